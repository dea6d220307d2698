//! Machines that accounts launch, and how their sizes follow what is measured (R2).
//!
//! An account launches a machine from an image and says by which thresholds it grows and shrinks. It is that account's alone,
//! counts in all limits, and is never given up for others. Whoever measures tells what it uses, once a second or more often; a
//! threshold that has been crossed for long enough, and not too soon after the last change, changes its size. It never has more than
//! the host, its account and its own ceiling allow, never less than what it uses, and what stands in the way is said.
//!
//! What is asked for more counts at once, and what is given back counts until the guest has given it: whatever a guest does, says
//! or leaves undone, nothing is promised twice, and nobody waits for it.
//!
//! | file | holds |
//! |---|---|
//! | `size` | what is changed, in which units |
//! | `check`, `fault` | whether thresholds can be kept, before anything goes by them, and why not |
//! | `threshold` | thresholds that have been checked |
//! | `measure` | what is measured, and what that comes to |
//! | `watch` | how long each threshold has been crossed |
//! | `target` | how far a size goes, and what stands in the way |
//! | `launch` | what a machine is launched with, and why it is not |

mod check;
mod fault;
mod launch;
mod measure;
mod obstacle;
mod size;
mod target;
mod threshold;
mod watch;

use std::sync::Arc;
use std::time::Duration;

pub use check::{
    Bounds, COOLDOWN_TO_GROW, COOLDOWN_TO_SHRINK, ChangeSpec, HELD_TO_GROW, HELD_TO_SHRINK, LEAST_TIME, MAX_THRESHOLDS,
    MOST_TIME, ThresholdSpec, check,
};
pub use fault::{Fault, ThresholdError, Whose};
pub use launch::{Launch, LaunchError, MOST_VCPUS, Part, ResizeError, SizeError};
pub(crate) use launch::{check_size, largest};
pub(crate) use measure::part;
pub use measure::{GuestMeasures, Measures, Use};
pub use obstacle::{Crossed, Obstacle};
pub use size::{BLOCK_MIB, Resource, Size, SizeChange, Taken};
pub(crate) use target::{Limit, needed};
pub(crate) use threshold::Percent;
pub use threshold::{Change, Comparison, Direction, Metric, Threshold, Thresholds};
pub(crate) use watch::{MOST_LOOK, Watch};

use self::measure::Has;
use self::target::{Around, Proposal, propose};
use crate::host::Step;
use crate::{Command, MachineId, MachineState, Reason, World};

/// How long a guest may take what it was asked to before that is said.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

