//! Requests that their callers gave an id: of a function, each id is one invocation, however often it is asked for, and by
//! whichever agent. Its answer is kept for ten minutes, as long as there is room for it.
//!
//! ```text
//!  begin ──First──► Ticket ── placed ──► over ──► log
//!    └─────Again──► waits for that, or reads the log
//! ```
//!
//! Each account has files of its own ([`log`]); where all together are too large, the account that has the most loses its
//! oldest. What is known of a request that is over takes about as much memory as the smallest records take there (280 bytes), so
//! that bound is one of memory too. What is known of one that runs is kept as long as it runs.

mod log;
#[cfg(test)]
pub(crate) mod tests;

use std::any::Any;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use prost::Message as _;
use stoker_policy::MachineId;
use stoker_proto::v1;
use tokio::sync::watch;

use self::log::{Event, Log, Place, Record, now_ms};
use crate::names::AccountName;

/// The largest record in bytes that is written by who has it: to the memory of a run folder (tmpfs) or the page cache that takes
/// some microseconds, and to hand it to a thread that may block some hundred.
const SMALL_BYTES: usize = 16 << 10;

/// All of them; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Answers(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// How large the files may be together, in bytes.
    most_bytes: u64,
    /// How large they are.
    bytes: Arc<AtomicU64>,
    accounts: Mutex<HashMap<Arc<str>, Arc<Account>>>,
    /// Held while the files of an account are opened.
    opening: Mutex<()>,
}

/// Those of one account. One thread at a time reads and writes its files, so that no account takes all that may block; what it
/// knows is never locked for long.
#[derive(Debug)]
struct Account {
    log: Arc<tokio::sync::Mutex<Log>>,
    /// Of the files together.
    bytes: AtomicU64,
    /// Of those of all accounts.
    all_bytes: Arc<AtomicU64>,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_name: HashMap<Arc<str>, State>,
    /// Those that are over, in the order of their records.
    over: VecDeque<(Place, Arc<str>)>,
}

#[derive(Debug)]
enum State {
    /// Few do at a time.
    Runs(Box<Running>),
    Over {
        asked: u64,
        place: Place,
    },
}

#[derive(Debug)]
struct Running {
    asked: u64,
    outcome: watch::Receiver<Option<Outcome>>,
    held: Weak<dyn Any + Send + Sync>,
    placed: Option<Placed>,
}

/// Where a request is to run, and the record of that.
#[derive(Clone, Copy, Debug)]
struct Placed {
    machine: MachineId,
    place: Place,
}

/// What a request came to: its answer, or why there is none although it may have run.
pub(super) type Outcome = Result<v1::InvokeResponse, NoAnswer>;

/// Why there is no answer for who asks again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NoAnswer {
    /// It was lost, and why.
    Lost(String),
    /// It went out as a stream and is not kept.
    Streamed,
}

/// What all who wait for a request share; dropped with the last of them.
pub(super) type Held = Arc<dyn Any + Send + Sync>;

/// What a request is, to who asks for it.
#[derive(Debug)]
pub(super) enum Begun {
    /// Nobody asked for it before: it is to be run.
    First(Ticket),
    /// It runs. Its outcome comes; none where it did not begin and may be asked for anew. None who asked before may be left.
    Again(watch::Receiver<Option<Outcome>>, Option<Held>),
    /// It is over.
    Over(Box<Outcome>),
    /// Something else was asked for by this name.
    Reused,
}

/// A request that runs. Dropped before it is over, it may be asked for anew if it was not placed; if it was, it is lost.
#[derive(Debug)]
pub(super) struct Ticket {
    answers: Answers,
    account: Arc<Account>,
    name: Arc<str>,
    asked: u64,
    /// It may be running in a machine, as far as the files tell.
    placed: bool,
    tell: watch::Sender<Option<Outcome>>,
}

// === impl Answers ===

