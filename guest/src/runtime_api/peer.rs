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

use crate::budget;

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

/// The head, or the trailers, that are being read.
#[derive(Default)]
struct Head {
    /// It is over: what comes is a body.
    over: bool,
    /// Read of it; of a body, since its last data.
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

    /// Data of a body is here: what is read next may be trailers, and is no part of that.
    pub(super) fn note_data(&self) {
        self.begin_request();
    }

    /// The request has its answer: what comes is the head of another.
    pub(super) fn end_request(&self) {
        *self.head() = Head::default();
    }

    /// Whether it may have so many more bytes.
    fn admits(&self, bytes: usize) -> bool {
        let mut head = self.head();
        head.bytes += bytes;
        // Of a body there may be a step of data that nobody has been given yet.
        let small = if head.over { SMALL_HEAD + STEP } else { SMALL_HEAD };
        if head.bytes > small && head.place.is_none() {
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
            // Asked where there is something to read only: else a turn that was long without reading would be followed by
            // another at once, for ever.
            if budget::turn_is_over() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
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
            if budget::turn_is_over() {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
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

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::time::{Duration, Instant};

    use tokio::io::{AsyncWriteExt as _, ReadBuf};
    use tokio::net::{TcpListener, TcpStream};

    use super::*;
    use crate::budget::{Budget, turn_is_over};

    #[tokio::test]
    async fn a_long_turn_is_followed_by_another_only_where_there_is_something_to_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut other = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = PeerStream(Peer::new(stream, Arc::new(Semaphore::new(1))));
        let (mut polls, mut bytes) = (0, [0; 8]);
        let reading = Budget::default().paced(poll_fn(|cx| {
            polls += 1;
            // As hyper does, which may take long between.
            let first = Pin::new(&mut stream).poll_read(cx, &mut ReadBuf::new(&mut bytes));
            assert!(first.is_pending());
            let begun = Instant::now();
            while !turn_is_over() {
                assert!(begun.elapsed() < Duration::from_secs(10));
            }
            Pin::new(&mut stream).poll_read(cx, &mut ReadBuf::new(&mut bytes))
        }));
        let still = tokio::time::timeout(Duration::from_millis(50), reading);
        assert!(still.await.is_err());
        assert!(polls <= 2, "{polls}");
        // What is there is read in the next.
        other.write_all(b"x").await.unwrap();
        let mut turns = 0;
        let read = Budget::default().paced(poll_fn(|cx| {
            turns += 1;
            let mut buffer = ReadBuf::new(&mut bytes);
            Pin::new(&mut stream)
                .poll_read(cx, &mut buffer)
                .map_ok(|()| buffer.filled().len())
        }));
        assert_eq!(read.await.unwrap(), 1);
        assert!(turns <= 2, "{turns}");
    }
}
