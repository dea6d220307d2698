//! Machines with accounts of credits on one host, in steps of time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use stoker_credits::{Account, Class, PS_PER_CREDIT, Plan, Terms};
use stoker_policy::{
    AccountLimits, Amount, Code, Command, Event, Host, Ids, Kind, MachineId, Now, Rules, RulesError, Shape,
};
use ulid::Ulid;

use crate::cpu::{Want, share};
use crate::load::Load;
use crate::random::Random;

const RUNTIME: &str = "simulated";

/// Every machine has so much memory, and there is enough for all.
const MEMORY_MIB: u32 = 128;

/// What is simulated.
#[derive(Clone, Debug)]
pub struct Setup {
    /// CPUs of the host.
    pub cpus: u32,
    /// vCPUs of each machine.
    pub vcpus: u32,
    /// vCPUs that all machines together may have for each CPU.
    pub cpu_overcommit: f64,
    /// What each vCPU brings to its machine's account.
    pub vcpu_plan: Plan,
    /// Loads, and how many machines of each are wanted.
    pub loads: Vec<(Load, usize)>,
    /// How long.
    pub length: Duration,
    /// How much time passes at once.
    pub step: Duration,
    /// Of two runs with the same seed all is the same.
    pub seed: u64,
}

/// What can't be simulated.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SetupError {
    /// There is nothing to do.
    #[error("{0} must be more than 0")]
    Zero(&'static str),
    /// No host works by these rules.
    #[error(transparent)]
    Rules(#[from] RulesError),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// How many machines were wanted.
    pub asked: usize,
    /// For how many there was room.
    pub admitted: usize,
    /// The part of all CPUs that was used, on average and in the busiest step.
    pub used: f64,
    /// See `used`.
    pub busiest: f64,
    /// How often machines' classes or limits were changed.
    pub changes: u64,
    /// By load.
    pub loads: Vec<LoadOutcome>,
}

/// What the machines of one load had, all of them together or on average.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadOutcome {
    /// The load's name.
    pub load: &'static str,
    /// How many machines.
    pub machines: usize,
    /// What one wanted on average, in millicores of one CPU.
    pub wanted_millis: f64,
    /// What one got.
    pub got_millis: f64,
    /// The least that any got of what it wanted: 1 is all.
    pub worst: f64,
    /// The part of the time that one was of the class high.
    pub high: f64,
    /// That it could use all its vCPUs, and was not high.
    pub full: f64,
    /// That it was slowed down.
    pub slowed: f64,
    /// That it was held to its baseline.
    pub exhausted: f64,
    /// What one could spend at the end, in credits.
    pub left: f64,
    /// What one is billed for, in credits.
    pub billed: f64,
}

/// A machine.
struct Machine {
    id: MachineId,
    load: usize,
    /// Its place among those of its load, and when its load begins.
    nth: usize,
    phase: Duration,
    terms: Terms,
    account: Account,
    class: Class,
    allowed_millis: u32,
    /// What it wanted and got, in thousandths of a ns; how many steps it was as in [`LoadOutcome`].
    wanted: u128,
    got: u128,
    was: [u64; 4],
}

/// The policies, and what they decided of machines.
struct Policies {
    host: Host,
    changes: u64,
}

