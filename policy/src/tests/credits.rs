//! What balances of credits let machines do.

use std::time::Duration;

use proptest::prelude::*;
use stoker_credits::{Class, Credits, Level, Mode, Plan, TermsError};

use super::driver::{Driver, commands};
use super::properties::{Op, op_or_restart};
use super::{RUNTIME, SECOND, SMALL, cold, demand, rules, with_drives};
use crate::world::HostRoom;
use crate::{Command, Cpu, Decision, Event, MachineId, PlanError, Reason, Rules, RulesError, Shape};

const HOUR: Duration = Duration::from_secs(3600);

/// New machines have 30 credits for each vCPU.
fn with_launch(rules: Rules) -> Rules {
    Rules {
        vcpu_plan: rules.vcpu_plan.map(|plan| Plan {
            launch: Credits::new(30),
            ..plan
        }),
        ..rules
    }
}

/// A machine that serves `a`, and the driver.
fn serving(rules: Rules) -> (Driver, MachineId) {
    let mut driver = Driver::new(rules);
    driver.request(demand("a", "f", 1, SMALL));
    driver.boot_all();
    driver.run_until(driver.now);
    let serves = |found: &&crate::Machine| found.account.is_some();
    let machine = driver.world().machines().find(serves).unwrap().id;
    (driver, machine)
}

fn cpu(driver: &Driver, machine: MachineId) -> (Class, u32) {
    let Cpu { class, allowed_millis } = driver.world().machine(machine).unwrap().cpu.unwrap();
    (class, allowed_millis)
}

fn set(decisions: &[Decision]) -> Vec<(Class, u32)> {
    let all = decisions.iter().filter_map(|decision| match decision.command {
        Command::SetCpu {
            class, allowed_millis, ..
        } => Some((class, allowed_millis)),
        _ => None,
    });
    all.collect()
}

#[test]
fn launch_credits_give_no_priority_before_there_is_an_account() {
    let mut driver = Driver::new(with_launch(rules()));
    let machine = *driver.booting.first().unwrap();
    assert_eq!(set(&driver.tell(machine)), [], "as every cgroup begins");
    driver.boot_all();
    let (_, decisions) = driver.request(demand("a", "f", 1, SMALL));
    assert_eq!(set(&decisions), [(Class::High, 2000)]);
    let command = decisions.iter().find(|d| matches!(d.command, Command::SetCpu { .. }));
    let reason = command.unwrap().reason.to_string();
    assert_eq!(reason, "it has 60.000 credits left, level 9 of 9");
    // When it is to end it comes before nobody, again.
    let decisions = driver.step(Event::Drain);
    assert_eq!(set(&decisions), []);
    driver.step(Event::DrainExpired);
    assert_eq!(cpu(&driver, machine), (Class::Normal, 2000));
}

#[test]
fn a_busy_machine_falls_step_by_step_to_its_baseline_and_keeps_that() {
    let (mut driver, machine) = serving(with_launch(cold()));
    assert_eq!(cpu(&driver, machine), (Class::High, 2000));
    driver.kernel.want(machine, 2000, driver.now);
    let mut seen = vec![cpu(&driver, machine)];
    while driver.now < 4 * HOUR {
        driver.run_until(driver.now + SECOND);
        let now = cpu(&driver, machine);
        if seen.last() != Some(&now) {
            seen.push(now);
        }
    }
    let millis: Vec<_> = seen.iter().map(|(_, millis)| *millis).collect();
    assert_eq!(millis, [2000, 2000, 1775, 1550, 1325, 1100, 875, 650, 425, 200]);
    let last = seen.last().unwrap().0;
    assert_eq!((seen[1].0, last), (Class::Normal, Class::Exhausted));
    // It uses neither more nor less.
    let spent = |driver: &mut Driver| {
        driver.kernel.settle(machine, driver.now);
        driver.kernel.get(machine).unwrap().account.totals().spent.get()
    };
    let before = spent(&mut driver);
    driver.run_until(driver.now + 10 * SECOND);
    let used = (spent(&mut driver) - before) / 1_000_000_000;
    assert!(used.abs_diff(2000) <= 40, "{used} ms in 10 s");
}

