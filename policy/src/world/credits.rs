//! Machines' accounts of credits, as decisions know them. The accounts themselves are with whoever counts.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::{Account, Class, Mode, Plan, Terms, TermsError};

use super::{ApplyError, HostRoom, Timer, Touch, World};
use crate::{MachineId, MachineState, Mono, Shape};

/// The least time after which an account is settled because of what it earns alone. One whose machine runs is settled by whoever
/// counts; this is for those that lie idle, which can wait so long for a class that they do not use.
const LEAST_WAIT: Duration = Duration::from_secs(1);

/// How urgently a machine runs, and how much.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// Before whom it comes.
    pub class: Class,
    /// The most that its vCPUs may use, in millicores of one CPU; all of them where it is not held back.
    pub allowed_millis: u32,
}

/// A machine's account of credits.
#[derive(Clone, Debug)]
pub struct Balance {
    /// What it goes by.
    pub plan: Plan,
    /// The same as settlements take it.
    pub terms: Terms,
    /// As it was last told; nothing before that.
    pub account: Option<Account>,
    /// When it is to be settled unless it is before.
    pub(crate) due: Option<Mono>,
}

/// Why a machine can't go by other terms.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// It is not there, or has no account.
    #[error("there is no such machine, or it has no account of credits")]
    Unknown,
    /// It is not in a state for that.
    #[error("the machine boots or ends; its credits can be changed while it is ready")]
    State,
    /// The terms contradict one another.
    #[error(transparent)]
    Terms(#[from] TermsError),
    /// There is not enough CPU to let every machine have its baseline.
    #[error(
        "a baseline of {asked_millis} millicores does not fit: other machines are promised {others_millis} of the {host_millis} that \
         this host's CPUs have; give at most {}, or end other machines", host_millis.saturating_sub(*others_millis)
    )]
    Baselines {
        /// What was asked for.
        asked_millis: u32,
        /// What all other machines have.
        others_millis: u64,
        /// What there is.
        host_millis: u64,
    },
}

// === impl Balance ===

impl Balance {
    fn new(plan: Plan) -> Result<Self, TermsError> {
        Ok(Self {
            plan,
            terms: plan.terms()?,
            account: None,
            due: None,
        })
    }
}

// === impl World ===

impl World {
    /// What a new machine has, or one that was found; by the rules where its own can't be.
    pub(super) fn balance(&self, shape: Shape, mode: Option<Mode>) -> Option<Balance> {
        let own = self.rules.plan(shape, mode)?;
        let any = self.rules.plan(self.rules.with_baseline(shape), None)?;
        Balance::new(own).or_else(|_| Balance::new(any)).ok()
    }

    /// What a machine would go by with another baseline, in millicores of all its vCPUs, or another mode.
    ///
    /// # Errors
    /// [`PlanError`] says why it can't, and what could be.
    pub fn plan_for(&self, id: MachineId, baseline_millis: Option<u32>, mode: Option<Mode>) -> Result<Plan, PlanError> {
        self.terms_for(id, baseline_millis, mode).map(|(plan, _)| plan)
    }

    /// The same with its terms.
    fn terms_for(
        &self,
        id: MachineId,
        baseline_millis: Option<u32>,
        mode: Option<Mode>,
    ) -> Result<(Plan, Terms), PlanError> {
        let machine = self.machine(id).ok_or(PlanError::Unknown)?;
        let now = machine.credits.as_ref().ok_or(PlanError::Unknown)?.plan;
        let ready = matches!(machine.state, MachineState::Warming | MachineState::Active);
        if !ready || machine.reserved.is_some() {
            return Err(PlanError::State);
        }
        let shape = Shape {
            vcpus: machine.vcpus(),
            baseline_millis: baseline_millis.unwrap_or(now.baseline_millis),
            ..machine.shape
        };
        let plan = self
            .rules
            .plan(shape, mode.or(Some(now.mode)))
            .ok_or(PlanError::Unknown)?;
        let terms = plan.terms()?;
        if HostRoom::of_baseline(now.baseline_millis, shape.baseline_millis).baseline_millis > 0 {
            let host_millis = self.rules.host_baseline_millis;
            let used = u64::try_from(self.used.baseline_millis).unwrap_or(0);
            let others_millis = used.saturating_sub(now.baseline_millis.into());
            let asked_millis = shape.baseline_millis;
            if others_millis.saturating_add(asked_millis.into()) > host_millis {
                return Err(PlanError::Baselines {
                    asked_millis,
                    others_millis,
                    host_millis,
                });
            }
        }
        Ok((plan, terms))
    }

