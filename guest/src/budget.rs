//! What the thread that serves all containers spends on each of them: counted for it, and bounded.
//!
//! A container makes work for PID 1 by all that it does towards it: requests, connections, what it writes, its telemetry. That
//! work runs in tasks of this one thread. [`Budget::paced`] is around each of them: it counts the thread's CPU time of every
//! turn for the container, so that it is part of what the container has used, and lets a container that takes more than its
//! part wait, while others have their turns at once. It costs a reading of the thread's clock a turn, and nothing while there
//! is nothing to do.
//!
//! Every task of the thread is one of these, or [`uncounted`]: the time between two readings is the container's whose turn ends
//! with the second, for what the kernel did to wake the thread, and the runtime to find the task, was for it. Where the thread is
//! woken for no task, by what comes for one that waits, nobody is charged ([`before_rest`]).
//!
//! A container that has rested may take 10 ms at once, and so much more with each invocation; a warm call takes a fraction of
//! one. Bytes that the agent sends or waits for, payloads and streamed answers, bring time with them too. Else it has at most a
//! quarter of the thread's time in the long run. A task that has to wait books its turn, which it then has whatever happens until
//! then: none of them starves, however slow the host is.

use std::cell::Cell;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// The part of the thread's time that a container may have in the long run: one in so many.
const PART: u32 = 4;
/// What a container that has rested may take at once.
const AT_ONCE: Duration = Duration::from_millis(10);
/// What a booked turn is taken to cost. Its part of the time is as fine as the runtime's timers are, 1 ms.
const BOOKED: Duration = Duration::from_micros(250);
/// What comes with a byte that the agent sends or waits for: a few times what moving it takes on an emulated host.
const A_BYTE: Duration = Duration::from_nanos(500);
/// How often in a row the thread may be woken for no task before it sleeps for [`NAP`].
const IDLE_WAKES: u32 = 8;
/// Long beside what waking the thread takes, and short beside a call.
const NAP: Duration = Duration::from_micros(100);
/// How long a connection is read from before others have their turns.
const TURN: Duration = Duration::from_micros(50);

/// What a container has taken, by the generic cell rate algorithm (ITU-T I.371, virtual scheduling). Times are since a fixed
/// moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Account {
    /// When all that it has taken, and booked, is made up for.
    even: Duration,
    /// Turns that were booked and have not come.
    booked: u32,
}

/// The budget of one container. Clones are the same.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    made: Instant,
    account: Mutex<Account>,
    /// Told where something was forgiven: what was booked is void.
    forgiven: Notify,
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
    turn: Option<BookedTurn>,
}

/// Resolves when the turn comes (true), or is void.
type BookedTurn = Pin<Box<dyn Future<Output = bool> + Send>>;

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
    /// Bytes that were passed on in it to the agent, which waits for them.
    static PASSED_ON: Cell<usize> = const { Cell::new(0) };
    /// How often in a row the thread was woken for no task.
    static IDLE: Cell<u32> = const { Cell::new(0) };
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
        self.booked = self.booked.saturating_add(1);
        Err(free.saturating_add(booked))
    }

    /// A booked turn begins: it is to cost what it costs.
    fn begin_booked(&mut self) {
        self.even = self.even.saturating_sub(BOOKED.saturating_mul(PART));
        self.booked = self.booked.saturating_sub(1);
    }

    /// So much of what was taken is forgiven; what was booked is void.
    fn forgive(&mut self, time: Duration, now: Duration) {
        let booked = BOOKED
            .saturating_mul(PART)
            .saturating_mul(std::mem::take(&mut self.booked));
        let even = self.even.saturating_sub(booked);
        self.even = even.saturating_sub(time.saturating_mul(PART)).max(even.min(now));
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
            forgiven: Notify::new(),
            spent_ns: AtomicU64::new(0),
        }))
    }
}

impl Budget {
    /// CPU time that was spent on the container, in ns.
    pub(crate) fn spent_ns(&self) -> u64 {
        self.0.spent_ns.load(Ordering::Relaxed)
    }

    /// An invocation brings with it what may be taken at once, and what its payload of so many bytes takes: calls that follow
    /// each other without a pause do not wait.
    pub(crate) fn invoked(&self, bytes: usize) {
        self.forgive(AT_ONCE.saturating_add(of_bytes(bytes)));
    }

    fn forgive(&self, time: Duration) {
        self.account().forgive(time, self.0.made.elapsed());
        self.0.forgiven.notify_waiters();
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

    /// None where a turn may begin now; else the one that is booked with this.
    fn book(&self) -> Option<BookedTurn> {
        let at = self.account().begin(self.0.made.elapsed()).err()?;
        let inner = Arc::clone(&self.0);
        Some(Box::pin(async move {
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(inner.made + at) => true,
                () = inner.forgiven.notified() => false,
            }
        }))
    }

