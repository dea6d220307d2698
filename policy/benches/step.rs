//! What one event costs, and how that grows: `cargo bench -p stoker-policy`, or `cargo xtask bench world`.
//!
//! A full host: every machine belongs to an account and is full of busy containers, and requests of every account wait. Each
//! round a container is done, which gives it the next request of its kind, and a new request comes and waits; every tenth
//! container ends with its request, so that another is made in its room.

#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    clippy::indexing_slicing,
    clippy::panic
)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion};
use stoker_policy::{
    AccountLimits, Amount, Code, Command, Completion, ContainerId, Decision, Demand, Event, Host, Ids, Kind, MachineId,
    Now, RequestId, Resize, Rules, Sample, Shape,
};
use ulid::Ulid;

const CONTAINERS_A_MACHINE: u32 = 4;
const ACCOUNTS: u32 = 100;

struct Load {
    host: Host,
    ids: Ids,
    now: Duration,
    accounts: Vec<Arc<str>>,
    runtime: Arc<str>,
    running: Vec<(ContainerId, RequestId)>,
    /// Made and not ready.
    created: Vec<ContainerId>,
    booting: Vec<MachineId>,
    /// How amounts of functions are looked after.
    resize: Option<Arc<Resize>>,
    rounds: u64,
}

fn rules(machines: u32) -> Rules {
    let unlimited = u32::MAX;
    Rules {
        standard: Shape {
            vcpus: 2,
            memory_mib: 1088,
            drive_mib: 0,
            baseline_millis: 200,
        },
        reserve_mib: 64,
        drive_reserve_mib: 0,
        max_drive_mib: 0,
        max_vcpus: 8,
        max_machines: machines as usize,
        host_memory_mib: u64::from(machines) * 1088,
        host_reserve_mib: 0,
        host_cpu_millis: u64::from(machines) * 2000,
        host_scratch_mib: 0,
        vcpu_plan: None,
        host_baseline_millis: u64::MAX,
        warming: BTreeMap::new(),
        concurrent_boots: machines as usize,
        queue_limit: usize::MAX,
        default_limits: AccountLimits {
            machines: unlimited,
            cpu_millis: u64::MAX,
            memory_mib: u64::MAX,
            functions: u32::MAX,
            concurrency: unlimited,
            waiting: unlimited,
            share: 1,
        },
        account_limits: BTreeMap::new(),
        queue_timeout: Duration::from_secs(60),
        container_idle: Duration::from_secs(600),
        machine_idle: Duration::from_secs(600),
        boot_backoff: Duration::from_secs(1),
        boot_backoff_max: Duration::from_secs(60),
        boot_failures: 3,
    }
}

impl Load {
    /// Machines full of busy containers, and requests that wait.
    fn new(machines: u32, waiting: u32) -> Self {
        let mut load = Self {
            host: Host::new(rules(machines), Ids::new(1)),
            ids: Ids::new(2),
            now: Duration::ZERO,
            accounts: (0..ACCOUNTS).map(|n| format!("account{n}").into()).collect(),
            runtime: "python3.11".into(),
            running: Vec::new(),
            created: Vec::new(),
            booting: Vec::new(),
            resize: None,
            rounds: 0,
        };
        for n in 0..machines * CONTAINERS_A_MACHINE {
            load.request(n % ACCOUNTS);
        }
        for machine in std::mem::take(&mut load.booting) {
            load.step(Event::MachineReady { machine });
        }
        load.make_ready();
        for n in 0..waiting {
            load.request(n % ACCOUNTS);
        }
        load
    }

    fn demand(&self, account: u32) -> Demand {
        let code = Code {
            uid: Ulid(u128::from(account) + 1),
            version: 1,
        };
        let amount = Amount {
            cpu_millis: 500,
            memory_mib: 256,
            scratch_mib: 0,
        };
        Demand {
            account: self.accounts[account as usize].clone(),
            runtime: self.runtime.clone(),
            kinds: vec![Kind { code, amount }],
            resize: self.resize.clone(),
            own_amount: false,
        }
    }

    fn request(&mut self, account: u32) -> Duration {
        let request = RequestId(self.ids.next(self.now));
        let demand = self.demand(account);
        self.step(Event::Requested { request, demand })
    }

    fn make_ready(&mut self) {
        for container in std::mem::take(&mut self.created) {
            self.step(Event::ContainerReady { container });
        }
    }