/// Simulates a host.
///
/// # Errors
/// [`SetupError`] says what is wrong with what is asked for.
pub fn credits(setup: &Setup) -> Result<Outcome, SetupError> {
    for (name, zero) in [
        ("the number of CPUs", setup.cpus == 0),
        (
            "the number of machines",
            setup.loads.iter().all(|(_, machines)| *machines == 0),
        ),
        ("the step", setup.step.is_zero()),
        ("the length", setup.length < setup.step),
    ] {
        if zero {
            return Err(SetupError::Zero(name));
        }
    }
    let loads = mixed(&setup.loads);
    let rules = rules(setup, loads.len());
    // As many machines as wanted need not fit.
    let fits = Rules {
        warming: BTreeMap::new(),
        ..rules.clone()
    };
    fits.check()?;
    let mut policies = Policies {
        host: Host::new(rules, Ids::new(setup.seed)),
        changes: 0,
    };
    let mut machines = policies.admit(setup, &loads);
    let cpu_millis = u64::from(setup.cpus) * 1000;
    let by_id: HashMap<_, _> = machines
        .iter()
        .enumerate()
        .map(|(at, machine)| (machine.id, at))
        .collect();
    for at in 0..machines.len() {
        policies.settled(&mut machines, &by_id, at, Duration::ZERO);
    }
    policies.changes = 0;
    let (mut wants, mut got) = (Vec::new(), Vec::new());
    let step_ns = u64::try_from(setup.step.as_nanos()).unwrap_or(u64::MAX);
    let (mut now, mut steps, mut used, mut busiest) = (Duration::ZERO, 0_u64, 0_u128, 0_u64);
    while now + setup.step <= setup.length {
        wants.clear();
        for machine in &mut machines {
            let full_millis = machine.terms.full_millis();
            let load = setup.loads.get(machine.load).map(|(load, _)| load);
            let millis = load.map_or(0, |load| load.wants(machine.nth, now + machine.phase, full_millis));
            machine.wanted += u128::from(millis) * u128::from(step_ns);
            wants.push(Want {
                millis: millis.min(machine.allowed_millis),
                baseline_millis: machine.terms.baseline_millis(),
                high: machine.class == Class::High,
            });
        }
        share(cpu_millis, &wants, &mut got);
        now += setup.step;
        let now_ns = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX);
        let mut crossed = Vec::new();
        for (at, (machine, got)) in machines.iter_mut().zip(&got).enumerate() {
            machine.note(*got, step_ns);
            let used_ns = u64::from(*got).saturating_mul(step_ns) / 1000;
            if machine.account.settle(&machine.terms, now_ns, used_ns).is_some() {
                crossed.push(at);
            }
        }
        for at in crossed {
            policies.settled(&mut machines, &by_id, at, now);
        }
        policies.wake(&mut machines, &by_id, now);
        let all: u64 = got.iter().map(|millis| u64::from(*millis)).sum();
        (steps, used, busiest) = (steps + 1, used + u128::from(all), busiest.max(all));
    }
    let part = |millis: f64| millis / cpu_millis as f64;
    Ok(Outcome {
        asked: loads.len(),
        admitted: machines.len(),
        used: part(used as f64 / steps.max(1) as f64),
        busiest: part(busiest as f64),
        changes: policies.changes,
        loads: outcomes(setup, &machines, steps, step_ns),
    })
}

/// The load of each machine that is wanted, mixed so that those which are admitted are of all loads alike.
fn mixed(loads: &[(Load, usize)]) -> Vec<usize> {
    let places = loads.iter().enumerate().flat_map(|(load, (_, machines))| {
        let all = *machines as f64;
        (0..*machines).map(move |nth| ((nth as f64 + 0.5) / all, load))
    });
    let mut places: Vec<_> = places.collect();
    places.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    places.into_iter().map(|(_, load)| load).collect()
}

fn rules(setup: &Setup, machines: usize) -> Rules {
    let forever = Duration::from_secs(u32::MAX.into());
    let count = u64::try_from(machines).unwrap_or(u64::MAX);
    // In the range of what a host has it is far from what a u64 holds.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let host_cpu_millis = (f64::from(setup.cpus) * setup.cpu_overcommit * 1000.0) as u64;
    Rules {
        standard: Shape {
            vcpus: setup.vcpus,
            memory_mib: MEMORY_MIB,
            drive_mib: 0,
            baseline_millis: setup.vcpu_plan.baseline_millis.saturating_mul(setup.vcpus),
        },
        reserve_mib: 0,
        drive_reserve_mib: 0,
        max_drive_mib: 0,
        max_vcpus: setup.vcpus,
        max_machines: machines,
        host_memory_mib: count.saturating_mul(MEMORY_MIB.into()),
        host_reserve_mib: 0,
        host_cpu_millis,
        host_scratch_mib: 0,
        vcpu_plan: Some(setup.vcpu_plan),
        host_baseline_millis: u64::from(setup.cpus) * 1000,
        warming: [(RUNTIME.into(), machines)].into(),
        concurrent_boots: machines,
        queue_limit: 0,
        default_limits: AccountLimits {
            machines: u32::MAX,
            cpu_millis: u64::MAX,
            memory_mib: u64::MAX,
            functions: u32::MAX,
            concurrency: u32::MAX,
            waiting: 0,
            share: 1,
        },
        account_limits: BTreeMap::new(),
        queue_timeout: forever,
        container_idle: forever,
        machine_idle: forever,
        boot_backoff: forever,
        boot_backoff_max: forever,
        boot_failures: 1,
    }
}

// === impl Policies ===