impl Step<'_> {
    /// An account wants a machine. Where it can't have it nothing happens: who asks finds out before (`World::may_launch`).
    pub(crate) fn launch_asked(&mut self, machine: MachineId, account: Arc<str>, launch: Box<Launch>, by: Arc<str>) {
        if self.world.may_launch(machine, &account, &launch).is_err() {
            return;
        }
        let command = Command::LaunchMachine {
            machine,
            account,
            launch,
        };
        if self.decide(command, Reason::Asked { by }) {
            self.weigh(machine);
        }
    }

    /// Somebody wants a machine that was launched to end.
    pub(crate) fn end_asked(&mut self, machine: MachineId, by: Arc<str>) {
        let found = self.world.machine(machine);
        if found.is_some_and(|found| found.launched.is_some() && found.state != MachineState::Stopping) {
            let command = Command::DestroyMachine { machine, gently: true };
            self.decide(command, Reason::Asked { by });
        }
    }

    /// Somebody wants a machine to have another size. Where it can't have it nothing happens (`World::resize_for`).
    pub(crate) fn resize_asked(&mut self, machine: MachineId, change: SizeChange, by: Arc<str>) {
        if let Ok(asked) = self.world.resize_for(machine, change) {
            self.resize(machine, asked, Reason::Asked { by });
        }
    }

    /// Somebody wants a machine to go by other thresholds, or by none.
    pub(crate) fn thresholds_asked(&mut self, machine: MachineId, thresholds: Thresholds, by: Arc<str>) {
        let found = self.world.machine(machine);
        if found.is_some_and(|found| found.launched.is_some() && found.state != MachineState::Stopping) {
            let command = Command::SetThresholds { machine, thresholds };
            self.decide(command, Reason::Asked { by });
        }
    }

    /// A machine was measured.
    pub(crate) fn measured(&mut self, machine: MachineId, measures: &Measures) {
        if self.world.draining {
            return;
        }
        let is_due = self.world.running_mut(machine).is_some_and(|launched| {
            let measures = measures.without(launched.balloon.taken_mib);
            let of_vcpus = launched.taken.vcpus.saturating_mul(1000);
            let has = Has {
                cpu_millis: launched.asked.cpu_millis.min(of_vcpus),
                memory_mib: launched.taken.memory_mib,
                balloon_mib: launched.balloon.taken_mib,
            };
            launched.watch.look(&launched.thresholds, &measures, has)
        });
        if is_due {
            for resource in Resource::ALL {
                self.scale(machine, resource);
            }
        }
    }

    /// A threshold about this resource may be due.
    fn scale(&mut self, machine: MachineId, resource: Resource) {
        let Some(Proposal { due, crossed }) = self.world.proposal(machine, resource) else {
            return;
        };
        let reason = Reason::Crossed(crossed);
        if crossed.after != crossed.before {
            let launched = self.world.launched(machine);
            let asked = launched.map(|launched| launched.held(launched.asked.with(resource, crossed.after)));
            if let Some(asked) = asked {
                self.resize(machine, asked, reason);
            }
            return;
        }
        let launched = self.world.running_mut(machine);
        let obstacle = crossed.obstacle;
        let is_news = launched
            .zip(obstacle)
            .is_some_and(|(launched, obstacle)| launched.watch.is_news(&due, obstacle));
        if is_news {
            self.decide(Command::KeepSize { machine, resource }, reason);
        }
    }

    fn resize(&mut self, machine: MachineId, asked: Size, reason: Reason) {
        let Some(launched) = self.world.launched(machine) else {
            return;
        };
        let before = launched.asked;
        if before == asked {
            return;
        }
        let number = launched.number_for(asked);
        let command = Command::ResizeMachine { machine, number, asked };
        if !self.decide(command, reason) {
            return;
        }
        if before.vcpus != asked.vcpus
            && let Some(plan) = self.world.plan_rescaled(machine)
        {
            let (before, after) = (before.vcpus, asked.vcpus);
            self.decide(
                Command::ChangePlan { machine, plan },
                Reason::Rescaled { before, after },
            );
        }
        self.credits(machine);
        self.weigh(machine);
    }

    /// A machine that was launched runs, or its guest has taken more of what it was asked to.
    pub(crate) fn launched(&mut self, machine: MachineId) {
        self.weigh(machine);
        self.credits(machine);
        let pending = self
            .world
            .launched(machine)
            .and_then(|launched| launched.pending(self.world.now.mono));
        if let Some((number, took, taken)) = pending
            && taken
        {
            let reason = Reason::Taken { took };
            self.decide(Command::ReportResize { machine, number }, reason);
        }
    }

    /// A guest has had so long to take what it was asked to.
    pub(crate) fn resize_due(&mut self, machine: MachineId) {
        let Some(launched) = self.world.launched(machine) else {
            return;
        };
        let (asked, taken) = (launched.asked, launched.taken);
        if let Some((number, after, false)) = launched.pending(self.world.now.mono) {
            let reason = Reason::NotTaken { asked, taken, after };
            self.decide(Command::ReportResize { machine, number }, reason);
        }
    }
}

impl World {
    /// What is to become of a resource of a machine by its thresholds.
    fn proposal(&self, id: MachineId, resource: Resource) -> Option<Proposal> {
        let machine = self.machine(id)?;
        let launched = machine.launched.as_ref()?;
        propose(launched, resource, || Around {
            most: self.room_for(machine, launched, resource),
            allowed_millis: machine.cpu.map(|cpu| cpu.allowed_millis),
            baseline_millis: machine.shape.baseline_millis,
        })
    }
}
