//! Connections are read in turn, so that who asks thousands of things at once waits in its own socket, and not everyone else
//! behind it.
//!
//! All connections of an agent share as many turns as it has threads. Who has one reads once, and the turn goes on when the
//! requests of that read are decided. Who has read little since all others that wanted to had a turn is given the next one;
//! the others line up behind it (deficit round robin with sparse flows first, as in RFC 8290).

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;
use tonic::transport::server::Connected;

/// The bytes that a connection may read before it lines up.
const CREDIT: usize = 512;

/// The least and the most bytes that are read at once: few where requests come, since one may be as small as a hundred.
const LEAST: usize = 256;
const MOST: usize = 64 << 10;

/// The turns of all connections; clones share them.
#[derive(Clone, Debug)]
pub struct Turns(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    turns: Arc<Semaphore>,
    /// Who lines up needs a permit of this one before it asks for a turn: so the others wait behind few.
    line: Arc<Semaphore>,
    /// How many turns were ever asked for, and how many of those are over or given up.
    asked: AtomicU64,
    given: AtomicU64,
}

/// What a connection and its requests know of each other; clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<Reads>);

#[derive(Debug, Default)]
struct Reads {
    /// Whose process is at the other end, where that is known.
    user: Option<u32>,
    /// A request came since the last read.
    came: AtomicBool,
    /// Of the last read, while it lasts.
    turn: Mutex<Weak<Turn>>,
}

/// A turn; over where it is dropped.
#[derive(Debug)]
struct Turn {
    _turn: Option<OwnedSemaphorePermit>,
    _line: Option<OwnedSemaphorePermit>,
}

/// A request that is neither placed, nor waits, nor has been answered: the turn in which it was read goes on.
#[derive(Debug)]
pub struct Undecided {
    _turn: Option<Arc<Turn>>,
}

/// A stream that tells when there is something to read, and who is at its other end.
pub trait Readable {
    /// The user id of the process there, where the kernel vouches for it.
    fn user(&self) -> Option<u32>;

    /// Ready where there may be something to read, or the stream has ended.
    ///
    /// # Errors
    ///
    /// Where the stream is broken.
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>>;
}

/// A stream that is read in turn with others.
#[derive(Debug)]
pub struct Paced<S> {
    stream: S,
    turns: Turns,
    wait: Wait,
    pace: Pace,
    /// The bytes that it may read before it lines up.
    credit: usize,
    /// The turns that had been asked for when it had its last one: with all of them given its credit is whole again.
    seen: u64,
    /// The bytes of the last read where there is more; else none.
    full: usize,
}

/// How far a stream is on its way to a turn.
#[derive(Debug)]
struct Wait {
    waits: bool,
    lines_up: bool,
    line: PollSemaphore,
    in_line: Option<OwnedSemaphorePermit>,
    turn: PollSemaphore,
}

// === impl Turns ===

impl Turns {
    /// So many turns at a time, at least one.
    #[must_use]
    pub fn new(at_a_time: usize) -> Self {
        let at_a_time = at_a_time.clamp(1, Semaphore::MAX_PERMITS);
        Self(Arc::new(Shared {
            turns: Arc::new(Semaphore::new(at_a_time)),
            line: Arc::new(Semaphore::new(at_a_time)),
            asked: AtomicU64::new(0),
            given: AtomicU64::new(0),
        }))
    }

    fn wait(&self) -> Wait {
        Wait {
            waits: false,
            lines_up: false,
            line: PollSemaphore::new(self.0.line.clone()),
            in_line: None,
            turn: PollSemaphore::new(self.0.turns.clone()),
        }
    }
}

// === impl Pace ===

impl Pace {
    /// A request has come; it counts until it is decided, and what this returns dropped.
    #[must_use]
    pub fn begin(&self) -> Undecided {
        self.0.came.store(true, Ordering::Relaxed);
        Undecided {
            _turn: self.turn().upgrade(),
        }
    }

    /// The user id of who calls, where the kernel vouches for it: over a Unix socket alone.
    #[must_use]
    pub fn user(&self) -> Option<u32> {
        self.0.user
    }

