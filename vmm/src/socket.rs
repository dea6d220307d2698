//! Unix sockets that the VMM listens on.

use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Why a socket could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers on it.
    #[error("the socket {0} is in use by another process; give this machine a path of its own or stop that one")]
    InUse(PathBuf),
    /// It cannot be made.
    #[error("cannot listen on {path}: {source}; check that the folder exists and that this user may write it")]
    Bind {
        /// The path of the socket.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
}

/// A socket's file, which is removed when this is dropped.
#[derive(Debug)]
pub struct SocketFile(pub PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Listens on `path`, without blocking. A socket there on which nobody listens any more is replaced.
///
/// # Errors
/// Where somebody else listens on it, or it cannot be made.
pub fn listen(path: &Path) -> Result<UnixListener, ListenError> {
    let fail = |source| ListenError::Bind {
        path: path.to_owned(),
        source,
    };
    let listener = match UnixListener::bind(path) {
        // Connecting to a file that is no socket is refused as well, and it may be somebody's.
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_socket(path) => {
            match UnixStream::connect(path) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                _ => return Err(ListenError::InUse(path.to_owned())),
            }
            std::fs::remove_file(path).map_err(fail)?;
            UnixListener::bind(path)
        }
        other => other,
    }
    .map_err(fail)?;
    listener.set_nonblocking(true).map_err(fail)?;
    Ok(listener)
}

fn is_socket(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let first = listen(&path).unwrap();
        let error = listen(&path).unwrap_err();
        assert!(error.to_string().contains("in use"), "{error}");
        drop(first);
        let _second = listen(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("precious");
        std::fs::write(&path, "data").unwrap();
        assert!(listen(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
        let error = listen(&folder.path().join("no/such")).unwrap_err();
        assert!(error.to_string().contains("folder"), "{error}");
    }
}
