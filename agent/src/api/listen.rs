//! Where the agent listens: a Unix socket for its owner and group, and TCP on loopback where configured.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_stream::{Stream, StreamExt as _};

use crate::{config, files};

/// How long nothing is accepted after the kernel could not: without descriptors or memory, to ask again at once would only take
/// a CPU from those that could free some.
const PAUSE: Duration = Duration::from_millis(100);

/// Listening sockets.
#[derive(Debug)]
pub struct Listeners {
    /// On the Unix socket.
    pub unix: UnixListener,
    /// On TCP, where configured.
    pub tcp: Option<TcpListener>,
    /// Removes the socket's file when dropped.
    pub socket: SocketFile,
}

/// A socket's path; the file is removed with it.
#[derive(Debug)]
pub struct SocketFile(PathBuf);

/// Why the agent can't listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Somebody answers there.
    #[error("stokerd is already running: another process listens on {}", path.display())]
    Running {
        /// The socket.
        path: PathBuf,
    },
    /// Something else lies there.
    #[error("{} is there and is not a socket; remove it or set api.socket to another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket or its folder could not be made.
    #[error("can't listen on the Unix socket {}: {source}", path.display())]
    Unix {
        /// The socket.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// The port is in use, or the address is not this host's.
    #[error("can't listen on {address}: {source}; end what uses it or change {key}")]
    Tcp {
        /// The key of the configuration that names it.
        key: &'static str,
        /// The address.
        address: SocketAddr,
        /// The underlying error.
        source: io::Error,
    },
}

// === impl Listeners ===

impl Listeners {
    /// Listens where configured. A socket that a dead agent left is taken over.
    ///
    /// # Errors
    ///
    /// [`ListenError`].
    pub async fn bind(config: &config::Api) -> Result<Self, ListenError> {
        let tcp = match config.tcp {
            None => None,
            Some(address) => Some(tcp(address, "api.tcp").await?),
        };
        let (unix, socket) = unix(&config.socket).await?;
        Ok(Self { unix, tcp, socket })
    }
}

/// Listens on an address that this key of the configuration names.
///
/// # Errors
///
/// [`ListenError`].
pub async fn tcp(address: SocketAddr, key: &'static str) -> Result<TcpListener, ListenError> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|source| ListenError::Tcp { key, address, source })
}

/// Listens on a Unix socket with mode 0660; its folder is made with mode 0750 where it is missing.
///
/// # Errors
///
/// [`ListenError`].
pub async fn unix(path: &Path) -> Result<(UnixListener, SocketFile), ListenError> {
    let failed = |source| ListenError::Unix {
        path: path.to_owned(),
        source,
    };
    if let Some(folder) = path.parent() {
        files::make_private_dir(folder).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket { path: path.to_owned() });
        }
        // A full backlog or a lack of permission is not a dead agent's socket.
        Ok(_) => match UnixStream::connect(path).await {
            Ok(_) => {
                return Err(ListenError::Running { path: path.to_owned() });
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => {}
            Err(error) => return Err(failed(error)),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    // Made under another name and renamed, so that nobody finds it before it has its mode, and a stale one is replaced
    // in one step.
    let making = files::with_suffix(path, ".new");
    files::remove(&making).map_err(failed)?;
    let listener = UnixListener::bind(&making).map_err(failed)?;
    std::fs::set_permissions(&making, std::fs::Permissions::from_mode(0o660)).map_err(failed)?;
    std::fs::rename(&making, path).map_err(failed)?;
    Ok((listener, SocketFile(path.to_owned())))
}

/// What is accepted; after each failure nothing for [`PAUSE`].
pub fn unhurried<S>(incoming: impl Stream<Item = io::Result<S>>) -> impl Stream<Item = io::Result<S>> {
    let mut failing = false;
    incoming.then(move |accepted| {
        let failed_before = std::mem::replace(&mut failing, accepted.is_err());
        async move {
            if let Err(error) = &accepted {
                if !failed_before {
                    tracing::warn!(%error, "can't accept connections; those that come wait until it can");
                }
                tokio::time::sleep(PAUSE).await;
            }
            accepted
        }
    })
}

// === impl SocketFile ===

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Where it is gone already there is nothing to do.
        let _ = std::fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn owner_and_group_only_and_one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/stoker/s.sock");
        let (listener, file) = unix(&path).await.unwrap();
        let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o660);
        assert_eq!(mode(path.parent().unwrap()), 0o750);
        let error = unix(&path).await.unwrap_err().to_string();
        assert!(error.contains("already running"), "{error}");
        drop(listener);
        // The file is still there, nobody answers: a dead agent's.
        let (listener, other) = unix(&path).await.unwrap();
        std::mem::forget(file);
        UnixStream::connect(&path).await.unwrap();
        drop((listener, other));
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn where_nothing_can_be_accepted_it_is_asked_again_later() {
        let without_descriptors = || io::Error::from_raw_os_error(nix::libc::EMFILE);
        let failures = tokio_stream::iter((0..3).map(|_| Err(without_descriptors())));
        let mut accepted = std::pin::pin!(unhurried(failures.chain(tokio_stream::once(Ok(7)))));
        let begun = Instant::now();
        for _ in 0..3 {
            assert!(accepted.next().await.unwrap().is_err());
        }
        assert!(begun.elapsed() >= 3 * PAUSE);
        assert_eq!(accepted.next().await.unwrap().unwrap(), 7);
    }

    #[tokio::test]
    async fn other_files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(unix(&path).await, Err(ListenError::NotASocket { .. })));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let config = config::Api {
            socket: dir.path().join("s.sock"),
            tcp: taken.local_addr().ok(),
            ..config::Api::default()
        };
        let error = Listeners::bind(&config).await.unwrap_err().to_string();
        assert!(error.contains(&taken.local_addr().unwrap().to_string()), "{error}");
        assert!(error.contains("change api.tcp"), "{error}");
        assert!(!config.socket.exists());
    }
}
