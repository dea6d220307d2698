//! Machines that accounts launch.

mod admission;
mod check;
mod devices;
mod limits;
mod pressure;
mod properties;
mod rules;
mod run;
mod trust;

use std::time::Duration;

use super::{SECOND, cold};
use crate::scale::{ChangeSpec, Comparison, Direction, Launch, Resource, Size, ThresholdSpec, Thresholds, check};
use crate::{AccountLimits, Rules, World};

/// A host of 16 vCPUs and 16 GiB, on which nothing is booted ahead.
fn host() -> Rules {
    Rules {
        max_machines: 16,
        max_vcpus: 8,
        host_memory_mib: 16_384,
        host_cpu_millis: 16_000,
        host_baseline_millis: 4000,
        host_scratch_mib: 100_000,
        default_limits: AccountLimits {
            machines: 8,
            memory_mib: 16_384,
            ..cold().default_limits
        },
        ..cold()
    }
}

/// Of so many vCPUs and MiB, on a host of 8 vCPUs a machine.
fn launch(vcpus: u32, memory_mib: u32) -> Launch {
    Launch {
        image: "sha256:feed".into(),
        size: Size::whole(vcpus, memory_mib),
        ceiling: Size::whole(8, 8192),
        base_mib: 256,
        drive_mib: 1024,
        thresholds: Thresholds::default(),
        mode: None,
    }
}

/// `cpu_use` above so many percent for 5 s lets it grow by a vCPU, every 10 s.
fn grow(percent: f64) -> ThresholdSpec {
    ThresholdSpec {
        metric: "cpu_use".into(),
        comparison: Comparison::Above,
        value: percent,
        held: Some(5 * SECOND),
        resource: Resource::Vcpus,
        direction: Direction::Grow,
        change: ChangeSpec::By(1),
        least: None,
        most: None,
        cooldown: Some(10 * SECOND),
    }
}

/// `cpu_use` below so many percent for 20 s lets it shrink by a vCPU, once a minute.
fn shrink(percent: f64) -> ThresholdSpec {
    ThresholdSpec {
        comparison: Comparison::Below,
        held: Some(20 * SECOND),
        direction: Direction::Shrink,
        cooldown: Some(60 * SECOND),
        ..grow(percent)
    }
}

/// The same about memory.
fn of_memory(spec: ThresholdSpec, mib: u32) -> ThresholdSpec {
    ThresholdSpec {
        metric: "memory_use".into(),
        resource: Resource::Memory,
        change: ChangeSpec::By(mib),
        ..spec
    }
}

/// Checked for a machine of [`launch`].
fn checked(world: &World, specs: &[ThresholdSpec]) -> Thresholds {
    check(specs, &world.bounds_for("a", Size::whole(8, 8192), 256)).unwrap()
}

fn with_limits(change: impl FnOnce(&mut AccountLimits)) -> Rules {
    let mut rules = host();
    change(&mut rules.default_limits);
    rules
}

fn minutes(n: u32) -> Duration {
    n * 60 * SECOND
}