impl Policies {
    /// Boots as many machines as the policies admit, and gives each to an account of its own.
    fn admit(&mut self, setup: &Setup, loads: &[usize]) -> Vec<Machine> {
        let mut random = Random::new(setup.seed);
        let mut nths = vec![0; setup.loads.len()];
        let mut machines = Vec::new();
        let booted: Vec<_> = self
            .step(Duration::ZERO, Event::Tick)
            .into_iter()
            .filter_map(|command| match command {
                Command::BootMachine { machine, .. } => Some(machine),
                _ => None,
            })
            .collect();
        for (id, load) in booted.iter().zip(loads) {
            self.step(Duration::ZERO, Event::MachineReady { machine: *id });
            let found = self.host.world().machine(*id);
            let Some(terms) = found.and_then(|found| Some(found.credits.as_ref()?.terms)) else {
                continue;
            };
            let nth = nths.get_mut(*load).map_or(0, |next| {
                *next += 1;
                *next - 1
            });
            let period = setup.loads.get(*load).map_or(Duration::ZERO, |(load, _)| load.period());
            let phase = random.below(u64::try_from(period.as_nanos()).unwrap_or(u64::MAX));
            machines.push(Machine {
                id: *id,
                load: *load,
                nth,
                phase: Duration::from_nanos(phase),
                terms,
                account: Account::open(&terms, 0),
                class: Class::Normal,
                allowed_millis: terms.full_millis(),
                wanted: 0,
                got: 0,
                was: [0; 4],
            });
        }
        // One container for each, which takes all of its machine.
        for (nth, _) in machines.iter().enumerate() {
            let account: Arc<str> = format!("account-{nth}").into();
            let kind = Kind {
                code: Code {
                    uid: Ulid(u128::try_from(nth).unwrap_or(0)),
                    version: 1,
                },
                amount: Amount {
                    cpu_millis: setup.vcpus.saturating_mul(1000),
                    memory_mib: MEMORY_MIB,
                    scratch_mib: 0,
                },
            };
            let runtime = RUNTIME.into();
            self.step(Duration::ZERO, Event::Prepare { account, runtime, kind });
        }
        machines
    }

    /// Tells of an account, and does what is decided.
    fn settled(&mut self, machines: &mut [Machine], by_id: &HashMap<MachineId, usize>, at: usize, now: Duration) {
        let Some(machine) = machines.get(at) else { return };
        let event = Event::CreditsSettled {
            machine: machine.id,
            account: machine.account,
        };
        let commands = self.step(now, event);
        self.carry_out(machines, by_id, commands, now);
    }

    /// What is due by now.
    fn wake(&mut self, machines: &mut [Machine], by_id: &HashMap<MachineId, usize>, now: Duration) {
        while self.host.next_wake().is_some_and(|at| at <= now) {
            let commands = self.step(now, Event::Tick);
            self.carry_out(machines, by_id, commands, now);
        }
    }

    fn carry_out(
        &mut self,
        machines: &mut [Machine],
        by_id: &HashMap<MachineId, usize>,
        commands: Vec<Command>,
        now: Duration,
    ) {
        for command in commands {
            match command {
                Command::SetCpu {
                    machine,
                    class,
                    allowed_millis,
                } => {
                    if let Some(machine) = by_id.get(&machine).and_then(|at| machines.get_mut(*at)) {
                        (machine.class, machine.allowed_millis) = (class, allowed_millis);
                        self.changes += 1;
                    }
                }
                Command::SettleCredits { machine } => {
                    if let Some(at) = by_id.get(&machine).copied() {
                        // It was, at the end of this step.
                        self.settled(machines, by_id, at, now);
                    }
                }
                _ => {}
            }
        }
    }

    fn step(&mut self, mono: Duration, event: Event) -> Vec<Command> {
        let decisions = self.host.step(Now { mono, wall: mono }, event);
        decisions.into_iter().map(|decision| decision.command).collect()
    }
}

// === impl Machine ===

impl Machine {
    fn note(&mut self, got_millis: u32, step_ns: u64) {
        self.got += u128::from(got_millis) * u128::from(step_ns);
        let [high, full, slowed, exhausted] = &mut self.was;
        let was = match self.class {
            Class::High => high,
            Class::Exhausted => exhausted,
            Class::Normal if self.allowed_millis < self.terms.full_millis() => slowed,
            Class::Normal => full,
        };
        *was += 1;
    }
}

fn outcomes(setup: &Setup, machines: &[Machine], steps: u64, step_ns: u64) -> Vec<LoadOutcome> {
    let of_load = |(at, (load, _)): (usize, &(Load, usize))| {
        let mut outcome = LoadOutcome {
            load: load.name(),
            worst: 1.0,
            ..LoadOutcome::default()
        };
        let of: Vec<_> = machines.iter().filter(|machine| machine.load == at).collect();
        let all = of.len().max(1) as f64;
        let time = (u128::from(steps) * u128::from(step_ns)).max(1) as f64;
        outcome.machines = of.len();
        for machine in of {
            outcome.wanted_millis += machine.wanted as f64 / time / all;
            outcome.got_millis += machine.got as f64 / time / all;
            if machine.wanted > 0 {
                outcome.worst = outcome.worst.min(machine.got as f64 / machine.wanted as f64);
            }
            let [high, full, slowed, exhausted] = machine.was.map(|was| was as f64 / steps.max(1) as f64 / all);
            outcome.high += high;
            outcome.full += full;
            outcome.slowed += slowed;
            outcome.exhausted += exhausted;
            outcome.left += machine.account.spendable_ps() as f64 / PS_PER_CREDIT as f64 / all;
            outcome.billed += machine.account.totals().billed.get() as f64 / PS_PER_CREDIT as f64 / all;
        }
        outcome
    };
    setup.loads.iter().enumerate().map(of_load).collect()
}

