//! Connections to what listens in the container.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use stoker_proto::limits::FORWARDED_PORTS;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::OwnedSemaphorePermit;

use super::{NotRunning, Workload};
use crate::blocking;
use crate::budget::Budget;

/// How long what listens may take to accept a connection: it does not where as many wait already as it lets.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PortError {
    #[error(transparent)]
    NotRunning(#[from] NotRunning),
    #[error("there are {FORWARDED_PORTS} connections, as many as may be")]
    TooMany,
    #[error("cannot make a socket in the container: {0}")]
    Socket(#[source] io::Error),
    #[error("nobody listens on port {0} of the container")]
    Refused(u16),
    #[error("nobody accepts a connection on port {port} of the container: {source}")]
    Connect { port: u16, source: io::Error },
}

/// A connection.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) budget: Budget,
    pub(crate) _place: OwnedSemaphorePermit,
}

// === impl Workload ===

impl Workload {
    /// Connects to a TCP port on the container's loopback.
    pub(crate) async fn connect(&self, port: u16) -> Result<Connection, PortError> {
        let running = self.running()?;
        let place = Arc::clone(&running.ports)
            .try_acquire_owned()
            .map_err(|_| PortError::TooMany)?;
        let container = running.pidfd.try_clone().map_err(PortError::Socket)?;
        let made = blocking::on_a_thread("port", move || socket_in(&container)).await;
        let made = match made.flatten() {
            Ok(made) => made,
            // Where the container ended meanwhile, that is why.
            Err(error) => {
                let ended = self.running().err();
                return Err(ended.map_or(PortError::Socket(error), PortError::NotRunning));
            }
        };
        let socket = TcpSocket::from_std_stream(std::net::TcpStream::from(made));
        let connecting = socket.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
        let stream = match tokio::time::timeout(TIMEOUT, connecting).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Err(PortError::Refused(port)),
            Ok(Err(source)) => return Err(PortError::Connect { port, source }),
            Err(late) => {
                let source = late.into();
                return Err(PortError::Connect { port, source });
            }
        };
        // What is sent is passed on as it comes.
        stream.set_nodelay(true).map_err(PortError::Socket)?;
        Ok(Connection {
            stream,
            budget: running.subject.budget().clone(),
            _place: place,
        })
    }
}

/// A socket in the network namespace of this process's. The thread stays there, and is to end.
fn socket_in(container: &OwnedFd) -> io::Result<OwnedFd> {
    setns(container, CloneFlags::CLONE_NEWNET)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Inet, SockType::Stream, flags, None)?)
}
