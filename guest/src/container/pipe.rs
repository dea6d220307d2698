//! What the programs of a container write, as it comes by a pipe.

use std::io::{self, PipeReader, Read as _};
use std::os::fd::AsRawFd as _;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::sync::watch;

use crate::budget::{Source, Wakes, breathe};

/// What is read at a time, in bytes.
const CHUNK: usize = 8 << 10;
/// The most lines of it that are passed on at a time: each may be an event for each of several subscribers.
const LINES: usize = 16;

/// The reading end of a pipe.
pub(super) struct Pipe {
    source: Source<PipeReader>,
    /// Bytes that were read so far.
    read: AtomicU64,
    /// Those of them that were passed on; all there will ever be once it has an end.
    passed: watch::Sender<u64>,
}

/// Says that nothing more is passed on, whatever the reason.
struct AtEnd<'a>(&'a watch::Sender<u64>);

// === impl AtEnd ===

impl Drop for AtEnd<'_> {
    fn drop(&mut self) {
        self.0.send_replace(u64::MAX);
    }
}

// === impl Pipe ===

impl Pipe {
    pub(super) fn new(pipe: PipeReader) -> Self {
        Self {
            source: Source::new(pipe),
            read: AtomicU64::new(0),
            passed: watch::Sender::new(0),
        }
    }

    /// Passes on what comes, some lines at a time, until every writer is gone. For one task.
    pub(super) async fn pass_on(&self, mut to: impl FnMut(&[u8])) -> io::Result<()> {
        let _at_end = AtEnd(&self.passed);
        fcntl(self.source.get(), FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let mut chunk = [0; CHUNK];
        loop {
            let length = self
                .source
                .read(|mut pipe| uninterrupted(|| pipe.read(&mut chunk)))
                .await?;
            if length == 0 {
                return Ok(());
            }
            self.read.fetch_add(length as u64, Ordering::Relaxed);
            let mut left = chunk.get(..length).unwrap_or_default();
            while !left.is_empty() {
                let (some, rest) = left.split_at(some_lines(left));
                to(some);
                left = rest;
                self.passed.send_modify(|passed| *passed += some.len() as u64);
                breathe().await;
            }
        }
    }

    /// Resolves when all that is in it now has been passed on, which another task does.
    pub(super) async fn caught_up(&self) {
        let by_now = self.read.load(Ordering::Relaxed) + self.waiting();
        // The sender is in `self`.
        let _ = self.passed.subscribe().wait_for(|passed| *passed >= by_now).await;
    }

    /// Bytes that have not been read.
    fn waiting(&self) -> u64 {
        let mut bytes: libc::c_int = 0;
        // SAFETY: the call writes one integer, to a place that is ours.
        let asked = unsafe { libc::ioctl(self.source.get().as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        Errno::result(asked).map_or(0, |_| u64::try_from(bytes).unwrap_or(0))
    }
}

impl Wakes for Pipe {
    fn silence(&self) {
        self.source.silence();
    }
}

/// Up to where it has so many lines as are passed on at a time.
fn some_lines(data: &[u8]) -> usize {
    memchr::memchr_iter(b'\n', data)
        .nth(LINES - 1)
        .map_or(data.len(), |end| end + 1)
}

fn uninterrupted<T>(mut operation: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match operation() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_lines_go_at_a_time() {
        assert_eq!(some_lines(b""), 0);
        assert_eq!(some_lines(b"one\ntwo"), 7);
        assert_eq!(some_lines(&[b'\n'; 100]), LINES);
        assert_eq!(some_lines(&b"a\n".repeat(LINES)), 2 * LINES);
    }
}
