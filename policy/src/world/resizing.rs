//! How machines that accounts launched come to be, and to have other sizes.

use std::sync::Arc;
use std::time::Duration;

use stoker_credits::Mode;

use super::launched::Pending;
use super::{ApplyError, HostRoom, Launched, Machine, MachineResize, MachineState, Timer, Touch, World};
use crate::scale::{Launch, LaunchError, PATIENCE, Resource, Size, Taken, Thresholds, check_size};
use crate::{Amount, MachineId, Now, Shape};

/// How many of a machine's resizes are remembered.
const REMEMBERED: usize = 16;

impl World {
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
        launched.resizes.push_back(MachineResize {
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
        let (asked, taken, is_awaited) = (launched.asked, launched.taken, launched.pending.is_some());
        let counts = Shape {
            vcpus: asked.vcpus.max(taken.vcpus),
            memory_mib: asked.memory_mib.max(taken.memory_mib),
            ..shape
        };
        self.count_shape(id, counts);
        // An earlier agent had asked for it, or its guest has given back what it had.
        if !taken.is(asked) && !is_awaited {
            self.await_guest(id);
        }
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

    pub(super) fn set_balloon(&mut self, id: MachineId, mib: u32) -> Result<(), ApplyError> {
        let now = self.now.mono;
        let launched = self.running_mut(id).ok_or(ApplyError::State("machine"))?;
        if mib > launched.asked.memory_mib {
            return Err(ApplyError::Room("memory in the machine"));
        }
        (launched.balloon.asked_mib, launched.balloon.asked_at) = (mib, Some(now));
        self.watch_balloon(id);
        Ok(())
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
