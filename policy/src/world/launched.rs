//! Machines that accounts launched. They belong to their account from the start, are in no pool and hold no containers of
//! functions, so that nothing is placed in them and nobody gives them up.
//!
//! `Machine::shape` of one is what counts: what was asked for last, or what its guest may still have of what was asked before,
//! whichever is more. It grows when more is asked for, and shrinks when the machine's devices tell that less is taken; what they tell
//! of the time before the last request changes nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use stoker_credits::{Mode, Plan};

use super::{ApplyError, HostRoom, Machine, MachineState, Timer, Touch, World};
use crate::scale::{
    Bounds, Launch, LaunchError, Limit, Obstacle, PATIENCE, ResizeError, Resource, Size, SizeChange, Taken, Thresholds,
    Use, Watch, check_size, largest, needed,
};
use crate::{Amount, MachineId, Mono, Now, Shape};

/// How many of a machine's resizes are remembered.
const REMEMBERED: usize = 16;

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
    pub resizes: VecDeque<Resize>,
    /// The number of the last request to its devices; 0 before the first of this agent.
    pub(crate) number: u64,
    pub(crate) watch: Watch,
    /// What its guest has not taken yet.
    pending: Option<Pending>,
    /// The baseline that it was given, in millicores, and for how many vCPUs: what it has for another number is a part of that,
    /// so that it comes back to the same.
    baseline: (u32, u32),
}

/// A change of a machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
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
struct Pending {
    since: Mono,
    /// When it is told that the guest has not taken it; nothing once it was.
    due: Option<Mono>,
}

// === impl Launched ===

