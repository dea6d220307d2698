//! What a container writes to. The kernel wakes this thread for every byte that comes, if it is asked to: that alone is work. So a
//! descriptor is watched only while what comes by it may be read.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

use super::turn_is_over;

/// The most that is read at a time, in bytes.
const STEP: usize = 64 << 10;

/// What a task waits for.
pub(crate) trait Wakes {
    /// Nothing of it is to wake anybody until the task is polled again.
    fn silence(&self);
}

/// A descriptor that does not block.
#[derive(Debug)]
pub(crate) struct Source<T: AsRawFd> {
    io: Arc<T>,
    /// None: it is not watched.
    watched: Mutex<Option<AsyncFd<Arc<T>>>>,
}

/// A connection, for one that reads and writes. Its clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Socket(Arc<Source<TcpStream>>);

// === impl Source ===

impl<T: AsRawFd> Source<T> {
    pub(crate) fn new(io: T) -> Self {
        Self {
            io: Arc::new(io),
            watched: Mutex::default(),
        }
    }

    pub(crate) fn get(&self) -> &T {
        &self.io
    }

    /// Reads something as soon as there is something to be read. For one task.
    pub(crate) async fn read<R>(&self, mut read: impl FnMut(&T) -> io::Result<R>) -> io::Result<R> {
        std::future::poll_fn(|cx| self.poll(cx, Interest::READABLE, &mut read)).await
    }

    /// Does something as soon as it would not block.
    fn poll<R>(
        &self,
        cx: &mut Context<'_>,
        interest: Interest,
        mut operation: impl FnMut(&T) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        let mut place = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let watched = match &mut *place {
            Some(watched) => watched,
            None => {
                // SAFETY: the descriptor is open as long as what has it, and nobody closes that while it is in an `Arc`.
                let watched = unsafe { AsyncFd::register(Arc::clone(&self.io)) };
                place.insert(watched?)
            }
        };
        loop {
            let mut ready = if interest.is_readable() {
                ready!(watched.poll_read_ready(cx))?
            } else {
                ready!(watched.poll_write_ready(cx))?
            };
            if let Ok(done) = ready.try_io(|watched| operation(watched.get_ref())) {
                return Poll::Ready(done);
            }
        }
    }
}

impl<T: AsRawFd> Wakes for Source<T> {
    fn silence(&self) {
        *self.watched.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl<W: Wakes> Wakes for Arc<W> {
    fn silence(&self) {
        (**self).silence();
    }
}

/// For tasks that wait for what this process does itself.
impl Wakes for () {
    fn silence(&self) {}
}

// === impl Socket ===

impl Socket {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self(Arc::new(Source::new(stream)))
    }

    pub(crate) fn get(&self) -> &TcpStream {
        self.0.get()
    }
}

impl Wakes for Socket {
    fn silence(&self) {
        self.0.silence();
    }
}

/// Where the turn is over the task is polled again once others have had theirs.
fn in_turn(cx: &Context<'_>) -> Poll<()> {
    if turn_is_over() {
        cx.waker().wake_by_ref();
        return Poll::Pending;
    }
    Poll::Ready(())
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(in_turn(cx));
        let step = buf.remaining().min(STEP);
        let to = buf.initialize_unfilled_to(step);
        let length = ready!(
            self.0
                .poll(cx, Interest::READABLE, |mut stream| io::Read::read(&mut stream, to))
        )?;
        buf.advance(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        ready!(in_turn(cx));
        self.0.poll(cx, Interest::WRITABLE, |mut stream| {
            io::Write::write_vectored(&mut stream, bytes)
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.get().shutdown(std::net::Shutdown::Write))
    }
}
