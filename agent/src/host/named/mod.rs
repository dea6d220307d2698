//! Requests that their callers gave an id: of a function, each id is one invocation, however often it is asked for, and by
//! whichever agent. Its answer is kept for ten minutes, as long as there is room for it.
//!
//! ```text
//!  begin ──First──► Ticket ── placed ──► over ──► log
//!    └─────Again──► waits for that, or reads the log
//! ```
//!
//! Each account has files of its own ([`log`]); where all together are too large, the account that has the most loses its
//! oldest.

mod log;
#[cfg(test)]
mod tests;

use std::any::Any;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use stoker_policy::MachineId;
use stoker_proto::v1;
use tokio::sync::watch;

use self::log::{Event, Log, Place, Record};
use super::listing;

/// All of them; clones share it.
#[derive(Clone, Debug)]
pub(super) struct Named(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    folder: PathBuf,
    /// How large the files may be together, in bytes.
    most_bytes: u64,
    accounts: Mutex<HashMap<Arc<str>, Arc<Account>>>,
    /// Held while the files of an account are opened.
    opening: Mutex<()>,
}

/// Those of one account. Its files are read and written by threads that may block; what it knows is never locked for long.
#[derive(Debug)]
struct Account {
    log: Mutex<Log>,
    /// Of the files together.
    bytes: AtomicU64,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    by_name: HashMap<String, State>,
    /// Those that are over, in the order of their records.
    over: VecDeque<(Place, String)>,
}

#[derive(Debug)]
enum State {
    Runs {
        asked: u64,
        outcome: watch::Receiver<Option<Outcome>>,
        held: Weak<dyn Any + Send + Sync>,
    },
    Over {
        asked: u64,
        place: Place,
    },
}

/// Requests that were placed in a machine and are not over, with what was asked.
type Placed = BTreeMap<String, (MachineId, u64)>;

/// What a request came to: its answer, or why it has none although it may have run.
pub(super) type Outcome = Result<v1::InvokeResponse, String>;

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

/// A request that runs. Dropped before it is over, it may be asked for anew.
#[derive(Debug)]
pub(super) struct Ticket {
    named: Named,
    account: Arc<Account>,
    name: String,
    asked: u64,
    /// It may be running in a machine, as far as the files tell.
    placed: bool,
    tell: watch::Sender<Option<Outcome>>,
}

// === impl Named ===

impl Named {
    /// Opens the files of all accounts in a folder, with the requests that an earlier agent left in machines. Blocks.
    ///
    /// # Errors
    ///
    /// Where they can't be read, or new ones not be made.
    pub(super) fn open(folder: &Path, most_bytes: u64) -> io::Result<(Self, BTreeMap<MachineId, Vec<Ticket>>)> {
        crate::files::make_private_dir(folder)?;
        let named = Self(Arc::new(Inner {
            folder: folder.to_owned(),
            most_bytes,
            accounts: Mutex::default(),
            opening: Mutex::default(),
        }));
        let mut left: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for entry in std::fs::read_dir(folder)? {
            let Some(name) = entry?.file_name().to_str().map(Arc::<str>::from) else {
                continue;
            };
            let (account, placed) = named.open_account(name)?;
            for (name, (machine, asked)) in placed {
                let held = Weak::<()>::new();
                let mut ticket = named.ticket(&account, &mut account.known(), name, asked, held);
                ticket.placed = true;
                left.entry(machine).or_default().push(ticket);
            }
        }
        Ok((named, left))
    }

    /// Somebody asks for a request; `asked` says what, and `held` is dropped where nobody waits any more.
    ///
    /// # Errors
    ///
    /// Where the files of the account can't be used.
    pub(super) async fn begin(&self, account: Arc<str>, name: String, asked: u64, held: &Held) -> io::Result<Begun> {
        let (named, held) = (self.clone(), Arc::downgrade(held));
        tokio::task::spawn_blocking(move || named.begin_blocking(account, name, asked, held)).await?
    }

