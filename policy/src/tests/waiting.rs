//! Nobody waits for ever where others come and go.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;

use super::simulation::Simulation;
use super::{SECOND, SMALL, demand, rules};
use crate::{AccountLimits, Demand, Rules};

/// Nobody is refused for having waited too long: who is not served waits for ever.
fn patient() -> Rules {
    Rules {
        queue_limit: 1000,
        queue_timeout: 3600 * SECOND,
        warming: Default::default(),
        ..rules()
    }
}

fn with(change: impl Fn(&mut AccountLimits)) -> Rules {
    let mut rules = patient();
    change(&mut rules.default_limits);
    rules
}

fn on(runtime: &str, demand: Demand) -> Demand {
    Demand {
        runtime: runtime.into(),
        ..demand
    }
}

/// Small requests of several functions fill all that the account may have and never end; how long another one waits.
fn waits_among_small_ones(rules: Rules, other: Demand) -> Duration {
    let mut simulation = Simulation::new(rules);
    for n in 0..8 {
        let function = format!("small{}", n % 3);
        simulation.caller(demand("a", &function, 1, SMALL), 100 + 20 * (n % 10));
    }
    simulation.run_until(10 * SECOND);
    assert!(!simulation.driver.running.is_empty());
    let request = simulation.request(other, SECOND);
    while !simulation.driver.running.values().any(|of| *of == request) {
        let next = simulation.driver.now + SECOND / 10;
        simulation.run_until(next);
        assert!(next < 100 * SECOND, "it waits for ever");
    }
    simulation.waited[&request]
}

#[test]
fn a_large_request_is_not_overtaken_for_ever_by_small_ones_of_its_account() {
    let one = |l: &mut AccountLimits| l.machines = 1;
    let all = |_: &mut AccountLimits| {};
    // A second of patience, and what runs in the machine, 280 ms at most.
    let whole = demand("a", "whole", 1, (2000, 448));
    assert!(waits_among_small_ones(with(one), whole.clone()) < 2 * SECOND);
    assert!(
        waits_among_small_ones(with(all), whole) < 2 * SECOND,
        "or on a host full of its own"
    );
    // One that needs a larger machine: its account's have to end, and that has to boot.
    let larger = demand("a", "larger", 1, (3000, 900));
    assert!(waits_among_small_ones(with(one), larger.clone()) < 4 * SECOND);
    assert!(waits_among_small_ones(with(all), larger) < 4 * SECOND);
    // One that needs a machine of another kind.
    let other = on("nodejs20.x", demand("a", "other", 1, SMALL));
    assert!(waits_among_small_ones(with(one), other.clone()) < 4 * SECOND);
    assert!(waits_among_small_ones(with(all), other) < 4 * SECOND);
}

/// Small requests of an account never end, and one of it needs a machine for which another account's leaves no room: how long
/// one waits that came after that.
fn waits_behind_one_that_cannot_be_helped(rules: Rules, first: Demand, other: Demand) -> Duration {
    let mut simulation = Simulation::new(rules);
    simulation.caller(demand("b", "long", 1, SMALL), 3_600_000);
    simulation.run_until(2 * SECOND);
    for n in 0..8 {
        let small = demand("a", &format!("small{}", n % 3), 1, SMALL);
        simulation.caller(on(&other.runtime, small), 100 + 20 * (n % 10));
    }
    simulation.run_until(10 * SECOND);
    let first = simulation.request(first, SECOND);
    simulation.run_until(15 * SECOND);
    let request = simulation.request(other, SECOND);
    while !simulation.waited.contains_key(&request) {
        let next = simulation.driver.now + SECOND / 10;
        simulation.run_until(next);
        assert!(next < 100 * SECOND, "it waits for ever");
    }
    assert!(!simulation.waited.contains_key(&first), "it could be helped");
    simulation.waited[&request]
}

