use std::sync::atomic::{AtomicUsize, Ordering};

use stoker_proto::limits::STREAM_PART_BYTES;
use tokio::runtime::{Builder, Runtime};

use super::*;

const MS: Duration = Duration::from_millis(1);

/// As `main` makes it.
fn runtime(budgets: &Budgets) -> Runtime {
    let resting = budgets.clone();
    Builder::new_current_thread()
        .enable_all()
        .on_thread_park(move || resting.rest())
        .build()
        .unwrap()
}

/// CPU time of this thread.
fn cpu() -> Duration {
    Duration::from_nanos(thread_cpu_ns())
}

fn spent(budget: &Budget) -> Duration {
    Duration::from_nanos(budget.spent_ns())
}

fn spin(time: Duration) {
    let begin = cpu();
    while cpu() - begin < time {}
}

/// Works whenever it is polled, and wants to be polled again.
async fn greedy(turn: Duration) {
    loop {
        spin(turn);
        tokio::task::yield_now().await;
    }
}

/// Counts how often it was told.
#[derive(Clone, Default)]
struct Told(Arc<AtomicUsize>);

impl Wakes for Told {
    fn silence(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[test]
fn one_that_never_has_enough_has_its_part_and_is_charged_with_it() {
    let budgets = Budgets::default();
    let (budget, told) = (budgets.budget(), Told::default());
    let time = runtime(&budgets).block_on(async {
        let begin = Instant::now();
        let task = budget.throttle(greedy(MS / 20), told.clone());
        assert!(tokio::time::timeout(400 * MS, task).await.is_err());
        begin.elapsed()
    });
    let spent = spent(&budget);
    assert!(spent >= 10 * MS, "it had its burst: {spent:?}");
    assert!(spent <= 11 * MS + time / 4, "{spent:?} of {time:?}");
    assert!(told.0.load(Ordering::Relaxed) > 0, "what wakes it was not silenced");
}

#[test]
fn many_that_never_have_enough_leave_half_to_others() {
    let budgets = Budgets::default();
    let (others, mine) = ((0..10).map(|_| budgets.budget()).collect::<Vec<_>>(), budgets.budget());
    let (before, time) = runtime(&budgets).block_on(async {
        for budget in &others {
            tokio::spawn(budget.throttle(greedy(MS / 20), ()));
        }
        let begin = Instant::now();
        let calls = async {
            for _ in 0..100 {
                drop(mine.turn().expect("it is held up for what others do"));
                tokio::time::sleep(4 * MS).await;
            }
        };
        calls.await;
        (others.iter().map(spent).sum::<Duration>(), begin.elapsed())
    });
    assert!(
        before <= others.len() as u32 * 11 * MS + time / 2,
        "{before:?} of {time:?}"
    );
}

#[test]
fn all_that_is_spent_is_charged_once() {
    let budgets = Budgets::default();
    let (one, two) = (budgets.budget(), budgets.budget());
    let runtime = runtime(&budgets);
    let before = cpu();
    runtime.block_on(async {
        let inner = one.throttle(
            async {
                spin(2 * MS);
                tokio::task::yield_now().await;
                spin(2 * MS);
            },
            (),
        );
        let outer = one.charge(async {
            spin(MS);
            inner.await;
            spin(MS);
        });
        let other = two.throttle(async { spin(3 * MS) }, ());
        let _ = tokio::join!(tokio::spawn(other), outer);
        drop(two.charge_now());
        // Nobody's.
        budgets.nobody(async { spin(5 * MS) }).await;
    });
    budgets.rest();
    let (used, charged) = (cpu() - before, spent(&one) + spent(&two));
    assert!(
        spent(&one) >= 6 * MS && spent(&two) >= 3 * MS,
        "{:?} {:?}",
        spent(&one),
        spent(&two)
    );
    assert!(charged <= used - 5 * MS, "{charged:?} of {used:?}");
}

#[test]
fn what_is_done_around_what_is_served_is_charged_too() {
    let budgets = Budgets::default();
    let (busy, idle) = (budgets.budget(), budgets.budget());
    let runtime = runtime(&budgets);
    let (before, used) = runtime.block_on(async {
        let (ask, mut asked) = tokio::sync::mpsc::channel::<tokio::sync::oneshot::Sender<()>>(1);
        let serve = async move {
            while let Some(answer) = asked.recv().await {
                let _ = answer.send(());
            }
        };
        tokio::spawn(busy.throttle(serve, ()));
        let before = cpu();
        for _ in 0..20_000 {
            let (answer, answered) = tokio::sync::oneshot::channel();
            ask.send(answer).await.unwrap();
            answered.await.unwrap();
        }
        (before, cpu() - before)
    });
    let charged = spent(&busy);
    println!("{charged:?} of {used:?} since {before:?}");
    assert!(
        charged >= used * 9 / 10 && charged <= used * 11 / 10,
        "{charged:?} of {used:?}"
    );
    assert_eq!(spent(&idle), Duration::ZERO);
}

#[test]
fn calls_and_what_readers_take_bring_tokens() {
    let budget = Budgets::default().budget();
    let spend = |time| {
        let _turn = budget.turn().unwrap();
        spin(time);
    };
    let grants: [fn(&Budget); 2] = [Budget::grant_call, |budget| budget.grant_bytes(STREAM_PART_BYTES)];
    for grant in grants {
        spend(11 * MS);
        assert!(budget.turn().is_err());
        (0..20).for_each(|_| grant(&budget));
        drop(budget.turn().unwrap());
    }
}

#[test]
fn a_turn_ends() {
    let budgets = Budgets::default();
    let budget = budgets.budget();
    assert!(!turn_is_over());
    {
        let _turn = budget.turn().unwrap();
        assert!(!turn_is_over(), "nothing was done in it");
        while !turn_is_over() {}
        let _inner = budget.charge_now();
        assert!(turn_is_over(), "what is within a turn is of that turn");
    }
    assert!(!turn_is_over());
}

#[test]
fn what_is_gone_is_forgotten() {
    let budgets = Budgets::default();
    let budget = budgets.budget();
    let other = budget.clone();
    drop(budget.turn());
    drop(budget);
    assert_eq!(budgets.state().spent.len(), 1);
    drop(other);
    assert!(budgets.state().spent.is_empty());
    budgets.rest();
}
