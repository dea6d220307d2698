//! Any thresholds, loads, guests and reports.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::super::SECOND;
use super::super::driver::Driver;
use super::super::properties::{Op, op};
use super::devices::Fleet;
use super::run::{Run, Takes};
use super::{checked, grow, host, launch, of_memory, shrink, with_limits};
use crate::scale::{
    ChangeSpec, Direction, GuestMeasures, Launch, Measures, Resource, Size, SizeChange, ThresholdSpec, Thresholds,
};
use crate::{AccountLimits, Command, Decision, Event, MachineId, Now, Reason, Rules};

/// One thing that happens to machines that were launched; numbers choose among what can.
#[derive(Clone, Debug)]
enum Do {
    Any(Op),
    Launch {
        account: u8,
        vcpus: u32,
        blocks: u32,
        thresholds: u8,
    },
    Measure {
        machine: u8,
        cpu_ns: u64,
        memory_bytes: u64,
        pressure_us: u64,
        guest: bool,
    },
    Resize {
        machine: u8,
        change: SizeChange,
    },
    Thresholds(u8, u8),
    Plan(u8, u32),
    Deliver(u8),
    Take(u8, u32),
    Report(u8),
    Arrive(u8, bool),
    Lie {
        machine: u8,
        number: u64,
    },
    End(u8),
}

fn doing() -> impl Strategy<Value = Do> {
    let part = |most: u32| prop::option::of(0..most);
    let change = (part(10), part(9000), part(1200)).prop_map(|(vcpus, cpu_millis, blocks)| SizeChange {
        vcpus,
        cpu_millis,
        memory_mib: blocks.map(|blocks| blocks * 2),
    });
    prop_oneof![
        6 => op().prop_map(Do::Any),
        3 => (0..3_u8, 1..5_u32, 128..800_u32, any::<u8>())
            .prop_map(|(account, vcpus, blocks, thresholds)| Do::Launch { account, vcpus, blocks, thresholds }),
        12 => (any::<u8>(), 0..5_000_000_000_u64, 0..2_500_000_000_u64, 0..1_000_000_u64, any::<bool>()).prop_map(
            |(machine, cpu_ns, memory_bytes, pressure_us, guest)| Do::Measure { machine, cpu_ns, memory_bytes, pressure_us, guest }
        ),
        3 => (any::<u8>(), change).prop_map(|(machine, change)| Do::Resize { machine, change }),
        1 => any::<(u8, u8)>().prop_map(|(machine, n)| Do::Thresholds(machine, n)),
        1 => (any::<u8>(), 1..4000_u32).prop_map(|(machine, millis)| Do::Plan(machine, millis)),
        5 => any::<u8>().prop_map(Do::Deliver),
        5 => (any::<u8>(), 0..150_u32).prop_map(|(machine, part)| Do::Take(machine, part)),
        5 => any::<u8>().prop_map(Do::Report),
        5 => any::<(u8, bool)>().prop_map(|(n, lost)| Do::Arrive(n, lost)),
        1 => (any::<u8>(), 0..20_u64).prop_map(|(machine, number)| Do::Lie { machine, number }),
        1 => any::<u8>().prop_map(Do::End),
    ]
}

/// What happens between requests and what comes of them, and nothing else.
fn resizing() -> impl Strategy<Value = Do> {
    let part = |range: std::ops::Range<u32>| prop::option::of(range);
    let change = (part(1..7), part(128..800)).prop_map(|(vcpus, blocks)| SizeChange {
        vcpus,
        cpu_millis: None,
        memory_mib: blocks.map(|blocks| blocks * 2),
    });
    prop_oneof![
        4 => (any::<u8>(), change).prop_map(|(machine, change)| Do::Resize { machine, change }),
        4 => any::<u8>().prop_map(Do::Deliver),
        4 => (any::<u8>(), 0..150_u32).prop_map(|(machine, part)| Do::Take(machine, part)),
        4 => any::<u8>().prop_map(Do::Report),
        3 => (any::<u8>(), prop::bool::weighted(0.2)).prop_map(|(n, lost)| Do::Arrive(n, lost)),
    ]
}