#[test]
fn one_that_cannot_be_helped_keeps_no_other_from_being_helped() {
    let rules = || Rules {
        host_memory_mib: 1024,
        ..patient()
    };
    let larger = demand("a", "larger", 1, (3000, 900));
    let whole = demand("a", "whole", 1, (2000, 448));
    let on_another = on("nodejs20.x", larger.clone());
    // A second of patience, one until they are looked at again, and what runs in the machine.
    for first in [larger, on_another] {
        let waited = waits_behind_one_that_cannot_be_helped(rules(), first, whole.clone());
        assert!(waited < 3 * SECOND, "{waited:?}");
    }
}

#[test]
fn a_large_request_gets_the_room_of_an_idle_machine_of_its_own_and_one_of_another_account() {
    for machines in [1, 4] {
        let mut simulation = Simulation::new(Rules {
            host_memory_mib: 1024,
            ..with(|limits| limits.machines = machines)
        });
        simulation.request(demand("a", "small", 1, SMALL), SECOND);
        simulation.request(demand("b", "small", 1, SMALL), SECOND);
        simulation.run_until(4 * SECOND);
        let world = simulation.driver.world();
        assert_eq!(
            (world.accounts.len(), world.machines().count(), world.at_rest.len()),
            (2, 2, 2)
        );
        let request = simulation.request(demand("a", "larger", 1, (3000, 900)), SECOND);
        simulation.run_until(10 * SECOND);
        assert!(simulation.waited.contains_key(&request), "where it may have {machines}");
    }
}

/// Small requests of an account that may have so many machines never end, and one of it needs a larger one; another account has
/// a machine whose turn is never over, and runs something there for so long. How long a small one waited at most, and the
/// larger one.
fn waits_beside_another_account(machines: u32, takes: Duration) -> (Duration, Duration) {
    let mut rules = with(|limits| limits.machines = machines);
    rules.host_memory_mib = 1024;
    let large_share = AccountLimits {
        share: 1000,
        ..rules.default_limits.clone()
    };
    rules.account_limits = [("b".into(), large_share)].into();
    let mut simulation = Simulation::new(rules);
    simulation.request(demand("b", "f", 1, SMALL), takes);
    simulation.run_until(2 * SECOND);
    assert_eq!(simulation.waited.len(), 1);
    for takes in [200, 230, 270] {
        simulation.caller(demand("a", "small", 1, SMALL), takes);
    }
    simulation.run_until(5 * SECOND);
    let larger = simulation.request(demand("a", "larger", 1, (3000, 900)), SECOND);
    simulation.run_until(30 * SECOND);
    let waited = |id| {
        let waits = simulation.driver.now - simulation.arrived[id];
        simulation.waited.get(id).copied().unwrap_or(waits)
    };
    let others = simulation.arrived.keys().filter(|id| **id != larger);
    (others.map(waited).max().unwrap(), waited(&larger))
}

#[test]
fn an_account_gives_up_a_busy_machine_where_an_idle_one_of_another_makes_up_the_rest() {
    for machines in [1, 4] {
        let (small, larger) = waits_beside_another_account(machines, SECOND / 10);
        assert!(larger < 4 * SECOND, "{larger:?} where it may have {machines}");
        assert!(small < 6 * SECOND, "{small:?} where it may have {machines}");
    }
}

#[test]
fn an_account_gives_up_no_machine_where_the_host_would_not_have_the_room() {
    for machines in [1, 4] {
        let (small, _) = waits_beside_another_account(machines, 3600 * SECOND);
        assert!(small < 2 * SECOND, "{small:?} where it may have {machines}");
    }
}

/// How long each account waited at most in `time`, where so many accounts want machines of a host that can have four.
fn longest_waits(demands: impl Iterator<Item = Demand>, time: Duration) -> BTreeMap<Arc<str>, Duration> {
    let mut simulation = Simulation::new(Rules {
        host_memory_mib: 4 * 1024,
        concurrent_boots: 4,
        ..patient()
    });
    for demand in demands {
        simulation.caller(demand, 400);
    }
    simulation.run_until(time);
    let mut longest = BTreeMap::<_, Duration>::new();
    for (request, demand) in &simulation.driver.demands {
        let arrived = simulation.arrived[request];
        let waited = simulation.waited.get(request).copied().unwrap_or(time - arrived);
        let most = longest.entry(demand.account.clone()).or_default();
        *most = (*most).max(waited);
    }
    longest
}