impl Answers {
    /// Opens the files of all accounts in a folder, with the requests that an earlier agent left in machines. Blocks.
    ///
    /// # Errors
    ///
    /// Where they can't be read.
    pub(super) fn open(folder: &Path, most_bytes: u64) -> io::Result<(Self, BTreeMap<MachineId, Vec<Ticket>>)> {
        crate::files::make_private_dir(folder)?;
        let answers = Self(Arc::new(Inner {
            folder: folder.to_owned(),
            most_bytes,
            bytes: Arc::default(),
            accounts: Mutex::default(),
            opening: Mutex::default(),
        }));
        let mut left: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let entry = entry?;
            let name = entry.file_name().to_str().and_then(|name| AccountName::new(name).ok());
            let (Some(name), true) = (name, entry.file_type()?.is_dir()) else {
                tracing::warn!(path = %entry.path().display(), "left alone: not the kept answers of an account");
                continue;
            };
            for (machine, ticket) in answers.open_account(name.account().into())? {
                left.entry(machine).or_default().push(ticket);
            }
        }
        Ok((answers, left))
    }

    /// Somebody asks for a request; `asked` says what, and `held` is dropped where nobody waits any more.
    ///
    /// # Errors
    ///
    /// Where the files of the account can't be used.
    pub(super) async fn begin(&self, account: Arc<str>, name: String, asked: u64, held: &Held) -> io::Result<Begun> {
        let answers = self.clone();
        let account = match self.known_account(&account) {
            Some(account) => account,
            None => tokio::task::spawn_blocking(move || answers.account(account)).await??,
        };
        let mut log = account.log.clone().lock_owned().await;
        account.forget(&mut log, now_ms(), u64::MAX);
        let place = match self.find(&account, name.into(), asked, held) {
            Ok(begun) => return Ok(begun),
            Err(place) => place,
        };
        let outcome = tokio::task::spawn_blocking(move || kept(&log, place)).await??;
        Ok(Begun::Over(Box::new(outcome)))
    }

    /// What is known of a request; where its record is, where it is over.
    fn find(&self, account: &Arc<Account>, name: Arc<str>, asked: u64, held: &Held) -> Result<Begun, Place> {
        let mut known = account.known();
        match known.by_name.get(&name) {
            Some(state) if state.asked() != asked => Ok(Begun::Reused),
            Some(State::Runs(running)) => Ok(Begun::Again(running.outcome.clone(), running.held.upgrade())),
            Some(State::Over { place, .. }) => Err(*place),
            None => {
                let held = Arc::downgrade(held);
                Ok(Begun::First(self.ticket(account, &mut known, name, asked, held, None)))
            }
        }
    }

    fn ticket(
        &self,
        account: &Arc<Account>,
        known: &mut Known,
        name: Arc<str>,
        asked: u64,
        held: Weak<dyn Any + Send + Sync>,
        placed: Option<Placed>,
    ) -> Ticket {
        let (tell, outcome) = watch::channel(None);
        let running = Running {
            asked,
            outcome,
            held,
            placed,
        };
        known.by_name.insert(name.clone(), State::Runs(running.into()));
        Ticket {
            answers: self.clone(),
            account: account.clone(),
            name,
            asked,
            placed: placed.is_some(),
            tell,
        }
    }

    fn known_account(&self, name: &str) -> Option<Arc<Account>> {
        self.accounts().get(name).cloned()
    }

    fn account(&self, name: Arc<str>) -> io::Result<Arc<Account>> {
        let _alone = self.0.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(account) = self.known_account(&name) {
            return Ok(account);
        }
        // Nothing was left of it when this agent started.
        let log = Log::open(&self.0.folder.join(&*name), |_, _| {})?;
        let account = Account::new(log, Known::default(), self.0.bytes.clone());
        self.accounts().insert(name, account.clone());
        Ok(account)
    }

    /// Opens the files that an earlier agent left of an account. What was placed in a machine and is not over is told.
    fn open_account(&self, name: Arc<str>) -> io::Result<Vec<(MachineId, Ticket)>> {
        let (mut known, mut left) = (Known::default(), BTreeMap::new());
        let folder = self.0.folder.join(&*name);
        let log = Log::open(&folder, |place, record| {
            left.remove(&record.name);
            match record.event {
                Some(Event::Placed(machine)) => {
                    if let Ok(machine) = machine.parse().map(MachineId) {
                        left.insert(record.name, (record.asked, Placed { machine, place }));
                    }
                }
                Some(Event::Answered(_) | Event::Lost(_) | Event::Streamed(_)) => {
                    known.keep(record.name.into(), record.asked, place)
                }
                Some(Event::NotBegun(_)) | None => {}
            }
        })?;
        let account = Account::new(log, known, self.0.bytes.clone());
        let ticket = |(name, (asked, placed)): (String, (u64, Placed))| {
            let (mut known, held) = (account.known(), Weak::<()>::new());
            let ticket = self.ticket(&account, &mut known, name.into(), asked, held, Some(placed));
            (placed.machine, ticket)
        };
        let left = left.into_iter().map(ticket).collect();
        // Nobody else has it yet.
        let mut log = account.log.try_lock().map_err(io::Error::other)?;
        account.forget(&mut log, now_ms(), u64::MAX);
        if log.bytes() > 0 {
            self.accounts().insert(name, account.clone());
        } else {
            // Where there is something else in it, it stays.
            let _ = std::fs::remove_dir(folder);
        }
        drop(log);
        Ok(left)
    }

    /// Where all are too large the account that has the most loses its oldest file. Blocks.
    fn make_room(&self) {
        while self.0.bytes.load(Ordering::Relaxed) > self.0.most_bytes {
            let bytes = |account: &&Arc<Account>| account.bytes.load(Ordering::Relaxed);
            let Some(largest) = self.accounts().values().max_by_key(bytes).cloned() else {
                return;
            };
            // Who uses it makes room after that.
            let Ok(mut log) = largest.log.try_lock() else { return };
            let before = log.bytes();
            largest.forget(&mut log, now_ms(), before.saturating_sub(1));
            if log.bytes() >= before {
                // All that it has is of requests that run, or can't be removed.
                return;
            }
        }
    }

    /// Every change leaves it whole, so a panic elsewhere does no harm: as with all locks here.
    fn accounts(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Account>>> {
        self.0.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Account ===

impl Account {
    fn new(log: Log, known: Known, all_bytes: Arc<AtomicU64>) -> Arc<Self> {
        let bytes = log.bytes();
        all_bytes.fetch_add(bytes, Ordering::Relaxed);
        Arc::new(Self {
            bytes: AtomicU64::new(bytes),
            all_bytes,
            log: Arc::new(tokio::sync::Mutex::new(log)),
            known: Mutex::new(known),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is too old goes, and the oldest where there are more than so many bytes; but that a request runs is written
    /// anew. What can't be removed goes another time. Blocks.
    fn forget(&self, log: &mut Log, now_ms: u64, most_bytes: u64) {
        let forgotten = log.forget(now_ms, most_bytes).and_then(|any| match any {
            true => self.place_again(log),
            false => Ok(()),
        });
        if let Err(error) = forgotten {
            tracing::warn!(%error, "can't clear away old answers");
        }
        let (now, before) = (log.bytes(), self.bytes.swap(log.bytes(), Ordering::Relaxed));
        // By what came or went; the sum wraps as it should.
        self.all_bytes.fetch_add(now.wrapping_sub(before), Ordering::Relaxed);
    }

    /// Some of the files are gone.
    fn place_again(&self, log: &mut Log) -> io::Result<()> {
        let running = self.known().forget(log);
        for (name, asked, machine) in running {
            let place = log.append(&placed(&name, asked, machine))?;
            self.known().place(&name, Some(Placed { machine, place }));
        }
        Ok(())
    }
}

/// What came of a request, as its record says. Blocks.
fn kept(log: &Log, place: Place) -> io::Result<Outcome> {
    let damaged = |why: &dyn fmt::Display| Ok(Err(format!("its answer, which was kept, can't be read: {why}").into()));
    match log.read(place).map(|record| record.event) {
        Ok(Some(Event::Answered(answer))) => match v1::InvokeResponse::decode(answer) {
            Ok(answer) => Ok(Ok(answer)),
            Err(error) => damaged(&error),
        },
        Ok(Some(Event::Lost(why))) => Ok(Err(why.into())),
        Ok(Some(Event::Streamed(_))) => Ok(Err(NoAnswer::Streamed)),
        // Asked for once more, it would be so again.
        Ok(_) => damaged(&"it is none"),
        Err(error) if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) => {
            damaged(&error)
        }
        Err(error) => Err(error),
    }
}

/// The record that a request is to run in a machine.
fn placed(name: &str, asked: u64, machine: MachineId) -> Record {
    Record {
        name: name.to_owned(),
        asked,
        at_ms: now_ms(),
        event: Some(Event::Placed(machine.to_string())),
    }
}

// === impl NoAnswer ===

impl<T: Into<String>> From<T> for NoAnswer {
    fn from(why: T) -> Self {
        Self::Lost(why.into())
    }
}

// === impl State ===

impl State {
    fn asked(&self) -> u64 {
        match self {
            Self::Runs(running) => running.asked,
            Self::Over { asked, .. } => *asked,
        }
    }
}

// === impl Known ===

impl Known {
    fn keep(&mut self, name: Arc<str>, asked: u64, place: Place) {
        self.by_name.insert(name.clone(), State::Over { asked, place });
        self.over.push_back((place, name));
    }

    /// Where one that runs is to, nowhere where it did not begin.
    fn place(&mut self, name: &str, at: Option<Placed>) {
        if let Some(State::Runs(running)) = self.by_name.get_mut(name) {
            running.placed = at;
        }
    }

    /// Forgets those whose records are gone; but those that run are told.
    fn forget(&mut self, log: &Log) -> Vec<(Arc<str>, u64, MachineId)> {
        while let Some((place, _)) = self.over.front()
            && !log.has(*place)
            && let Some((place, name)) = self.over.pop_front()
        {
            // Not one that was asked for anew since.
            if matches!(self.by_name.get(&name), Some(State::Over { place: now, .. }) if *now == place) {
                self.by_name.remove(&name);
            }
        }
        let running = self.by_name.iter().filter_map(|(name, state)| {
            let State::Runs(running) = state else { return None };
            let Placed { machine, .. } = running.placed.filter(|placed| !log.has(placed.place))?;
            Some((name.clone(), running.asked, machine))
        });
        running.collect()
    }
}

// === impl Ticket ===

impl Ticket {
    /// The request's name in its guest.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// It is about to be run in a machine.
    ///
    /// # Errors
    ///
    /// Where that can't be noted: it must not be run then.
    pub(super) async fn placed(&mut self, machine: MachineId) -> io::Result<()> {
        self.placed = true;
        let record = placed(&self.name, self.asked, machine);
        let known = move |known: &mut Known, record: &Record, place| {
            known.place(&record.name, Some(Placed { machine, place }));
        };
        self.append(record, known).await
    }

    /// It has its answer, or was lost. Where that can't be kept, those who wait hear it all the same.
    pub(super) async fn over(self, outcome: Outcome) {
        let event = match &outcome {
            Ok(answer) => Event::Answered(answer.encode_to_vec().into()),
            Err(NoAnswer::Lost(why)) => Event::Lost(why.clone()),
            Err(NoAnswer::Streamed) => Event::Streamed(true),
        };
        let name = self.name.clone();
        let known = |known: &mut Known, record: &Record, place| known.keep(name, record.asked, place);
        if let Err(error) = self.append(self.record(event), known).await {
            tracing::error!(%error, name = &*self.name, "an answer is not kept");
        }
        self.tell.send_replace(Some(outcome));
    }

    /// It has not begun, and ends.
    pub(super) async fn not_begun(mut self) {
        let known = |known: &mut Known, record: &Record, _| known.place(&record.name, None);
        if std::mem::take(&mut self.placed)
            && let Err(error) = self.append(self.record(Event::NotBegun(true)), known).await
        {
            tracing::error!(%error, name = &*self.name, "it is not kept that a request did not begin");
        }
    }

    fn record(&self, event: Event) -> Record {
        Record {
            name: self.name.as_ref().to_owned(),
            asked: self.asked,
            at_ms: now_ms(),
            event: Some(event),
        }
    }

    /// `then` makes known what is in the files now.
    async fn append(
        &self,
        record: Record,
        then: impl FnOnce(&mut Known, &Record, Place) + Send + 'static,
    ) -> io::Result<()> {
        let (answers, account) = (self.answers.clone(), self.account.clone());
        let mut log = account.log.clone().lock_owned().await;
        let is_small = record.encoded_len() <= SMALL_BYTES;
        let append = move || {
            let place = log.append(&record)?;
            then(&mut account.known(), &record, place);
            account.forget(&mut log, now_ms(), u64::MAX);
            drop(log);
            answers.make_room();
            Ok(())
        };
        if is_small {
            append()
        } else {
            tokio::task::spawn_blocking(append).await?
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut known = self.account.known();
        let Some(State::Runs(running)) = known.by_name.get_mut(&self.name) else {
            return;
        };
        if !self.placed {
            known.by_name.remove(&self.name);
            return;
        }
        // It is not known what it came to: who asks for it hears that, and it is not run again.
        let lost = Err("the agent lost track of it".into());
        running.outcome = watch::channel(Some(lost.clone())).1;
        self.tell
            .send_if_modified(|outcome| outcome.is_none() && outcome.replace(lost).is_none());
    }
}
