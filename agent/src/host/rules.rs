//! What decisions go by, from the configuration and the size of this host.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_policy::{AccountLimits, Rules, Shape};
use stoker_proto::limits::MAX_SCRATCH_MIB;
use stoker_proto::scratch::SCRATCH_BASE_MIB;

use super::error::HostError;
use super::memory::Bounds;
use crate::capacity::{Capacity, GUEST_OVERHEAD_MIB, free_disk};
use crate::config::{Account, Config, Machines};
use crate::files;

/// How long no machine is booted after a boot failed; doubled at each failure in a row up to the second value.
const BOOT_BACKOFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// After how many failed boots in a row requests are refused rather than left waiting.
pub(super) const BOOT_FAILURES: u32 = 3;

/// The most memory in MiB that the messages of all invocations take; on a small host a quarter of its memory.
const MESSAGES_MIB: u32 = 1024;

/// What decisions go by.
///
/// # Errors
/// Where the configuration does not work out on this host.
pub fn rules(config: &Config) -> Result<Rules, HostError> {
    let capacity = Capacity::of_this_host().map_err(HostError::Size)?;
    let cpus = capacity.cpu_millis / 1000;
    let all_cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    let all_mib = u64::from(capacity.memory_mib) + u64::from(GUEST_OVERHEAD_MIB);
    let (machines, pool) = (&config.machines, &config.pool);
    let warming: BTreeMap<Arc<str>, usize> = pool
        .warming
        .iter()
        .map(|(runtime, target)| (runtime.as_str().into(), count(*target)))
        .collect();
    let host_memory_mib = pool.memory_mib.unwrap_or(all_mib / 10 * 9);
    let host_scratch_mib = match pool.scratch_gib {
        Some(gib) => gib.saturating_mul(1024),
        None => disk_mib(machines)?,
    };
    let limits = |account: &Account| AccountLimits {
        machines: account.machines.unwrap_or(pool.max_machines),
        cpu_millis: account.vcpus.map_or(u64::MAX, |vcpus| u64::from(vcpus) * 1000),
        memory_mib: account.memory_mib.unwrap_or(host_memory_mib),
        functions: account.functions.unwrap_or(u32::MAX),
        concurrency: account.concurrency.unwrap_or(u32::MAX),
        waiting: account.waiting.unwrap_or_else(|| pool.queue.div_ceil(4)),
        share: account.share.unwrap_or(1),
    };
    let vcpu_plan = config.credits.vcpu_plan(pool.cpu_overcommit);
    let rules = Rules {
        standard: Shape {
            vcpus: machines.vcpus,
            memory_mib: machines.memory_mib,
            drive_mib: machines.scratch_mib,
            baseline_millis: vcpu_plan.baseline_millis.saturating_mul(machines.vcpus),
        },
        reserve_mib: GUEST_OVERHEAD_MIB,
        drive_reserve_mib: SCRATCH_BASE_MIB,
        max_drive_mib: MAX_SCRATCH_MIB,
        // A machine may have more vCPUs than the host has CPUs where that was configured; a request can't ask for it.
        max_vcpus: cpus.max(machines.vcpus),
        max_machines: count(pool.max_machines),
        host_memory_mib,
        host_reserve_mib: pool.reserve_mib.unwrap_or(all_mib / 20),
        host_cpu_millis: cpu_millis(all_cpus, pool.cpu_overcommit),
        host_scratch_mib,
        vcpu_plan: Some(vcpu_plan),
        host_baseline_millis: cpu_millis(all_cpus, 1.0),
        warming,
        concurrent_boots: count(pool.concurrent_boots.unwrap_or(cpus.max(1))),
        queue_limit: count(pool.queue),
        default_limits: limits(&config.account),
        account_limits: named(config).map(|(name, account)| (name, limits(&account))).collect(),
        queue_timeout: pool.queue_timeout,
        container_idle: pool.container_idle_timeout,
        machine_idle: pool.machine_idle_timeout,
        boot_backoff: BOOT_BACKOFF.0,
        boot_backoff_max: BOOT_BACKOFF.1,
        boot_failures: BOOT_FAILURES,
    };
    rules.check()?;
    Ok(rules)
}

/// What machines may have of the disk where nothing else is configured, in MiB: half of what was free as the first agent started
/// whose machines may still be there. What they have written since is not free any more, and is theirs.
fn disk_mib(machines: &Machines) -> Result<u64, HostError> {
    #[derive(Serialize, Deserialize)]
    struct Disk {
        folder: PathBuf,
        mib: u64,
    }
    let folder = &machines.scratch_dir;
    let file = machines.run_dir.join("disk.json");
    // One that a crash left half written is none.
    let known = files::read_json::<Disk>(&file).ok().flatten();
    if let Some(known) = known.filter(|known| known.folder == *folder) {
        return Ok(known.mib);
    }
    let free = free_disk(folder).map_err(|source| HostError::Disk {
        path: folder.clone(),
        source,
    })?;
    let mib = (free / 2) >> 20;
    let disk = Disk {
        folder: folder.clone(),
        mib,
    };
    // Where there is no run folder yet, there is no machine.
    if machines.run_dir.exists()
        && let Err(error) = serde_json::to_vec(&disk)
            .map_err(Into::into)
            .and_then(|text| std::fs::write(&file, text))
    {
        tracing::warn!(
            "the next agent will not know how much of the disk machines may have: {}: {error}",
            file.display()
        );
    }
    Ok(mib)
}

