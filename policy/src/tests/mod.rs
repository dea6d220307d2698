//! Examples of each rule, and properties under any sequence of events in virtual time.

mod consistency;
mod contention;
mod credits;
mod driver;
mod examples;
mod fairness;
mod found;
mod kernel;
mod limits;
mod properties;
mod refusals;
mod replay;
mod resize;
mod scale;
mod scratch;
mod simulation;
mod waiting;

use std::collections::BTreeMap;
use std::time::Duration;

use stoker_credits::{Mode, Plan};
use ulid::Ulid;

use crate::{AccountLimits, Amount, Code, Demand, Kind, Rules, Shape};

const RUNTIME: &str = "python3.11";
const SMALL: (u32, u32) = (250, 128);
/// Larger than a standard machine.
const LARGE: (u32, u32) = (3000, 900);

const SECOND: Duration = Duration::from_secs(1);

fn rules() -> Rules {
    Rules {
        standard: Shape {
            vcpus: 2,
            memory_mib: 512,
            drive_mib: 0,
            baseline_millis: 200,
        },
        reserve_mib: 64,
        drive_reserve_mib: 0,
        max_drive_mib: 0,
        max_vcpus: 4,
        max_machines: 4,
        host_memory_mib: 2048,
        host_reserve_mib: 0,
        host_cpu_millis: 16_000,
        host_scratch_mib: 0,
        vcpu_plan: Some(Plan::new(1, 100, Mode::Standard)),
        host_baseline_millis: 2000,
        warming: BTreeMap::from([(RUNTIME.into(), 1)]),
        concurrent_boots: 2,
        queue_limit: 3,
        default_limits: AccountLimits {
            machines: 4,
            cpu_millis: u64::MAX,
            memory_mib: 2048,
            functions: u32::MAX,
            concurrency: 1000,
            waiting: 1000,
            share: 1,
        },
        account_limits: BTreeMap::new(),
        queue_timeout: Duration::from_secs(30),
        container_idle: Duration::from_secs(60),
        machine_idle: Duration::from_secs(120),
        boot_backoff: Duration::from_secs(1),
        boot_backoff_max: Duration::from_secs(60),
        boot_failures: 3,
    }
}

/// Machines have drives of 1024 MiB, which may grow to four times that, and all of them together to eight times.
fn with_drives(rules: Rules) -> Rules {
    Rules {
        standard: Shape {
            drive_mib: 1024,
            ..rules.standard
        },
        drive_reserve_mib: 64,
        max_drive_mib: 4096,
        host_scratch_mib: 8192,
        ..rules
    }
}

/// Nothing is booted ahead of requests, and many may wait.
fn cold() -> Rules {
    Rules {
        queue_limit: 100,
        warming: Default::default(),
        ..rules()
    }
}

/// The same name gives the same id.
fn uid(account: &str, function: &str) -> Ulid {
    let name = format!("{account}/{function}");
    let hash = name.bytes().fold(7_u128, |hash, byte| {
        hash.wrapping_mul(0x0100_0193).wrapping_add(byte.into())
    });
    Ulid(hash)
}

/// CPU in millicores and memory in MiB, and no disk.
impl From<(u32, u32)> for Amount {
    fn from((cpu_millis, memory_mib): (u32, u32)) -> Self {
        Self {
            cpu_millis,
            memory_mib,
            scratch_mib: 0,
        }
    }
}

/// The same and scratch disk in MiB.
impl From<(u32, u32, u32)> for Amount {
    fn from((cpu_millis, memory_mib, scratch_mib): (u32, u32, u32)) -> Self {
        Self {
            cpu_millis,
            memory_mib,
            scratch_mib,
        }
    }
}

fn kind(account: &str, function: &str, version: u64, amount: impl Into<Amount>) -> Kind {
    Kind {
        code: Code {
            uid: uid(account, function),
            version,
        },
        amount: amount.into(),
    }
}

fn demand(account: &str, function: &str, version: u64, amount: impl Into<Amount>) -> Demand {
    Demand {
        account: account.into(),
        runtime: RUNTIME.into(),
        kinds: vec![kind(account, function, version, amount)],
        resize: None,
        own_amount: false,
    }
}
