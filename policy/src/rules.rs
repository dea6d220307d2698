use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::{Credits, Mode, Plan, TermsError};

use crate::{Amount, Shape};

/// The `cpu.weight` of all machines of an account of share 1 together.
pub(crate) const WEIGHT: u32 = 1000;

/// The most that the kernel takes as `cpu.weight` (Documentation/admin-guide/cgroup-v2.rst).
pub const MAX_WEIGHT: u32 = 10_000;

/// What decisions go by. From the configuration and the host.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    /// The size of a machine in the warming pool, and of any other unless a request needs a larger one.
    pub standard: Shape,
    /// Guest memory in MiB that a machine's kernel and init keep for themselves.
    pub reserve_mib: u32,
    /// What the file system of a machine's drive keeps for itself, in MiB.
    #[serde(default)]
    pub drive_reserve_mib: u32,
    /// The most that a machine's drive may be made, in MiB.
    #[serde(default)]
    pub max_drive_mib: u32,
    /// The most vCPUs that a machine may have.
    pub max_vcpus: u32,
    /// The most machines of any state at once.
    pub max_machines: usize,
    /// The most memory in MiB of all machines together.
    pub host_memory_mib: u64,
    /// What of the host's memory should be available, in MiB: where it is pressed for memory and less is, machines are asked for
    /// what they do not use. None in recordings of before there was one.
    #[serde(default)]
    pub host_reserve_mib: u64,
    /// The most vCPUs of all machines together, in millicores.
    pub host_cpu_millis: u64,
    /// The most that the drives of all machines together may hold, in MiB.
    #[serde(default)]
    pub host_scratch_mib: u64,
    /// What each vCPU of a machine brings to its account of credits; nothing in recordings of before there were any.
    #[serde(default)]
    pub vcpu_plan: Option<Plan>,
    /// The most that all machines together may be promised of the host's CPUs, in millicores: all of them.
    #[serde(default)]
    pub host_baseline_millis: u64,
    /// How many machines of each runtime the warming pool should hold.
    pub warming: BTreeMap<Arc<str>, usize>,
    /// The most boots at a time.
    pub concurrent_boots: usize,
    /// The most requests that wait.
    pub queue_limit: usize,
    /// What an account may have, unless it is named in `account_limits`.
    pub default_limits: AccountLimits,
    /// What the accounts named may have.
    pub account_limits: BTreeMap<Arc<str>, AccountLimits>,
    /// How long a request waits at most for a place.
    pub queue_timeout: Duration,
    /// How long a container may lie idle.
    pub container_idle: Duration,
    /// How long an active machine may lie without containers, or one too many in the warming pool.
    pub machine_idle: Duration,
    /// How long no machine of a runtime is booted after a boot failed; doubled at each failure in a row.
    pub boot_backoff: Duration,
    /// Where the doubling ends.
    pub boot_backoff_max: Duration,
    /// After how many failed boots in a row requests that need one are refused until the next attempt.
    pub boot_failures: u32,
}

/// What an account may have at a time, and its share of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccountLimits {
    /// Machines.
    pub machines: u32,
    /// vCPUs of all its machines in millicores; without limit in recordings of before there was one.
    #[serde(default = "unlimited_cpu")]
    pub cpu_millis: u64,
    /// Memory of all its machines in MiB.
    pub memory_mib: u64,
    /// Functions; likewise.
    #[serde(default = "unlimited")]
    pub functions: u32,
    /// Requests that run or for which a container is made. Those that wait are not among them.
    pub concurrency: u32,
    /// Requests that wait.
    pub waiting: u32,
    /// Its weight where accounts contend for machines: one of share 2 gets twice what one of share 1 gets. At least 1.
    pub share: u32,
}

/// An account has as many functions as it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the account has {has} functions, and may have {limit}: delete one")]
pub struct TooManyFunctions {
    /// How many it has.
    pub has: u32,
    /// How many it may have.
    pub limit: u32,
}

