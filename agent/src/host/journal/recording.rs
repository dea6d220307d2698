//! Events as they came, with what was decided about each, in a file of JSON lines; and their replay, which must decide the
//! same.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::path::Path;

use serde::{Deserialize, Serialize};
use stoker_policy::{Decision, Event, Host, Ids, Now, Rules};
use tokio::sync::mpsc;

/// How many events may wait to be written.
const QUEUE: usize = 16 * 1024;

/// What the format of the file is; of another nothing is replayed.
const FORMAT: u32 = 1;

/// The first line of a recording: all that decisions depend on beside events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    /// The format of the file.
    pub format: u32,
    /// The version of the agent that wrote it.
    pub version: String,
    /// Of the ids.
    pub seed: u64,
    /// What decisions go by.
    pub rules: Rules,
}

/// Any other line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Line {
    now: Now,
    event: Event,
    decisions: Vec<Decision>,
}

/// Takes events to record.
#[derive(Debug)]
pub(in crate::host) struct Recording(mpsc::Sender<Line>);

/// What was replayed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replayed {
    /// How many events.
    pub events: u64,
    /// How many decisions, each the same as recorded.
    pub decisions: u64,
}

/// Why a recording was not replayed to its end.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The file can't be read.
    #[error("can't read the recording: {0}")]
    Read(#[from] io::Error),
    /// There is nothing in the file.
    #[error("the recording is empty")]
    Empty,
    /// A line is not what an agent writes.
    #[error("line {line} is not part of a recording: {source}")]
    Parse {
        /// From 1.
        line: u64,
        /// The underlying error.
        source: serde_json::Error,
    },
    /// It is of another format.
    #[error("the recording has format {found} (of stokerd {version}), this stokerd replays {FORMAT}")]
    Format {
        /// Its format.
        found: u32,
        /// The version of the agent that wrote it.
        version: String,
    },
    /// Something else was decided than is recorded.
    #[error("line {line} was decided otherwise\n  recorded: {recorded}\n  replayed: {replayed}")]
    Differs {
        /// From 1.
        line: u64,
        /// The decisions that are recorded.
        recorded: String,
        /// Those of the replay.
        replayed: String,
    },
}

// === impl Header ===

impl Header {
    /// Of a recording of this agent.
    #[must_use]
    pub fn new(seed: u64, rules: Rules) -> Self {
        Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            seed,
            rules,
        }
    }
}

// === impl Recording ===

impl Recording {
    /// Begins a recording in place of one that is there.
    pub(in crate::host) fn start(path: &Path, header: &Header) -> io::Result<Self> {
        let mut file = BufWriter::new(File::create(path)?);
        write(&mut file, header)?;
        file.flush()?;
        let (to, mut lines) = mpsc::channel(QUEUE);
        let path = path.display().to_string();
        tracing::warn!(path, "every event is recorded, and the file grows without end");
        tokio::task::spawn_blocking(move || {
            if let Err(error) = write_all(&mut file, &mut lines) {
                tracing::error!(%error, path, "the recording of events ends: it can't be written");
            }
        });
        Ok(Self(to))
    }

    /// Records an event; `false` where the recording has ended, for it can't keep up or be written.
    pub(in crate::host) fn push(&mut self, now: Now, event: Event, decisions: &[Decision]) -> bool {
        let line = Line {
            now,
            event,
            decisions: decisions.to_vec(),
        };
        match self.0.try_send(line) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                tracing::error!("the recording of events ends: it does not keep up");
                false
            }
            // That was logged.
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }
}

fn write_all(file: &mut BufWriter<File>, lines: &mut mpsc::Receiver<Line>) -> io::Result<()> {
    while let Some(line) = lines.blocking_recv() {
        write(file, &line)?;
        // What there is to write next is not there yet.
        if lines.is_empty() {
            file.flush()?;
        }
    }
    file.flush()
}

fn write(file: &mut BufWriter<File>, line: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *file, line)?;
    file.write_all(b"\n")
}

/// Takes the events of a recording again, and checks that the same is decided. A last line that is cut off, as an agent
/// leaves it that was killed, ends it.
///
/// # Errors
/// The first difference, or why the file can't be read.
pub fn replay(path: &Path) -> Result<Replayed, ReplayError> {
    let mut lines = BufReader::new(File::open(path)?).lines();
    let first = lines.next().ok_or(ReplayError::Empty)??;
    let header: Header = serde_json::from_str(&first).map_err(|source| ReplayError::Parse { line: 1, source })?;
    if header.format != FORMAT {
        return Err(ReplayError::Format {
            found: header.format,
            version: header.version,
        });
    }
    let mut host = Host::new(header.rules, Ids::new(header.seed));
    let mut replayed = Replayed::default();
    let mut number = 1;
    let mut lines = lines.peekable();
    while let Some(line) = lines.next() {
        let line = line?;
        number += 1;
        let parsed = serde_json::from_str(&line);
        let Line { now, event, decisions } = match parsed {
            Ok(line) => line,
            Err(error) if error.is_eof() && lines.peek().is_none() => break,
            Err(source) => return Err(ReplayError::Parse { line: number, source }),
        };
        let decided = host.step(now, event);
        if decided != decisions {
            return Err(ReplayError::Differs {
                line: number,
                recorded: format!("{decisions:?}"),
                replayed: format!("{decided:?}"),
            });
        }
        replayed.events += 1;
        replayed.decisions += u64::try_from(decisions.len()).unwrap_or(u64::MAX);
    }
    Ok(replayed)
}
