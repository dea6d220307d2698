//! Standard output and error of a container, by one pipe so that their order is kept.
//!
//! Of what was written since the last [`Log::take`] the beginning and the end are kept ([`Excerpt`]), all of it goes to a
//! [`Feed`] as lines, and both are bounded: a function that writes without end neither blocks nor fills memory.

use std::os::fd::OwnedFd;
use std::os::unix::fs::fchown;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stoker_proto::excerpt::Excerpt;

use super::pipe::Pipe;
use crate::budget::Budget;
use crate::logs::Feed;

/// How long what was written is waited for. One whose container has no tokens left misses the end of its log, not its deadline.
const CATCH_UP: Duration = Duration::from_millis(500);

/// The log of a container. Clones are the same log.
#[derive(Clone)]
pub(crate) struct Log(Arc<Inner>);

struct Inner {
    pipe: Arc<Pipe>,
    written: Mutex<Excerpt>,
    feed: Feed,
}

// === impl Log ===

impl Log {
    /// Makes the pipe and a task that empties it until every writer is gone, at the cost of `budget`. The second part is the
    /// writer's end, which the user `writer` may open anew (as `/dev/stdout`). What comes goes to `feed` and `listener` too.
    pub(crate) fn open(
        writer: u32,
        feed: Feed,
        budget: &Budget,
        listener: impl Fn(&[u8]) + Send + Sync + 'static,
    ) -> std::io::Result<(Self, OwnedFd)> {
        let (pipe, end) = std::io::pipe()?;
        fchown(&end, Some(writer), None)?;
        let log = Self(Arc::new(Inner {
            pipe: Arc::new(Pipe::new(pipe)),
            written: Mutex::default(),
            feed,
        }));
        let (following, pipe) = (log.clone(), Arc::clone(&log.0.pipe));
        let follow = async move {
            let passed_on = following.0.pipe.pass_on(|data| {
                following.append(data);
                listener(data);
            });
            if let Err(error) = passed_on.await {
                tracing::error!("cannot read the log of a container: {error}");
            }
        };
        tokio::spawn(budget.throttle(follow, pipe));
        Ok((log, end.into()))
    }

    /// What was written since this was last called.
    pub(crate) async fn take(&self) -> Excerpt {
        self.catch_up().await;
        std::mem::take(&mut *self.written())
    }

    /// The lines.
    pub(crate) fn lines(&self) -> &Feed {
        &self.0.feed
    }

    /// Resolves when what was written by now is in the log. What a function wrote before it answered is in the pipe by then.
    pub(crate) async fn catch_up(&self) {
        let _ = tokio::time::timeout(CATCH_UP, self.0.pipe.caught_up()).await;
    }

    /// Adds what was written elsewhere.
    pub(crate) fn append(&self, data: &[u8]) {
        self.written().append(data);
        self.0.feed.write(data);
    }

    fn written(&self) -> std::sync::MutexGuard<'_, Excerpt> {
        self.0.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write as _;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use nix::time::{ClockId, clock_gettime};
    use stoker_proto::limits::LOG_BYTES;

    use super::*;
    use crate::budget::Budgets;
    use crate::logs::Feeds;

    struct Opened {
        log: Log,
        end: File,
        feeds: Feeds,
        heard: Arc<AtomicUsize>,
    }

    fn open() -> Opened {
        open_with(&Budgets::default().budget())
    }

    fn open_with(budget: &Budget) -> Opened {
        let feeds = Feeds::default();
        let heard = Arc::new(AtomicUsize::new(0));
        let hears = Arc::clone(&heard);
        let feed = feeds.feed("c".to_owned(), budget.clone());
        let (log, end) = Log::open(nix::unistd::getuid().as_raw(), feed, budget, move |data| {
            hears.fetch_add(data.len(), Ordering::Relaxed);
        })
        .unwrap();
        Opened {
            log,
            end: end.into(),
            feeds,
            heard,
        }
    }

    #[tokio::test]
    async fn gives_each_invocation_its_own() {
        let Opened {
            log,
            mut end,
            feeds,
            heard,
            ..
        } = open();
        end.write_all(b"one\n").unwrap();
        assert_eq!(log.take().await.into_bytes(), b"one\n");
        end.write_all(b"two\nthr").unwrap();
        assert_eq!(log.take().await.into_bytes(), b"two\nthr");
        assert_eq!(log.take().await, Excerpt::default());
        end.write_all(b"ee\n").unwrap();
        log.catch_up().await;
        log.lines().platform("END");
        let lines: Vec<_> = feeds.take().into_iter().map(|line| line.text).collect();
        assert_eq!(lines, ["one", "two", "three", "END"]);
        assert_eq!(heard.load(Ordering::Relaxed), 14);
        drop(end);
        // What will never come is not waited for.
        log.0.pipe.caught_up().await;
    }

    #[tokio::test]
    async fn drains_a_writer_without_end_and_keeps_the_beginning_and_the_end() {
        let Opened { log, mut end, .. } = open();
        let writer = tokio::task::spawn_blocking(move || {
            end.write_all(b"first\n").unwrap();
            for _ in 0..100 {
                end.write_all(&[b'x'; 100_000]).unwrap();
            }
            end.write_all(b"last\n").unwrap();
        });
        writer.await.unwrap();
        log.0.pipe.caught_up().await;
        let written = log.take().await;
        assert!(written.missing() > 9_000_000);
        let text = written.into_bytes();
        assert!(text.starts_with(b"first\n") && text.ends_with(b"last\n") && text.len() <= LOG_BYTES);
        assert_eq!(log.take().await.missing(), 0);
    }

    /// The kernel tells of each byte that is written to a pipe which somebody watches.
    #[test]
    fn one_without_tokens_is_not_even_listened_to() {
        let budgets = Budgets::default();
        let resting = budgets.clone();
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_all().on_thread_park(move || resting.rest()).build();
        runtime.unwrap().block_on(async {
            let Opened { log, mut end, .. } = open_with(&budgets.budget());
            let cpu = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
            let (before, begin) = (cpu(), std::time::Instant::now());
            let writer = tokio::task::spawn_blocking(move || {
                while begin.elapsed() < Duration::from_millis(500) {
                    end.write_all(b"\n").unwrap();
                }
            });
            writer.await.unwrap();
            let (used, time) = (cpu() - before, begin.elapsed());
            assert!(used <= time / 4 + Duration::from_millis(15), "{used:?} in {time:?}");
            log.0.pipe.caught_up().await;
        });
    }
}
