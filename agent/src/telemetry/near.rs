//! Has machines charged in time whose level of credits may fall.
//!
//! The kernel charges a thread that runs on at its ticks alone, which are up to 10 ms apart; so late a change of level would be seen. The
//! ledger tells where that may be ([`Ledger::near`]): then its threads are charged when its credits may be spent
//! ([`Ledger::charge`]), and again as long as the machine runs on. Else this waits, and costs nothing.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::time::TimeSpec;
use stoker_credits::Terms;
use stoker_ebpf::{CgroupId, Ledger, LedgerError};
use stoker_linux::sched::Policy;

/// How often a machine is looked at, at most: so much later its change of level is seen.
const PAUSE: Duration = Duration::from_millis(1);

/// It takes their CPUs from all machines, and briefly.
const URGENT: Policy = Policy::Fifo { priority: 2 };

/// The thread that does this, until it is dropped.
#[derive(Debug)]
pub(super) struct Near {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

struct Watch {
    ledger: Arc<Ledger>,
    stop: Arc<EventFd>,
    /// What machines that run on had spent when they were looked at last, in ps.
    running: HashMap<CgroupId, u128>,
    /// When each of them is looked at.
    looks: BinaryHeap<Reverse<(Instant, CgroupId)>>,
}

// === impl Near ===

impl Near {
    /// Starts it.
    ///
    /// # Errors
    /// Where there can be no more threads.
    pub(super) fn start(ledger: Arc<Ledger>) -> io::Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let mut watch = Watch {
            ledger,
            stop: stop.clone(),
            running: HashMap::new(),
            looks: BinaryHeap::new(),
        };
        let thread = thread::Builder::new().name("credits".into()).spawn(move || {
            if let Err(error) = URGENT.apply(0) {
                tracing::debug!(%error, "changes of machines' levels may be seen late on a busy host");
            }
            if let Err(error) = watch.run() {
                tracing::error!(%error, "changes of machines' levels are seen at the kernel's ticks alone");
            }
        })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Near {
    fn drop(&mut self) {
        let stopped = self.stop.write(1);
        if let (Ok(_), Some(thread)) = (stopped, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

// === impl Watch ===

impl Watch {
    fn run(&mut self) -> io::Result<()> {
        loop {
            let due = self.looks.peek().map(|Reverse((due, _))| *due);
            let timeout = due.map(|due| TimeSpec::from(due.saturating_duration_since(Instant::now())));
            let ledger = self.ledger.clone();
            let mut waits = [self.stop.as_fd(), ledger.near()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
            match ppoll(&mut waits, timeout, None) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [stop, _] = &waits;
            if stop.any() == Some(true) {
                return Ok(());
            }
            ledger.drain_near(|machine, left_ns| self.told(machine, left_ns));
            self.look_at_due();
        }
    }

    /// A machine runs, and may use so much CPU time until its level falls.
    fn told(&mut self, machine: CgroupId, left_ns: u64) {
        if self.running.contains_key(&machine) {
            return;
        }
        if let Ok(Some((terms, account))) = self.ledger.account(machine) {
            self.running.insert(machine, account.totals().spent.get());
            self.look_after(machine, left_ns, &terms);
        }
    }

    fn look_at_due(&mut self) {
        let now = Instant::now();
        while let Some(&Reverse((due, machine))) = self.looks.peek() {
            if due > now {
                break;
            }
            self.looks.pop();
            if let Err(error) = self.look(machine) {
                tracing::debug!(%machine, %error, "not looked at any more");
                self.running.remove(&machine);
            }
        }
    }

    /// Has a machine charged, and looks at it again where it runs on near to another level.
    fn look(&mut self, machine: CgroupId) -> Result<(), LedgerError> {
        self.ledger.charge(machine)?;
        // From now on it is told of again.
        let account = self.ledger.settle_account(machine)?;
        let spent = account.totals().spent.get();
        let runs = self.running.insert(machine, spent) != Some(spent);
        match self.ledger.account(machine)? {
            Some((terms, _)) if runs && self.ledger.is_near(&account, &terms) => {
                self.look_after(machine, account.slack_ns(&terms), &terms);
            }
            _ => {
                self.running.remove(&machine);
            }
        }
        Ok(())
    }

    /// Looks at it when it has used so much, if all its vCPUs run.
    fn look_after(&mut self, machine: CgroupId, left_ns: u64, terms: &Terms) {
        let full = u64::from(terms.full_millis().max(1));
        let soonest = Duration::from_nanos(left_ns.saturating_mul(1000) / full);
        self.looks.push(Reverse((Instant::now() + soonest.max(PAUSE), machine)));
    }
}
