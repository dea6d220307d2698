//! A connection is read on only as fast as what it asks is decided, and little by little where many requests come: a client
//! that asks thousands of things at once waits in its own socket, and not everyone else behind it.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

/// How many requests of a connection may be undecided before nothing more is read from it.
const UNDECIDED: usize = 8;

/// The least and the most bytes that are read at once: few where requests come, since one may be as small as a hundred.
const LEAST: usize = 1 << 10;
const MOST: usize = 64 << 10;

/// What is known of a connection's requests; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<State>);

#[derive(Debug, Default)]
struct State {
    undecided: AtomicUsize,
    /// A request came since this was last asked.
    came: AtomicBool,
    /// Reads on.
    reader: Mutex<Option<Waker>>,
}

/// A request that is neither placed, nor waits, nor has been answered.
#[derive(Debug)]
pub struct Undecided(Pace);

/// A stream that is read at its [`Pace`].
#[derive(Debug)]
pub struct Paced<S> {
    stream: S,
    pace: Pace,
    /// How much is read next.
    limit: usize,
    /// The last read took all that it might: there is more.
    full: bool,
}

// === impl Pace ===

impl Pace {
    /// A request has come; it counts until it is decided, and what this returns dropped.
    #[must_use]
    pub fn begin(&self) -> Undecided {
        self.0.came.store(true, Ordering::Relaxed);
        self.0.undecided.fetch_add(1, Ordering::Relaxed);
        Undecided(self.clone())
    }

    /// Whether nothing more is to be read for now; who asks is woken when that is over.
    fn holds(&self, cx: &Context<'_>) -> bool {
        if self.0.undecided.load(Ordering::Acquire) < UNDECIDED {
            return false;
        }
        *self.reader() = Some(cx.waker().clone());
        // It may have been over before the waker was there to be seen.
        self.0.undecided.load(Ordering::Acquire) >= UNDECIDED
    }

    fn reader(&self) -> std::sync::MutexGuard<'_, Option<Waker>> {
        self.0.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Undecided ===

impl Drop for Undecided {
    fn drop(&mut self) {
        let before = self.0.0.undecided.fetch_sub(1, Ordering::AcqRel);
        if before <= UNDECIDED
            && let Some(reader) = self.0.reader().take()
        {
            reader.wake();
        }
    }
}

// === impl Paced ===

impl<S> Paced<S> {
    /// A stream of which nothing has been read.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            pace: Pace::default(),
            limit: MOST,
            full: false,
        }
    }
}

impl<S> Connected for Paced<S> {
    type ConnectInfo = Pace;

    fn connect_info(&self) -> Pace {
        self.pace.clone()
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.pace.holds(cx) {
            return Poll::Pending;
        }
        if std::mem::take(&mut self.full) {
            // What came goes first, and others' requests beside it.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let room = self.limit.min(buf.remaining());
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(room));
        ready!(Pin::new(&mut self.stream).poll_read(cx, &mut part))?;
        let read = part.filled().len();
        buf.advance(read);
        self.full = read > 0 && read == room;
        // A large message is read in ever larger pieces.
        self.limit = if self.pace.0.came.swap(false, Ordering::Relaxed) {
            LEAST
        } else {
            (self.limit * 2).min(MOST)
        };
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    /// Polls once.
    async fn is_ready(reading: &mut (impl Future + Unpin)) -> bool {
        std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut *reading).poll(cx).is_ready())).await
    }

    #[tokio::test]
    async fn a_connection_waits_for_its_undecided_requests() {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let mut server = Paced::new(server);
        let pace = server.connect_info();
        client.write_all(&[1; 100]).await.unwrap();
        let mut buffer = [0; 50];
        assert_eq!(server.read(&mut buffer).await.unwrap(), 50);
        let mut undecided: Vec<_> = (0..UNDECIDED).map(|_| pace.begin()).collect();
        let mut reading = Box::pin(server.read(&mut buffer));
        assert!(!is_ready(&mut reading).await);
        assert_eq!(pace.0.undecided.load(Ordering::Relaxed), UNDECIDED);
        undecided.pop();
        assert_eq!(reading.await.unwrap(), 50);
    }

    #[tokio::test]
    async fn where_requests_come_little_is_read_at_once_and_more_of_a_large_one() {
        let (mut client, server) = tokio::io::duplex(1 << 20);
        let mut server = Paced::new(server);
        client.write_all(&vec![1; 1 << 20]).await.unwrap();
        let mut buffer = vec![0; 1 << 20];
        assert_eq!(server.read(&mut buffer).await.unwrap(), MOST);
        drop(server.pace.begin());
        assert_eq!(server.read(&mut buffer).await.unwrap(), MOST);
        assert_eq!(server.read(&mut buffer).await.unwrap(), LEAST);
        assert_eq!(server.read(&mut buffer).await.unwrap(), 2 * LEAST);
        // It lets others go first where there is more.
        let mut reading = Box::pin(server.read(&mut buffer));
        assert!(!is_ready(&mut reading).await);
        assert_eq!(reading.await.unwrap(), 4 * LEAST);
    }
}