/// Rules that can't work.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RulesError {
    /// The standard machine is smaller than what its guest keeps for itself.
    #[error(
        "a machine of {memory_mib} MiB leaves nothing for containers, its guest keeps {reserve_mib} MiB: raise [machines] memory_mib"
    )]
    NoCapacity {
        /// The standard machine's memory.
        memory_mib: u32,
        /// What its guest keeps.
        reserve_mib: u32,
    },
    /// The host can't hold a single machine.
    #[error(
        "a machine of {memory_mib} MiB does not fit in the {host_memory_mib} MiB that machines may use: lower [machines] memory_mib or raise [pool] memory_mib"
    )]
    HostTooSmall {
        /// The standard machine's memory.
        memory_mib: u32,
        /// What all may use.
        host_memory_mib: u64,
    },
    /// Something that must be at least one is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// The host's CPUs can't hold a single machine.
    #[error(
        "a machine of {vcpus} vCPUs does not fit in the {host_cpu_millis} millicores that machines may have: lower [machines] vcpus or raise [pool] cpu_overcommit"
    )]
    TooFewCpus {
        /// The standard machine's vCPUs.
        vcpus: u32,
        /// What all may have.
        host_cpu_millis: u64,
    },
    /// Accounts of credits can't be kept so.
    #[error("[credits] {0}")]
    Credits(TermsError),
    /// The host's CPUs can't give a single machine its baseline.
    #[error(
        "a machine's baseline of {baseline_millis} millicores does not fit in the {host_millis} that this host's CPUs have: lower [credits] baseline_percent or [machines] vcpus"
    )]
    BaselineTooLarge {
        /// Of the standard machine.
        baseline_millis: u32,
        /// What all may be promised.
        host_millis: u64,
    },
    /// The drive of the standard machine holds nothing but its file system.
    #[error(
        "a scratch disk of {drive_mib} MiB leaves nothing for containers, its file system keeps {reserve_mib} MiB: raise [machines] scratch_mib"
    )]
    NoDriveCapacity {
        /// The standard machine's drive.
        drive_mib: u32,
        /// What its file system keeps.
        reserve_mib: u32,
    },
    /// A drive that is larger than one may be.
    #[error("a machine's scratch disk may be at most {max} MiB, not {drive_mib}: lower [machines] scratch_mib")]
    DriveTooLarge {
        /// What is configured.
        drive_mib: u32,
        /// What may be.
        max: u32,
    },
    /// The host's disk can't hold a single drive.
    #[error(
        "a scratch disk of {drive_mib} MiB does not fit in the {host_scratch_mib} MiB that machines may have of the host's disk: lower [machines] scratch_mib, raise [pool] scratch_gib, or free disk in [machines] scratch_dir"
    )]
    HostDiskTooSmall {
        /// The standard machine's drive.
        drive_mib: u32,
        /// What all may have.
        host_scratch_mib: u64,
    },
    /// A limit of an account that must be at least one is zero.
    #[error("{field} of {account} must be at least 1")]
    ZeroLimit {
        /// The limit.
        field: &'static str,
        /// The account, or all that are not named.
        account: String,
    },
    /// A machine of more vCPUs than a machine may have.
    #[error("a machine may have at most {max} vCPUs, not {vcpus}: lower [machines] vcpus")]
    TooManyCpus {
        /// What is configured.
        vcpus: u32,
        /// What may be.
        max: u32,
    },
    /// The warming pool alone is larger than the host.
    #[error(
        "a warming pool of {machines} machines is more than the host may run: {limit} allows {max}; lower [pool] warming or change that"
    )]
    WarmingTooLarge {
        /// All runtimes together.
        machines: usize,
        /// What count, memory, CPUs, disk and baselines allow.
        max: usize,
        /// What allows the fewest, and its setting.
        limit: &'static str,
    },
}

// === impl Rules ===

impl Rules {
    /// The `cpu.weight` of a machine that has no account, or is ending. As many as may boot at a time weigh half of what an
    /// account of share 1 does: enough that those who wait for their first machine get it where all CPUs are busy, and not so
    /// much that one who wants many slows down those who have theirs.
    #[must_use]
    pub fn unowned_weight(&self) -> u32 {
        let boots = u32::try_from(self.concurrent_boots).unwrap_or(u32::MAX);
        (WEIGHT / 2 / boots.max(1)).max(1)
    }

    /// Checks that the rules can work together.
    ///
    /// # Errors
    /// The first thing that cannot.
    pub fn check(&self) -> Result<(), RulesError> {
        let zeros = [
            ("[machines] vcpus", self.standard.vcpus == 0),
            ("[pool] max_machines", self.max_machines == 0),
            ("[pool] concurrent_boots", self.concurrent_boots == 0),
        ];
        if let Some((name, _)) = zeros.iter().find(|(_, zero)| *zero) {
            return Err(RulesError::Zero(name));
        }
        if let Some((field, name)) = self.zero_limit() {
            return Err(RulesError::ZeroLimit { field, account: name });
        }
        let memory_mib = self.standard.memory_mib;
        if self.standard.vcpus > self.max_vcpus {
            return Err(RulesError::TooManyCpus {
                vcpus: self.standard.vcpus,
                max: self.max_vcpus,
            });
        }
        if memory_mib <= self.reserve_mib {
            return Err(RulesError::NoCapacity {
                memory_mib,
                reserve_mib: self.reserve_mib,
            });
        }
        let host_memory_mib = self.host_memory_mib;
        if u64::from(memory_mib) > host_memory_mib {
            return Err(RulesError::HostTooSmall {
                memory_mib,
                host_memory_mib,
            });
        }
        if u64::from(self.standard.vcpus) * 1000 > self.host_cpu_millis {
            return Err(RulesError::TooFewCpus {
                vcpus: self.standard.vcpus,
                host_cpu_millis: self.host_cpu_millis,
            });
        }
        self.check_drives()?;
        self.check_credits()?;
        let machines = self.warming.values().fold(0_usize, |sum, n| sum.saturating_add(*n));
        let (max, limit) = self.most_standard_machines();
        if machines > max {
            return Err(RulesError::WarmingTooLarge { machines, max, limit });
        }
        Ok(())
    }

