//! Any sequence of events.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use ulid::Ulid;

use super::driver::{Driver, End, source};
use super::{RUNTIME, SMALL, demand, kind, rules, uid, with_drives};
use crate::resize::Thresholds;
use crate::{
    AccountLimits, Amount, Completion, ContainerFailure, ContainerId, Decision, Demand, Event, MachineId, MachineState,
    Reason, RequestId, Resize, ResizeMode, Rules, Sample,
};

/// One thing that happens; numbers choose among what can.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Request {
        account: u8,
        function: u8,
        version: u8,
        amount: u8,
        older_too: bool,
        resize: u8,
    },
    /// What one that runs or starts used.
    Executed {
        which: u8,
        peak_mib: u16,
        throttled: bool,
        killed: bool,
    },
    Prepare {
        account: u8,
        function: u8,
    },
    Leave(u8),
    Ready(u8),
    BootFails(u8),
    MachineDies(u8),
    Created(u8),
    InitFails(u8, bool),
    Done(u8, Completion),
    ContainerDies(u8),
    Stopped(u8),
    Destroyed(u8),
    Deleted {
        account: u8,
        function: u8,
    },
    Late(u8),
    /// An account has other limits; a number chooses them.
    Limits {
        account: u8,
        which: u8,
    },
    Pass(u16),
    Wake,
    /// Another agent starts; a number chooses its rules.
    Restart(u8),
    Adopt(u8),
}

const AMOUNTS: [(u32, u32); 5] = [SMALL, (500, 200), (2000, 448), (3000, 900), (5000, 100)];

/// What each of these takes of a drive in MiB, where machines have drives.
const SCRATCH: [u32; 5] = [300, 900, 1500, 960, 0];

pub(super) fn op() -> impl Strategy<Value = Op> {
    let completion = prop_oneof![
        4 => Just(Completion::Answered),
        1 => Just(Completion::Ended),
        1 => Just(Completion::NotBegun),
    ];
    prop_oneof![
        6 => (0..3_u8, 0..3_u8, 1..3_u8, 0..5_u8, any::<bool>(), 0..6_u8).prop_map(
            |(account, function, version, amount, older_too, resize)| {
                Op::Request { account, function, version, amount, older_too, resize }
            }
        ),
        4 => (any::<u8>(), 0..1000_u16, any::<bool>(), prop::bool::weighted(0.2)).prop_map(
            |(which, peak_mib, throttled, killed)| Op::Executed { which, peak_mib, throttled, killed }
        ),
        1 => (0..3_u8, 0..3_u8).prop_map(|(account, function)| Op::Prepare { account, function }),
        1 => any::<u8>().prop_map(Op::Leave),
        4 => any::<u8>().prop_map(Op::Ready),
        1 => any::<u8>().prop_map(Op::BootFails),
        1 => any::<u8>().prop_map(Op::MachineDies),
        5 => any::<u8>().prop_map(Op::Created),
        1 => any::<(u8, bool)>().prop_map(|(n, lost)| Op::InitFails(n, lost)),
        5 => (any::<u8>(), completion).prop_map(|(n, completion)| Op::Done(n, completion)),
        1 => any::<u8>().prop_map(Op::ContainerDies),
        3 => any::<u8>().prop_map(Op::Stopped),
        3 => any::<u8>().prop_map(Op::Destroyed),
        1 => (0..3_u8, 0..3_u8).prop_map(|(account, function)| Op::Deleted { account, function }),
        1 => any::<u8>().prop_map(Op::Late),
        1 => (0..3_u8, any::<u8>()).prop_map(|(account, which)| Op::Limits { account, which }),
        2 => (0..20_000_u16).prop_map(Op::Pass),
        2 => Just(Op::Wake),
    ]
}

/// One thing that happens, where the agent may restart.
pub(super) fn op_or_restart() -> impl Strategy<Value = Op> {
    prop_oneof![
        36 => op(),
        1 => any::<u8>().prop_map(Op::Restart),
        3 => any::<u8>().prop_map(Op::Adopt),
    ]
}

/// Rules as the next agent may have them, tighter ones among them.
fn changed(rules: &Rules, n: u8) -> Rules {
    let mut other = rules.clone();
    let limits = &mut other.default_limits;
    match n % 10 {
        0 => (limits.machines, limits.memory_mib) = (1, 1000),
        1 => limits.concurrency = 1,
        2 => (other.max_machines, other.host_memory_mib) = (1, 1000),
        3 => (other.standard.vcpus, other.standard.memory_mib) = (1, 300),
        4 => other.reserve_mib = 200,
        5 => (other.standard.vcpus, other.standard.memory_mib) = (3, 900),
        6 => other.host_scratch_mib = 2000,
        7 => other.drive_reserve_mib = 200,
        8 if other.standard.drive_mib == 0 => other = with_drives(other),
        8 => (other.standard.drive_mib, other.max_drive_mib) = (2000, 2000),
        _ => {}
    }
    if other.check().is_ok() { other } else { rules.clone() }
}

