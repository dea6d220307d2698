//! Where the serial console's output goes: a file that cannot grow without end, and the last lines kept in memory.
//!
//! The guest writes byte by byte, as fast as it likes. So bytes are gathered before they are written, and no more is written
//! than a kernel that boots or dies has to say; of a flood, the end alone. What is kept in memory is always complete.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

/// Most bytes of a console file.
pub const FILE_BYTES: u64 = 1024 * 1024;
/// Bytes at its start (how the guest booted) that are kept when it is full.
pub const HEAD_BYTES: u64 = 256 * 1024;
/// Bytes of the end that are kept in memory for the exit report.
pub const TAIL_BYTES: usize = 4096;

/// Bytes that are gathered at most before they are written.
const GATHERED_BYTES: usize = 4096;
/// How long a byte waits for others at most.
const GATHERING: Duration = Duration::from_millis(50);
/// Bytes written in a second for as long as the guest writes more.
const RATE: u64 = 64 * 1024;
/// Bytes written at any speed by a guest that was quiet before: a boot with all of its messages.
const BURST: u64 = FILE_BYTES;

const DROPPED: &[u8] = b"\n[... older output was dropped here ...]\n";

/// A console shared by the serial port, which writes it, and the machine, which reads its tail.
#[derive(Clone)]
pub struct Console(Arc<Mutex<Inner>>);

struct Inner {
    sink: Sink,
    tail: VecDeque<u8>,
    /// Not written yet.
    gathered: Vec<u8>,
    /// Wakes up who writes what is gathered.
    timer: Option<TimerFd>,
    /// It is going to.
    armed: bool,
    budget: Budget,
    /// Bytes that were not written because they were too many, since some were.
    dropped: u64,
}

/// How much may be written: up to [`BURST`] at once, [`RATE`] for each second.
struct Budget {
    left: u64,
    at: Instant,
}

enum Sink {
    Stdout,
    File { file: File, length: u64 },
    Nothing,
}

// === impl Console ===

impl Console {
    /// A console on standard output.
    pub fn stdout() -> Self {
        Self::new(Sink::Stdout)
    }

    /// A console that only keeps its tail.
    pub fn nowhere() -> Self {
        Self::new(Sink::Nothing)
    }

