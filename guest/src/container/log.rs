//! Standard output and error of a container, by one pipe so that their order is kept.
//!
//! Of what was written since the last [`Log::take`] the beginning and the end are kept ([`Excerpt`]), all of it goes to a
//! [`Feed`] as lines, and both are bounded: a function that writes without end neither blocks nor fills memory.

use std::io::{ErrorKind, PipeReader, Read as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use stoker_proto::excerpt::Excerpt;
use tokio::io::unix::AsyncFd;

use crate::logs::Feed;

/// What [`Log::take`] reads at most to catch up: more than the pipe can hold.
const CATCH_UP: usize = 1 << 20;
/// Room of the pipe in bytes: the kernel's default for a pipe.
const PIPE: usize = 64 << 10;

/// The log of a container. Clones are the same log.
#[derive(Clone)]
pub(crate) struct Log(Arc<Inner>);

struct Inner {
    pipe: AsyncFd<PipeReader>,
    written: Mutex<Excerpt>,
    feed: Feed,
    /// Who else wants it.
    listener: OnceLock<Listener>,
}

/// Who is told what comes.
type Listener = Box<dyn Fn(&[u8]) + Send + Sync>;

/// How a pipe was left.
enum Pipe {
    /// There may be more.
    Full,
    Empty,
    /// There will never be more.
    Closed,
}

// === impl Log ===

impl Log {
    /// Makes the pipe and a task that empties it until every writer is gone. The second part is the writer's end, which
    /// the user `writer` may open anew (as `/dev/stdout`). What comes goes to `feed` too.
    pub(crate) fn open(writer: u32, feed: Feed) -> std::io::Result<(Self, OwnedFd)> {
        let (pipe, end) = std::io::pipe()?;
        fchown(&end, Some(writer), None)?;
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        // SAFETY: a `PipeReader` has one descriptor, which stays open as long as it lives.
        let pipe = unsafe { AsyncFd::register(pipe) }?;
        let log = Self(Arc::new(Inner {
            pipe,
            written: Mutex::default(),
            feed,
            listener: OnceLock::new(),
        }));
        tokio::spawn(log.clone().follow());
        Ok((log, end.into()))
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

    /// What a function wrote before it answered is in the pipe by now, if the task below has not had it yet.
    pub(crate) fn catch_up(&self) {
        let _ = self.read(CATCH_UP);
    }

    /// Passes on what comes by the pipe. There is one listener.
    pub(crate) fn pass_to(&self, listener: impl Fn(&[u8]) + Send + Sync + 'static) {
        // A second would not be heard of.
        let _ = self.0.listener.set(Box::new(listener));
    }

    /// Adds what was written elsewhere.
    pub(crate) fn append(&self, data: &[u8]) {
        self.written().append(data);
        self.0.feed.write(data);
    }

    async fn follow(self) {
        while let Ok(mut ready) = self.0.pipe.readable().await {
            match self.read(PIPE) {
                Ok(Pipe::Full) => {}
                Ok(Pipe::Empty) => ready.clear_ready(),
                Ok(Pipe::Closed) | Err(_) => return,
            }
            drop(ready);
            // One who writes without pause must not have this thread for himself.
            tokio::task::yield_now().await;
        }
    }

    /// Reads what is there, at most about `limit` bytes.
    fn read(&self, limit: usize) -> std::io::Result<Pipe> {
        let mut written = self.written();
        let mut pipe = self.0.pipe.get_ref();
        let mut chunk = [0; 8192];
        let mut total = 0;
        while total < limit {
            match pipe.read(&mut chunk) {
                Ok(0) => return Ok(Pipe::Closed),
                Ok(length) => {
                    let data = chunk.get(..length).unwrap_or_default();
                    written.append(data);
                    self.0.feed.write(data);
                    if let Some(listener) = self.0.listener.get() {
                        listener(data);
                    }
                    total += length;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(Pipe::Empty),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Pipe::Full)
    }

    fn written(&self) -> std::sync::MutexGuard<'_, Excerpt> {
        self.0.written.lock().unwrap_or_else(PoisonError::into_inner)
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
        let (log, end) = Log::open(nix::unistd::getuid().as_raw(), feeds.feed("c".to_owned())).unwrap();
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
