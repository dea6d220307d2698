//! A connection of the runtime, which tells how the runtime left it.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// What a request's head may have before it needs one of the places for large ones, in bytes.
const SMALL_HEAD: usize = 64 << 10;

/// What is read at a time, in bytes: hyper makes room for twice as much as came, and keeps it.
const STEP: usize = 64 << 10;

/// A connection, for whoever wants to know of its end.
pub(super) struct Peer {
    stream: TcpStream,
    reset: AtomicBool,
    head: Mutex<Head>,
    /// Of all connections: the requests whose heads may be large at a time.
    large_heads: Arc<Semaphore>,
}

/// The head that is being read.
#[derive(Default)]
struct Head {
    /// None is: what comes is a body.
    over: bool,
    bytes: usize,
    place: Option<OwnedSemaphorePermit>,
}

/// The same for the server, which reads and writes.
pub(super) struct PeerStream(pub(super) Arc<Peer>);

// === impl Peer ===

impl Peer {
    pub(super) fn new(stream: TcpStream, large_heads: Arc<Semaphore>) -> Arc<Self> {
        acknowledge_at_once(&stream);
        Arc::new(Self {
            stream,
            reset: AtomicBool::new(false),
            head: Mutex::default(),
            large_heads,
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

    /// Whether the other side sends no more. It may still read.
    pub(super) fn has_ended(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.stream.as_raw_fd(), &mut [0], flags) {
            Ok(length) => length == 0,
            Err(errno) => {
                let error = io::Error::from(errno);
                self.note(&error);
                error.kind() != io::ErrorKind::WouldBlock
            }
        }
    }

    /// The head of a request is here.
    pub(super) fn begin_request(&self) {
        *self.head() = Head {
            over: true,
            ..Head::default()
        };
    }

    /// The request has its answer: what comes is the head of another.
    pub(super) fn end_request(&self) {
        *self.head() = Head::default();
    }

    /// Whether it may have so many more bytes.
    fn admits(&self, bytes: usize) -> bool {
        let mut head = self.head();
        if head.over {
            return true;
        }
        head.bytes += bytes;
        if head.bytes > SMALL_HEAD && head.place.is_none() {
            head.place = Arc::clone(&self.large_heads).try_acquire_owned().ok();
            return head.place.is_some();
        }
        true
    }

    fn head(&self) -> MutexGuard<'_, Head> {
        self.head.lock().unwrap_or_else(PoisonError::into_inner)
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

/// A client may hold back a piece of its request until the one before is acknowledged (RFC 9293, 3.7.4), which the kernel
/// does up to 40 ms late. It forgets that it shall not (tcp(7), `TCP_QUICKACK`).
fn acknowledge_at_once(stream: &TcpStream) {
    // Without it is slower.
    let _ = stream.set_quickack(true);
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

// === impl PeerStream ===

impl AsyncRead for PeerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let peer = &self.0;
        loop {
            ready!(peer.stream.poll_read_ready(cx))?;
            let step = buf.remaining().min(STEP);
            if let Some(read) = peer.done(peer.stream.try_read(buf.initialize_unfilled_to(step))) {
                let length = read?;
                if !peer.admits(length) {
                    return Poll::Ready(Err(io::Error::other("there are large heads enough")));
                }
                acknowledge_at_once(&peer.stream);
                buf.advance(length);
                return Poll::Ready(Ok(()));
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
