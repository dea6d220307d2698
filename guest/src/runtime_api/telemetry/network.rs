//! Connections to programs inside a container: a socket belongs to the network namespace in which it was made.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;

/// `SIOCGSKNS` (linux/sockios.h): the network namespace of a socket.
const SIOCGSKNS: libc::Ioctl = 0x894c;
/// Of the thread that makes a socket, in bytes.
const STACK_BYTES: usize = 128 << 10;

/// The network namespace of a container, or that of this process. Clones are the same.
#[derive(Clone, Debug)]
pub(super) struct Network(Option<Arc<OwnedFd>>);

// === impl Network ===

impl Network {
    /// That in which a connection was accepted.
    pub(super) fn of(connection: impl AsFd) -> io::Result<Self> {
        if cfg!(test) {
            // Without privileges one may not ask, and all are in one namespace.
            return Ok(Self(None));
        }
        // SAFETY: no memory goes in; a descriptor or an error comes out.
        let namespace = Errno::result(unsafe { libc::ioctl(connection.as_fd().as_raw_fd(), SIOCGSKNS) })?;
        // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
        let namespace = unsafe { OwnedFd::from_raw_fd(namespace) };
        Ok(Self(Some(Arc::new(namespace))))
    }

    /// Connects to a port of its loopback address.
    pub(super) async fn connect(&self, port: u16) -> io::Result<TcpStream> {
        let socket = match &self.0 {
            None => TcpSocket::new_v4()?,
            Some(namespace) => socket_in(Arc::clone(namespace)).await?,
        };
        let stream = socket.connect((Ipv4Addr::LOCALHOST, port).into()).await?;
        stream.set_nodelay(true)?;
        Ok(stream)
    }
}

/// A thread of its own enters the namespace: where it failed to leave it again, no other thread would be in the wrong one.
async fn socket_in(namespace: Arc<OwnedFd>) -> io::Result<TcpSocket> {
    let (sender, socket) = oneshot::channel();
    std::thread::Builder::new()
        .name("network".to_owned())
        .stack_size(STACK_BYTES)
        .spawn(move || {
            let entered = setns(&*namespace, CloneFlags::CLONE_NEWNET);
            // Nobody may want it any more.
            let _ = sender.send(entered.map_err(io::Error::from).and_then(|()| TcpSocket::new_v4()));
        })?;
    socket.await.map_err(io::Error::other)?
}