    /// One container is done, and one request comes: how long each event took.
    fn round(&mut self) -> [Duration; 2] {
        self.rounds += 1;
        let at = (self.rounds.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % self.running.len();
        let (container, request) = self.running.swap_remove(at);
        let completion = if self.rounds.is_multiple_of(10) {
            Completion::Ended
        } else {
            Completion::Answered
        };
        let done = self.step(Event::Completed {
            container,
            request,
            completion,
        });
        self.make_ready();
        let account = (self.rounds % u64::from(ACCOUNTS)) as u32;
        [done, self.request(account)]
    }

    fn step(&mut self, event: Event) -> Duration {
        self.now += Duration::from_micros(50);
        let now = Now {
            mono: self.now,
            wall: self.now,
        };
        let began = Instant::now();
        let decisions = self.host.step(now, event);
        let took = began.elapsed();
        self.note(&decisions);
        took
    }

    fn note(&mut self, decisions: &[Decision]) {
        for decision in decisions {
            match &decision.command {
                Command::BootMachine { machine, .. } => self.booting.push(*machine),
                Command::CreateContainer { container, .. } => self.created.push(*container),
                Command::Dispatch { container, request, .. } => self.running.push((*container, *request)),
                _ => {}
            }
        }
    }
}

/// The times of single events, sorted.
fn times(load: &mut Load, rounds: usize) -> Vec<Duration> {
    let mut times: Vec<_> = (0..rounds).flat_map(|_| load.round()).collect();
    times.sort_unstable();
    times
}

fn percentiles(name: &str, times: &[Duration]) {
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_nanos();
    println!(
        "{{\"name\": \"{name}\", \"events\": {}, \"p50_ns\": {}, \"p99_ns\": {}, \"p999_ns\": {}}}",
        times.len(),
        at(0.5),
        at(0.99),
        at(0.999),
    );
}

/// Warm calls of one account after another on a host with room, through to their ends.
fn a_million_requests() -> Duration {
    let mut load = Load::new(100, 0);
    while let Some((container, request)) = load.running.pop() {
        load.step(Event::Completed {
            container,
            request,
            completion: Completion::Answered,
        });
    }
    let mut took = Duration::ZERO;
    for n in 0..1_000_000_u32 {
        took += load.request(n % ACCOUNTS);
        let Some((container, request)) = load.running.pop() else {
            panic!("a warm request waits");
        };
        took += load.step(Event::Completed {
            container,
            request,
            completion: Completion::Answered,
        });
    }
    took
}

/// What an execution used, of one function after another: CPU is looked at, and nothing changes.
fn executions(criterion: &mut Criterion) {
    let mut load = Load::new(100, 0);
    load.resize = Some(Arc::new(Resize::default()));
    for (container, request) in std::mem::take(&mut load.running) {
        load.step(Event::Completed {
            container,
            request,
            completion: Completion::Answered,
        });
    }
    for account in 0..ACCOUNTS {
        load.request(account);
    }
    let running = load.running.clone();
    assert_eq!(running.len(), ACCOUNTS as usize);
    let events = running.iter().filter_map(|(container, _)| {
        let kind = load.host.world().container(*container)?.kind;
        let sample = Sample {
            wall_ns: 100_000_000,
            cpu_ns: 40_000_000,
            throttled_ns: 4_000_000,
            wait_ns: 0,
            memory_peak_bytes: 200 << 20,
            oom_killed: false,
            amount: kind.amount,
        };
        let (container, code) = (*container, kind.code);
        Some(Event::Executed {
            container,
            code,
            sample,
        })
    });
    let all: Vec<_> = events.collect();
    let mut next = all.iter().cycle().cloned();
    criterion.bench_function("execution", |bencher| {
        bencher.iter_batched(
            || next.next(),
            |event| event.map(|event| load.step(event)),
            BatchSize::SmallInput,
        );
    });
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    for (name, machines, waiting) in [("1,000 machines", 1000, 1000), ("10,000 machines", 10_000, 10_000)] {
        let mut load = Load::new(machines, waiting);
        assert_eq!(load.running.len(), (machines * CONTAINERS_A_MACHINE) as usize);
        assert_eq!(load.host.world().waiting(), waiting);
        criterion.bench_function(&format!("step/{name}"), |bencher| {
            bencher.iter_batched(|| (), |()| load.round(), BatchSize::SmallInput);
        });
        let times = times(&mut load, 100_000);
        percentiles(name, &times);
    }
    executions(&mut criterion);
    let took = a_million_requests();
    println!("{{\"name\": \"a million requests\", \"ms\": {}}}", took.as_millis());
    criterion.final_summary();
}
