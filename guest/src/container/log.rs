//! Standard output and error of a container, by one pipe so that their order is kept, and what its external extensions write,
//! by another.
//!
//! Of what was written since the last [`Log::take`] the beginning and the end are kept ([`Excerpt`]), all of it goes to a
//! [`Feed`] as lines, and both are bounded: a function that writes without end is slowed down, and does not fill memory.

use std::io::{ErrorKind, PipeReader, Read as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use stoker_proto::excerpt::Excerpt;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep};

use crate::budget::{self, Budget};
use crate::logs::{Feed, Writer};

/// What [`Log::take`] reads at most to catch up, in bytes: what a pipe holds, unless its writer has made it larger.
const CATCH_UP: usize = 64 << 10;
/// What is read at a time of what one that is gone has left, in bytes: as much as mostly fits among the lines that wait.
const LEFT: usize = 16 << 10;
/// What is read at a time, in bytes: lines may be a byte each.
const CHUNK: usize = 2048;
/// Where something is written again so soon, it is read at intervals.
const SOON: Duration = Duration::from_millis(2);
/// Those intervals. A writer who fills the pipe meanwhile waits: 16 MiB a second.
const INTERVAL: Duration = Duration::from_millis(4);

/// The log of a container. Clones are the same log.
#[derive(Clone)]
pub(crate) struct Log(Arc<Inner>);

struct Inner {
    own: Arc<Output>,
    extensions: OnceLock<Arc<Output>>,
    written: Mutex<Excerpt>,
    feed: Feed,
}

/// A pipe that something of the container writes to.
struct Output {
    of: Writer,
    pipe: PipeReader,
    /// Who else wants it.
    listener: Listener,
}

/// Who is told what comes.
type Listener = Box<dyn Fn(&[u8]) + Send + Sync>;

/// What a pipe had.
enum Had {
    Nothing,
    /// All of that was read.
    Some,
    /// There may be more.
    Much,
    /// There will never be more.
    End,
}

// === impl Log ===

impl Log {
    /// Makes the pipe and a task that empties it until every writer is gone. The second part is the writer's end, which
    /// the user `writer` may open anew (as `/dev/stdout`). What comes goes to `feed` and `listener` too, within `budget`.
    pub(crate) fn open(
        writer: u32,
        feed: Feed,
        listener: impl Fn(&[u8]) + Send + Sync + 'static,
        budget: &Budget,
    ) -> std::io::Result<(Self, OwnedFd)> {
        let (pipe, end) = std::io::pipe()?;
        fchown(&end, Some(writer), None)?;
        let own = Output::new(Writer::Function, pipe, listener)?;
        let log = Self(Arc::new(Inner {
            own: Arc::clone(&own),
            extensions: OnceLock::new(),
            written: Mutex::default(),
            feed,
        }));
        tokio::spawn(budget.paced(log.clone().follow(own)));
        Ok((log, end.into()))
    }

    /// What its external extensions write belongs to it, too.
    pub(crate) fn add_extensions(
        &self,
        pipe: PipeReader,
        listener: impl Fn(&[u8]) + Send + Sync + 'static,
        budget: &Budget,
    ) -> std::io::Result<()> {
        let output = Output::new(Writer::Extension, pipe, listener)?;
        let set = self.0.extensions.set(Arc::clone(&output));
        set.map_err(|_| ErrorKind::AlreadyExists)?;
        tokio::spawn(budget.paced(self.clone().follow(output)));
        Ok(())
    }

    /// What was written since this was last called.
    pub(crate) fn take(&self) -> Excerpt {
        self.catch_up();
        std::mem::take(&mut *self.written())
    }

    /// The lines, once what was written up to now is among them.
    pub(crate) fn lines(&self) -> &Feed {
        self.catch_up();
        &self.0.feed
    }

    /// What a function or an extension wrote before it answered is in its pipe by now, if the task below has not had it yet.
    pub(crate) fn catch_up(&self) {
        for output in [Some(&self.0.own), self.0.extensions.get()].into_iter().flatten() {
            let _ = self.read(output, |total| total >= CATCH_UP);
        }
    }

    /// Of a container that is gone: some of what it has left is among the lines. Whether that was all, also a line without an end.
    pub(crate) fn catch_up_at_end(&self) -> bool {
        let had = self.read(&self.0.own, |total| total >= LEFT);
        let is_all = !matches!(had, Ok(Had::Much));
        if is_all {
            self.0.feed.of_request(None);
        }
        is_all
    }

    /// Reads all that comes, until no writer is left.
    async fn follow(self, output: Arc<Output>) -> std::io::Result<()> {
        while self.read_as_it_comes(&output).await? && self.read_at_intervals(&output).await? {}
        Ok(())
    }

    /// Reads as something is written, as long as that is not often: each write to a pipe that is watched wakes this thread. Where
    /// it can't be watched, for want of memory, that is often too. Whether there are writers left.
    async fn read_as_it_comes(&self, output: &Output) -> std::io::Result<bool> {
        let Ok(watched) = output.watch() else {
            return Ok(true);
        };
        let mut last: Option<Instant> = None;
        loop {
            let mut ready = watched.readable().await?;
            let had = self.read(output, |_| budget::turn_is_over())?;
            let soon = last.replace(Instant::now()).is_some_and(|last| last.elapsed() < SOON);
            match had {
                Had::End => return Ok(false),
                Had::Nothing | Had::Some if !soon => ready.clear_ready(),
                Had::Nothing | Had::Some | Had::Much => return Ok(true),
            }
        }
    }