/// Limits that an account may be given: what others have, or less of something, down to less than any machine.
fn limited(rules: &Rules, n: u8) -> Box<AccountLimits> {
    let mut limits = Box::new(rules.default_limits.clone());
    match n % 8 {
        0 => limits.machines = 1,
        1 => limits.cpu_millis = 2000,
        2 => limits.memory_mib = 700,
        3 => limits.concurrency = 1,
        4 => (limits.waiting, limits.share) = (0, 3),
        5 => limits.memory_mib = 100,
        _ => {}
    }
    limits
}

/// A resizer that acts on little.
fn eager(mode: ResizeMode) -> Arc<Resize> {
    Arc::new(Resize {
        mode,
        least: (100, 64).into(),
        most: (5000, 1500).into(),
        thresholds: Thresholds {
            executions_up: 1,
            executions_down: 2,
            cooldown_up: Duration::from_secs(1),
            cooldown_down: Duration::from_secs(5),
            ..Thresholds::default()
        },
        kept: None,
    })
}

fn pick<T: Copy + Ord>(from: impl IntoIterator<Item = T>, n: u8) -> Option<T> {
    let all: BTreeSet<_> = from.into_iter().collect();
    let at = usize::from(n).checked_rem(all.len())?;
    all.into_iter().nth(at)
}

impl Driver {
    pub(super) fn apply(&mut self, op: Op) {
        let event = match op {
            Op::Request {
                account,
                function,
                version,
                amount,
                older_too,
                resize,
            } => {
                let (account, function) = (format!("account{account}"), format!("function{function}"));
                let amount = self.amount(amount);
                let mut of = demand(&account, &function, version.into(), amount);
                if older_too && version > 1 {
                    of.kinds.push(kind(&account, &function, 1, amount));
                }
                if let Some(mode) =
                    [ResizeMode::Advise, ResizeMode::Auto, ResizeMode::Auto].get(usize::from(resize % 4))
                {
                    of.resize = Some(eager(*mode));
                    of.own_amount = resize == 5;
                }
                let before = self.standing(&account);
                let (request, decisions) = self.request(of);
                self.check_preference(request, &before, &decisions);
                return;
            }
            Op::Executed {
                which,
                peak_mib,
                throttled,
                killed,
            } => {
                let containers = self.world().containers().map(|container| container.id);
                pick(containers, which).and_then(|container| {
                    let kind = self.world().container(container)?.kind;
                    let sample = Sample {
                        wall_ns: 100_000_000,
                        cpu_ns: 20_000_000,
                        throttled_ns: if throttled { 80_000_000 } else { 0 },
                        wait_ns: 0,
                        memory_peak_bytes: u64::from(peak_mib) << 20,
                        oom_killed: killed,
                        amount: kind.amount,
                    };
                    Some(Event::Executed {
                        container,
                        code: kind.code,
                        sample,
                    })
                })
            }
            Op::Prepare { account, function } => {
                let (account, function) = (format!("account{account}"), format!("function{function}"));
                Some(Event::Prepare {
                    kind: kind(&account, &function, 1, self.amount(0)),
                    account: account.into(),
                    runtime: RUNTIME.into(),
                })
            }
            Op::Leave(n) => pick(self.demands.keys().copied(), n).map(|request| Event::CallerLeft { request }),
            Op::Ready(n) => pick(self.booting.iter().copied(), n).map(|machine| Event::MachineReady { machine }),
            Op::BootFails(n) => pick(self.booting.iter().copied(), n).map(|machine| Event::MachineEnded { machine }),
            Op::MachineDies(n) => pick(self.world().machines().map(|machine| machine.id), n)
                .map(|machine| Event::MachineEnded { machine }),
            Op::Created(n) => {
                pick(self.creating.iter().copied(), n).map(|container| Event::ContainerReady { container })
            }
            Op::InitFails(n, lost) => pick(self.creating.iter().copied(), n).map(|container| {
                let failure = if lost {
                    ContainerFailure::Lost
                } else {
                    ContainerFailure::Settled
                };
                Event::ContainerFailed { container, failure }
            }),
            Op::Done(n, completion) => pick(self.running.keys().copied(), n).map(|container| Event::Completed {
                container,
                request: self.running[&container],
                completion,
            }),
            Op::ContainerDies(n) => pick(self.world().containers().map(|container| container.id), n)
                .map(|container| Event::ContainerEnded { container }),
            Op::Stopped(n) => {
                pick(self.stopping.iter().copied(), n).map(|container| Event::ContainerEnded { container })
            }
            Op::Destroyed(n) => pick(self.destroying.iter().copied(), n).map(|machine| Event::MachineEnded { machine }),
            Op::Deleted { account, function } => Some(Event::FunctionDeleted {
                uid: uid(&format!("account{account}"), &format!("function{function}")),
            }),
            // Reports about what is long gone, or never was.
            Op::Late(n) => {
                let (machine, container) = (MachineId(Ulid(1)), ContainerId(Ulid(2)));
                let request = RequestId(Ulid(3));
                // And about what is there already.
                let known = pick(self.world().machines().map(|machine| machine.id), n);
                let another = known.filter(|id| !self.found.contains_key(id)).unwrap_or(machine);
                let events = [
                    Event::MachineFound {
                        machine: known.unwrap_or(machine),
                        runtime: RUNTIME.into(),
                        shape: self.world().rules().standard,
                        account: Some("account0".into()),
                        created: Duration::ZERO,
                        mode: None,
                        launched: None,
                    },
                    Event::MachineAdopted {
                        machine: another,
                        containers: Vec::new(),
                    },
                    Event::MachineReady { machine },
                    Event::MachineEnded { machine },
                    Event::ContainerReady { container },
                    Event::ContainerEnded { container },
                    Event::Completed {
                        container,
                        request,
                        completion: Completion::Ended,
                    },
                    Event::CallerLeft { request },
                ];
                let n = usize::from(n) % events.len();
                events.into_iter().nth(n).filter(|_| known.is_some() || n > 0)
            }
            Op::Limits { account, which } => Some(Event::LimitsAsked {
                account: format!("account{account}").into(),
                limits: limited(self.world().rules(), which),
                by: "someone".into(),
            }),
            Op::Pass(ms) => {
                self.now += Duration::from_millis(ms.into());
                Some(Event::Tick)
            }
            Op::Restart(n) => {
                self.restart(changed(self.world().rules(), n));
                return;
            }
            Op::Adopt(n) => {
                if let Some(machine) = pick(self.found.keys().copied(), n) {
                    self.adopt(machine);
                }
                return;
            }
            Op::Wake => {
                if let Some(at) = self.host.next_wake() {
                    self.now = at;
                }
                Some(Event::Tick)
            }
        };
        if let Some(event) = event {
            self.step(event);
        }
    }