#[test]
fn an_idle_machine_rises_by_timers_alone() {
    let (mut driver, machine) = serving(cold());
    let asked = driver.kernel.asked;
    assert_eq!(cpu(&driver, machine), (Class::Exhausted, 200), "without launch credits");
    driver.run_until(driver.now + 24 * HOUR);
    assert_eq!(cpu(&driver, machine), (Class::High, 2000));
    let asked = driver.kernel.asked - asked;
    assert_eq!(asked, Level::HIGH.number(), "once a level, and in time");
}

#[test]
fn what_was_settled_before_is_old() {
    let (mut driver, machine) = serving(with_launch(cold()));
    let old = driver.kernel.get(machine).unwrap().account;
    driver.kernel.want(machine, 2000, driver.now);
    driver.run_until(driver.now + HOUR);
    let now = cpu(&driver, machine);
    assert_ne!(now.0, Class::High);
    let decisions = driver.step(Event::CreditsSettled { machine, account: old });
    assert_eq!((set(&decisions), cpu(&driver, machine)), (vec![], now));
}

#[test]
fn what_an_earlier_agent_decided_is_decided_anew() {
    let (mut driver, machine) = serving(with_launch(cold()));
    driver.restart(with_launch(cold()));
    assert_eq!(driver.world().machine(machine).unwrap().cpu, None, "not known");
    assert_eq!(set(&driver.tell(machine)), [(Class::High, 2000)]);
    assert_eq!(set(&driver.adopt(machine)), []);
}

#[test]
fn baselines_are_never_more_than_the_host() {
    let half = |plan: Plan| Plan {
        baseline_millis: 400,
        ..plan
    };
    let promised = Rules {
        standard: Shape {
            baseline_millis: 800,
            ..rules().standard
        },
        vcpu_plan: rules().vcpu_plan.map(half),
        warming: [(RUNTIME.into(), 2)].into(),
        ..rules()
    };
    let mut driver = Driver::new(promised.clone());
    driver.boot_all();
    assert_eq!(driver.world().machines().count(), 2);
    // There would be room for two more but for the baselines.
    let (_, decisions) = driver.request(demand("a", "f", 1, (3000, 900)));
    assert_eq!(commands(&decisions).len(), 1, "a warming machine goes: {decisions:?}");
    let too_many = Rules {
        warming: [(RUNTIME.into(), 3)].into(),
        ..promised.clone()
    };
    assert!(matches!(
        too_many.check(),
        Err(RulesError::WarmingTooLarge {
            machines: 3,
            max: 2,
            limit: "CPU for baselines ([credits] baseline_percent)"
        })
    ));
    let too_large = Rules {
        host_baseline_millis: 799,
        ..promised
    };
    let error = too_large.check().unwrap_err();
    assert!(error.to_string().contains("baseline_percent"), "{error}");
}

#[test]
fn rules_that_contradict_one_another_are_refused() {
    let with = |change: fn(&mut Plan)| {
        let mut rules = rules();
        change(rules.vcpu_plan.as_mut().unwrap());
        rules.check().unwrap_err().to_string()
    };
    let error = with(|plan| (plan.cap, plan.high_enter) = (Some(Credits::new(10)), Some(Credits::new(11))));
    assert!(
        error.contains("[credits] high_enter (11.000 credits) must not be above cap"),
        "{error}"
    );
    let error = with(|plan| plan.baseline_millis = 1001);
    assert!(error.contains("1001 millicores is more than 1 vCPU"), "{error}");
    let error = with(|plan| plan.baseline_millis = 0);
    assert!(error.contains("would never run"), "{error}");
}

