//! The thread that hears when machines' levels of credits change, and holds those that fall to what they may use.
//!
//! What falls is held here and at once, as its account says, and the event loop learns of it afterwards: its own threads, which are
//! scheduled as any others, may have to wait on a host that is busy. A level that rises is left to the loop.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::EventFd;
use nix::sys::time::TimeSpec;
use stoker_credits::{Account, Class};
use stoker_ebpf::{CgroupId, Ledger};
use stoker_linux::sched::Policy;
use tokio::sync::Notify;
use ulid::Ulid;

use super::credits::{lock, now_ns};
use super::near::Near;
use crate::watcher::Watcher;

/// It takes their CPUs from all machines, and briefly.
const URGENT: Policy = Policy::Fifo { priority: 2 };

/// How many machines are held here within [`PERIOD`], at most, so that this thread leaves the host most of a CPU: each takes up to about half
/// a millisecond. Those beyond are left to the event loop.
const MOST_HELD: u32 = 50;
const PERIOD: Duration = Duration::from_millis(100);

/// Lets a machine run by a class and use so much of the host's CPUs, in thousandths of one. Says whether it does.
pub type Hold = dyn Fn(Class, u32) -> bool + Send + Sync;

/// A machine's level changed.
#[derive(Clone, Copy, Debug)]
pub struct Crossing {
    /// The machine.
    pub machine: Ulid,
    /// Its account after the last change.
    pub account: Account,
    /// It was held to what the account says, so long after its level had fallen. Of several times the longest.
    pub held: Option<Duration>,
}

/// The thread, until this is dropped, and what it has heard.
#[derive(Debug)]
pub(super) struct Levels {
    shared: Arc<Shared>,
    _watcher: Watcher,
}

#[derive(Debug, Default)]
struct Shared {
    machines: Mutex<HashMap<CgroupId, Machine>>,
    untold: Mutex<HashMap<Ulid, Crossing>>,
    news: Notify,
}

#[derive(Clone)]
struct Machine {
    id: Ulid,
    hold: Option<Arc<Hold>>,
}

struct Watch {
    ledger: Arc<Ledger>,
    shared: Arc<Shared>,
    near: Near,
    budget: Budget,
}

/// How many more may be held until when.
struct Budget {
    left: u32,
    until: Instant,
}

// === impl Levels ===

impl Levels {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where there can be no more threads.
    pub(super) fn start(ledger: Arc<Ledger>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let mut watch = Watch {
            near: Near::new(ledger.clone()),
            ledger,
            shared: shared.clone(),
            budget: Budget {
                left: MOST_HELD,
                until: Instant::now() + PERIOD,
            },
        };
        let watcher = Watcher::start("credits", move |stop| {
            if let Err(error) = URGENT.apply(0) {
                tracing::debug!(%error, "changes of machines' levels may be seen late on a busy host");
            }
            if let Err(error) = watch.run(stop) {
                tracing::error!(%error, "it is not heard any more how machines' credits change");
            }
        })?;
        Ok(Self {
            shared,
            _watcher: watcher,
        })
    }

    /// Tells of a machine from now on.
    pub(super) fn add(&self, counted: CgroupId, machine: Ulid) {
        let machine = Machine {
            id: machine,
            hold: None,
        };
        lock(&self.shared.machines).insert(counted, machine);
    }

    /// Has a machine held so when its level falls.
    pub(super) fn hold_by(&self, counted: CgroupId, hold: Arc<Hold>) {
        if let Some(machine) = lock(&self.shared.machines).get_mut(&counted) {
            machine.hold = Some(hold);
        }
    }

    /// Tells of a machine no more.
    pub(super) fn remove(&self, counted: CgroupId) {
        let removed = lock(&self.shared.machines).remove(&counted);
        if let Some(machine) = removed {
            lock(&self.shared.untold).remove(&machine.id);
        }
    }

    /// Resolves once there may be something to [take](Self::take).
    pub(super) async fn news(&self) {
        self.shared.news.notified().await;
    }

    /// What has changed since the last call.
    pub(super) fn take(&self) -> HashMap<Ulid, Crossing> {
        std::mem::take(&mut lock(&self.shared.untold))
    }
}

// === impl Watch ===

impl Watch {
    fn run(&mut self, stop: &EventFd) -> io::Result<()> {
        loop {
            let due = self.near.due();
            let timeout = due.map(|due| TimeSpec::from(due.saturating_duration_since(Instant::now())));
            let mut waits = [stop.as_fd(), self.ledger.near(), self.ledger.crossings()]
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match ppoll(&mut waits, timeout, None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [stop, ..] = &waits;
            if stop.any() == Some(true) {
                return Ok(());
            }
            self.near.hear();
            self.near.look_at_due();
            self.hear();
        }
    }

    /// Takes what crossings the ledger tells of; the last of each machine counts.
    fn hear(&mut self) {
        let mut crossed: HashMap<CgroupId, (Account, bool)> = HashMap::new();
        self.ledger.drain(|crossing| {
            let fell = crossing.to < crossing.from;
            let (account, fell_before) = crossed.entry(crossing.owner).or_insert((crossing.account, false));
            (*account, *fell_before) = (crossing.account, fell || *fell_before);
        });
        if crossed.is_empty() {
            return;
        }
        for (counted, (account, fell)) in crossed {
            let Some(machine) = lock(&self.shared.machines).get(&counted).cloned() else {
                continue;
            };
            let held = machine
                .hold
                .filter(|_| fell)
                .and_then(|hold| self.hold(counted, &account, &*hold));
            self.shared.tell(Crossing {
                machine: machine.id,
                account,
                held,
            });
        }
        // Also where nothing is to be told: some may have been lost.
        self.shared.news.notify_one();
    }

    /// Holds a machine to what it may use now, and says how long after its fall that was.
    fn hold(&mut self, counted: CgroupId, fell: &Account, hold: &Hold) -> Option<Duration> {
        let (terms, account) = self.ledger.account(counted).ok()??;
        let class = account.level().class();
        // As plenty as before, and whether it comes before others is not known here.
        if class == Class::High || !self.budget.take() {
            return None;
        }
        hold(class, account.allowed_millis(&terms))
            .then(|| Duration::from_nanos(now_ns().saturating_sub(fell.settled_ns())))
    }
}

// === impl Budget ===

impl Budget {
    fn take(&mut self) -> bool {
        let now = Instant::now();
        if now >= self.until {
            *self = Self {
                left: MOST_HELD,
                until: now + PERIOD,
            };
        }
        let left = self.left.checked_sub(1);
        self.left = left.unwrap_or(0);
        left.is_some()
    }
}

// === impl Shared ===

impl Shared {
    fn tell(&self, crossing: Crossing) {
        let mut untold = lock(&self.untold);
        let before = untold.get(&crossing.machine).and_then(|before| before.held);
        let held = crossing.held.max(before);
        untold.insert(crossing.machine, Crossing { held, ..crossing });
    }
}

// === impl Machine ===

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("id", &self.id).finish_non_exhaustive()
    }
}