/// Some thresholds, all of them quick.
fn some(n: u8) -> Vec<ThresholdSpec> {
    let quick = |spec| ThresholdSpec {
        held: Some(SECOND),
        cooldown: Some(SECOND),
        ..spec
    };
    let share = |spec| ThresholdSpec {
        resource: Resource::CpuShare,
        change: ChangeSpec::ByPercent(40.0),
        ..spec
    };
    let all = [
        grow(70.0),
        shrink(40.0),
        of_memory(grow(70.0), 200),
        of_memory(shrink(40.0), 300),
        share(grow(90.0)),
        share(shrink(20.0)),
        ThresholdSpec {
            metric: "io_pressure".into(),
            ..of_memory(grow(10.0), 64)
        },
    ];
    let chosen = all.into_iter().enumerate().filter(|(bit, _)| n >> bit & 1 == 1);
    chosen.map(|(_, spec)| quick(spec)).collect()
}

struct Fuzz {
    driver: Driver,
    fleet: Fleet,
    measures: BTreeMap<MachineId, Measures>,
}

impl Fuzz {
    fn new() -> Self {
        Self {
            driver: Driver::new(narrow()),
            fleet: Fleet::default(),
            measures: BTreeMap::new(),
        }
    }

    /// With two machines that run, and use next to nothing.
    fn running() -> Self {
        let mut fuzz = Self::new();
        for account in 0..2 {
            fuzz.apply(Do::Launch {
                account,
                vcpus: 2,
                blocks: 400,
                thresholds: 0,
            });
        }
        assert_eq!(fuzz.fleet.machines().len(), 2);
        for machine in fuzz.fleet.machines() {
            fuzz.step(Event::MachineReady { machine });
            fuzz.idle(machine);
        }
        fuzz
    }

    /// A machine is measured that uses next to nothing.
    fn idle(&mut self, machine: MachineId) {
        self.driver.now += SECOND;
        let measures = self.measures.entry(machine).or_default();
        measures.at = self.driver.now;
        measures.guest = Some(GuestMeasures::default());
        let measures = *measures;
        self.step(Event::Measured { machine, measures });
    }

    fn pick(&self, n: u8) -> Option<MachineId> {
        let machines = self.fleet.machines();
        machines.get(usize::from(n).checked_rem(machines.len())?).copied()
    }

    fn step(&mut self, event: Event) -> Vec<Decision> {
        if let Event::MachineEnded { machine } = event {
            self.fleet.ended(machine);
        }
        let decisions = self.driver.step(event);
        self.fleet.note(&decisions);
        self.check_bounds(&decisions);
        self.fleet.check(&self.driver);
        decisions
    }

    /// No machine is asked to have more than it may, or less than it has always.
    fn check_bounds(&self, decisions: &[Decision]) {
        for decision in decisions {
            let Command::ResizeMachine { machine, asked, .. } = decision.command else {
                continue;
            };
            let launched = self.driver.world().machine(machine).unwrap().launched.as_ref().unwrap();
            assert!(asked.vcpus >= 1 && asked.vcpus <= launched.ceiling.vcpus);
            assert!(asked.memory_mib >= launched.base_mib && asked.memory_mib <= launched.ceiling.memory_mib);
            assert!(asked.memory_mib.is_multiple_of(2));
            assert!(asked.cpu_millis >= 1 && asked.cpu_millis <= asked.vcpus * 1000);
            assert!(asked.cpu_millis <= launched.ceiling.cpu_millis);
        }
    }

