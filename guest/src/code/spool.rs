//! A zip as it comes in.

use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use sha2::{Digest as _, Sha256};

use super::{CodeError, Incoming, io};

/// Writes what comes into a file on the file system of `folder` and checks size and digest. The file has no name, so it
/// is nobody else's, and gone when it is closed.
pub(super) fn receive(folder: &Path, mut incoming: Incoming) -> Result<File, CodeError> {
    let mut file = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .open(folder)
        .map_err(io("make a file for the zip"))?;
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
    file.rewind().map_err(io("read the zip"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use bytes::Bytes;

    use super::super::CodeStore;
    use super::*;

    /// Of `hello`.
    const HELLO: &str = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";

    fn spool(size: u64, sha256: &str, chunks: &[&'static [u8]]) -> Result<Vec<u8>, CodeError> {
        let folder = tempfile::tempdir().unwrap();
        let (sender, incoming) = CodeStore::channel(sha256.to_owned(), size, 0)?;
        for chunk in chunks {
            sender.blocking_send(Bytes::from_static(chunk)).unwrap();
        }
        drop(sender);
        let received = receive(folder.path(), incoming).map(|mut file| {
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        });
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
