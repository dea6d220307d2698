//! What the thread that serves all containers spends on each of them: counted for it, and bounded.
//!
//! A container makes work for PID 1 by all that it does towards it: requests, connections, what it writes, its telemetry. That
//! work runs in tasks of this one thread. [`Budget::paced`] is around each of them: it counts the thread's CPU time of every
//! turn for the container, so that it is part of what the container has used, and lets a container that takes more than its
//! part wait, while others have their turns at once. It costs a reading of the thread's clock a turn, and nothing while there
//! is nothing to do.
//!
//! Every task of the thread is one of these, or [`uncounted`]: the time between two readings is the container's whose turn ends
//! with the second, for what the kernel did to wake the thread, and the runtime to find the task, was for it.
//!
//! A container that has rested may take 10 ms at once, and so much again with each invocation; a warm call takes a fraction of
//! one. Else it has at most a quarter of the thread's time in the long run. A task that has to wait books its turn, which it then
//! has whatever happens until then: none of them starves, however slow the host is.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep};

/// The part of the thread's time that a container may have in the long run: one in so many.
const PART: u32 = 4;
/// What a container that has rested may take at once.
const AT_ONCE: Duration = Duration::from_millis(10);
/// What a booked turn is taken to cost. Its part of the time is as fine as the runtime's timers are, 1 ms.
const BOOKED: Duration = Duration::from_micros(250);
/// How long a connection is read from before others have their turns.
const TURN: Duration = Duration::from_micros(50);

/// What a container has taken, by the generic cell rate algorithm (ITU-T I.371, virtual scheduling). Times are since a fixed
/// moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Account {
    /// When all that it has taken is made up for.
    even: Duration,
}

/// The budget of one container. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    made: Instant,
    account: Mutex<Account>,
    spent_ns: AtomicU64,
}

/// Work for a container whose cost is counted for it.
pub(crate) struct Counted<F> {
    budget: Budget,
    work: Pin<Box<F>>,
}

/// The same, which waits where the container has taken more than its part.
pub(crate) struct Paced<F> {
    counted: Counted<F>,
    /// When its turn is.
    turn: Option<Pin<Box<Sleep>>>,
}

/// How far a turn is.
#[derive(Clone, Copy)]
enum Turn {
    None,
    /// Nothing was asked of it yet.
    New,
    /// It was asked first whether it may go on.
    Since(std::time::Instant),
}

thread_local! {
    /// The CPU time of this thread when it was last read, in ns.
    static READ: Cell<u64> = const { Cell::new(0) };
    /// The turn that a container has in this thread.
    static NOW: Cell<Turn> = const { Cell::new(Turn::None) };
    /// Something was passed on in it that the agent waits for.
    static PASSED_ON: Cell<bool> = const { Cell::new(false) };
}

// === impl Account ===

impl Account {
    /// Whether a turn may begin now; else when the one is that is booked with this.
    fn begin(&mut self, now: Duration) -> Result<(), Duration> {
        let free = self.even.saturating_sub(AT_ONCE.saturating_mul(PART));
        if free <= now {
            return Ok(());
        }
        let booked = BOOKED.saturating_mul(PART);
        self.even = self.even.saturating_add(booked);
        Err(free.saturating_add(booked))
    }

    /// A booked turn begins: it is to cost what it costs.
    fn begin_booked(&mut self) {
        self.even = self.even.saturating_sub(BOOKED.saturating_mul(PART));
    }

    /// What was taken is forgiven.
    fn refill(&mut self, now: Duration) {
        self.even = self.even.min(now);
    }

    /// A turn has ended and has cost so much.
    fn end(&mut self, cost: Duration, now: Duration) {
        self.even = self.even.max(now).saturating_add(cost.saturating_mul(PART));
    }
}

// === impl Budget ===

impl Default for Budget {
    fn default() -> Self {
        Self(Arc::new(Inner {
            made: Instant::now(),
            account: Mutex::default(),
            spent_ns: AtomicU64::new(0),
        }))
    }
}

impl Budget {
    /// CPU time that was spent on the container, in ns.
    pub(crate) fn spent_ns(&self) -> u64 {
        self.0.spent_ns.load(Ordering::Relaxed)
    }

    /// An invocation brings with it what may be taken at once: calls that follow each other without a pause never wait.
    pub(crate) fn refill(&self) {
        self.account().refill(self.0.made.elapsed());
    }

    /// Counts what `work` costs, and lets it wait for its turn.
    pub(crate) fn paced<F: Future>(&self, work: F) -> Paced<F> {
        Paced {
            counted: self.counted(work),
            turn: None,
        }
    }

