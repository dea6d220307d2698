//! A connection of the runtime, which tells how the runtime left it.

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use nix::sys::socket::{MsgFlags, recv};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::budget::Socket;

/// What a request's head may have before it needs one of the places for large ones, in bytes.
const SMALL_HEAD: usize = 64 << 10;

/// A connection, for whoever wants to know of its end.
pub(super) struct Peer {
    socket: Socket,
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
    /// Of a connection that had a large one. It keeps it, as hyper keeps the memory.
    place: Option<OwnedSemaphorePermit>,
}

/// The same for the server, which reads and writes.
pub(super) struct PeerStream {
    peer: Arc<Peer>,
    socket: Socket,
}

// === impl Peer ===

impl Peer {
    /// Of a stream that does not block.
    pub(super) fn new(stream: TcpStream, large_heads: Arc<Semaphore>) -> Arc<Self> {
        acknowledge_at_once(&stream);
        Arc::new(Self {
            socket: Socket::new(stream),
            reset: AtomicBool::new(false),
            head: Mutex::default(),
            large_heads,
        })
    }

    pub(super) fn socket(&self) -> &Socket {
        &self.socket
    }

    /// Whether the other side closed it with something in it unread: the kernel then resets the connection instead of
    /// ending it (RFC 1122, 4.2.2.13), also where a process was killed.
    pub(super) fn was_reset(&self) -> bool {
        // An error that nobody has met yet waits in the socket.
        let waits = self.socket.get().take_error();
        if let Ok(Some(error)) | Err(error) = waits {
            self.note(&error);
        }
        self.reset.load(Ordering::Relaxed)
    }

    /// Whether the other side sends no more. It may still read.
    pub(super) fn has_ended(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        match recv(self.socket.get().as_raw_fd(), &mut [0], flags) {
            Ok(length) => length == 0,
            Err(errno) => {
                let error = io::Error::from(errno);
                self.note(&error);
                error.kind() != io::ErrorKind::WouldBlock
            }
        }
    }

    /// The head of a request is here. Whether it may be followed by another.
    pub(super) fn begin_request(&self) -> bool {
        let mut head = self.head();
        head.over = true;
        head.place.is_none()
    }

    /// The request has its answer: what comes is the head of another.
    pub(super) fn end_request(&self) {
        let mut head = self.head();
        head.over = false;
        head.bytes = 0;
    }

    /// The connection has ended, and its memory is free. Who wants to know of its end may still ask.
    pub(super) fn end(&self) {
        self.head().place = None;
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

    /// What came of a read or write.
    fn noted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.inspect_err(|error| self.note(error))
    }
}

/// A client may hold back a piece of its request until the one before is acknowledged (RFC 9293, 3.7.4), which the kernel
/// does up to 40 ms late. It forgets that it shall not (tcp(7), `TCP_QUICKACK`).
fn acknowledge_at_once(stream: &TcpStream) {
    // Without it is slower.
    let _ = SockRef::from(stream).set_tcp_quickack(true);
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get().as_fd()
    }
}

// === impl PeerStream ===

impl PeerStream {
    pub(super) fn new(peer: Arc<Peer>) -> Self {
        let socket = peer.socket.clone();
        Self { peer, socket }
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.socket).poll_read(cx, buf));
        self.peer.noted(read)?;
        if !self.peer.admits(buf.filled().len() - before) {
            return Poll::Ready(Err(io::Error::other("there are large heads enough")));
        }
        acknowledge_at_once(self.socket.get());
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.socket).poll_write_vectored(cx, bytes));
        Poll::Ready(self.peer.noted(written))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
