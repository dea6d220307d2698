//! What is let go because nobody wants it for long enough.

use std::sync::Arc;

use crate::host::Step;
use crate::world::Timer;
use crate::{Command, Mono, Reason, Refusal, RequestId, RequestState};

impl Step<'_> {
    /// Takes the timers that are due.
    pub(crate) fn reclaim(&mut self) {
        if self.world.draining {
            return;
        }
        let now = self.world.now.mono;
        while let Some(timer) = self.world.timers.due(now) {
            match timer {
                Timer::Deadline(request) => self.deadline(request),
                Timer::Overdue(account, runtime) => self.overdue(&account, &runtime),
                Timer::ContainerIdle(container) => {
                    if let Some((machine, idle)) = self.world.idle_container_due(container) {
                        self.decide(Command::StopContainer { machine, container }, Reason::Idle { idle });
                    }
                }
                Timer::MachineIdle(machine) => {
                    if let Some(idle) = self.world.idle_machine_due(machine) {
                        let command = Command::DestroyMachine { machine, gently: true };
                        self.decide(command, Reason::Idle { idle });
                    }
                }
                Timer::Credits(machine) => self.credits_due(machine),
                Timer::Resize(machine) => self.resize_due(machine),
                Timer::Surplus(runtime) => self.surplus(&runtime),
                Timer::Awaited(account) => self.world.stop_awaiting(&account),
                Timer::Backoff(runtime) => {
                    self.world.unsettled.insert(runtime);
                }
            }
        }
    }

    fn deadline(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        if request.state == RequestState::Waiting {
            let waited = self.since(request.arrived.mono);
            self.refuse(id, Refusal::QueueTimeout { waited });
        }
    }

    /// The largest machines go first: the pool should hold standard ones.
    fn surplus(&mut self, runtime: &Arc<str>) {
        let target = self.world.rules.warming.get(runtime).copied().unwrap_or(0);
        let Some(entry) = self.world.runtime(runtime) else {
            return;
        };
        let warming = entry.warming.len();
        let surplus: Vec<_> = entry.warming.roomiest().take(warming.saturating_sub(target)).collect();
        let mut next = None;
        for machine in surplus {
            let ready = self.world.machine(machine).and_then(|found| found.ready);
            let due = ready.map_or(self.world.now.mono, |ready| {
                ready.mono.saturating_add(self.world.rules.machine_idle)
            });
            if due > self.world.now.mono {
                next = Some(next.map_or(due, |next: Mono| next.min(due)));
                continue;
            }
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let reason = Reason::Surplus {
                warming: count(warming),
                target: count(target),
            };
            self.decide(Command::DestroyMachine { machine, gently: true }, reason);
        }
        if let Some(at) = next {
            self.world.timers.set(at, Timer::Surplus(runtime.clone()));
        }
    }
}