    /// Counts what `work` costs. It is bounded, or the agent's wish.
    pub(crate) fn counted<F: Future>(&self, work: F) -> Counted<F> {
        Counted {
            budget: self.clone(),
            work: Box::pin(work),
        }
    }

    /// Whether a turn may begin now; else when the booked one is.
    fn begin(&self) -> Result<(), Instant> {
        let made = self.0.made;
        self.account().begin(made.elapsed()).map_err(|at| made + at)
    }

    /// A turn has ended.
    fn end(&self) {
        let cost = Duration::from_nanos(self.count());
        self.account().end(cost, self.0.made.elapsed());
    }

    fn account(&self) -> MutexGuard<'_, Account> {
        self.0.account.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts what the thread has used since it was last looked at, in ns.
    fn count(&self) -> u64 {
        let cost = lap();
        self.0.spent_ns.fetch_add(cost, Ordering::Relaxed);
        cost
    }
}

/// The CPU time that this thread has used since this was last called in it, in ns.
fn lap() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)
        .map(Duration::from)
        .map_or(0, |time| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    now.saturating_sub(READ.replace(now))
}

/// Whether the turn that a container has now has been long enough: what can go on later is to do so. Never the first time that
/// a turn is asked, so that each gets on.
pub(crate) fn turn_is_over() -> bool {
    match NOW.get() {
        Turn::None => false,
        Turn::New => {
            NOW.set(Turn::Since(std::time::Instant::now()));
            false
        }
        Turn::Since(begun) => begun.elapsed() > TURN,
    }
}

/// In this turn something was passed on that the agent has granted room for, a part of a streamed answer. It brings with it what
/// an invocation does: how fast a stream goes is for its reader to say.
pub(crate) fn passed_on() {
    PASSED_ON.set(true);
}

/// Work that is for no container.
pub(crate) async fn uncounted<F: Future>(work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        let polled = work.as_mut().poll(cx);
        lap();
        polled
    })
    .await
}

/// Spawns work that is for no container.
pub(crate) fn spawn_uncounted<F>(work: F) -> JoinHandle<F::Output>
where
    F: Future<Output: Send> + Send + 'static,
{
    tokio::spawn(uncounted(work))
}

// === impl Counted ===

impl<F: Future> Future for Counted<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let polled = self.work.as_mut().poll(cx);
        self.budget.count();
        polled
    }
}

// === impl Paced ===