/// The most that messages of invocations take.
///
/// # Errors
/// Where the size of this host can't be found out.
pub fn bounds(config: &Config) -> Result<Bounds, HostError> {
    let capacity = Capacity::of_this_host().map_err(HostError::Size)?;
    let all = u64::from((capacity.memory_mib / 4).min(MESSAGES_MIB)) << 20;
    let bytes = |account: &Account| match account.payload_mib {
        Some(mib) => u64::from(mib) << 20,
        None => all / 4,
    };
    Ok(Bounds {
        all,
        account: bytes(&config.account),
        accounts: named(config).map(|(name, account)| (name, bytes(&account))).collect(),
    })
}

/// The accounts that are named; what one leaves out is as for any other.
fn named(config: &Config) -> impl Iterator<Item = (Arc<str>, Account)> {
    let any = &config.account;
    config.accounts.iter().map(|(name, account)| {
        let account = account.or(any);
        (name.as_str().into(), account)
    })
}

/// So many CPUs, each given out that often.
fn cpu_millis(cpus: usize, overcommit: f64) -> u64 {
    let cpus = f64::from(u32::try_from(cpus).unwrap_or(u32::MAX));
    // In the range that the configuration allows it is far from what a u64 holds.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let millis = (cpus * overcommit * 1000.0) as u64;
    millis
}

fn count(n: u32) -> usize {
    usize::try_from(n).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_that_is_named_has_its_own_and_the_rest_as_any() {
        let mut config = Config::default();
        // However much of the disk is free.
        config.pool.scratch_gib = Some(100);
        config.account.concurrency = Some(7);
        config.account.vcpus = Some(12);
        config.account.functions = Some(100);
        config.account.payload_mib = Some(3);
        let acme = Account {
            share: Some(5),
            payload_mib: Some(9),
            ..Account::default()
        };
        config.accounts.insert("acme".into(), acme);
        let rules = rules(&config).unwrap();
        let (acme, other) = (rules.limits("acme"), rules.limits("other"));
        assert_eq!((acme.share, acme.concurrency, other.share), (5, 7, 1));
        assert_eq!((acme.cpu_millis, acme.functions), (12_000, 100));
        assert_eq!((other.waiting, other.machines), (250, 64));
        let bounds = bounds(&config).unwrap();
        assert_eq!((bounds.account, bounds.accounts["acme"]), (3 << 20, 9 << 20));
    }

    #[test]
    fn machines_have_half_of_the_free_disk_or_what_is_configured() {
        let mut config = Config::default();
        config.machines.scratch_mib = 128;
        config.machines.scratch_dir = "/dev/shm".into();
        let free_mib = free_disk(std::path::Path::new("/dev/shm")).unwrap() >> 20;
        let rules = |config: &Config| rules(config).unwrap();
        // Others may write meanwhile.
        let half = rules(&config).host_scratch_mib;
        assert!(half.abs_diff(free_mib / 2) < free_mib / 8, "{half} of {free_mib}");
        // What is written then was promised already.
        let dir = tempfile::tempdir().unwrap();
        config.machines.run_dir = dir.path().to_owned();
        config.machines.scratch_dir = dir.path().join("scratch");
        let before = rules(&config).host_scratch_mib;
        std::fs::write(dir.path().join("large"), vec![1; 64 << 20]).unwrap();
        assert_eq!(rules(&config).host_scratch_mib, before);
        // Of another disk something else is known.
        config.machines.scratch_dir = "/dev/shm".into();
        let half = rules(&config).host_scratch_mib;
        assert!(half.abs_diff(free_mib / 2) < free_mib / 8, "{half} of {free_mib}");
        config.pool.scratch_gib = Some(7);
        assert_eq!(rules(&config).host_scratch_mib, 7 * 1024);
        assert_eq!(rules(&config).standard.drive_mib, 128);
        assert_eq!(rules(&config).largest_amount().scratch_mib, 7 * 1024 - SCRATCH_BASE_MIB);
    }

    #[test]
    fn baselines_make_no_host_smaller_by_default() {
        for overcommit in [0.1, 1.0, 8.0, 10.0, 13.7, 1000.0] {
            let mut config = Config::default();
            config.pool.cpu_overcommit = overcommit;
            (config.machines.vcpus, config.pool.warming) = (1, BTreeMap::new());
            let Ok(rules) = rules(&config) else {
                // Not one vCPU fits.
                assert!(overcommit < 1.0);
                continue;
            };
            let vcpus = rules.host_cpu_millis / 1000;
            assert!(
                u64::from(rules.standard.baseline_millis) * vcpus <= rules.host_baseline_millis,
                "{overcommit}"
            );
        }
    }

    #[test]
    fn cpus_are_given_out_more_than_once() {
        assert_eq!(cpu_millis(2, 8.0), 16_000);
        assert_eq!(cpu_millis(3, 0.5), 1500);
    }
}