    /// An account was settled. One that was told later than another that happened after it is old, and is not taken.
    pub(super) fn credits_settled(&mut self, id: MachineId, account: Account) {
        let now = self.now.mono;
        let Some(balance) = self.machines.get_mut(&id).and_then(|machine| machine.credits.as_mut()) else {
            return;
        };
        let known = balance.account.map_or(0, |known| known.settled_ns());
        if account.settled_ns() < known {
            return;
        }
        balance.account = Some(account);
        let rises = account.until_crossing(&balance.terms, 0).map(Duration::from_nanos);
        let due = rises.and_then(|after| now.checked_add(after.max(LEAST_WAIT)));
        let before = std::mem::replace(&mut balance.due, due);
        if let Some(at) = before {
            self.timers.clear(at, Timer::Credits(id));
        }
        if let Some(at) = due {
            self.timers.set(at, Timer::Credits(id));
        }
        self.touched.push_back(Touch::Credits(id));
    }

    /// A machine is gone: its account is not settled any more.
    pub(super) fn forget_balance(&mut self, id: MachineId, balance: Option<&Balance>) {
        if let Some(at) = balance.and_then(|balance| balance.due) {
            self.timers.clear(at, Timer::Credits(id));
        }
    }

    pub(super) fn set_cpu(&mut self, id: MachineId, cpu: Cpu) -> Result<(), ApplyError> {
        let machine = self.machines.get_mut(&id).ok_or(ApplyError::Unknown("machine"))?;
        let least = machine.credits.as_ref().ok_or(ApplyError::State("machine"))?;
        if cpu.allowed_millis < least.terms.baseline_millis() {
            return Err(ApplyError::Room("CPU for the machine's baseline"));
        }
        machine.cpu = Some(cpu);
        Ok(())
    }

    pub(super) fn settle_credits(&mut self, id: MachineId) -> Result<(), ApplyError> {
        let machine = self.machines.get_mut(&id).ok_or(ApplyError::Unknown("machine"))?;
        let balance = machine.credits.as_mut().ok_or(ApplyError::State("machine"))?;
        if let Some(at) = balance.due.take() {
            self.timers.clear(at, Timer::Credits(id));
        }
        Ok(())
    }

    pub(super) fn grant_credits(&mut self, id: MachineId) -> Result<(), ApplyError> {
        let machine = self.machines.get(&id).ok_or(ApplyError::Unknown("machine"))?;
        match machine.credits {
            Some(_) => Ok(()),
            None => Err(ApplyError::State("machine")),
        }
    }

    pub(super) fn change_plan(&mut self, id: MachineId, plan: Plan) -> Result<(), ApplyError> {
        let allowed = self.terms_for(id, Some(plan.baseline_millis), Some(plan.mode));
        let (allowed, terms) = allowed.map_err(|error| match error {
            PlanError::Unknown => ApplyError::Unknown("machine"),
            PlanError::State | PlanError::Terms(_) => ApplyError::State("machine"),
            PlanError::Baselines { .. } => ApplyError::Room("CPU for all baselines"),
        })?;
        let Some(machine) = self.machines.get_mut(&id) else {
            return Err(ApplyError::Unknown("machine"));
        };
        let more = HostRoom::of_baseline(machine.shape.baseline_millis, plan.baseline_millis);
        let balance = machine.credits.as_mut().ok_or(ApplyError::State("machine"))?;
        if allowed != plan {
            return Err(ApplyError::State("machine"));
        }
        (balance.plan, balance.terms) = (plan, terms);
        machine.shape.baseline_millis = plan.baseline_millis;
        self.note_baseline(id, plan.baseline_millis);
        self.used = self.used.plus(more);
        let machine = self.machines.get(&id);
        if let Some(account) = machine.and_then(|machine| self.accounts.get_mut(machine.account.as_ref()?)) {
            account.has = account.has.plus(more);
        }
        // There may be room for others now.
        self.unsettled.append(&mut self.lacking);
        Ok(())
    }
}