    fn turn(&self) -> MutexGuard<'_, Weak<Turn>> {
        self.0.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Paced ===

impl<S: Readable> Paced<S> {
    /// A stream of which nothing has been read.
    pub fn new(stream: S, turns: Turns) -> Self {
        let reads = Reads {
            user: stream.user(),
            ..Reads::default()
        };
        Self {
            stream,
            wait: turns.wait(),
            turns,
            pace: Pace(Arc::new(reads)),
            credit: CREDIT,
            seen: 0,
            full: 0,
        }
    }
}

impl<S> Paced<S> {
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<Turn> {
        let shared = &self.turns.0;
        let wait = &mut self.wait;
        if !wait.waits {
            wait.waits = true;
            if shared.given.load(Ordering::Relaxed) >= self.seen {
                self.credit = CREDIT;
            }
            wait.lines_up = self.credit == 0;
            shared.asked.fetch_add(1, Ordering::Relaxed);
        }
        if wait.lines_up && wait.in_line.is_none() {
            wait.in_line = ready!(wait.line.poll_acquire(cx));
        }
        let turn = Turn {
            _turn: ready!(wait.turn.poll_acquire(cx)),
            _line: wait.in_line.take(),
        };
        wait.waits = false;
        shared.given.fetch_add(1, Ordering::Relaxed);
        self.seen = shared.asked.load(Ordering::Relaxed);
        Poll::Ready(turn)
    }