    /// A console in a file, which is made, or emptied where it is there.
    ///
    /// # Errors
    /// Where the file cannot be opened for writing.
    pub fn file(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).write(true).truncate(true).open(path)?;
        Ok(Self::new(Sink::File { file, length: 0 }))
    }

    fn new(sink: Sink) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            sink,
            tail: VecDeque::new(),
            gathered: Vec::new(),
            timer: None,
            armed: false,
            budget: Budget::full(Instant::now()),
            dropped: 0,
        })))
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `epoll` tell, as `data`, when [`Console::write_gathered`] is to be called. Without it, bytes wait until they are many, or for
    /// [`Console::finish`].
    ///
    /// # Errors
    /// Where the kernel has no timer, or refuses.
    pub fn watch(&self, epoll: &Epoll, data: u64) -> io::Result<()> {
        let timer = TimerFd::new()?;
        // Its count is never read: setting it again clears it.
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
        epoll.ctl(ControlOperation::Add, timer.as_raw_fd(), event)?;
        self.inner().timer = Some(timer);
        Ok(())
    }

    /// Writes what is gathered.
    pub fn write_gathered(&self) {
        let mut inner = self.inner();
        inner.armed = false;
        inner.flush(Instant::now());
    }

    /// Writes what is left to write, the last [`TAIL_BYTES`] in any case, and returns [`Console::tail`].
    pub fn finish(&self) -> String {
        self.inner().finish()
    }

    /// The same for a thread that has panicked; `None` where another, or this thread itself, is in the middle of writing.
    pub fn try_finish(&self) -> Option<String> {
        match self.0.try_lock() {
            Ok(mut inner) => Some(inner.finish()),
            Err(TryLockError::Poisoned(inner)) => Some(inner.into_inner().finish()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The last lines: at most [`TAIL_BYTES`] bytes, beginning with a whole line where there is more than one.
    pub fn tail(&self) -> String {
        self.inner().last_lines()
    }
}

/// Never fails: a console that cannot be written (a full disk, a closed pipe) must not stop the guest.
impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner().write(bytes, Instant::now);
        Ok(bytes.len())
    }

    /// Does nothing: the serial port flushes each byte.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

// === impl Inner ===

impl Inner {
    fn write(&mut self, bytes: &[u8], now: impl Fn() -> Instant) {
        let kept = bytes.get(bytes.len().saturating_sub(TAIL_BYTES)..).unwrap_or_default();
        let over = (self.tail.len() + kept.len()).saturating_sub(TAIL_BYTES);
        self.tail.drain(..over);
        self.tail.extend(kept);
        if matches!(self.sink, Sink::Nothing) {
            return;
        }
        for part in bytes.chunks(GATHERED_BYTES) {
            self.gathered.extend_from_slice(part);
            if self.gathered.len() >= GATHERED_BYTES {
                self.flush(now());
            }
        }
        if !self.gathered.is_empty() && !self.armed {
            // Without a timer, or where it is refused, bytes are written later.
            self.armed = self
                .timer
                .as_mut()
                .is_some_and(|timer| timer.reset(GATHERING, None).is_ok());
        }
    }

    fn flush(&mut self, now: Instant) {
        let bytes = std::mem::take(&mut self.gathered);
        if bytes.is_empty() {
            return;
        }
        if self.budget.take(bytes.len() as u64, now) {
            self.tell_dropped();
            self.put(&bytes);
        } else {
            self.dropped += bytes.len() as u64;
        }
        self.gathered = bytes;
        self.gathered.clear();
    }

    fn finish(&mut self) -> String {
        let bytes = std::mem::take(&mut self.gathered);
        if self.dropped == 0 {
            self.put(&bytes);
        } else {
            let kept = self.tail.make_contiguous().to_vec();
            self.dropped = (self.dropped + bytes.len() as u64).saturating_sub(kept.len() as u64);
            self.tell_dropped();
            self.put(&kept);
        }
        self.last_lines()
    }

    fn tell_dropped(&mut self) {
        let dropped = std::mem::take(&mut self.dropped);
        if dropped > 0 {
            let text =
                format!("\n[... {dropped} bytes were dropped here, for they were more than {RATE} a second ...]\n");
            self.put(text.as_bytes());
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let _ = self.sink.write(bytes);
    }

    fn last_lines(&mut self) -> String {
        let full = self.tail.len() == TAIL_BYTES;
        let bytes: &[u8] = self.tail.make_contiguous();
        let cut = match bytes.iter().position(|byte| *byte == b'\n') {
            Some(at) if full && at + 1 < bytes.len() => at + 1,
            _ => 0,
        };
        String::from_utf8_lossy(bytes.get(cut..).unwrap_or_default()).into_owned()
    }
}

// === impl Budget ===

impl Budget {
    fn full(now: Instant) -> Self {
        Self { left: BURST, at: now }
    }

    /// Takes `bytes` of it, all or none.
    fn take(&mut self, bytes: u64, now: Instant) -> bool {
        let elapsed = now.saturating_duration_since(self.at).as_micros();
        let earned = u64::try_from(elapsed * u128::from(RATE) / 1_000_000).unwrap_or(u64::MAX);
        // Of a time too short for a byte nothing is lost.
        if earned > 0 {
            self.at = now;
            self.left = self.left.saturating_add(earned).min(BURST);
        }
        let enough = bytes <= self.left;
        if enough {
            self.left -= bytes;
        }
        enough
    }
}

// === impl Sink ===

impl Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Nothing => Ok(()),
            Self::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(bytes)?;
                stdout.flush()
            }
            Self::File { file, length } => {
                if *length + bytes.len() as u64 > FILE_BYTES {
                    file.set_len(HEAD_BYTES)?;
                    file.seek(SeekFrom::Start(HEAD_BYTES))?;
                    file.write_all(DROPPED)?;
                    *length = HEAD_BYTES + DROPPED.len() as u64;
                }
                file.write_all(bytes)?;
                *length += bytes.len() as u64;
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests;
