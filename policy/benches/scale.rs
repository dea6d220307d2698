//! What it costs to look at machines that were launched: `cargo bench -p stoker-policy --bench scale --profile dist`.
//!
//! A thousand machines with four thresholds each are measured, as the agent does it once a second: an event for each. In the
//! first case all is as it should be; in the second every machine is busy and as large as it may be, so that a threshold of each
//! is due every time and something stands in its way; in the third every machine has another size after each round.

#![allow(clippy::panic, clippy::expect_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use criterion::{BatchSize, Criterion};
use stoker_credits::{Mode, Plan};
use stoker_policy::scale::{
    ChangeSpec, Comparison, Direction, GuestMeasures, Measures, Resource, Size, Taken, ThresholdSpec, check,
};
use stoker_policy::{AccountLimits, Command, Event, Host, Ids, Launch, MachineId, Now, Rules, Shape};

const MACHINES: u64 = 1000;
const SECOND: Duration = Duration::from_secs(1);

struct Load {
    host: Host,
    now: Duration,
    machines: Vec<MachineId>,
    measures: Measures,
    /// How many decisions a round came to.
    decisions: usize,
}

fn rules() -> Rules {
    Rules {
        standard: Shape {
            vcpus: 2,
            memory_mib: 1024,
            drive_mib: 0,
            baseline_millis: 200,
        },
        reserve_mib: 64,
        drive_reserve_mib: 0,
        max_drive_mib: 0,
        max_vcpus: 64,
        max_machines: usize::MAX,
        host_memory_mib: 1 << 30,
        host_reserve_mib: 0,
        host_cpu_millis: 1 << 40,
        host_scratch_mib: 0,
        vcpu_plan: Some(Plan::new(1, 100, Mode::Standard)),
        host_baseline_millis: 1 << 40,
        warming: BTreeMap::new(),
        concurrent_boots: 1,
        queue_limit: 1,
        default_limits: AccountLimits {
            machines: u32::MAX,
            cpu_millis: u64::MAX,
            memory_mib: u64::MAX,
            functions: u32::MAX,
            concurrency: 1,
            waiting: 1,
            share: 1,
        },
        account_limits: BTreeMap::new(),
        queue_timeout: SECOND,
        container_idle: SECOND,
        machine_idle: SECOND,
        boot_backoff: SECOND,
        boot_backoff_max: SECOND,
        boot_failures: 3,
    }
}

/// Grows and shrinks by CPU and by memory.
fn thresholds(most: u32) -> [ThresholdSpec; 4] {
    let cpu = |comparison, value, direction| ThresholdSpec {
        metric: "cpu_use".into(),
        comparison,
        value,
        held: Some(SECOND),
        resource: Resource::Vcpus,
        direction,
        change: ChangeSpec::By(1),
        least: None,
        most: Some(most),
        cooldown: Some(SECOND),
    };
    let memory = |spec: ThresholdSpec| ThresholdSpec {
        metric: "memory_use".into(),
        resource: Resource::Memory,
        change: ChangeSpec::By(128),
        most: None,
        ..spec
    };
    let (up, down) = (
        cpu(Comparison::Above, 80.0, Direction::Grow),
        cpu(Comparison::Below, 30.0, Direction::Shrink),
    );
    [up.clone(), down.clone(), memory(up), memory(down)]
}

impl Load {
    fn new(most: u32) -> Self {
        let mut load = Self {
            host: Host::new(rules(), Ids::new(1)),
            now: Duration::ZERO,
            machines: Vec::new(),
            measures: Measures {
                guest: Some(GuestMeasures {
                    memory_bytes: 512 << 20,
                    cpu_pressure_us: Some(0),
                    memory_pressure_us: Some(0),
                    io_pressure_us: Some(0),
                }),
                ..Measures::default()
            },
            decisions: 0,
        };
        let (ceiling, base_mib) = (Size::whole(64, 8192), 256);
        let bounds = load.host.world().bounds_for("account", ceiling, base_mib);
        let thresholds = check(&thresholds(most), &bounds).expect("good thresholds");
        let mut ids = Ids::new(2);
        for n in 0..MACHINES {
            let machine = MachineId(ids.next(Duration::ZERO));
            let account: Arc<str> = format!("account{}", n % 100).into();
            let launch = Box::new(Launch {
                image: "image".into(),
                size: Size::whole(2, 1024),
                ceiling,
                base_mib,
                drive_mib: 0,
                thresholds: thresholds.clone(),
                mode: None,
            });
            let by = "bench".into();
            load.step(Event::LaunchAsked {
                machine,
                account,
                launch,
                by,
            });
            load.step(Event::MachineReady { machine });
            load.took(machine, 0, Size::whole(2, 1024));
            load.machines.push(machine);
        }
        load
    }

    fn took(&mut self, machine: MachineId, number: u64, size: Size) {
        let taken = Taken {
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
        };
        self.step(Event::MachineResized { machine, number, taken });
    }

    fn step(&mut self, event: Event) -> Vec<Command> {
        let now = Now {
            mono: self.now,
            wall: self.now,
        };
        let decisions = self.host.step(now, event);
        self.decisions += decisions.len();
        decisions.into_iter().map(|decision| decision.command).collect()
    }

    /// A second passes in which every machine used so much CPU, and all are measured.
    fn round(&mut self, cpu: Duration) {
        self.now += SECOND;
        self.measures.at = self.now;
        self.measures.cpu_ns += u64::try_from(cpu.as_nanos()).unwrap_or(u64::MAX);
        let now = Now {
            mono: self.now,
            wall: self.now,
        };
        for machine in &self.machines {
            let event = Event::Measured {
                machine: *machine,
                measures: self.measures,
            };
            self.decisions += self.host.step(now, event).len();
        }
    }

    /// All guests take what they are asked to.
    fn take_all(&mut self) {
        for machine in self.machines.clone() {
            let launched = self
                .host
                .world()
                .machine(machine)
                .and_then(|machine| machine.launched.clone());
            let Some(launched) = launched else {
                panic!("a machine is gone")
            };
            let number = u64::try_from(launched.resizes.len()).unwrap_or(0);
            self.took(machine, number, launched.asked);
        }
    }
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let mut steady = Load::new(64);
    steady.decisions = 0;
    criterion.bench_function("scale/1,000 machines, 4 thresholds each, nothing to do", |bencher| {
        bencher.iter(|| steady.round(SECOND));
    });
    assert_eq!(steady.decisions, 0);

    let mut full = Load::new(2);
    full.round(2 * SECOND);
    criterion.bench_function("scale/1,000 machines, all of them as large as they may be", |bencher| {
        bencher.iter(|| full.round(2 * SECOND));
    });
    let sizes = full.host.world().machines().map(|machine| machine.shape.vcpus);
    assert!(sizes.into_iter().all(|vcpus| vcpus == 2));

    criterion.bench_function("scale/1,000 machines, all of them grow", |bencher| {
        let busy = || {
            let mut load = Load::new(64);
            load.take_all();
            load.round(SECOND);
            load.decisions = 0;
            load
        };
        bencher.iter_batched(
            busy,
            |mut load| {
                load.round(2 * SECOND);
                assert!(load.decisions >= 3 * load.machines.len());
                load
            },
            BatchSize::LargeInput,
        );
    });
    criterion.final_summary();
}