    /// A turn has ended, in which so many bytes were passed on.
    fn end(&self, passed_on: usize) {
        let cost = Duration::from_nanos(self.count());
        self.account().end(cost, self.0.made.elapsed());
        if passed_on > 0 {
            self.forgive(cost.min(of_bytes(passed_on)));
        }
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

fn of_bytes(bytes: usize) -> Duration {
    A_BYTE.saturating_mul(u32::try_from(bytes).unwrap_or(u32::MAX))
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

/// In this turn bytes were passed on that the agent has granted room for, a part of a streamed answer: how fast a stream goes is
/// for its reader to say.
pub(crate) fn passed_on(bytes: usize) {
    PASSED_ON.set(PASSED_ON.get().saturating_add(bytes));
}

/// To be called before the thread rests. What comes for a task that waits for its turn wakes the thread and no task: that is
/// charged to nobody, since it is not known who made it, and bounded by a sleep that takes much of it together.
pub(crate) fn before_rest() {
    lap();
    let wakes = IDLE.get().saturating_add(1);
    IDLE.set(wakes);
    if wakes > IDLE_WAKES {
        std::thread::sleep(NAP);
    }
}

/// Work that is for no container.
pub(crate) async fn uncounted<F: Future>(work: F) -> F::Output {
    let mut work = std::pin::pin!(work);
    std::future::poll_fn(|cx| {
        IDLE.set(0);
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
        IDLE.set(0);
        let polled = self.work.as_mut().poll(cx);
        self.budget.count();
        polled
    }
}

// === impl Paced ===

impl<F: Future> Future for Paced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        IDLE.set(0);
        let this = &mut *self;
        let budget = &this.counted.budget;
        loop {
            if this.turn.is_none() {
                this.turn = budget.book();
            }
            let Some(turn) = &mut this.turn else { break };
            let Poll::Ready(comes) = turn.as_mut().poll(cx) else {
                // What woke it before its time is the container's doing.
                budget.end(0);
                return Poll::Pending;
            };
            this.turn = None;
            if comes {
                budget.account().begin_booked();
                break;
            }
        }
        NOW.set(Turn::New);
        PASSED_ON.set(0);
        let polled = this.counted.work.as_mut().poll(cx);
        NOW.set(Turn::None);
        budget.end(PASSED_ON.take());
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
        // So much more comes with each invocation, and no more than was taken.
        account.forgive(AT_ONCE, now);
        account.end(Duration::from_millis(8), now);
        account.begin(now).unwrap();
        account.end(Duration::from_millis(2), now);
        assert!(account.begin(now).is_err() && account.begin(now).is_err());
        account.forgive(Duration::from_secs(1), now);
        assert_eq!(account, Account { even: now, booked: 0 });
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

    /// Takes so much of the thread.
    fn spin(time: Duration) {
        let until = std::time::Instant::now() + time;
        while std::time::Instant::now() < until {
            std::hint::spin_loop();
        }
    }

    /// How long 40 turns of 1 ms take in which so many bytes are passed on.
    async fn stream(budget: &Budget, bytes: usize) -> Duration {
        let begun = std::time::Instant::now();
        let stream = budget.paced(async {
            for _ in 0..40 {
                spin(Duration::from_millis(1));
                passed_on(bytes);
                tokio::task::yield_now().await;
            }
        });
        stream.await;
        begun.elapsed()
    }

    #[tokio::test]
    async fn what_is_passed_on_does_not_wait_and_a_byte_is_not_much() {
        let budget = Budget::default();
        stream(&budget, 1 << 16).await;
        let now = budget.0.made.elapsed();
        assert!(budget.account().even <= now + AT_ONCE * PART);
        // Of 40 ms a quarter is paid at once, and the rest takes three times as long again.
        let budget = Budget::default();
        assert!(stream(&budget, 1).await > Duration::from_millis(100));
    }

    #[tokio::test]
    async fn an_invocation_ends_the_waiting() {
        let budget = Budget::default();
        budget.account().end(Duration::from_secs(3600), budget.0.made.elapsed());
        let work = budget.paced(async {});
        tokio::pin!(work);
        for _ in 0..3 {
            assert!(
                std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx)))
                    .await
                    .is_pending()
            );
        }
        budget.invoked(0);
        assert!(
            std::future::poll_fn(|cx| Poll::Ready(work.as_mut().poll(cx)))
                .await
                .is_pending(),
            "an hour is more"
        );
        budget.forgive(Duration::from_secs(3600));
        tokio::time::timeout(Duration::from_secs(10), work).await.unwrap();
    }

    #[test]
    fn a_thread_that_is_woken_for_no_task_naps() {
        IDLE.set(0);
        let resting = |times: u32| {
            let begun = std::time::Instant::now();
            (0..times).for_each(|_| before_rest());
            begun.elapsed()
        };
        resting(IDLE_WAKES);
        assert!(resting(5) >= NAP * 5);
        IDLE.set(0);
    }

    /// Where waking the thread costs more than a turn that is booked, as on emulated hosts.
    #[tokio::test]
    async fn none_starves_where_it_is_dear_to_wake_the_thread() {
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
            spin(Duration::from_millis(1));
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
