//! Machines that accounts launched. They belong to their account from the start, are in no pool and hold no containers of
//! functions, so that nothing is placed in them and nobody gives them up.
//!
//! `Machine::shape` of one is what counts: what was asked for last, or what its guest may still have of what was asked before,
//! whichever is more. It grows when more is asked for, and shrinks when the machine's devices tell that less is taken; what they tell
//! of the time before the last request changes nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use stoker_credits::Plan;

use super::{HostRoom, Machine, MachineState, World};
use crate::pressure::Balloon;
use crate::scale::{
    Bounds, Launch, LaunchError, Limit, Metric, Obstacle, ResizeError, Resource, Size, SizeChange, Taken, Thresholds,
    Use, Watch, check_size, largest, needed,
};
use crate::{MachineId, Mono, Now};

/// What is to be said of a machine that an account launched, beside what is to be said of any.
#[derive(Clone, Debug)]
pub struct Launched {
    /// What it was booted from.
    pub image: Arc<str>,
    /// The most that it may ever have.
    pub ceiling: Size,
    /// The memory that it was booted with, in MiB, and can't give back.
    pub base_mib: u32,
    /// What it is to have.
    pub asked: Size,
    /// What its guest has taken of that.
    pub taken: Taken,
    /// When its size changes, and how.
    pub thresholds: Thresholds,
    /// Its last resizes, the oldest first.
    pub resizes: VecDeque<MachineResize>,
    /// What the host has taken back of its memory, as it was told last.
    pub balloon: Balloon,
    /// The number of the last request to its devices; 0 before the first of this agent.
    pub(crate) number: u64,
    pub(crate) watch: Watch,
    /// What its guest has not taken yet.
    pub(super) pending: Option<Pending>,
    /// The baseline that it was given, in millicores, and for how many vCPUs: what it has for another number is a part of that,
    /// so that it comes back to the same.
    pub(super) baseline: (u32, u32),
}

/// A change of a machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MachineResize {
    /// When it was decided.
    pub at: Now,
    /// What the machine was to have before.
    pub before: Size,
    /// What it is to have.
    pub asked: Size,
    /// How long its guest took for it; nothing where it has not taken it.
    pub took: Option<Duration>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Pending {
    pub(super) since: Mono,
    /// When it is told that the guest has not taken it; nothing once it was.
    pub(super) due: Option<Mono>,
}

// === impl Launched ===

impl Launched {
    pub(super) fn new(launch: &Launch, taken: Taken, baseline_millis: u32) -> Box<Self> {
        Box::new(Self {
            image: launch.image.clone(),
            ceiling: launch.ceiling,
            base_mib: launch.base_mib,
            asked: launch.size,
            taken,
            thresholds: launch.thresholds.clone(),
            resizes: VecDeque::new(),
            balloon: Balloon::default(),
            number: 0,
            watch: Watch::default(),
            pending: None,
            baseline: (baseline_millis, launch.size.vcpus),
        })
    }

    /// What it used when it was measured last, up to `now`; nothing where that is not known.
    #[must_use]
    pub fn used(&self, now: Mono) -> Option<Use> {
        self.watch.fresh(now)
    }

    /// The values of its metrics as they were measured last, in the metric's unit; none of what is not known.
    pub fn metrics(&self) -> impl Iterator<Item = (Metric, u64)> {
        self.watch.metrics()
    }

    /// The metrics that the kernel of its guest does not count: a threshold on one is never crossed.
    pub fn unsupported_metrics(&self) -> impl Iterator<Item = Metric> {
        self.watch.unsupported()
    }

    /// The number of a request for such a size: a new one where its devices have something to do.
    pub(crate) fn number_for(&self, asked: Size) -> u64 {
        let is_same = (asked.vcpus, asked.memory_mib) == (self.asked.vcpus, self.asked.memory_mib);
        self.number + u64::from(!is_same)
    }

    /// What its guest was asked for and has not been told to have taken: the number of the request, for how long it is pending,
    /// and whether it has it.
    pub(crate) fn pending(&self, now: Mono) -> Option<(u64, Duration, bool)> {
        let pending = self.pending?;
        let taken = self.taken.is(self.asked);
        Some((self.number, now.saturating_sub(pending.since), taken))
    }

    /// A size whose CPU share follows its vCPUs, as far as it may.
    pub(crate) fn held(&self, size: Size) -> Size {
        Size {
            cpu_millis: size.cpu_millis.min(self.ceiling.cpu_millis),
            ..size
        }
    }