    fn amount(&self, n: u8) -> Amount {
        let (n, has_drives) = (usize::from(n), self.world().rules().standard.drive_mib > 0);
        let (cpu_millis, memory_mib) = AMOUNTS[n];
        (cpu_millis, memory_mib, if has_drives { SCRATCH[n] } else { 0 }).into()
    }

    /// What could serve a request of an account before it comes: idle containers, active machines, warming machines.
    fn standing(&self, account: &str) -> Standing {
        let world = self.world();
        let spare = world.spare_disk(account);
        let machines = || world.machines();
        let in_state = |state| machines().filter(move |machine| machine.state == state);
        Standing {
            waiting: world.waiting(),
            idle: world
                .containers()
                .filter(|container| container.state == crate::ContainerState::Idle)
                .map(|container| container.kind)
                .collect(),
            active: in_state(MachineState::Active)
                .filter_map(|machine| Some((machine.account.clone()?, machine.room().with(spare))))
                .collect(),
            warming: in_state(MachineState::Warming)
                .filter(|machine| machine.reserved.is_none())
                .map(|machine| machine.room().with(spare))
                .collect(),
        }
    }

    fn check_preference(&self, request: RequestId, before: &Standing, decisions: &[Decision]) {
        let Demand { account, .. } = &self.demands[&request];
        let kinds = self.asks_for(request);
        let amount = kinds[0].amount;
        let rules = self.world().rules();
        // With others in line the places may have gone to them; and an account may run as many as it may.
        let limits = rules.limits(account);
        let running = self.world().account(account).map_or(0, |found| found.running);
        if self.world().awaits(account) {
            return assert_eq!(
                source(decisions),
                None,
                "before guests that may have it warm have answered"
            );
        }
        if before.waiting > 0 || rules.shape_for(amount).is_none() || running >= limits.concurrency {
            return;
        }
        let source = source(decisions);
        if kinds.iter().any(|kind| before.idle.contains(kind)) {
            assert!(matches!(source, Some(Reason::IdleContainer { .. })), "{source:?}");
        } else if before
            .active
            .iter()
            .any(|(of, free)| of == account && amount.fits(*free))
        {
            assert!(matches!(source, Some(Reason::RoomInMachine { .. })), "{source:?}");
        } else if source.is_some() {
            assert!(before.warming.iter().any(|room| amount.fits(*room)));
            assert!(matches!(source, Some(Reason::WarmingMachine { .. })), "{source:?}");
        }
    }