    /// How many standard machines the host may run, and what allows no more.
    fn most_standard_machines(&self) -> (usize, &'static str) {
        let Shape {
            vcpus,
            memory_mib,
            drive_mib,
            baseline_millis,
        } = self.standard;
        let fits = |host: u64, machine: u64| host.checked_div(machine).unwrap_or(u64::MAX);
        let limits = [
            (
                u64::try_from(self.max_machines).unwrap_or(u64::MAX),
                "[pool] max_machines",
            ),
            (
                fits(self.host_memory_mib, memory_mib.into()),
                "memory ([pool] memory_mib)",
            ),
            (
                fits(self.host_cpu_millis, u64::from(vcpus) * 1000),
                "CPU ([pool] cpu_overcommit)",
            ),
            (
                fits(self.host_scratch_mib, drive_mib.into()),
                "disk ([pool] scratch_gib, or half of what was free in [machines] scratch_dir)",
            ),
            (
                fits(self.host_baseline_millis, baseline_millis.into()),
                "CPU for baselines ([credits] baseline_percent)",
            ),
        ];
        let (max, limit) = limits.into_iter().min_by_key(|(max, _)| *max).unwrap_or_default();
        (usize::try_from(max).unwrap_or(usize::MAX), limit)
    }

    /// Without drives there is nothing to check: rules of before there were any.
    fn check_drives(&self) -> Result<(), RulesError> {
        let drive_mib = self.standard.drive_mib;
        let (reserve_mib, max) = (self.drive_reserve_mib, self.max_drive_mib);
        if drive_mib == 0 {
            return Ok(());
        }
        if drive_mib <= reserve_mib {
            return Err(RulesError::NoDriveCapacity { drive_mib, reserve_mib });
        }
        if drive_mib > max {
            return Err(RulesError::DriveTooLarge { drive_mib, max });
        }
        let host_scratch_mib = self.host_scratch_mib;
        if u64::from(drive_mib) > host_scratch_mib {
            return Err(RulesError::HostDiskTooSmall {
                drive_mib,
                host_scratch_mib,
            });
        }
        Ok(())
    }

    fn check_credits(&self) -> Result<(), RulesError> {
        for vcpus in [1, self.standard.vcpus, self.max_vcpus] {
            let shape = self.with_baseline(Shape { vcpus, ..self.standard });
            if let Some(plan) = self.plan(shape, None) {
                plan.terms().map_err(RulesError::Credits)?;
            }
        }
        let (baseline_millis, host_millis) = (self.standard.baseline_millis, self.host_baseline_millis);
        if u64::from(baseline_millis) > host_millis {
            return Err(RulesError::BaselineTooLarge {
                baseline_millis,
                host_millis,
            });
        }
        Ok(())
    }

    /// A machine of this size with the baseline that its vCPUs have by default.
    #[must_use]
    pub fn with_baseline(&self, shape: Shape) -> Shape {
        let of_each = self.vcpu_plan.map_or(0, |plan| plan.baseline_millis);
        Shape {
            baseline_millis: of_each.saturating_mul(shape.vcpus),
            ..shape
        }
    }

    /// What the account of a machine of this size is to have, in a mode of its own if it has one; nothing in recordings of before
    /// there were credits.
    #[must_use]
    pub fn plan(&self, shape: Shape, mode: Option<Mode>) -> Option<Plan> {
        let vcpu = self.vcpu_plan?;
        let times = |credits: Credits| Credits::from_millis(credits.millis().saturating_mul(shape.vcpus.into()));
        Some(Plan {
            vcpus: shape.vcpus,
            baseline_millis: shape.baseline_millis,
            mode: mode.unwrap_or(vcpu.mode),
            launch: times(vcpu.launch),
            cap: vcpu.cap.map(times),
            limit: vcpu.limit.map(times),
            high_enter: vcpu.high_enter.map(times),
            high_leave: vcpu.high_leave.map(times),
            low: vcpu.low.map(times),
            recover: vcpu.recover.map(times),
        })
    }