    /// The most that it may have of itself.
    pub(crate) fn most(&self, resource: Resource) -> Limit {
        match resource {
            Resource::CpuShare => {
                let (of_vcpus, most) = (self.asked.vcpus.saturating_mul(1000), self.ceiling.cpu_millis);
                match of_vcpus <= most {
                    true => Limit {
                        amount: of_vcpus,
                        by: Obstacle::Vcpus(of_vcpus),
                    },
                    false => Limit {
                        amount: most,
                        by: Obstacle::Ceiling(most),
                    },
                }
            }
            _ => {
                let amount = self.ceiling.get(resource);
                let by = Obstacle::Ceiling(amount);
                Limit { amount, by }
            }
        }
    }

    /// The least that it has of itself.
    pub(crate) fn least(&self, resource: Resource, baseline_millis: u32) -> Limit {
        let (amount, by): (u32, fn(u32) -> Obstacle) = match resource {
            Resource::Vcpus => (1, Obstacle::Always),
            Resource::CpuShare => (baseline_millis.max(1), Obstacle::Always),
            Resource::Memory => (self.base_mib, Obstacle::Booted),
        };
        Limit { amount, by: by(amount) }
    }

    /// What it is promised with so many vCPUs, in millicores.
    pub(super) fn baseline_for(&self, vcpus: u32) -> u32 {
        let (millis, of) = self.baseline;
        let part = u64::from(millis) * u64::from(vcpus) / u64::from(of.max(1));
        u32::try_from(part).unwrap_or(u32::MAX).max(millis.min(1))
    }

    /// The most vCPUs for which what it is promised, and so much more, is enough.
    fn vcpus_within(&self, baseline_millis: u32, more_millis: i64) -> u32 {
        let (millis, of) = self.baseline;
        if millis == 0 {
            return u32::MAX;
        }
        let all = i128::from(baseline_millis) + i128::from(more_millis.max(0));
        let most = ((all + 1) * i128::from(of) - 1) / i128::from(millis);
        u32::try_from(most).unwrap_or(u32::MAX)
    }
}

// === impl World ===

impl World {
    /// What there is to be said of a machine that an account launched.
    pub(crate) fn launched(&self, id: MachineId) -> Option<&Launched> {
        self.machine(id)?.launched.as_deref()
    }

    /// The same of one that runs.
    pub(crate) fn running_mut(&mut self, id: MachineId) -> Option<&mut Launched> {
        let machine = self.machines.get_mut(&id)?;
        machine
            .launched
            .as_deref_mut()
            .filter(|_| machine.state == MachineState::Active)
    }

    /// The largest machine that an account may launch here: what a ceiling is where nothing else was asked for.
    #[must_use]
    pub fn ceiling_for(&self, account: &str) -> Size {
        let (host, of_account) = (largest(&self.rules), self.bounds_of(account));
        let vcpus = host.vcpus.min(of_account.vcpus);
        let memory_mib = host.memory_mib.min(of_account.memory_mib);
        Size::whole(vcpus, memory_mib - memory_mib % Resource::Memory.unit())
    }

    /// What thresholds of a machine have to stay within, by which it is launched.
    #[must_use]
    pub fn bounds_for(&self, account: &str, ceiling: Size, base_mib: u32) -> Bounds {
        Bounds {
            host: largest(&self.rules),
            account: self.bounds_of(account),
            machine: ceiling,
            base_mib,
            credits: self.rules.vcpu_plan.is_some(),
        }
    }

    /// The same of a machine that is there.
    #[must_use]
    pub fn bounds(&self, id: MachineId) -> Option<Bounds> {
        let machine = self.machine(id)?;
        let launched = machine.launched.as_deref()?;
        Some(Bounds {
            credits: machine.credits.is_some(),
            ..self.bounds_for(machine.account.as_deref()?, launched.ceiling, launched.base_mib)
        })
    }

    fn bounds_of(&self, account: &str) -> Size {
        let limits = self.rules.limits(account);
        let vcpus = u32::try_from(limits.cpu_millis / 1000).unwrap_or(u32::MAX);
        Size::whole(vcpus, u32::try_from(limits.memory_mib).unwrap_or(u32::MAX))
    }

