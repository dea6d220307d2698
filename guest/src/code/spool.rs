//! A zip as it comes in.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::{CodeError, Incoming, io};

/// A complete zip of the right digest in a file, which goes when this does.
#[derive(Debug)]
pub(super) struct Spool {
    path: PathBuf,
}

// === impl Spool ===

impl Spool {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Writes what comes into a file in `folder` and checks size and digest.
pub(super) fn receive(folder: &Path, mut incoming: Incoming) -> Result<Spool, CodeError> {
    let path = folder.join(format!("{}.zip", incoming.sha256));
    let mut file = File::create(&path).map_err(io("make a file for the zip"))?;
    let spool = Spool { path };
    let mut digest = Sha256::new();
    let mut length = 0_u64;
    while let Some(chunk) = incoming.chunks.blocking_recv() {
        length += chunk.len() as u64;
        if length > incoming.size_bytes {
            break;
        }
        digest.update(&chunk);
        file.write_all(&chunk).map_err(io("write the zip"))?;
    }
    if length != incoming.size_bytes {
        return Err(CodeError::Length {
            announced: incoming.size_bytes,
            actual: length,
        });
    }
    let actual: String = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    if actual != incoming.sha256 {
        return Err(CodeError::Digest { actual });
    }
    Ok(spool)
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::super::CodeStore;
    use super::*;

    /// Of `hello`.
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn spool(size: u64, sha256: &str, chunks: &[&'static [u8]]) -> Result<Vec<u8>, CodeError> {
        let folder = tempfile::tempdir().unwrap();
        let (sender, incoming) = CodeStore::channel(sha256.to_owned(), size)?;
        for chunk in chunks {
            sender.blocking_send(Bytes::from_static(chunk)).unwrap();
        }
        drop(sender);
        let received = receive(folder.path(), incoming).map(|spool| std::fs::read(spool.path()).unwrap());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        received
    }

    #[test]
    fn takes_what_was_announced_and_nothing_else() {
        assert_eq!(spool(5, HELLO, &[b"he", b"", b"llo"]).unwrap(), b"hello");
        assert!(matches!(
            spool(5, HELLO, &[b"hell"]),
            Err(CodeError::Length { actual: 4, .. })
        ));
        assert!(matches!(
            spool(5, HELLO, &[b"hello", b"!"]),
            Err(CodeError::Length { actual: 6, .. })
        ));
        assert!(matches!(spool(5, HELLO, &[b"jello"]), Err(CodeError::Digest { .. })));
        assert!(matches!(spool(u64::MAX, HELLO, &[]), Err(CodeError::Size(_))));
        assert!(matches!(spool(5, "../../etc/passwd", &[]), Err(CodeError::Name)));
        assert!(matches!(spool(5, &HELLO.to_uppercase(), &[]), Err(CodeError::Name)));
    }
}