    /// Reads at intervals, until nothing was written in one. Whether there are writers left.
    async fn read_at_intervals(&self, output: &Output) -> std::io::Result<bool> {
        loop {
            sleep(INTERVAL).await;
            match self.read(output, |_| budget::turn_is_over())? {
                Had::End => return Ok(false),
                Had::Nothing => return Ok(true),
                Had::Some | Had::Much => {}
            }
        }
    }

    /// Reads what is there, until it is `enough`: asked before each piece with the bytes that were read.
    fn read(&self, output: &Output, enough: impl Fn(usize) -> bool) -> std::io::Result<Had> {
        let mut written = self.written();
        let mut pipe = &output.pipe;
        let mut chunk = [0; CHUNK];
        let mut total = 0;
        while !enough(total) {
            match pipe.read(&mut chunk) {
                Ok(0) => return Ok(Had::End),
                Ok(length) => {
                    let data = chunk.get(..length).unwrap_or_default();
                    written.append(data);
                    self.0.feed.write(output.of, data);
                    (output.listener)(data);
                    total += length;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    return Ok(if total == 0 { Had::Nothing } else { Had::Some });
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Had::Much)
    }

    fn written(&self) -> std::sync::MutexGuard<'_, Excerpt> {
        self.0.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Output ===

impl Output {
    fn new(
        of: Writer,
        pipe: PipeReader,
        listener: impl Fn(&[u8]) + Send + Sync + 'static,
    ) -> std::io::Result<Arc<Self>> {
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(Arc::new(Self {
            of,
            pipe,
            listener: Box::new(listener),
        }))
    }

    fn watch(&self) -> std::io::Result<AsyncFd<BorrowedFd<'_>>> {
        let pipe = self.pipe.as_fd();
        // SAFETY: the descriptor stays open and the same as long as it is borrowed.
        Ok(unsafe { AsyncFd::register_with_interest(pipe, Interest::READABLE) }?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;

    use stoker_proto::limits::LOG_BYTES;

    use super::*;
    use crate::logs::Feeds;

    fn open() -> (Log, File, Feeds) {
        let feeds = Feeds::default();
        let (log, end) = Log::open(
            nix::unistd::getuid().as_raw(),
            feeds.feed("c".to_owned()),
            |_| (),
            &Budget::default(),
        )
        .unwrap();
        (log, end.into(), feeds)
    }

    #[tokio::test]
    async fn gives_each_invocation_its_own() {
        let (log, mut end, feeds) = open();
        end.write_all(b"one\n").unwrap();
        assert_eq!(log.take().into_bytes(), b"one\n");
        end.write_all(b"two\nthr").unwrap();
        assert_eq!(log.take().into_bytes(), b"two\nthr");
        assert_eq!(log.take(), Excerpt::default());
        end.write_all(b"ee\n").unwrap();
        log.lines().platform("END");
        let lines: Vec<_> = feeds.take().into_iter().map(|line| line.text).collect();
        assert_eq!(lines, ["one", "two", "three", "END"]);
    }

    #[tokio::test]
    async fn what_extensions_wrote_is_there_at_once_too() {
        let (log, mut end, _) = open();
        let (pipe, mut of_extensions) = std::io::pipe().unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let ears = Arc::clone(&heard);
        let listener = move |data: &[u8]| ears.lock().unwrap().extend_from_slice(data);
        log.add_extensions(pipe, listener, &Budget::default()).unwrap();
        end.write_all(b"function\n").unwrap();
        of_extensions.write_all(b"extension\n").unwrap();
        assert_eq!(log.take().into_bytes(), b"function\nextension\n");
        assert_eq!(*heard.lock().unwrap(), b"extension\n");
    }

    #[tokio::test]
    async fn the_last_words_of_one_that_is_gone_are_among_the_lines() {
        let (log, mut end, feeds) = open();
        fcntl(&end, FcntlArg::F_SETPIPE_SZ(1 << 20)).unwrap();
        end.write_all(&[[b'x'; 1023].as_slice(), b"\n"].concat().repeat(96))
            .unwrap();
        end.write_all(b"killed").unwrap();
        drop(end);
        let mut lines = Vec::new();
        let mut is_all = false;
        while !is_all {
            is_all = log.catch_up_at_end();
            lines.extend(std::iter::from_fn(|| Some(feeds.take()).filter(|lines| !lines.is_empty())).flatten());
        }
        let texts: Vec<_> = lines.iter().flat_map(|lines| lines.lines()).collect();
        assert_eq!((texts.len(), texts.last().copied()), (97, Some("killed")));
        assert!(lines.iter().all(|lines| lines.lost_bytes == 0));
    }

    #[tokio::test]
    async fn drains_a_writer_without_end_and_keeps_the_beginning_and_the_end() {
        let (log, mut end, _) = open();
        let writer = tokio::task::spawn_blocking(move || {
            end.write_all(b"first\n").unwrap();
            for _ in 0..100 {
                end.write_all(&[b'x'; 100_000]).unwrap();
            }
            end.write_all(b"last\n").unwrap();
        });
        writer.await.unwrap();
        let written = log.take();
        assert!(written.missing() > 9_000_000);
        let text = written.into_bytes();
        assert!(text.starts_with(b"first\n") && text.ends_with(b"last\n") && text.len() <= LOG_BYTES);
        assert_eq!(log.take().missing(), 0);
    }
}