#[test]
fn another_plan_is_taken_where_there_is_room_for_it() {
    let (mut driver, machine) = serving(with_launch(rules()));
    let ask = |driver: &mut Driver, baseline_millis, mode| {
        driver.step(Event::PlanAsked {
            machine,
            baseline_millis,
            mode,
            by: "root".into(),
        })
    };
    // One other warms; 200 of 2000 are its.
    assert_eq!(driver.world().machines().count(), 2);
    assert_eq!(
        driver.world().plan_for(machine, Some(1801), None),
        Err(PlanError::Baselines {
            asked_millis: 1801,
            others_millis: 200,
            host_millis: 2000,
        })
    );
    let refused = driver
        .world()
        .plan_for(machine, Some(1801), None)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("give at most 1800"), "{refused}");
    assert_eq!(ask(&mut driver, Some(1801), None), []);
    assert!(matches!(
        driver.world().plan_for(machine, Some(0), None),
        Err(PlanError::Terms(TermsError::NoBaseline))
    ));
    let decisions = ask(&mut driver, Some(1800), Some(Mode::Unlimited));
    assert!(matches!(
        &decisions[..],
        [Decision { command: Command::ChangePlan { plan, .. }, reason: Reason::Asked { by } }]
            if plan.baseline_millis == 1800 && plan.mode == Mode::Unlimited && **by == *"root"
    ));
    assert_eq!(driver.kernel.get(machine).unwrap().terms.baseline_millis(), 1800);
    // The host is full by that, and no longer once it is lower. Who waits is served then.
    let (_, decisions) = driver.request(demand("b", "f", 1, SMALL));
    assert!(!commands(&decisions).is_empty());
    let (waits, decisions) = driver.request(demand("c", "f", 1, SMALL));
    assert_eq!(commands(&decisions).len(), 0, "{decisions:?}");
    let decisions = ask(&mut driver, Some(100), None);
    assert!(
        decisions
            .iter()
            .any(|d| matches!(d.command, Command::BootMachine { .. })),
        "{decisions:?}"
    );
    driver.boot_all();
    assert!(
        driver
            .world()
            .request(waits)
            .is_some_and(|found| found.state != crate::RequestState::Waiting)
    );
    // It is the next agent's, too.
    driver.run_until(driver.now);
    driver.restart(with_launch(rules()));
    let found = driver.world().machine(machine).unwrap();
    let plan = found.credits.as_ref().unwrap().plan;
    assert_eq!((plan.baseline_millis, plan.mode), (100, Mode::Unlimited));
    assert_eq!(
        driver.world().plan_for(machine, None, None),
        Err(PlanError::State),
        "not yet"
    );
    let nobody = MachineId(ulid::Ulid(77));
    assert_eq!(driver.world().plan_for(nobody, None, None), Err(PlanError::Unknown));
}

#[test]
fn credits_that_are_given_count_at_once() {
    let (mut driver, machine) = serving(cold());
    assert_eq!(cpu(&driver, machine), (Class::Exhausted, 200));
    let decisions = driver.step(Event::CreditsGranted {
        machine,
        credits: Credits::new(100),
        by: "root".into(),
    });
    assert_eq!(decisions.len(), 1);
    driver.run_until(driver.now);
    assert_eq!(cpu(&driver, machine), (Class::High, 2000));
    let nobody = MachineId(ulid::Ulid(77));
    let granted = Event::CreditsGranted {
        machine: nobody,
        credits: Credits::new(1),
        by: "root".into(),
    };
    assert_eq!(driver.step(granted), []);
}

/// One thing that happens to accounts.
#[derive(Clone, Debug)]
enum Step {
    World(Op),
    /// A machine wants so many millicores.
    Want(u8, u16),
    /// Time passes, in ms, with all that accounts do meanwhile.
    Run(u32),
    /// The agent hears of one account.
    Tell(u8),
    Ask(u8, u16, bool),
    Grant(u8, u16),
    /// The host's clock is set.
    Clock(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => op_or_restart().prop_map(Step::World),
        4 => (any::<u8>(), 0..4000_u16).prop_map(|(n, millis)| Step::Want(n, millis)),
        4 => (0..3_600_000_u32).prop_map(Step::Run),
        3 => any::<u8>().prop_map(Step::Tell),
        1 => (any::<u8>(), 0..2100_u16, any::<bool>()).prop_map(|(n, millis, all)| Step::Ask(n, millis, all)),
        1 => (any::<u8>(), any::<u16>()).prop_map(|(n, credits)| Step::Grant(n, credits)),
        1 => any::<u32>().prop_map(Step::Clock),
    ]
}

