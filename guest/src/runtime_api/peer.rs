//! A connection of the runtime, which tells how the runtime left it.

use std::io;
use std::os::fd::AsRawFd as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use nix::sys::socket::{Shutdown, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

/// A connection, for whoever wants to know of its end.
pub(super) struct Peer {
    stream: TcpStream,
    reset: AtomicBool,
}

/// The same for the server, which reads and writes.
pub(super) struct PeerStream(pub(super) Arc<Peer>);

// === impl Peer ===

impl Peer {
    pub(super) fn new(stream: TcpStream) -> Arc<Self> {
        Arc::new(Self {
            stream,
            reset: AtomicBool::new(false),
        })
    }

    /// Whether the other side closed it with something in it unread: the kernel then resets the connection instead of
    /// ending it (RFC 1122, 4.2.2.13), also where a process was killed.
    pub(super) fn was_reset(&self) -> bool {
        // An error that nobody has met yet waits in the socket.
        let waits = self.stream.take_error();
        if let Ok(Some(error)) | Err(error) = waits {
            self.note(&error);
        }
        self.reset.load(Ordering::Relaxed)
    }

    fn note(&self, error: &io::Error) {
        // A broken pipe: it had ended its own side before.
        if matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe) {
            self.reset.store(true, Ordering::Relaxed);
        }
    }

    /// What came of a read or write. None where it is to be tried again when the socket is ready.
    fn done<T>(&self, result: io::Result<T>) -> Option<io::Result<T>> {
        match result {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                self.note(&error);
                Some(Err(error))
            }
            Ok(done) => Some(Ok(done)),
        }
    }
}

// === impl PeerStream ===

impl AsyncRead for PeerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let peer = &self.0;
        loop {
            ready!(peer.stream.poll_read_ready(cx))?;
            if let Some(read) = peer.done(peer.stream.try_read(buf.initialize_unfilled())) {
                return Poll::Ready(read.map(|length| buf.advance(length)));
            }
        }
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let peer = &self.0;
        loop {
            ready!(peer.stream.poll_write_ready(cx))?;
            if let Some(written) = peer.done(peer.stream.try_write_vectored(bytes)) {
                return Poll::Ready(written);
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(self.0.stream.as_raw_fd(), Shutdown::Write).map_err(io::Error::from))
    }
}
