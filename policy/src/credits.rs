//! How urgently machines run, and how much, by their balances of credits.
//!
//! A machine runs as the level of its balance says (`stoker_credits::Level`): ahead of others with plenty, held to its
//! baseline with nothing. One that serves no account, since it boots or waits to be assigned, or is to end, comes before nobody,
//! whatever it has: all new machines have launch credits, and would take the CPUs from those that serve.
//!
//! Every machine may always use its baseline. So machines are admitted by that too: all baselines together are no more than
//! the host's CPUs.

use std::sync::Arc;

use stoker_credits::{Class, Credits, Mode};

use crate::host::Step;
use crate::world::Cpu;
use crate::{Command, Machine, MachineId, MachineState, Reason};

impl Step<'_> {
    /// What is known of a machine's balance changed, or whom it serves.
    pub(crate) fn credits(&mut self, id: MachineId) {
        let Some((cpu, reason)) = self.world.machine(id).and_then(due) else {
            return;
        };
        if self.world.machine(id).and_then(|machine| machine.cpu) != Some(cpu) {
            let Cpu { class, allowed_millis } = cpu;
            let command = Command::SetCpu {
                machine: id,
                class,
                allowed_millis,
            };
            self.decide(command, reason);
        }
    }

    /// A machine that lies idle may have earned enough for its next level. Nobody else would see it, for nothing happens there.
    pub(crate) fn credits_due(&mut self, machine: MachineId) {
        let balance = self.world.machine(machine).and_then(|found| found.credits.as_ref());
        if let Some(account) = balance.and_then(|balance| balance.account) {
            let reason = Reason::NextLevel {
                level: account.level().number(),
                millicredits: Credits::from_ps(account.spendable_ps()).millis(),
            };
            self.decide(Command::SettleCredits { machine }, reason);
        }
    }

    /// Somebody wants a machine to go by other terms. Where that can't be, nothing changes: who asks finds out before
    /// (`World::plan_for`).
    pub(crate) fn plan_asked(&mut self, machine: MachineId, baseline: Option<u32>, mode: Option<Mode>, by: Arc<str>) {
        if let Ok(plan) = self.world.plan_for(machine, baseline, mode) {
            self.decide(Command::ChangePlan { machine, plan }, Reason::Asked { by });
        }
    }

    /// Somebody gives a machine credits.
    pub(crate) fn granted(&mut self, machine: MachineId, credits: Credits, by: Arc<str>) {
        if self.world.machine(machine).is_some_and(|found| found.credits.is_some()) {
            self.decide(Command::GrantCredits { machine, credits }, Reason::Asked { by });
        }
    }
}

/// Where an account launched a machine it is held to its CPU share as well, but not to less than its baseline.
fn held_to_share(machine: &Machine, allowed_millis: u32) -> u32 {
    let share = machine.launched.as_ref().map(|launched| launched.asked.cpu_millis);
    share.map_or(allowed_millis, |share| {
        allowed_millis.min(share.max(machine.shape.baseline_millis))
    })
}

/// How a machine is to run, and why.
fn due(machine: &Machine) -> Option<(Cpu, Reason)> {
    let balance = machine.credits.as_ref()?;
    let account = balance.account?;
    let serves = machine.account.is_some() && machine.state != MachineState::Stopping;
    let class = match account.level().class() {
        Class::High if !serves => Class::Normal,
        class => class,
    };
    let cpu = Cpu {
        class,
        allowed_millis: held_to_share(machine, account.allowed_millis(&balance.terms)),
    };
    let reason = Reason::Balance {
        level: account.level().number(),
        millicredits: Credits::from_ps(account.spendable_ps()).millis(),
        owed_millicredits: Credits::covering_ps(account.owed_ps()).millis(),
        serves,
    };
    Some((cpu, reason))
}
