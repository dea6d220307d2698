//! What this process spends for each container. It serves all of them from one thread: what one makes it do, the others wait
//! for. So its CPU time is measured task by task, rationed, and charged to whom it was spent for.
//!
//! * **Rationed** ([`Budget::throttle`]): a task that does what a container asks (its connections, its pipes, its subscribers) is
//!   not polled while the container has no tokens left ([`buckets`]), and costs nothing meanwhile: what would wake it is not
//!   looked at either ([`Source`]). A task has its turn for about [`TURN_NS`] at a time, then others have theirs ([`breathe`]).
//! * **Charged** ([`Budget::spent_ns`]): all that was spent for a container, also because the agent called it, with its share of
//!   what the thread did around that ([`charges`]). What no container caused is charged to nobody.
//!
//! A warm call draws well below 0.1 ms of the 10 ms that a container has saved up: its answer is read, its next request, and
//! what it wrote. What comes of the agent's side of a call is charged and not drawn. A call brings 1 ms with it, so that calls
//! alone never hold a container up, however closely they follow each other. Where several containers take what they can, one
//! that is called now and then does not notice them: it needs less than its part.
//!
//! To know for whom the thread works costs reading its CPU clock once for each poll of such a task.

mod buckets;
mod charges;
mod source;
mod task;

use std::cell::Cell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};

use buckets::Buckets;
use charges::{Charges, Owner};
pub(crate) use source::{Socket, Source, Wakes};
pub(crate) use task::{Owned, Throttled};

/// How long a task is at work before others have their turn, in ns.
const TURN_NS: u64 = 50_000;

/// What a call brings with it, in ns: many times what the container's side of one takes, and more than that on an emulated host.
const CALL_NS: u64 = 1_000_000;
/// What a byte of a streamed answer brings with it that its reader has asked for, in ns: likewise.
const BYTE_NS: u64 = 150;

/// A container's number among all that there have been.
type Id = u64;

/// The budgets of all containers that this thread serves. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Budgets(Arc<Mutex<State>>);

/// The budget of one container. Clones are the same; it ends with the last one.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<One>);

#[derive(Debug)]
struct One {
    id: Id,
    all: Budgets,
}

#[derive(Debug)]
struct State {
    begun: Instant,
    next: Id,
    buckets: Buckets,
    charges: Charges,
    /// What was spent so far, in ns.
    spent: HashMap<Id, u64>,
}

/// As long as it is there the thread works for somebody.
pub(crate) struct AtWork {
    all: Budgets,
    /// What was before, where that goes on afterwards.
    outer: Option<Owner>,
    turn: Turn,
}

/// Where this thread is.
#[derive(Clone, Copy)]
struct Turn {
    /// It works for somebody.
    at_work: bool,
    end: End,
}

/// When the turn of a task is over.
#[derive(Clone, Copy)]
enum End {
    Never,
    /// So long after it was first asked: each gets on in its turn, however slow this machine is.
    ToBeSet,
    At(Instant),
}

thread_local! {
    static TURN: Cell<Turn> = const { Cell::new(Turn { at_work: false, end: End::Never }) };
}

/// Whether the task that this thread polls is to let others have their turn.
pub(crate) fn turn_is_over() -> bool {
    let turn = TURN.get();
    match turn.end {
        End::Never => false,
        End::ToBeSet => {
            let end = End::At(Instant::now() + Duration::from_nanos(TURN_NS));
            TURN.set(Turn { end, ..turn });
            false
        }
        End::At(end) => Instant::now() >= end,
    }
}

/// Lets others have their turn, where this one is over.
pub(crate) async fn breathe() {
    if turn_is_over() {
        tokio::task::yield_now().await;
    }
}

// === impl Budgets ===

impl Default for Budgets {
    fn default() -> Self {
        Self(Arc::new(Mutex::new(State {
            begun: Instant::now(),
            next: 0,
            buckets: Buckets::default(),
            charges: Charges::default(),
            spent: HashMap::new(),
        })))
    }
}

impl Budgets {
    /// For one more container.
    pub(crate) fn budget(&self) -> Budget {
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        state.buckets.add(id);
        state.spent.insert(id, 0);
        Budget(Arc::new(One { id, all: self.clone() }))
    }

    /// To be called when the thread has nothing to do and is about to rest.
    pub(crate) fn rest(&self) {
        let cpu_ns = thread_cpu_ns();
        let mut state = self.state();
        state.turn_to(Owner::Around, cpu_ns, None);
        state.settle();
    }

    /// A task that is there for all that are called.
    pub(crate) fn connection<F: Future>(&self, future: F) -> Owned<F> {
        Owned::new(self.clone(), Owner::Connection, future)
    }

    /// A task that is there for no container.
    pub(crate) fn nobody<F: Future>(&self, future: F) -> Owned<F> {
        Owned::new(self.clone(), Owner::Nobody, future)
    }