impl Launched {
    fn new(launch: &Launch, taken: Taken, baseline_millis: u32) -> Box<Self> {
        Box::new(Self {
            image: launch.image.clone(),
            ceiling: launch.ceiling,
            base_mib: launch.base_mib,
            asked: launch.size,
            taken,
            thresholds: launch.thresholds.clone(),
            resizes: VecDeque::new(),
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

    /// The most that it may have of itself.
    pub(crate) fn most(&self, resource: Resource) -> Limit {
        match resource {
            Resource::CpuShare => {
                let amount = self.asked.vcpus.saturating_mul(1000);
                let by = Obstacle::Vcpus(amount);
                Limit { amount, by }
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
    fn baseline_for(&self, vcpus: u32) -> u32 {
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
        let (has, asked) = (launched.asked, launched.asked.changed(change));
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
    fn left_to(&self, account: &str) -> HostRoom {
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
        let limits = match resource {
            Resource::Vcpus => {
                let counts = machine.shape.vcpus;
                let promised = launched.vcpus_within(machine.shape.baseline_millis, host.baseline_millis);
                vec![
                    limit(more(counts, account.cpu_millis / 1000), Obstacle::Account),
                    limit(more(counts, host.cpu_millis / 1000), Obstacle::Host),
                    limit(promised, Obstacle::Promised),
                ]
            }
            // Its vCPUs are what counts.
            Resource::CpuShare => Vec::new(),
            Resource::Memory => {
                let counts = machine.shape.memory_mib;
                vec![
                    limit(more(counts, account.memory_mib), Obstacle::Account),
                    limit(more(counts, host.memory_mib), Obstacle::Host),
                ]
            }
        };
        let least = limits.into_iter().min_by_key(|limit| limit.amount);
        least.unwrap_or_else(|| launched.most(resource))
    }

    /// What a machine's account goes by with the vCPUs that it is to have now.
    pub(crate) fn plan_rescaled(&self, id: MachineId) -> Option<Plan> {
        let launched = self.launched(id)?;
        self.plan_for(id, Some(launched.baseline_for(launched.asked.vcpus)), None)
            .ok()
    }

    pub(super) fn launch(&mut self, id: MachineId, account: &Arc<str>, launch: &Launch) -> Result<(), ApplyError> {
        self.may_launch(id, account, launch).map_err(|error| match error {
            LaunchError::Draining => ApplyError::State("host"),
            LaunchError::Exists => ApplyError::Exists("machine"),
            LaunchError::Size(_) | LaunchError::Terms(_) => ApplyError::State("machine"),
            LaunchError::Account { .. } => ApplyError::Room("room in the account's limits"),
            LaunchError::Host { .. } => ApplyError::Room("room on the host"),
        })?;
        let taken = Taken {
            vcpus: launch.size.vcpus,
            memory_mib: launch.base_mib,
        };
        self.insert_launched(
            id,
            account,
            launch,
            launch.shape(&self.rules),
            taken,
            MachineState::Booting,
        );
        Ok(())
    }

    /// A machine that an earlier agent left counts as much as that has written down; what its guest has of it is not known before
    /// its devices tell.
    pub(super) fn launched_found(
        &mut self,
        id: MachineId,
        account: &Arc<str>,
        launch: &Launch,
        shape: Shape,
        created: Now,
        mode: Option<Mode>,
    ) {
        let shape = Shape {
            vcpus: shape.vcpus.max(launch.size.vcpus),
            memory_mib: shape.memory_mib.max(launch.size.memory_mib),
            ..shape
        };
        let taken = Taken {
            vcpus: shape.vcpus,
            memory_mib: shape.memory_mib,
        };
        let launch = Launch { mode, ..launch.clone() };
        self.insert_launched(id, account, &launch, shape, taken, MachineState::Found);
        if let Some(machine) = self.machines.get_mut(&id) {
            (machine.created, machine.cpu) = (created, None);
        }
    }

    fn insert_launched(
        &mut self,
        id: MachineId,
        account: &Arc<str>,
        launch: &Launch,
        shape: Shape,
        taken: Taken,
        state: MachineState,
    ) {
        let asked = Shape {
            vcpus: launch.size.vcpus,
            ..shape
        };
        let allocated = Amount {
            cpu_millis: launch.size.cpu_millis,
            memory_mib: shape.memory_mib,
            scratch_mib: shape.drive_mib,
        };
        self.insert_machine(Machine {
            account: Some(account.clone()),
            launched: Some(Launched::new(launch, taken, shape.baseline_millis)),
            credits: self.balance(asked, launch.mode),
            allocated,
            capacity: allocated,
            growth_mib: 0,
            ..self.new_machine(id, &launch.image, shape, state)
        });
        let room = HostRoom::of(shape);
        self.count(account, |account| {
            account.has = account.has.plus(room);
            account.launched.insert(id);
            account.launched_mib += room.memory_mib;
            account.given_millis += u64::from(allocated.cpu_millis);
        });
    }

    /// The guest of a machine that was launched has answered.
    pub(super) fn launched_ready(&mut self, id: MachineId) {
        let now = self.now;
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        machine.state = MachineState::Active;
        machine.ready = Some(now);
        (machine.assigned, machine.last_used) = (now.mono, now.mono);
        if let Some(launched) = machine.launched.as_deref()
            && !launched.taken.is(launched.asked)
        {
            self.await_guest(id);
        }
        self.touched.push_back(Touch::Launched(id));
        self.refresh_rest(id);
    }

    pub(super) fn resize(&mut self, id: MachineId, number: u64, asked: Size) -> Result<(), ApplyError> {
        let machine = self.machines.get(&id).ok_or(ApplyError::Unknown("machine"))?;
        let launched = machine.launched.as_deref().ok_or(ApplyError::State("machine"))?;
        if machine.state != MachineState::Active || number != launched.number_for(asked) {
            return Err(ApplyError::State("machine"));
        }
        check_size(asked, launched.ceiling, launched.base_mib)
            .map_err(|_| ApplyError::Room("room in the machine's own limits"))?;
        let baseline_millis = match machine.credits {
            Some(_) => launched.baseline_for(asked.vcpus),
            None => machine.shape.baseline_millis,
        };
        let shape = Shape {
            vcpus: machine.shape.vcpus.max(asked.vcpus),
            memory_mib: machine.shape.memory_mib.max(asked.memory_mib),
            ..machine.shape
        };
        let promised = HostRoom::of_baseline(machine.shape.baseline_millis, baseline_millis);
        let more = HostRoom::between(machine.shape, shape).plus(promised);
        let account = machine.account.as_deref().unwrap_or_default();
        if more.lacks(self.left_to(account)).is_some() {
            return Err(ApplyError::Room("room in the account's limits"));
        }
        if more.lacks(self.free()).is_some() {
            return Err(ApplyError::Room("room on the host"));
        }
        let (before, asks) = (launched.asked, number != launched.number);
        self.count_shape(id, shape);
        self.give(id, asked.cpu_millis);
        let now = self.now;
        let Some(launched) = self.running_mut(id) else {
            return Err(ApplyError::Unknown("machine"));
        };
        (launched.asked, launched.number) = (asked, number);
        for resource in Resource::ALL {
            if asked.get(resource) != before.get(resource) {
                launched
                    .watch
                    .begin_anew(&launched.thresholds, resource, Some(now.mono));
            }
        }
        if launched.resizes.len() >= REMEMBERED {
            launched.resizes.pop_front();
        }
        launched.resizes.push_back(Resize {
            at: now,
            before,
            asked,
            // What is only held to less needs nothing of its guest.
            took: (!asks).then_some(Duration::ZERO),
        });
        if asks {
            self.await_guest(id);
        }
        Ok(())
    }

    /// What a machine's devices tell. It can't be more than was asked for, nor less than it was booted with; what they tell of the
    /// time before the last request is old.
    pub(super) fn machine_resized(&mut self, id: MachineId, number: u64, taken: Taken) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let shape = machine.shape;
        let Some(launched) = machine
            .launched
            .as_deref_mut()
            .filter(|_| machine.state == MachineState::Active)
        else {
            return;
        };
        if number != launched.number {
            return;
        }
        launched.taken = Taken {
            vcpus: taken.vcpus.clamp(1, shape.vcpus.max(1)),
            memory_mib: taken
                .memory_mib
                .clamp(launched.base_mib.min(shape.memory_mib), shape.memory_mib),
        };
        let (asked, taken) = (launched.asked, launched.taken);
        let counts = Shape {
            vcpus: asked.vcpus.max(taken.vcpus),
            memory_mib: asked.memory_mib.max(taken.memory_mib),
            ..shape
        };
        self.count_shape(id, counts);
        self.touched.push_back(Touch::Launched(id));
    }

    pub(super) fn report_resize(&mut self, id: MachineId, number: u64) -> Result<(), ApplyError> {
        let now = self.now.mono;
        let launched = self.running_mut(id).ok_or(ApplyError::State("machine"))?;
        let pending = launched.pending(now).filter(|(of, ..)| *of == number);
        let (_, took, taken) = pending.ok_or(ApplyError::State("machine"))?;
        if taken {
            if let Some(last) = launched.resizes.back_mut() {
                last.took.get_or_insert(took);
            }
            // It is measured anew with what it has now.
            for resource in [Resource::Vcpus, Resource::Memory] {
                launched.watch.begin_anew(&launched.thresholds, resource, None);
            }
            self.await_nothing(id);
        } else if let Some(due) = launched.pending.as_mut().and_then(|pending| pending.due.take()) {
            self.timers.clear(due, Timer::Resize(id));
        }
        Ok(())
    }

    pub(super) fn keep_size(&mut self, id: MachineId) -> Result<(), ApplyError> {
        self.running_mut(id).map(|_| ()).ok_or(ApplyError::State("machine"))
    }

    pub(super) fn set_thresholds(&mut self, id: MachineId, thresholds: &Thresholds) -> Result<(), ApplyError> {
        let machine = self.machines.get_mut(&id).ok_or(ApplyError::Unknown("machine"))?;
        let launched = machine.launched.as_deref_mut().ok_or(ApplyError::State("machine"))?;
        launched.thresholds = thresholds.clone();
        launched.watch.forget();
        Ok(())
    }

    /// A machine was given another baseline than its vCPUs had come to.
    pub(super) fn note_baseline(&mut self, id: MachineId, baseline_millis: u32) {
        if let Some(launched) = self
            .machines
            .get_mut(&id)
            .and_then(|machine| machine.launched.as_deref_mut())
            && launched.baseline_for(launched.asked.vcpus) != baseline_millis
        {
            launched.baseline = (baseline_millis, launched.asked.vcpus);
        }
    }

    /// Its guest is to take what was asked for; where it does not, that is said.
    fn await_guest(&mut self, id: MachineId) {
        self.await_nothing(id);
        let since = self.now.mono;
        let due = since.saturating_add(PATIENCE);
        if let Some(launched) = self
            .machines
            .get_mut(&id)
            .and_then(|machine| machine.launched.as_deref_mut())
        {
            launched.pending = Some(Pending { since, due: Some(due) });
            self.timers.set(due, Timer::Resize(id));
        }
    }

    /// Nothing is asked of its guest any more.
    pub(super) fn await_nothing(&mut self, id: MachineId) {
        let launched = self
            .machines
            .get_mut(&id)
            .and_then(|machine| machine.launched.as_deref_mut());
        let pending = launched.and_then(|launched| launched.pending.take());
        if let Some(due) = pending.and_then(|pending| pending.due) {
            self.timers.clear(due, Timer::Resize(id));
        }
    }

    /// A machine counts as so large from now on. There may be room for others now.
    fn count_shape(&mut self, id: MachineId, shape: Shape) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let more = HostRoom::between(machine.shape, shape);
        if more == HostRoom::default() {
            return;
        }
        machine.shape = shape;
        (machine.allocated.memory_mib, machine.capacity.memory_mib) = (shape.memory_mib, shape.memory_mib);
        self.used = self.used.plus(more);
        let Some(name) = machine.account.clone() else {
            return;
        };
        let runtimes = self.count(&name, |account| {
            account.has = account.has.plus(more);
            account.launched_mib += more.memory_mib;
        });
        if more.memory_mib < 0 || more.cpu_millis < 0 {
            self.unsettled.append(&mut self.lacking);
            for runtime in runtimes {
                // Its limits may let it have another.
                if self.group(&name, &runtime).is_some_and(|group| !group.queue.is_empty()) {
                    self.touched.push_back(Touch::Warming(runtime));
                }
            }
        }
    }

    /// A machine weighs so much of its account's CPU from now on, in millicores.
    fn give(&mut self, id: MachineId, cpu_millis: u32) {
        let Some(machine) = self.machines.get_mut(&id) else {
            return;
        };
        let before = machine.allocated.cpu_millis;
        (machine.allocated.cpu_millis, machine.capacity.cpu_millis) = (cpu_millis, cpu_millis);
        if let Some(account) = machine.account.as_ref().and_then(|name| self.accounts.get_mut(name)) {
            let given = account.given_millis.saturating_add(cpu_millis.into());
            account.given_millis = given.saturating_sub(before.into());
        }
    }
}