    /// Neither waits for a turn nor keeps one from others.
    fn give_up(&mut self) {
        if self.wait.waits {
            self.wait = self.turns.wait();
            self.turns.0.given.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Who can't be written to is not read on, and may not be polled for reading at all.
    fn written<T>(&mut self, polled: Poll<T>) -> Poll<T> {
        if polled.is_pending() {
            self.give_up();
        }
        polled
    }
}

impl<S> Drop for Paced<S> {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl<S> Connected for Paced<S> {
    type ConnectInfo = Pace;

    fn connect_info(&self) -> Pace {
        self.pace.clone()
    }
}

impl<S: AsyncRead + Readable + Unpin> AsyncRead for Paced<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(this.stream.poll_readable(cx))?;
        let turn = ready!(this.poll_turn(cx));
        // A large message is read in ever larger pieces.
        let came = this.pace.0.came.swap(false, Ordering::Relaxed);
        let piece = if came {
            LEAST
        } else {
            (this.full * 2).clamp(LEAST, MOST)
        };
        let room = piece.max(this.credit).min(buf.remaining());
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(room));
        ready!(Pin::new(&mut this.stream).poll_read(cx, &mut part))?;
        let read = part.filled().len();
        buf.advance(read);
        this.credit = this.credit.saturating_sub(read);
        this.full = if read == room { read } else { 0 };
        if read > 0 {
            let turn = Arc::new(turn);
            *this.pace.turn() = Arc::downgrade(&turn);
            tokio::spawn(async move {
                // Its requests' tasks are about to be spawned: they begin before it is over.
                next_round().await;
                drop(turn);
            });
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.written(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.give_up();
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

// === impl Readable ===

impl Readable for UnixStream {
    /// As it was when it connected (SO_PEERCRED, unix(7)).
    fn user(&self) -> Option<u32> {
        self.peer_cred().ok().map(|peer| peer.uid())
    }

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(cx)
    }
}

impl Readable for TcpStream {
    fn user(&self) -> Option<u32> {
        None
    }

    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(cx)
    }
}

/// Once all tasks that are ready now have run. (`yield_now` waits for the driver too.)
async fn next_round() {
    let mut woken = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut woken, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::task::{Wake, Waker};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    fn pair(turns: &Turns) -> (UnixStream, Paced<UnixStream>) {
        let (client, server) = UnixStream::pair().unwrap();
        (client, Paced::new(server, turns.clone()))
    }

    /// Reads all that one turn gives.
    async fn read(server: &mut Paced<UnixStream>) -> usize {
        let mut buffer = vec![0; 2 * MOST];
        server.read(&mut buffer).await.unwrap()
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Polls a read once: how much it gave.
    fn poll(server: &mut Paced<UnixStream>, waker: &Waker) -> Option<usize> {
        let mut buffer = vec![0; 2 * MOST];
        let mut buffer = ReadBuf::new(&mut buffer);
        match Pin::new(server).poll_read(&mut Context::from_waker(waker), &mut buffer) {
            Poll::Ready(read) => {
                read.unwrap();
                Some(buffer.filled().len())
            }
            Poll::Pending => None,
        }
    }

    /// Until what was written can be read.
    async fn readable(server: &Paced<UnixStream>) {
        server.stream.readable().await.unwrap();
    }

    /// Until the turns that no request keeps are over.
    async fn all_over(turns: &Turns) {
        drop(turns.0.turns.acquire().await.unwrap());
    }

    #[tokio::test]
    async fn a_turn_lasts_until_its_requests_are_decided() {
        let turns = Turns::new(1);
        let (mut client, mut server) = pair(&turns);
        let (mut other, mut second) = pair(&turns);
        client.write_all(&[1; 100]).await.unwrap();
        other.write_all(&[1; 100]).await.unwrap();
        assert_eq!(read(&mut server).await, 100);
        let (first, last) = (server.connect_info().begin(), server.connect_info().begin());
        readable(&second).await;
        let woken = Arc::new(Woken::default());
        let waker = woken.clone().into();
        assert_eq!(poll(&mut second, &waker), None);
        drop(first);
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        assert_eq!(woken.0.load(Ordering::Relaxed), 0);
        drop(last);
        assert_eq!(woken.0.load(Ordering::Relaxed), 1);
        assert_eq!(poll(&mut second, &waker), Some(100));
    }

    #[tokio::test]
    async fn the_kernel_says_who_calls_over_a_unix_socket_alone() {
        let turns = Turns::new(1);
        let (_client, server) = pair(&turns);
        let own = nix::unistd::geteuid().as_raw();
        assert_eq!(server.connect_info().user(), Some(own));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
        client.unwrap();
        let server = Paced::new(accepted.unwrap().0, turns);
        assert_eq!(server.connect_info().user(), None);
    }

    #[tokio::test]
    async fn whoever_ends_or_is_not_written_to_gives_its_turn_up() {
        let turns = Turns::new(1);
        let mut waiting = Vec::new();
        let (mut client, mut server) = pair(&turns);
        client.write_all(&[1; 100]).await.unwrap();
        assert_eq!(read(&mut server).await, 100);
        let undecided = server.connect_info().begin();
        drop(server);
        let woken = Arc::new(Woken::default());
        for _ in 0..3 {
            let (mut client, mut server) = pair(&turns);
            client.write_all(&[1; 100]).await.unwrap();
            readable(&server).await;
            assert_eq!(poll(&mut server, &woken.clone().into()), None);
            waiting.push((client, server));
        }
        // The first has its turn given to it as it ends, the second can't be written to.
        drop(undecided);
        woken_times(&woken, 1).await;
        drop(waiting.remove(0));
        woken_times(&woken, 2).await;
        let (_, stuck) = &mut waiting[0];
        let mut context = Context::from_waker(Waker::noop());
        while Pin::new(&mut *stuck).poll_write(&mut context, &[0; 4096]).is_ready() {}
        woken_times(&woken, 3).await;
        let (_, last) = &mut waiting[1];
        assert_eq!(read(last).await, 100);
        let shared = &turns.0;
        // The stuck one asks again once it is read.
        assert_eq!(
            shared.asked.load(Ordering::Relaxed),
            shared.given.load(Ordering::Relaxed)
        );
    }

    /// Until that many reads were woken.
    async fn woken_times(woken: &Woken, times: usize) {
        while woken.0.load(Ordering::Relaxed) < times {
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn who_reads_little_goes_before_those_that_line_up() {
        let turns = Turns::new(1);
        let mut loud: Vec<_> = (0..5).map(|_| pair(&turns)).collect();
        for (client, server) in &mut loud {
            client.write_all(&[1; 4 * CREDIT]).await.unwrap();
            assert_eq!(read(server).await, CREDIT);
            drop(server.connect_info().begin());
        }
        all_over(&turns).await;
        let keeper = turns.0.turns.clone().acquire_owned().await.unwrap();
        let woken = Arc::new(Woken::default());
        let waker: Waker = woken.clone().into();
        // Those have read much, and the others have not all had a turn since.
        for (_, server) in &mut loud {
            server.credit = 0;
            server.seen = u64::MAX;
            assert_eq!(poll(server, &waker), None);
        }
        let (mut client, mut quiet) = pair(&turns);
        client.write_all(&[1; 100]).await.unwrap();
        readable(&quiet).await;
        assert_eq!(poll(&mut quiet, &waker), None);
        drop(keeper);
        // One was in line before it.
        let mut order = Vec::new();
        while order.len() < 2 {
            if poll(&mut quiet, &waker).is_some() {
                order.push("quiet");
            }
            for (_, server) in &mut loud {
                if let Some(read) = poll(server, &waker) {
                    assert_eq!(read, LEAST);
                    drop(server.connect_info().begin());
                    order.push("loud");
                }
            }
            tokio::task::yield_now().await;
        }
        assert_eq!(order, ["loud", "quiet"]);
    }

    #[tokio::test]
    async fn where_requests_come_little_is_read_at_once_and_more_of_a_large_one() {
        let turns = Turns::new(1);
        let (mut client, mut server) = pair(&turns);
        let sending = tokio::spawn(async move {
            client.write_all(&vec![1; 1 << 20]).await.unwrap();
            client
        });
        let mut all = 0;
        let mut largest = 0;
        while all < 1 << 20 {
            let one = read(&mut server).await;
            largest = largest.max(one);
            all += one;
        }
        assert_eq!(all, 1 << 20);
        assert!(largest > 4 * CREDIT, "{largest}");
        let mut client = sending.await.unwrap();
        drop(server.connect_info().begin());
        client.write_all(&vec![1; 8 * CREDIT]).await.unwrap();
        assert_eq!(read(&mut server).await, CREDIT);
    }
}