    /// The limits of an account.
    #[must_use]
    pub fn limits(&self, account: &str) -> &AccountLimits {
        self.account_limits.get(account).unwrap_or(&self.default_limits)
    }

    /// Sets the limits of an account.
    pub(crate) fn set_limits(&mut self, account: &Arc<str>, limits: AccountLimits) {
        match limits == self.default_limits {
            true => self.account_limits.remove(account),
            false => self.account_limits.insert(account.clone(), limits),
        };
    }

    fn zero_limit(&self) -> Option<(&'static str, String)> {
        let named = self
            .account_limits
            .iter()
            .map(|(name, limits)| (limits, name.to_string()));
        named
            .chain([(&self.default_limits, "the default limits".to_owned())])
            .find_map(|(limits, name)| Some((limits.zero()?, name)))
    }

    /// What a machine of this size can give to containers.
    #[must_use]
    pub fn capacity(&self, shape: Shape) -> Amount {
        shape.amount().minus(Amount {
            cpu_millis: 0,
            memory_mib: self.reserve_mib,
            scratch_mib: self.drive_reserve_mib,
        })
    }

    /// What a standard machine can once its drive was made as large as it may be.
    pub(crate) fn most_in_standard(&self) -> Amount {
        self.capacity(Shape {
            drive_mib: self.largest_drive_mib(),
            ..self.standard
        })
    }

    /// The largest drive that a machine of this host may have, in MiB.
    fn largest_drive_mib(&self) -> u32 {
        let host_mib = u32::try_from(self.host_scratch_mib).unwrap_or(u32::MAX);
        self.max_drive_mib.min(host_mib)
    }

    /// The size of a machine that can hold a container of this amount: the standard one where it can, or one that is as much
    /// larger as it needs. `None` where none on this host could.
    #[must_use]
    pub fn shape_for(&self, amount: Amount) -> Option<Shape> {
        let standard = self.standard;
        let capacity = self.capacity(standard);
        if amount.fits(capacity) {
            return Some(standard);
        }
        // What it has enough of stays as it is.
        let part = |needs: u32, reserve: u32, has: u32, all: u32| match needs <= has {
            true => Some(all),
            false => needs.checked_add(reserve),
        };
        let (memory, disk) = (capacity.memory_mib, capacity.scratch_mib);
        let shape = self.with_baseline(Shape {
            vcpus: amount.cpu_millis.div_ceil(1000).max(standard.vcpus),
            memory_mib: part(amount.memory_mib, self.reserve_mib, memory, standard.memory_mib)?,
            drive_mib: part(amount.scratch_mib, self.drive_reserve_mib, disk, standard.drive_mib)?,
            baseline_millis: 0,
        });
        let fits = shape.vcpus <= self.max_vcpus
            && u64::from(shape.memory_mib) <= self.host_memory_mib
            && u64::from(shape.vcpus) * 1000 <= self.host_cpu_millis
            && shape.drive_mib <= self.largest_drive_mib()
            && u64::from(shape.baseline_millis) <= self.host_baseline_millis;
        fits.then_some(shape)
    }

    /// The most that one container could be given on this host.
    #[must_use]
    pub fn largest_amount(&self) -> Amount {
        let by_cpu = self.host_cpu_millis / 1000;
        let of_each = self.vcpu_plan.map_or(0, |plan| u64::from(plan.baseline_millis));
        let by_baseline = self.host_baseline_millis.checked_div(of_each);
        let vcpus = by_cpu.min(by_baseline.unwrap_or(u64::MAX));
        self.capacity(Shape {
            vcpus: self.max_vcpus.min(u32::try_from(vcpus).unwrap_or(u32::MAX)),
            memory_mib: u32::try_from(self.host_memory_mib).unwrap_or(u32::MAX),
            drive_mib: self.largest_drive_mib(),
            baseline_millis: 0,
        })
    }
}

// === impl AccountLimits ===

impl AccountLimits {
    /// Whether an account that has so many functions may have another.
    ///
    /// # Errors
    /// Where it may not.
    pub fn may_create_function(&self, has: u32) -> Result<(), TooManyFunctions> {
        let limit = self.functions;
        match has < limit {
            true => Ok(()),
            false => Err(TooManyFunctions { has, limit }),
        }
    }

    /// The first that is zero and must be at least one.
    pub(crate) fn zero(&self) -> Option<&'static str> {
        let fields = [
            ("machines", self.machines),
            ("concurrency", self.concurrency),
            ("share", self.share),
        ];
        fields
            .into_iter()
            .find(|(_, value)| *value == 0)
            .map(|(field, _)| field)
    }
}

fn unlimited_cpu() -> u64 {
    u64::MAX
}

fn unlimited() -> u32 {
    u32::MAX
}