    /// Lets everything that was begun come to its end.
    fn finish(&mut self) {
        self.step(Event::Drain);
        self.settle();
        let world = self.world();
        assert!(self.host.is_drained() && world.containers().next().is_none() && world.waiting() == 0);
        assert!(
            world.accounts.is_empty() && world.at_rest.is_empty() && world.loads.is_empty(),
            "leaked"
        );
        assert!(world.lines.is_empty() && world.large.is_empty(), "leaked");
        assert_eq!(self.ended.len(), self.demands.len(), "every request ended");
    }
}

struct Standing {
    waiting: u32,
    idle: BTreeSet<crate::Kind>,
    active: Vec<(std::sync::Arc<str>, Amount)>,
    warming: Vec<Amount>,
}

/// Whatever happens, all comes to its end.
fn ends(rules: Rules, ops: Vec<Op>, abandon: bool) {
    let mut driver = Driver::new(rules);
    for op in ops {
        driver.apply(op);
    }
    if abandon {
        driver.step(Event::DrainExpired);
    }
    driver.finish();
}

/// Whatever happened, those that come to a host where nothing goes wrong any more are served.
fn serves(rules: Rules, ops: Vec<Op>, wanted: Vec<(u8, u8, u8)>) {
    let mut driver = Driver::new(rules);
    for op in ops {
        driver.apply(op);
    }
    // Who may have too little for any machine is served by none.
    for account in 0..3 {
        driver.apply(Op::Limits { account, which: 7 });
    }
    driver.settle();
    driver.now += Duration::from_secs(3600);
    driver.step(Event::Tick);
    driver.settle();
    let requests: Vec<_> = wanted
        .into_iter()
        .map(|(account, function, amount)| {
            let (account, function) = (format!("account{account}"), format!("function{function}"));
            let of = demand(&account, &function, 1, driver.amount(amount));
            driver.request(of).0
        })
        .collect();
    driver.settle();
    for request in requests {
        assert_eq!(driver.ended.get(&request), Some(&End::Answered));
    }
}

fn any_rules() -> impl Strategy<Value = Rules> {
    let disk = prop::option::of(1024..8000_u64);
    (1..5_usize, 512..3000_u64, 1..4_u32, 1..6_u32, 1..4_u32, disk).prop_map(
        |(max_machines, host_memory_mib, machines, concurrency, share, disk)| {
            let limited = AccountLimits {
                machines,
                concurrency,
                share,
                cpu_millis: if machines == 2 { 5000 } else { u64::MAX },
                memory_mib: 1500,
                waiting: 2,
                functions: u32::MAX,
            };
            Rules {
                max_machines,
                host_memory_mib,
                account_limits: [("account1".into(), limited)].into(),
                ..some_disk(disk)
            }
        },
    )
}

fn some_disk(mib: Option<u64>) -> Rules {
    mib.map_or_else(rules, |host_scratch_mib| Rules {
        host_scratch_mib,
        ..with_drives(rules())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn holds_under_any_sequence_of_events(
        ops in prop::collection::vec(op(), 1..150),
        rules in any_rules(),
        abandon in any::<bool>(),
    ) {
        ends(rules, ops, abandon);
    }

    /// With nothing going wrong any more and everything that is begun being finished, nobody waits for ever and
    /// nobody is refused for want of a place that could be made.
    #[test]
    fn a_quiet_host_serves_everyone(
        ops in prop::collection::vec(op(), 0..80),
        wanted in prop::collection::vec((0..3_u8, 0..3_u8, 0..4_u8), 1..4),
        disk in prop::option::of(1564..8000_u64),
    ) {
        serves(some_disk(disk), ops, wanted);
    }

    #[test]
    fn holds_where_the_agent_restarts(
        ops in prop::collection::vec(op_or_restart(), 1..150),
        rules in any_rules(),
        abandon in any::<bool>(),
    ) {
        ends(rules, ops, abandon);
    }

    #[test]
    fn a_quiet_host_serves_everyone_where_the_agent_restarted(
        ops in prop::collection::vec(op_or_restart(), 0..80),
        wanted in prop::collection::vec((0..3_u8, 0..3_u8, 0..3_u8), 1..4),
        disk in prop::option::of(1700..8000_u64),
    ) {
        serves(some_disk(disk), ops, wanted);
    }
}