impl<F: Future> Future for Paced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = &mut *self;
        let budget = &this.counted.budget;
        if this.turn.is_none() {
            this.turn = budget.begin().err().map(|at| Box::pin(tokio::time::sleep_until(at)));
        }
        if let Some(turn) = &mut this.turn {
            if turn.as_mut().poll(cx).is_pending() {
                // What woke it before its time is the container's doing.
                budget.end();
                return Poll::Pending;
            }
            this.turn = None;
            budget.account().begin_booked();
        }
        NOW.set(Turn::New);
        PASSED_ON.set(false);
        let polled = this.counted.work.as_mut().poll(cx);
        NOW.set(Turn::None);
        budget.end();
        if PASSED_ON.replace(false) {
            budget.refill();
        }
        polled
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn us(us: u64) -> Duration {
        Duration::from_micros(us)
    }

    #[test]
    fn one_that_wants_all_gets_a_quarter() {
        let (mut account, mut now, mut had) = (Account::default(), Duration::ZERO, Duration::ZERO);
        while now < Duration::from_secs(10) {
            match account.begin(now) {
                Ok(()) => {
                    had += TURN;
                    now += TURN;
                    account.end(TURN, now);
                }
                Err(at) => {
                    assert!(at > now, "who waits does so for a time that comes");
                    now = at;
                    account.begin_booked();
                    had += TURN;
                    account.end(TURN, now);
                }
            }
        }
        let thousandths = had.as_micros() * 1000 / now.as_micros();
        assert!((245..=255).contains(&thousandths), "{thousandths}");
    }

    #[test]
    fn one_that_takes_less_than_its_part_never_waits() {
        let mut calm = Account::default();
        for round in 0..100_000 {
            let now = Duration::from_millis(1) * round;
            calm.begin(now).unwrap();
            calm.end(us(240), now);
        }
    }

    #[test]
    fn after_a_rest_there_is_time_at_once_again() {
        let mut account = Account::default();
        account.end(Duration::from_millis(30), Duration::ZERO);
        assert_eq!(account.begin(Duration::ZERO), Err(Duration::from_millis(81)));
        assert_eq!(
            account.begin(Duration::ZERO),
            Err(Duration::from_millis(82)),
            "each has a turn of its own"
        );
        account.begin_booked();
        account.begin_booked();
        let now = Duration::from_millis(120);
        for _ in 0..10 {
            account.begin(now).unwrap();
            account.end(Duration::from_millis(1), now);
        }
        account.end(Duration::from_millis(1), now);
        assert!(account.begin(now).is_err());
        // So there is with each invocation.
        account.refill(now);
        account.end(AT_ONCE, now);
        account.begin(now).unwrap();
        account.end(us(1), now);
        assert!(account.begin(now).is_err());
    }

    proptest! {
        /// Whatever turns cost, by any moment a container has had at most its part, what may be taken at once, and one turn.
        #[test]
        fn nobody_gets_more(costs in prop::collection::vec(1u64..5_000, 1..8), turns in 1usize..400) {
            let (mut account, mut now, mut had) = (Account::default(), Duration::ZERO, Duration::ZERO);
            for turn in 0..turns {
                if let Err(at) = account.begin(now) {
                    prop_assert!(at > now);
                    now = at;
                    account.begin_booked();
                }
                prop_assert!(had <= AT_ONCE + now / PART, "{had:?} of {now:?}");
                let cost = us(costs[turn % costs.len()]);
                had += cost;
                now += cost;
                account.end(cost, now);
            }
        }
    }

    #[tokio::test]
    async fn what_a_task_costs_is_counted_and_what_others_cost_is_not() {
        let (one, other) = (Budget::default(), Budget::default());
        let spin = |time: Duration| async move {
            let until = std::time::Instant::now() + time;
            while std::time::Instant::now() < until {
                std::hint::spin_loop();
            }
        };
        lap();
        one.paced(spin(Duration::from_millis(5))).await;
        uncounted(spin(Duration::from_millis(20))).await;
        other.counted(spin(Duration::from_millis(1))).await;
        let (one, other) = (one.spent_ns(), other.spent_ns());
        assert!(one > 0 && other > 0);
        assert!(one < 15_000_000 && other < 15_000_000, "{one} {other}");
    }

    #[tokio::test]
    async fn what_is_passed_on_does_not_wait() {
        let budget = Budget::default();
        let stream = budget.paced(async {
            for part in 0..40 {
                let until = std::time::Instant::now() + Duration::from_millis(1);
                while std::time::Instant::now() < until {
                    std::hint::spin_loop();
                }
                passed_on();
                if part < 39 {
                    tokio::task::yield_now().await;
                }
            }
        });
        stream.await;
        budget.account().begin(budget.0.made.elapsed()).unwrap();
        assert!(budget.account().even <= budget.0.made.elapsed());
    }

    /// Where waking the thread costs more than a turn that is booked, as on emulated hosts.
    #[tokio::test]
    async fn none_starves_where_it_is_dear_to_wake_the_thread() {
        let spin = || {
            let until = std::time::Instant::now() + Duration::from_millis(1);
            while std::time::Instant::now() < until {
                std::hint::spin_loop();
            }
        };
        let budget = Budget::default();
        budget.account().end(AT_ONCE * 2, budget.0.made.elapsed());
        let work = || {
            budget.paced(async {
                for _ in 0..10 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            })
        };
        // Whichever is woken, the other is charged for it while it waits.
        let mut both = Box::pin(async { tokio::join!(work(), work()) });
        let all = std::future::poll_fn(|cx| {
            spin();
            both.as_mut().poll(cx)
        });
        tokio::time::timeout(Duration::from_secs(60), all)
            .await
            .expect("both get on");
    }

    #[tokio::test]
    async fn work_without_end_waits_and_others_do_not() {
        let (hostile, calm) = (Budget::default(), Budget::default());
        let flood = tokio::spawn(hostile.paced(async {
            loop {
                let until = std::time::Instant::now() + TURN;
                while std::time::Instant::now() < until {
                    std::hint::spin_loop();
                }
                tokio::task::yield_now().await;
            }
        }));
        let begun = std::time::Instant::now();
        let mut turns = 0u32;
        while begun.elapsed() < Duration::from_millis(400) {
            calm.paced(tokio::time::sleep(Duration::from_millis(1))).await;
            turns += 1;
        }
        flood.abort();
        let spent = Duration::from_nanos(hostile.spent_ns());
        assert!(spent < Duration::from_millis(10 + 100 + 60), "{spent:?}");
        assert!(spent > TURN, "{spent:?}");
        assert!(turns > 20, "{turns}");
    }
}