    fn work_for(&self, owner: Owner) -> AtWork {
        let cpu_ns = thread_cpu_ns();
        let mut state = self.state();
        let (outer, turn) = state.begin(owner, cpu_ns, None);
        AtWork {
            all: self.clone(),
            outer,
            turn,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// === impl Budget ===

impl Budget {
    /// A task that does what the container asks, only as long as it has tokens. `wakes` is what it waits for.
    pub(crate) fn throttle<F: Future, W: Wakes>(&self, future: F, wakes: W) -> Throttled<F, W> {
        Throttled::new(self.clone(), future, wakes)
    }

    /// A task that does what the agent asks of the container.
    pub(crate) fn charge<F: Future>(&self, future: F) -> Owned<F> {
        Owned::new(self.0.all.clone(), Owner::Called(self.0.id), future)
    }

    /// The container is called: a call brings tokens for what it takes.
    pub(crate) fn grant_call(&self) {
        self.grant(CALL_NS);
    }

    /// So much of a streamed answer was passed on: how fast it goes is for its reader to say.
    pub(crate) fn grant_bytes(&self, bytes: usize) {
        self.grant(BYTE_NS.saturating_mul(bytes as u64));
    }

    fn grant(&self, ns: u64) {
        let mut state = self.0.all.state();
        let now_ns = state.ns(Instant::now());
        state.buckets.grant(self.0.id, now_ns, ns);
    }

    /// What is done until this is dropped is done because the agent asks it of the container.
    pub(crate) fn charge_now(&self) -> AtWork {
        self.0.all.work_for(Owner::Called(self.0.id))
    }

    /// CPU time of this thread that was spent for the container so far, in ns.
    pub(crate) fn spent_ns(&self) -> u64 {
        let cpu_ns = thread_cpu_ns();
        let mut state = self.0.all.state();
        let owner = state.charges.owner();
        state.turn_to(owner, cpu_ns, None);
        state.settle();
        state.spent.get(&self.0.id).copied().unwrap_or(0)
    }

    /// Whether it has no tokens left.
    #[cfg(test)]
    pub(crate) fn is_spent(&self) -> bool {
        let mut state = self.0.all.state();
        let now_ns = state.ns(Instant::now());
        state.buckets.wait(self.0.id, now_ns).is_some()
    }

    /// Begins a turn of a task of the container's; or how long it has to wait for one.
    fn turn(&self) -> Result<AtWork, Duration> {
        let (cpu_ns, now) = (thread_cpu_ns(), Instant::now());
        let mut state = self.0.all.state();
        let owner = Owner::Served(self.0.id);
        let outer = state.begin(owner, cpu_ns, Some(now));
        let now_ns = state.ns(now);
        let wait = state.buckets.wait(self.0.id, now_ns);
        drop(state);
        let (outer, turn) = outer;
        // Dropped at once where there is no turn.
        let work = AtWork {
            all: self.0.all.clone(),
            outer,
            turn,
        };
        match wait {
            None => Ok(work),
            Some(ns) => Err(Duration::from_nanos(ns)),
        }
    }
}

impl Drop for One {
    fn drop(&mut self) {
        let mut state = self.all.state();
        // What is not settled yet is nobody's.
        state.spent.remove(&self.id);
        let now_ns = state.ns(Instant::now());
        state.buckets.remove(self.id, now_ns);
    }
}

// === impl State ===

impl State {
    /// Somebody is at work, within what another is at or not. What was before.
    fn begin(&mut self, owner: Owner, cpu_ns: u64, turn: Option<Instant>) -> (Option<Owner>, Turn) {
        let before = TURN.get();
        let outer = before.at_work.then(|| self.charges.owner());
        TURN.set(Turn {
            at_work: true,
            end: turn.map_or(before.end, |_| End::ToBeSet),
        });
        self.turn_to(owner, cpu_ns, turn);
        if self.charges.is_long() {
            self.settle();
        }
        (outer, before)
    }

    fn turn_to(&mut self, owner: Owner, cpu_ns: u64, now: Option<Instant>) {
        if let (Owner::Served(id), spent) = self.charges.turn_to(owner, cpu_ns) {
            let now_ns = self.ns(now.unwrap_or_else(Instant::now));
            self.buckets.draw(id, now_ns, spent);
        }
    }

    fn settle(&mut self) {
        let Self {
            begun,
            buckets,
            charges,
            spent,
            ..
        } = self;
        let mut now_ns = None;
        charges.settle(|charge| {
            if let Some(spent) = spent.get_mut(&charge.id) {
                *spent += charge.ns;
            }
            if charge.around {
                let now_ns = *now_ns.get_or_insert_with(|| ns(begun.elapsed()));
                buckets.draw(charge.id, now_ns, charge.ns);
            }
        });
    }

    fn ns(&self, now: Instant) -> u64 {
        ns(now.saturating_duration_since(self.begun))
    }
}

// === impl AtWork ===

impl Drop for AtWork {
    fn drop(&mut self) {
        TURN.set(self.turn);
        if let Some(outer) = self.outer {
            let cpu_ns = thread_cpu_ns();
            self.all.state().turn_to(outer, cpu_ns, None);
        }
    }
}

/// CPU time of this thread so far, in ns.
fn thread_cpu_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(0, |time| ns(time.into()))
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
