//! Has machines charged in time whose level of credits may fall.
//!
//! The kernel charges a thread that runs on at its ticks alone, which are up to 10 ms apart; so late a change of level would be seen. The
//! ledger tells where that may be ([`Ledger::near`]): then its threads are charged when its credits may be spent
//! ([`Ledger::charge`]), and again as long as the machine runs on. Else there is nothing to do, and it costs nothing.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_credits::Terms;
use stoker_ebpf::{CgroupId, Ledger, LedgerError};

/// How often a machine is looked at, at most: so much later its change of level is seen.
const PAUSE: Duration = Duration::from_millis(1);

/// The machines that run near to a lower level.
pub(super) struct Near {
    ledger: Arc<Ledger>,
    /// What machines that run on had spent when they were looked at last, in ps.
    running: HashMap<CgroupId, u128>,
    /// When each of them is looked at.
    looks: BinaryHeap<Reverse<(Instant, CgroupId)>>,
}

impl Near {
    pub(super) fn new(ledger: Arc<Ledger>) -> Self {
        Self {
            ledger,
            running: HashMap::new(),
            looks: BinaryHeap::new(),
        }
    }

    /// When the next machine is to be looked at.
    pub(super) fn due(&self) -> Option<Instant> {
        self.looks.peek().map(|Reverse((due, _))| *due)
    }

    /// Takes up the machines that the ledger tells of.
    pub(super) fn hear(&mut self) {
        let ledger = self.ledger.clone();
        ledger.drain_near(|machine, left_ns| self.told(machine, left_ns));
    }

    /// Has those charged whose time has come.
    pub(super) fn look_at_due(&mut self) {
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