    /// Whether an account may launch a machine now.
    ///
    /// # Errors
    /// [`LaunchError`] says what it lacks.
    pub fn may_launch(&self, id: MachineId, account: &str, launch: &Launch) -> Result<(), LaunchError> {
        if self.draining {
            return Err(LaunchError::Draining);
        }
        if self.machines.contains_key(&id) {
            return Err(LaunchError::Exists);
        }
        launch.check(&self.rules)?;
        let shape = launch.shape(&self.rules);
        if let Some(plan) = self.rules.plan(shape, launch.mode) {
            plan.terms()?;
        }
        let room = HostRoom::of(shape);
        if let Some((part, needs, left)) = room.lacks(self.left_to(account)) {
            return Err(LaunchError::Account { part, needs, left });
        }
        match room.lacks(self.free()) {
            Some((part, needs, left)) => Err(LaunchError::Host { part, needs, left }),
            None => Ok(()),
        }
    }

    /// What a machine would have after a change that somebody asks for: all of it, or nothing.
    ///
    /// # Errors
    /// [`ResizeError`] says what stands in the way.
    pub fn resize_for(&self, id: MachineId, change: SizeChange) -> Result<Size, ResizeError> {
        let machine = self.machine(id).ok_or(ResizeError::Unknown)?;
        let launched = machine.launched.as_deref().ok_or(ResizeError::Unknown)?;
        if machine.state != MachineState::Active {
            return Err(ResizeError::State);
        }
        let (has, changed) = (launched.asked, launched.asked.changed(change));
        let asked = match change.cpu_millis {
            Some(_) => changed,
            None => launched.held(changed),
        };
        check_size(asked, launched.ceiling, launched.base_mib)?;
        let baseline_millis = machine
            .credits
            .as_ref()
            .map_or(0, |_| launched.baseline_for(asked.vcpus));
        for resource in Resource::ALL {
            let (before, wanted) = (has.get(resource), asked.get(resource));
            let refused = |obstacle| ResizeError::Obstacle {
                resource,
                wanted,
                obstacle,
            };
            // Its vCPUs are what counts, and enough for the share.
            if wanted > before && resource != Resource::CpuShare {
                let most = self.room_for(machine, launched, resource);
                if wanted > most.amount {
                    return Err(refused(most.by));
                }
            }
            // A share that only follows its vCPUs is no wish of its own.
            let follows = resource == Resource::CpuShare && change.cpu_millis.is_none();
            if wanted < before && !follows {
                let used = launched.used(self.now.mono).ok_or(refused(Obstacle::Unmeasured))?;
                let needed = needed(resource, used).ok_or(refused(Obstacle::Unmeasured))?;
                let least = launched.least(resource, baseline_millis);
                if wanted < least.amount {
                    return Err(refused(least.by));
                }
                if wanted < needed {
                    return Err(refused(Obstacle::Used(needed)));
                }
            }
        }
        Ok(asked)
    }

    /// What the limits of an account leave it.
    pub(super) fn left_to(&self, account: &str) -> HostRoom {
        let has = self
            .account(account)
            .map_or_else(HostRoom::default, |account| account.has);
        HostRoom::allowed(self.rules.limits(account)).minus(has)
    }

    /// The most of a resource that account and host let a machine have.
    pub(crate) fn room_for(&self, machine: &Machine, launched: &Launched, resource: Resource) -> Limit {
        let account = machine
            .account
            .as_deref()
            .map_or_else(HostRoom::default, |name| self.left_to(name));
        let host = self.free();
        let more = |counts: u32, left: i64| counts.saturating_add(u32::try_from(left.max(0)).unwrap_or(u32::MAX));
        let limit = |amount: u32, by: fn(u32) -> Obstacle| Limit { amount, by: by(amount) };
        let least = |limits: &[Limit]| limits.iter().copied().min_by_key(|limit| limit.amount);
        let least = match resource {
            Resource::Vcpus => {
                let counts = machine.shape.vcpus;
                let promised = launched.vcpus_within(machine.shape.baseline_millis, host.baseline_millis);
                least(&[
                    limit(more(counts, account.cpu_millis / 1000), Obstacle::Account),
                    limit(more(counts, host.cpu_millis / 1000), Obstacle::Host),
                    limit(promised, Obstacle::Promised),
                ])
            }
            // Its vCPUs are what counts.
            Resource::CpuShare => None,
            Resource::Memory => {
                let counts = machine.shape.memory_mib;
                least(&[
                    limit(more(counts, account.memory_mib), Obstacle::Account),
                    limit(more(counts, host.memory_mib), Obstacle::Host),
                ])
            }
        };
        least.unwrap_or_else(|| launched.most(resource))
    }

    /// What a machine's account goes by with the vCPUs that it is to have now.
    pub(crate) fn plan_rescaled(&self, id: MachineId) -> Option<Plan> {
        let launched = self.launched(id)?;
        self.plan_for(id, Some(launched.baseline_for(launched.asked.vcpus)), None)
            .ok()
    }
}
