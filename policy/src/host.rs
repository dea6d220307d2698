use crate::world::ApplyError;
use crate::{Command, ContainerFailure, Decision, Event, Ids, Mono, Now, Reason, Rules, World};

/// The world and all that is decided about it.
#[derive(Clone, Debug)]
pub struct Host {
    world: World,
    ids: Ids,
    faults: Vec<(Command, ApplyError)>,
}

/// One event being decided about. Policies are its methods, each in a file of its own.
pub(crate) struct Step<'a> {
    pub(crate) world: &'a mut World,
    pub(crate) ids: &'a mut Ids,
    decisions: Vec<Decision>,
    faults: &'a mut Vec<(Command, ApplyError)>,
}

// === impl Host ===

impl Host {
    /// Starts with nothing; machines that an earlier agent left come first, each by `MachineFound`. A `Tick` after these begins
    /// to fill the warming pool. The rules have been checked.
    #[must_use]
    pub fn new(rules: Rules, ids: Ids) -> Self {
        Self {
            world: World::new(rules),
            ids,
            faults: Vec::new(),
        }
    }

    /// Takes one event and says what is decided, in the order in which it is to be carried out.
    #[must_use]
    pub fn step(&mut self, now: Now, event: Event) -> Vec<Decision> {
        self.world.now = Now {
            mono: self.world.now.mono.max(now.mono),
            wall: now.wall,
        };
        let mut step = Step {
            world: &mut self.world,
            ids: &mut self.ids,
            decisions: Vec::new(),
            faults: &mut self.faults,
        };
        // More may be found that will do for what is wanted.
        let supplies = !matches!(event, Event::MachineFound { .. });
        step.take(event);
        loop {
            step.place();
            step.reclaim();
            if supplies {
                step.supply();
            }
            // What was let go or refused may have made a place.
            if step.world.touched.is_empty() {
                break;
            }
        }
        step.decisions
    }

    /// When a `Tick` is next needed, if no other event comes before.
    #[must_use]
    pub fn next_wake(&self) -> Option<Mono> {
        if self.world.draining {
            return None;
        }
        self.world.timers.next()
    }

    /// What there is.
    #[must_use]
    pub fn world(&self) -> &World {
        &self.world
    }

    /// It drains, and nothing is left.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.world.draining && self.world.is_empty()
    }

    /// Commands of policies that the world refused since this was last asked: faults of this crate, to be logged.
    pub fn take_faults(&mut self) -> Vec<(Command, ApplyError)> {
        std::mem::take(&mut self.faults)
    }
}

// === impl Step ===

impl Step<'_> {
    fn take(&mut self, event: Event) {
        match event {
            Event::CallerLeft { request } => self.caller_left(request),
            Event::Prepare { account, runtime, kind } => self.prepare(&account, &runtime, kind),
            Event::Executed {
                container,
                code,
                sample,
            } => self.executed(container, code, &sample),
            Event::ContainerFailed { container, failure } => {
                let kind = self.world.container(container).map(|found| found.kind);
                self.world.observe(event);
                if let Some(kind) = kind.filter(|_| failure == ContainerFailure::Settled) {
                    self.start_failed(kind);
                }
            }
            Event::FunctionDeleted { uid } => self.function_deleted(uid),
            Event::PlanAsked {
                machine,
                baseline_millis,
                mode,
                by,
            } => self.plan_asked(machine, baseline_millis, mode, by),
            Event::CreditsGranted { machine, credits, by } => self.granted(machine, credits, by),
            Event::LimitsAsked { account, limits, by } => self.limits_asked(account, limits, by),
            Event::LaunchAsked {
                machine,
                account,
                launch,
                by,
            } => self.launch_asked(machine, account, launch, by),
            Event::EndAsked { machine, by } => self.end_asked(machine, by),
            Event::ResizeAsked { machine, change, by } => self.resize_asked(machine, change, by),
            Event::ThresholdsAsked {
                machine,
                thresholds,
                by,
            } => self.thresholds_asked(machine, thresholds, by),
            Event::Measured { machine, measures } => self.measured(machine, &measures),
            Event::HostMemory { memory, balloons } => self.host_memory(&memory, &balloons),
            Event::Drain => {
                self.world.observe(event);
                self.drain();
            }
            Event::DrainExpired => {
                self.world.observe(Event::Drain);
                self.drain();
                self.abandon();
            }
            event => self.world.observe(event),
        }
    }

    /// Changes the world and notes the decision; `false` where the world refuses, which is a fault of the policy.
    pub(crate) fn decide(&mut self, command: Command, reason: Reason) -> bool {
        match self.world.apply(&command) {
            Ok(()) => {
                self.decisions.push(Decision { command, reason });
                true
            }
            Err(error) => {
                debug_assert!(false, "{command:?}: {error}");
                self.faults.push((command, error));
                false
            }
        }
    }
}