fn take(driver: &mut Driver, step: Step) {
    let pick = |driver: &Driver, n: u8| {
        let machines = driver.kernel.machines();
        machines.get(usize::from(n) % machines.len().max(1)).copied()
    };
    match step {
        Step::World(op) => driver.apply(op),
        Step::Want(n, millis) => {
            if let Some(machine) = pick(driver, n) {
                driver.kernel.want(machine, millis.into(), driver.now);
            }
        }
        Step::Run(ms) => driver.run_until(driver.now + Duration::from_millis(ms.into())),
        Step::Tell(n) => {
            if let Some(machine) = pick(driver, n) {
                driver.tell(machine);
            }
        }
        Step::Ask(n, millis, unlimited) => {
            if let Some(machine) = pick(driver, n) {
                let mode = if unlimited { Mode::Unlimited } else { Mode::Standard };
                driver.step(Event::PlanAsked {
                    machine,
                    baseline_millis: Some(millis.into()),
                    mode: Some(mode),
                    by: "somebody".into(),
                });
            }
        }
        Step::Grant(n, credits) => {
            if let Some(machine) = pick(driver, n) {
                driver.step(Event::CreditsGranted {
                    machine,
                    credits: Credits::from_millis(credits.into()),
                    by: "somebody".into(),
                });
            }
        }
        Step::Clock(seconds) => driver.wall_ahead = Duration::from_secs(seconds.into()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// What must hold at every step is checked by the driver and its kernel: to the ps nothing is lost, no machine may use less
    /// than its baseline, and no index of the world is wrong.
    #[test]
    fn whatever_happens_nobody_starves_and_no_more_is_promised_than_there_is(
        steps in prop::collection::vec(step(), 1..120),
        disk in any::<bool>(),
    ) {
        let rules = with_launch(if disk { with_drives(rules()) } else { rules() });
        let mut driver = Driver::new(rules);
        for step in steps {
            take(&mut driver, step);
            let world = driver.world();
            let was_found = world.machines().any(|machine| driver.inherited.contains(&machine.id));
            let promised: i64 = world.machines().map(|machine| i64::from(machine.shape.baseline_millis)).sum();
            prop_assert!(was_found || promised <= HostRoom::all(world.rules()).baseline_millis);
        }
        // All is told: each machine is as its balance says.
        driver.run_until(driver.now);
        for machine in driver.world().machines() {
            let Some(balance) = machine.credits.as_ref().filter(|_| machine.cpu.is_some()) else { continue };
            let account = balance.account.unwrap();
            let allowed = machine.cpu.unwrap().allowed_millis;
            prop_assert_eq!(allowed, account.allowed_millis(&balance.terms));
            prop_assert!(allowed >= machine.shape.baseline_millis);
            let kept = driver.kernel.get(machine.id).unwrap();
            prop_assert_eq!((kept.terms, kept.limit_millis), (balance.terms, allowed));
        }
        // Who rests comes back, however deep it had fallen.
        for machine in driver.kernel.machines() {
            driver.kernel.want(machine, 0, driver.now);
        }
        driver.run_until(driver.now + 72 * HOUR);
        for machine in driver.world().machines() {
            let Some(cpu) = machine.cpu.filter(|_| machine.credits.is_some()) else { continue };
            prop_assert_eq!((cpu.class != Class::Exhausted, cpu.allowed_millis), (true, machine.shape.vcpus * 1000));
        }
    }
}