    fn apply(&mut self, doing: Do) {
        let by = || "someone".into();
        let event = match doing {
            Do::Any(op) => {
                self.driver.apply(op);
                // What it destroyed or killed is gone, and what it ended.
                let gone: Vec<_> = self.fleet.machines();
                for machine in gone.into_iter().filter(|id| self.driver.world().machine(*id).is_none()) {
                    self.fleet.ended(machine);
                }
                self.fleet.check(&self.driver);
                return;
            }
            Do::Launch {
                account,
                vcpus,
                blocks,
                thresholds,
            } => {
                let machine = MachineId(self.driver.new_id());
                let launch = Launch {
                    thresholds: checked(self.driver.world(), &some(thresholds)),
                    // A share of all of its vCPUs, or of less.
                    ceiling: Size {
                        cpu_millis: 6000 - 1500 * u32::from(account),
                        ..self.driver.world().ceiling_for("account0")
                    },
                    ..launch(vcpus, blocks * 2)
                };
                Some(Event::LaunchAsked {
                    machine,
                    account: format!("account{account}").into(),
                    launch: Box::new(launch),
                    by: by(),
                })
            }
            Do::Measure {
                machine,
                cpu_ns,
                memory_bytes,
                pressure_us,
                guest,
            } => self.pick(machine).map(|machine| {
                self.driver.now += SECOND;
                let measures = self.measures.entry(machine).or_default();
                measures.at = self.driver.now;
                measures.cpu_ns += cpu_ns;
                measures.guest = guest.then_some(GuestMeasures {
                    memory_bytes,
                    cpu_pressure_us: Some(pressure_us),
                    memory_pressure_us: Some(pressure_us),
                    // Some kernels do not count it.
                    io_pressure_us: Some(pressure_us).filter(|us| us % 2 == 0),
                });
                let measures = *measures;
                Event::Measured { machine, measures }
            }),
            Do::Resize { machine, change } => self.pick(machine).map(|machine| {
                let by = by();
                Event::ResizeAsked { machine, change, by }
            }),
            Do::Thresholds(machine, n) => self.pick(machine).map(|machine| Event::ThresholdsAsked {
                machine,
                thresholds: checked(self.driver.world(), &some(n)),
                by: by(),
            }),
            Do::Plan(machine, millis) => self.pick(machine).map(|machine| Event::PlanAsked {
                machine,
                baseline_millis: Some(millis),
                mode: None,
                by: by(),
            }),
            Do::Deliver(machine) => {
                self.pick(machine)
                    .into_iter()
                    .for_each(|machine| self.fleet.deliver(machine));
                None
            }
            Do::Take(machine, part) => {
                self.pick(machine)
                    .into_iter()
                    .for_each(|machine| self.fleet.take(machine, part));
                None
            }
            Do::Report(machine) => {
                self.pick(machine)
                    .into_iter()
                    .for_each(|machine| self.fleet.report(machine));
                None
            }
            Do::Arrive(n, lost) => self.fleet.arrive(n.into(), lost),
            // Of a request that never was.
            Do::Lie { machine, number } => self.pick(machine).map(|machine| Event::MachineResized {
                machine,
                number: number + 1_000_000,
                taken: crate::scale::Taken {
                    vcpus: 0,
                    memory_mib: 0,
                },
            }),
            Do::End(machine) => self.pick(machine).map(|machine| Event::EndAsked { machine, by: by() }),
        };
        if let Some(event) = event {
            self.step(event);
        }
        self.fleet.check(&self.driver);
    }
}

fn narrow() -> Rules {
    Rules {
        max_machines: 6,
        host_memory_mib: 5000,
        host_cpu_millis: 12_000,
        host_baseline_millis: 1300,
        warming: [(super::super::RUNTIME.into(), 1)].into(),
        ..with_limits(|limits| {
            *limits = AccountLimits {
                machines: 4,
                memory_mib: 4000,
                cpu_millis: 9000,
                ..limits.clone()
            };
        })
    }
}

/// Thresholds by which a machine grows above the one value and shrinks below the other, by steps of any size.
fn any_pair() -> impl Strategy<Value = (ThresholdSpec, ThresholdSpec, bool)> {
    let change = || {
        prop_oneof![
            (1..6_u32).prop_map(ChangeSpec::By),
            (1..90_u32).prop_map(|percent| ChangeSpec::ByPercent(percent.into())),
            (1..8_u32).prop_map(ChangeSpec::To),
        ]
    };
    let times = || (1..60_u64, 1..120_u64).prop_map(|(held, cooldown)| [held, cooldown].map(Duration::from_secs));
    (
        2..99_u32,
        0..100_u32,
        change(),
        change(),
        times(),
        times(),
        any::<bool>(),
    )
        .prop_map(
            |(above, below, up, down, [up_held, up_cooldown], [down_held, down_cooldown], is_memory)| {
                let below = (above * below / 100).max(1).min(above - 1);
                let of = |spec: ThresholdSpec, change| {
                    let mib = |n: u32| n * 256;
                    let change = match change {
                        ChangeSpec::By(by) if is_memory => ChangeSpec::By(mib(by)),
                        ChangeSpec::To(to) if is_memory => ChangeSpec::To(mib(to)),
                        change => change,
                    };
                    let spec = if is_memory { of_memory(spec, 2) } else { spec };
                    ThresholdSpec { change, ..spec }
                };
                let up = ThresholdSpec {
                    held: Some(up_held),
                    cooldown: Some(up_cooldown),
                    ..of(grow(above.into()), up)
                };
                let down = ThresholdSpec {
                    held: Some(down_held),
                    cooldown: Some(down_cooldown),
                    ..of(shrink(below.into()), down)
                };
                (up, down, is_memory)
            },
        )
}

