//! Where the serial console's output goes: a file that cannot grow without end, and the last lines kept in memory.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

/// Most bytes of a console file.
pub const FILE_BYTES: u64 = 1024 * 1024;
/// Bytes at its start (how the guest booted) that are kept when it is full.
pub const HEAD_BYTES: u64 = 256 * 1024;
/// Bytes of the end that are kept in memory for the exit report.
pub const TAIL_BYTES: usize = 4096;

const DROPPED: &[u8] = b"\n[... older output was dropped here ...]\n";

/// A console shared by the serial port, which writes it, and the machine, which reads its tail.
#[derive(Clone)]
pub struct Console(Arc<Mutex<Inner>>);

struct Inner {
    sink: Sink,
    tail: VecDeque<u8>,
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
        })))
    }

    /// The last lines: at most [`TAIL_BYTES`] bytes, beginning with a whole line where there is more than one.
    pub fn tail(&self) -> String {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let full = inner.tail.len() == TAIL_BYTES;
        let bytes: &[u8] = inner.tail.make_contiguous();
        let cut = match bytes.iter().position(|byte| *byte == b'\n') {
            Some(at) if full && at + 1 < bytes.len() => at + 1,
            _ => 0,
        };
        String::from_utf8_lossy(bytes.get(cut..).unwrap_or_default()).into_owned()
    }
}

/// Never fails: a console that cannot be written (a full disk, a closed pipe) must not stop the guest.
impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if inner.tail.len() == TAIL_BYTES {
                inner.tail.pop_front();
            }
            inner.tail.push_back(*byte);
        }
        let _ = inner.sink.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_writes_without_end_fills_no_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console.log");
        let mut console = Console::file(&path).unwrap();
        console.write_all(b"the first line\n").unwrap();
        let line = [b'x'; 99];
        for number in 0..30_000 {
            console
                .write_all(format!("{number:06}{}\n", String::from_utf8_lossy(&line)).as_bytes())
                .unwrap();
            if number % 1000 == 0 {
                assert!(path.metadata().unwrap().len() <= FILE_BYTES);
            }
        }
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.len() as u64 <= FILE_BYTES);
        assert!(text.starts_with("the first line\n"));
        assert!(text.contains("older output was dropped"));
        assert!(text.lines().last().unwrap().starts_with("029999"));
        let tail = console.tail();
        assert!(tail.len() <= TAIL_BYTES && tail.lines().last().unwrap().starts_with("029999"));
        assert_eq!(tail.lines().next().unwrap().len(), 105);
    }

    #[test]
    fn the_tail_holds_all_of_a_short_output() {
        let mut console = Console::nowhere();
        console.write_all(b"one\ntwo \xff").unwrap();
        assert_eq!(console.tail(), "one\ntwo \u{fffd}");
    }
}