#[test]
fn more_accounts_than_machines_take_turns() {
    // Of 5 s each, and a second and a half to change machines.
    for (accounts, time) in [(10, 60), (40, 110)] {
        let demands = (0..2 * accounts).map(|n| demand(&format!("account{}", n % accounts), "f", 1, (500, 100)));
        let waits = longest_waits(demands, time * SECOND);
        let round = 7 * SECOND * accounts / 4;
        assert!(waits.values().all(|waited| *waited < round + 10 * SECOND), "{waits:?}");
    }
}

#[test]
fn many_accounts_that_want_larger_machines_take_turns() {
    // Two seconds each on four machines.
    let demands = (0..150).map(|n| demand(&format!("account{n}"), "f", 1, (3000, 900)));
    let waits = longest_waits(demands, 80 * SECOND);
    assert!(waits.values().all(|waited| *waited < 75 * SECOND), "{waits:?}");
}

#[test]
fn one_that_wants_a_standard_machine_is_not_kept_from_it_by_many_that_want_larger_ones() {
    let large = (0..40).map(|n| demand(&format!("account{n}"), "f", 1, (3000, 900)));
    let waits = longest_waits(large.chain([demand("small", "f", 1, SMALL)]), 60 * SECOND);
    assert!(waits["small"] < 20 * SECOND, "{waits:?}");
}

/// A caller that never stops: its function, how much it needs, whether of another runtime, and for how many ms it runs.
type Caller = (u8, usize, bool, u64);

/// Callers of one account with limits on machines and concurrency, on a host of so many machines, for 40 s: when the oldest
/// request came that has no answer.
fn oldest_of(callers: &[Caller], machines: u32, concurrency: u32, host: usize, warming: usize) -> Option<Duration> {
    let mut simulation = Simulation::new(narrow(machines, concurrency, host, warming));
    call(&mut simulation, callers);
    simulation.run_until(40 * SECOND);
    simulation.oldest_without_answer()
}

fn narrow(machines: u32, concurrency: u32, host: usize, warming: usize) -> Rules {
    let mut rules = with(|l| (l.machines, l.concurrency) = (machines, concurrency));
    rules.max_machines = host;
    rules.warming = [(super::RUNTIME.into(), warming)].into();
    rules
}

fn call(simulation: &mut Simulation, callers: &[Caller]) {
    let amounts = [SMALL, (500, 200), (2000, 448), (3000, 900)];
    for (function, amount, other, takes) in callers {
        let of = demand("a", &format!("function{function}"), 1, amounts[*amount]);
        simulation.caller(if *other { on("nodejs20.x", of) } else { of }, *takes);
    }
}