/// Which thresholds made it so large, and when.
fn changes(run: &Run, resource: Resource) -> Vec<(Duration, Direction, u32, u32)> {
    let all = run.told.iter().filter_map(|(at, decision)| match decision.reason {
        Reason::Crossed(crossed) if crossed.resource == resource && crossed.before != crossed.after => {
            let direction = if crossed.after > crossed.before {
                Direction::Grow
            } else {
                Direction::Shrink
            };
            Some((*at, direction, crossed.before, crossed.after))
        }
        _ => None,
    });
    all.collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever guests do and reports say, nothing is promised twice: all that guests truly have is there, within the limits of
    /// their accounts, and so is what functions have.
    #[test]
    fn nothing_is_promised_twice(all in prop::collection::vec(doing(), 1..200)) {
        let mut fuzz = Fuzz::new();
        for doing in all {
            fuzz.apply(doing);
        }
        // Once all is done that was asked, what counts is what was asked for, and nobody is waited for.
        for machine in fuzz.driver.booting.clone() {
            fuzz.step(Event::MachineReady { machine });
        }
        for event in fuzz.fleet.settle() {
            fuzz.step(event);
        }
        for machine in fuzz.driver.world().machines() {
            let Some(launched) = machine.launched.as_ref().filter(|_| machine.state == crate::MachineState::Active) else { continue };
            let shape = machine.shape;
            prop_assert_eq!((shape.vcpus, shape.memory_mib), (launched.asked.vcpus, launched.asked.memory_mib));
            prop_assert!(launched.pending(fuzz.driver.now).is_none());
        }
        fuzz.driver.step(Event::DrainExpired);
        fuzz.driver.settle();
        prop_assert!(fuzz.driver.host.is_drained() && fuzz.driver.world().accounts.is_empty());
    }

    /// However late, out of order or lost what devices tell is, less never counts than what guests have.
    #[test]
    fn what_guests_have_counts_however_late_that_is_told(all in prop::collection::vec(resizing(), 20..300)) {
        let mut fuzz = Fuzz::running();
        for doing in all {
            if let Do::Resize { machine, .. } = doing
                && let Some(machine) = fuzz.pick(machine)
            {
                // So that it may shrink: of what was long ago nothing is known.
                fuzz.idle(machine);
                fuzz.idle(machine);
            }
            fuzz.apply(doing);
        }
    }

    /// With a load that stays as it is a machine turns at most once, and then stays as it is.
    #[test]
    fn a_steady_load_makes_nothing_flap(
        (up, down, is_memory) in any_pair(),
        vcpus in 1..8_u32,
        millis in 0..9000_u32,
        mib in 0..9000_u32,
        slow in 0..20_u64,
    ) {
        let specs = [up, down];
        let mut run = Run::new(host(), launch(vcpus, vcpus * 512), &specs);
        (run.wants_millis, run.wants_mib) = (millis, mib);
        run.takes = Takes::After(Duration::from_secs(slow));
        run.seconds(1500);
        let resource = if is_memory { Resource::Memory } else { Resource::Vcpus };
        let all = changes(&run, resource);
        let turns = all.windows(2).filter(|pair| pair[0].1 != pair[1].1).count();
        prop_assert!(turns <= 1, "{:?}", all);
        // It has what it uses.
        if let Some((_, Direction::Shrink, before, after)) = all.last().copied() {
            let used = if is_memory { mib.min(before) } else { millis.min(before * 1000).div_ceil(1000) };
            prop_assert!(after >= used, "{} is less than {}", after, used);
        }
    }

    /// Whatever the load does: no two changes are closer than the cooldown of the threshold that made the later one, none is without
    /// its threshold having been crossed for so long, and none leaves less than what was used.
    #[test]
    fn no_load_makes_it_flap_beyond_its_cooldown(
        (up, down, is_memory) in any_pair(),
        loads in prop::collection::vec((0..9000_u32, 0..9000_u32, 1..90_u32), 1..40),
        slow in 0..8_u64,
    ) {
        let mut run = Run::new(host(), launch(2, 1024), &[up.clone(), down.clone()]);
        run.takes = Takes::After(Duration::from_secs(slow));
        let resource = if is_memory { Resource::Memory } else { Resource::Vcpus };
        for (millis, mib, seconds) in loads {
            (run.wants_millis, run.wants_mib) = (millis, mib);
            for _ in 0..seconds {
                run.second();
                let Some((at, direction, before, after)) = changes(&run, resource).last().copied() else { continue };
                if at == run.driver.now && direction == Direction::Shrink {
                    let used = if is_memory { mib.min(before) } else { millis.min(before * 1000).div_ceil(1000) };
                    prop_assert!(after >= used, "{after} is less than {used}");
                }
            }
        }
        let all = changes(&run, resource);
        for pair in all.windows(2) {
            let cooldown = match pair[1].1 {
                Direction::Grow => up.cooldown.unwrap(),
                Direction::Shrink => down.cooldown.unwrap(),
            };
            prop_assert!(pair[1].0 - pair[0].0 >= cooldown);
        }
        for (_, decision) in &run.told {
            if let Reason::Crossed(crossed) = decision.reason {
                let held = if crossed.above { up.held } else { down.held };
                prop_assert!(u128::from(crossed.held_ms) >= held.unwrap().as_millis());
                prop_assert!(crossed.above == (crossed.measured > crossed.threshold));
            }
        }
        let most = changes(&run, resource).len() as u64;
        let least_cooldown = up.cooldown.unwrap().min(down.cooldown.unwrap()).as_secs();
        prop_assert!(most <= run.driver.now.as_secs() / least_cooldown + 1);
    }

    /// What is checked is kept, and what is kept was checked: whatever is asked for, thresholds lie within their bounds or are
    /// refused.
    #[test]
    fn what_is_accepted_is_within_its_bounds(
        metric in 0..8_usize,
        value in prop_oneof![any::<f64>(), -10.0..200.0_f64],
        (above, grows) in any::<(bool, bool)>(),
        resource in 0..3_usize,
        change in prop_oneof![
            (0..20_u32).prop_map(ChangeSpec::By),
            prop_oneof![any::<f64>(), -10.0..2000.0_f64].prop_map(ChangeSpec::ByPercent),
            any::<u32>().prop_map(ChangeSpec::To),
            (0..20_u32).prop_map(ChangeSpec::To),
        ],
        (least, most) in (prop::option::of(0..20_u32), prop::option::of(0..5000_u32)),
        (held, cooldown) in (prop::option::of(0..200_000_u64), prop::option::of(0..200_000_u64)),
    ) {
        use crate::scale::{Comparison, Metric, check};
        let world = Driver::new(host());
        let bounds = world.world().bounds_for("a", Size::whole(8, 8192), 256);
        let spec = ThresholdSpec {
            metric: Metric::ALL.get(metric).map_or("other".into(), |metric| metric.name().into()),
            comparison: if above { Comparison::Above } else { Comparison::Below },
            value,
            held: held.map(Duration::from_secs),
            resource: Resource::ALL[resource],
            direction: if grows { Direction::Grow } else { Direction::Shrink },
            change,
            least,
            most,
            cooldown: cooldown.map(Duration::from_secs),
        };
        if let Ok(thresholds) = check(&[spec], &bounds) {
            let kept = &thresholds[0];
            prop_assert!(kept.least() <= kept.most());
            prop_assert!(kept.most() <= bounds.machine.get(kept.resource()));
            prop_assert!(kept.cooldown() >= SECOND && kept.held() >= SECOND);
            prop_assert!(value.is_finite() && value >= 0.0);
        }
    }

    /// A recording gives the same decisions again.
    #[test]
    fn what_was_written_down_replays(all in prop::collection::vec(doing(), 1..120)) {
        let mut fuzz = Fuzz::new();
        for doing in all {
            fuzz.apply(doing);
        }
        let written: Vec<String> = fuzz.driver.record.iter().map(|line| serde_json::to_string(line).unwrap()).collect();
        let mut host = crate::Host::new(fuzz.driver.rules.clone(), crate::Ids::new(fuzz.driver.seed));
        for line in written {
            let (now, event, decisions): (Now, Event, Vec<Decision>) = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(host.step(now, event), decisions);
        }
    }
}

/// Recordings of before machines were launched are read.
#[test]
fn older_recordings_are_read() {
    let limits = r#"{"machines":4,"memory_mib":2048,"concurrency":10,"waiting":10,"share":1}"#;
    let limits: AccountLimits = serde_json::from_str(limits).unwrap();
    assert_eq!((limits.cpu_millis, limits.functions), (u64::MAX, u32::MAX));
    let found = r#"{"MachineFound":{"machine":"00000000000000000000000001","runtime":"python3.11",
        "shape":{"vcpus":2,"memory_mib":512},"account":"a","created":{"secs":0,"nanos":0}}}"#;
    let found: Event = serde_json::from_str(found).unwrap();
    assert!(matches!(found, Event::MachineFound { launched: None, .. }));
    let thresholds = serde_json::to_string(&Thresholds::default()).unwrap();
    assert_eq!(thresholds, "[]");
}