#[cfg(test)]
mod tests {
    use stoker_credits::{Credits, Mode};

    use super::*;

    fn setup(loads: Vec<(Load, usize)>) -> Setup {
        Setup {
            cpus: 2,
            vcpus: 2,
            cpu_overcommit: 8.0,
            vcpu_plan: Plan {
                launch: Credits::new(30),
                ..Plan::new(1, 100, Mode::Standard)
            },
            loads,
            length: Duration::from_secs(6 * 3600),
            step: Duration::from_secs(1),
            seed: 7,
        }
    }

    fn of<'a>(outcome: &'a Outcome, load: &str) -> &'a LoadOutcome {
        outcome.loads.iter().find(|found| found.load == load).unwrap()
    }

    #[test]
    fn a_quiet_machine_among_hogs_has_what_their_baselines_leave() {
        let mut day = setup(vec![(Load::Web, 1), (Load::Hog, 7)]);
        day.length = Duration::from_secs(24 * 3600);
        day.vcpu_plan.launch = Credits::new(6);
        let outcome = credits(&day).unwrap();
        assert_eq!((outcome.asked, outcome.admitted), (8, 8));
        let (web, hog) = (of(&outcome, "web"), of(&outcome, "hog"));
        // All but their 1.4 CPUs, 0.6 of the 2 that it wants; but for the first hours, until it has saved enough.
        assert!((0.27..0.3).contains(&web.worst) && web.high > 0.8, "{web:?}");
        assert!(hog.exhausted > 0.5 && hog.got_millis < 300.0, "{hog:?}");
        // Nothing was ever less than a baseline.
        assert!(hog.got_millis >= 200.0);
        assert!(outcome.used > 0.7, "{outcome:?}");
    }

    #[test]
    fn where_all_are_new_launch_credits_make_all_equal() {
        // Among so many hogs each uses little more than it earns: what it was given lasts for a day.
        let outcome = credits(&setup(vec![(Load::Web, 1), (Load::Hog, 7)])).unwrap();
        let (web, hog) = (of(&outcome, "web"), of(&outcome, "hog"));
        assert!(hog.high > 0.99 && web.worst < 0.2, "{outcome:?}");
    }

    #[test]
    fn no_more_are_admitted_than_the_host_has_baselines_for() {
        let outcome = credits(&setup(vec![(Load::Idle, 10), (Load::Hog, 10)])).unwrap();
        assert_eq!((outcome.asked, outcome.admitted), (20, 8), "16 vCPUs");
        assert_eq!(
            outcome.loads.iter().map(|load| load.machines).collect::<Vec<_>>(),
            [4, 4]
        );
        let mut promised = setup(vec![(Load::Idle, 20)]);
        promised.vcpu_plan.baseline_millis = 250;
        assert_eq!(credits(&promised).unwrap().admitted, 4, "2 CPUs of baselines");
    }

    #[test]
    fn the_same_seed_gives_the_same() {
        let mut short = setup(vec![(Load::Web, 3), (Load::Batch, 3), (Load::Hog, 2)]);
        short.length = Duration::from_secs(600);
        assert_eq!(credits(&short).unwrap(), credits(&short).unwrap());
    }

    #[test]
    fn what_is_unlimited_is_billed() {
        let mut unlimited = setup(vec![(Load::Hog, 2)]);
        unlimited.vcpu_plan.mode = Mode::Unlimited;
        unlimited.length = Duration::from_secs(24 * 3600);
        unlimited.step = Duration::from_secs(10);
        let outcome = credits(&unlimited).unwrap();
        let hog = of(&outcome, "hog");
        assert!(hog.got_millis > 999.0 && hog.billed > 100.0, "{hog:?}");
    }

    #[test]
    fn what_can_not_be_simulated_is_said() {
        let with = |change: fn(&mut Setup)| {
            let mut setup = setup(vec![(Load::Idle, 1)]);
            change(&mut setup);
            credits(&setup).unwrap_err().to_string()
        };
        assert!(with(|setup| setup.cpus = 0).contains("CPUs"));
        assert!(with(|setup| setup.loads.clear()).contains("machines"));
        assert!(with(|setup| setup.step = Duration::ZERO).contains("step"));
        assert!(with(|setup| setup.vcpu_plan.baseline_millis = 0).contains("baseline of 0"));
    }
}