    fn begin_blocking(
        &self,
        account: Arc<str>,
        name: String,
        asked: u64,
        held: Weak<dyn Any + Send + Sync>,
    ) -> io::Result<Begun> {
        let account = self.account(account)?;
        let mut log = account.log();
        account.forget(&mut log, now_ms(), u64::MAX)?;
        let mut known = account.known();
        let place = match known.by_name.get(&name) {
            Some(State::Runs { asked: before, .. } | State::Over { asked: before, .. }) if *before != asked => {
                return Ok(Begun::Reused);
            }
            Some(State::Runs { outcome, held, .. }) => return Ok(Begun::Again(outcome.clone(), held.upgrade())),
            Some(State::Over { place, .. }) => *place,
            None => return Ok(Begun::First(self.ticket(&account, &mut known, name, asked, held))),
        };
        drop(known);
        match log.read(place)?.event {
            Some(Event::Answered(answer)) => Ok(Begun::Over(Box::new(Ok(*answer)))),
            Some(Event::Lost(why)) => Ok(Begun::Over(Box::new(Err(why)))),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    fn ticket(
        &self,
        account: &Arc<Account>,
        known: &mut Known,
        name: String,
        asked: u64,
        held: Weak<dyn Any + Send + Sync>,
    ) -> Ticket {
        let (tell, outcome) = watch::channel(None);
        let runs = State::Runs { asked, outcome, held };
        known.by_name.insert(name.clone(), runs);
        Ticket {
            named: self.clone(),
            account: account.clone(),
            name,
            asked,
            placed: false,
            tell,
        }
    }

    fn account(&self, name: Arc<str>) -> io::Result<Arc<Account>> {
        let known = || self.accounts().get(&name).cloned();
        if let Some(account) = known() {
            return Ok(account);
        }
        let _alone = self.0.opening.lock().unwrap_or_else(PoisonError::into_inner);
        match known() {
            Some(account) => Ok(account),
            None => Ok(self.open_account(name)?.0),
        }
    }

    /// Opens an account's files. What of it was placed in which machine and is not over is told with what was asked.
    fn open_account(&self, name: Arc<str>) -> io::Result<(Arc<Account>, Placed)> {
        let (log, records) = Log::open(&self.0.folder.join(&*name))?;
        let (mut known, mut placed) = (Known::default(), BTreeMap::new());
        for (place, record) in records {
            placed.remove(&record.name);
            match record.event {
                Some(Event::Placed(machine)) => {
                    if let Ok(machine) = machine.parse() {
                        placed.insert(record.name, (MachineId(machine), record.asked));
                    }
                }
                Some(Event::Answered(_) | Event::Lost(_)) => known.keep(record.name, record.asked, place),
                Some(Event::NotBegun(_)) | None => {}
            }
        }
        let account = Arc::new(Account {
            bytes: AtomicU64::new(log.bytes()),
            log: Mutex::new(log),
            known: Mutex::new(known),
        });
        self.accounts().insert(name, account.clone());
        Ok((account, placed))
    }

    /// Where all are too large the account that has the most loses its oldest file. Blocks.
    fn make_room(&self) -> io::Result<()> {
        loop {
            let accounts: Vec<_> = self.accounts().values().cloned().collect();
            let bytes = |account: &Arc<Account>| account.bytes.load(Ordering::Relaxed);
            if accounts.iter().map(bytes).sum::<u64>() <= self.0.most_bytes {
                return Ok(());
            }
            let Some(largest) = accounts.into_iter().max_by_key(bytes) else {
                return Ok(());
            };
            let mut log = largest.log();
            let less = log.bytes().saturating_sub(1);
            largest.forget(&mut log, 0, less)?;
        }
    }

    /// Every change leaves it whole, so a panic elsewhere does no harm: as with all locks here.
    fn accounts(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Account>>> {
        self.0.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Account ===

impl Account {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is too old goes, and the oldest where there are more than so many bytes. Blocks.
    fn forget(&self, log: &mut Log, now_ms: u64, most_bytes: u64) -> io::Result<()> {
        let forgotten = log.forget(now_ms, most_bytes);
        self.bytes.store(log.bytes(), Ordering::Relaxed);
        self.known().forget(log);
        forgotten
    }
}

// === impl Known ===

impl Known {
    fn keep(&mut self, name: String, asked: u64, place: Place) {
        self.by_name.insert(name.clone(), State::Over { asked, place });
        self.over.push_back((place, name));
    }

    /// Those whose records are gone.
    fn forget(&mut self, log: &Log) {
        while let Some((place, _)) = self.over.front()
            && !log.has(*place)
            && let Some((place, name)) = self.over.pop_front()
        {
            // Not one that was asked for anew since.
            if matches!(self.by_name.get(&name), Some(State::Over { place: now, .. }) if *now == place) {
                self.by_name.remove(&name);
            }
        }
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
        self.append(Event::Placed(machine.to_string()), false).await?;
        self.placed = true;
        Ok(())
    }

    /// It has its answer, or was lost. Where that can't be kept, those who wait hear it all the same.
    pub(super) async fn over(self, outcome: Outcome) {
        let event = match &outcome {
            Ok(answer) => Event::Answered(Box::new(answer.clone())),
            Err(why) => Event::Lost(why.clone()),
        };
        if let Err(error) = self.append(event, true).await {
            tracing::error!(%error, name = self.name, "an answer is not kept");
        }
        self.tell.send_replace(Some(outcome));
    }

    /// It has not begun, and ends.
    pub(super) async fn not_begun(self) {
        if self.placed
            && let Err(error) = self.append(Event::NotBegun(true), false).await
        {
            tracing::error!(%error, name = self.name, "it is not kept that a request did not begin");
        }
    }

    async fn append(&self, event: Event, over: bool) -> io::Result<()> {
        let record = Record {
            name: self.name.clone(),
            asked: self.asked,
            at_ms: now_ms(),
            event: Some(event),
        };
        let (named, account) = (self.named.clone(), self.account.clone());
        let append = move || {
            let mut log = account.log();
            let place = log.append(&record)?;
            if over {
                account.known().keep(record.name, record.asked, place);
            }
            account.forget(&mut log, record.at_ms, u64::MAX)?;
            drop(log);
            named.make_room()
        };
        tokio::task::spawn_blocking(append).await?
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut known = self.account.known();
        if matches!(known.by_name.get(&self.name), Some(State::Runs { .. })) {
            known.by_name.remove(&self.name);
        }
    }
}

fn now_ms() -> u64 {
    u64::try_from(listing::since_1970(SystemTime::now()).as_millis()).unwrap_or(u64::MAX)
}