/// Requests of one account that can't share a machine get theirs in order of arrival, whatever keeps each from it.
#[test]
fn requests_that_need_machines_of_their_own_take_turns() {
    // The account's memory keeps the large ones from a second machine, the host's machines the small one.
    let callers = [
        (0, 0, true, 200),
        (0, 0, false, 200),
        (0, 3, true, 214),
        (0, 3, false, 200),
        (0, 0, false, 200),
    ];
    assert!(oldest_of(&callers, 3, 4, 2, 0).is_none_or(|at| at > 30 * SECOND));
    // One machine, two runtimes.
    let callers = [(0, 0, true, 346), (0, 0, false, 200)];
    assert!(oldest_of(&callers, 2, 1, 1, 0).is_none_or(|at| at > 35 * SECOND));
    // One machine: room is kept in it for standard ones behind the large one, which waits longest.
    let callers = [
        (3, 0, false, 235),
        (0, 0, false, 381),
        (0, 1, false, 234),
        (0, 3, false, 200),
        (1, 1, false, 239),
        (1, 0, false, 377),
    ];
    assert!(oldest_of(&callers, 1, 1, 1, 0).is_none_or(|at| at > 25 * SECOND));
    // One machine, large and standard ones of two runtimes: seven turns of a second and a half.
    let callers = [
        (0, 2, true, 397),
        (0, 0, false, 284),
        (0, 0, true, 205),
        (1, 3, true, 476),
        (1, 3, false, 449),
        (0, 2, false, 423),
        (0, 3, false, 208),
    ];
    assert!(oldest_of(&callers, 2, 1, 1, 0).is_none_or(|at| at > 25 * SECOND));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 100, ..ProptestConfig::default() })]

    /// Callers of one account that never stop, of any functions and runtimes that its limits allow.
    #[test]
    fn who_may_run_runs_in_the_end(
        callers in prop::collection::vec((0..4_u8, 0..4_usize, any::<bool>(), 200..500_u64), 1..12),
        machines in 1..4_u32,
        max_machines in 1..4_usize,
        concurrency in 1..8_u32,
        warming in 0..2_usize,
    ) {
        // Of 20 one after another none takes more than to wait, to boot and to run.
        let oldest = oldest_of(&callers, machines, concurrency, max_machines, warming);
        prop_assert!(oldest.is_none_or(|at| at > 10 * SECOND), "{oldest:?}");
    }

    /// The same where another agent takes over from one that may have had more.
    #[test]
    fn who_may_run_runs_after_a_restart(
        callers in prop::collection::vec((0..4_u8, 0..4_usize, any::<bool>(), 200..500_u64), 1..12),
        machines in 1..4_u32,
        max_machines in 1..4_usize,
        concurrency in 1..8_u32,
        at in 500..5000_u64,
    ) {
        let mut simulation = Simulation::new(narrow(4, 8, 4, 1));
        call(&mut simulation, &callers);
        simulation.run_until(Duration::from_millis(at));
        simulation.restart(narrow(machines, concurrency, max_machines, 0));
        simulation.run_until(45 * SECOND);
        let oldest = simulation.oldest_without_answer();
        prop_assert!(oldest.is_none_or(|at| at > 10 * SECOND), "{oldest:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 100, ..ProptestConfig::default() })]

    /// Accounts have idle machines of any sizes, and nothing runs: whoever comes is served at once.
    #[test]
    fn one_that_comes_to_an_idle_host_is_served(
        before in prop::collection::vec((0..3_u8, 0..6_usize, any::<bool>()), 0..8),
        wanted in (0..3_u8, 0..6_usize, any::<bool>()),
        host_memory_mib in 1500..3000_u64,
        max_machines in 1..5_usize,
        machines in 1..5_u32,
        memory_mib in 1500..3000_u64,
        concurrency in 1..3_u32,
        warming in 0..2_usize,
        together in any::<bool>(),
    ) {
        let mut rules = with(|l| (l.machines, l.memory_mib, l.concurrency) = (machines, memory_mib, concurrency));
        (rules.host_memory_mib, rules.max_machines) = (host_memory_mib, max_machines);
        rules.warming = [(super::RUNTIME.into(), warming)].into();
        let amounts = [SMALL, (500, 200), (2000, 448), (3000, 900), (2000, 1200), (4000, 100)];
        let of = |n: usize, (account, amount, other): (u8, usize, bool)| {
            let of = demand(&format!("account{account}"), &format!("function{n}"), 1, amounts[amount]);
            if other { on("nodejs20.x", of) } else { of }
        };
        let mut simulation = Simulation::new(rules);
        for (n, before) in before.into_iter().enumerate() {
            simulation.request(of(n, before), SECOND / 10);
            if !together {
                simulation.run_until(simulation.driver.now + 2 * SECOND);
            }
        }
        simulation.run_until(simulation.driver.now + 20 * SECOND);
        let request = simulation.request(of(8, wanted), SECOND / 10);
        simulation.run_until(simulation.driver.now + 8 * SECOND);
        let waited = simulation.waited.get(&request);
        prop_assert!(waited.is_some_and(|waited| *waited < 4 * SECOND), "{waited:?}");
    }
}
