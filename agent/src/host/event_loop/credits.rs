//! Machines' accounts of credits: what is asked of them, and what was decided, handed to who keeps them.

use std::sync::Arc;
use std::time::Duration;

use stoker_credits::Account;
use stoker_policy::{Command, Cpu, Event, MachineId, PlanError};
use tokio::sync::oneshot;

use super::EventLoop;
use crate::host::error::CreditsError;
use crate::host::message::{Accounted, CreditsChange, Decided, Message};
use crate::telemetry::credits::Change;

impl EventLoop {
    pub(super) fn list_accounts(&self) -> Vec<Accounted> {
        let machines = self.host.world().machines();
        let accounted = machines
            .filter(|machine| machine.credits.is_some())
            .map(|machine| Accounted {
                machine: machine.id,
                account: machine.account.clone(),
                vcpus: machine.shape.vcpus,
                cpu: machine.cpu,
            });
        accounted.collect()
    }

    /// The machines whose accounts are open.
    pub(super) fn open_accounts(&self) -> impl Iterator<Item = MachineId> {
        let machines = self.host.world().machines();
        let opened = machines.filter(|machine| machine.credits.as_ref().is_some_and(|has| has.account.is_some()));
        opened.map(|machine| machine.id)
    }

    pub(super) fn credits_settled(&mut self, machine: MachineId, account: Account, held: Option<Duration>) {
        let known = self.host.world().machine(machine);
        let had = known.and_then(|known| known.credits.as_ref()?.account);
        // The last thing that was booked: a grant, which raises it, books no time.
        let fell = had.is_some_and(|had| account.level() < had.level());
        self.fell_ns = (fell && held.is_none()).then_some(account.settled_ns());
        self.step(Event::CreditsSettled { machine, account });
        self.fell_ns = None;
        if let Some(delay) = held {
            self.counts.cpu_delays.observe((), delay);
            // Something that was decided before may have been carried out after.
            if let Some(started) = self.machines.get(&machine).and_then(|handle| handle.started.as_ref()) {
                started.cpu.send_modify(|_| ());
            }
        }
    }

    /// What can't be is refused at once, and what is done is answered once it is.
    pub(super) fn change_credits(
        &mut self,
        machine: MachineId,
        change: CreditsChange,
        by: Arc<str>,
        reply: oneshot::Sender<Result<(), CreditsError>>,
    ) {
        let world = self.host.world();
        let (checked, event) = match change {
            CreditsChange::Plan { baseline_millis, mode } => (
                world.plan_for(machine, baseline_millis, mode).map(drop),
                Event::PlanAsked {
                    machine,
                    baseline_millis,
                    mode,
                    by,
                },
            ),
            CreditsChange::Grant(credits) => {
                let has_account = world.machine(machine).is_some_and(|found| found.credits.is_some());
                let checked = has_account.then_some(()).ok_or(PlanError::Unknown);
                (checked, Event::CreditsGranted { machine, credits, by })
            }
        };
        if let Err(error) = checked {
            return drop(reply.send(Err(error.into())));
        }
        self.changed = Some(reply);
        self.step(event);
        // Whatever was decided took it.
        self.changed = None;
    }

    pub(super) fn carry_out_credits(&mut self, command: &Command) {
        match *command {
            Command::SetCpu {
                machine,
                class,
                allowed_millis,
            } => {
                let handle = self.machines.get(&machine);
                if let Some(started) = handle.and_then(|handle| handle.started.as_ref()) {
                    started.cpu.send_replace(Some(Decided {
                        cpu: Cpu { class, allowed_millis },
                        fell_ns: self.fell_ns,
                        delays: self.counts.cpu_delays.clone(),
                    }));
                }
            }
            Command::SettleCredits { machine } => self.change_account(machine, Change::Settle),
            Command::GrantCredits { machine, credits } => self.change_account(machine, Change::Grant(credits.ps())),
            Command::ChangePlan { machine, plan } => {
                self.note(machine, |record| {
                    record.shape.baseline_millis = plan.baseline_millis;
                    record.mode = Some(plan.mode);
                });
                let balance = self
                    .host
                    .world()
                    .machine(machine)
                    .and_then(|found| found.credits.as_ref());
                if let Some(terms) = balance.map(|balance| balance.terms) {
                    self.change_account(machine, Change::Terms(terms));
                }
            }
            _ => {}
        }
    }

    /// What the next agent has to know is written down before.
    fn change_account(&mut self, machine: MachineId, change: Change) {
        let reply = self.changed.take();
        let started = self.machines.get(&machine).and_then(|handle| handle.started.as_ref());
        let record = started.map(|started| started.record.clone());
        let told = self.machines.get(&machine).map(|handle| handle.credits_changed.clone());
        let is_news = change != Change::Settle;
        self.spawn(|shared, inbox| async move {
            if let Some(record) = record
                && let Err(error) = record.save().await
            {
                tracing::warn!(%machine, %error, "the next agent will not know what a machine's credits go by");
            }
            let launcher = shared.launcher.clone();
            let changed = tokio::task::spawn_blocking(move || launcher.change_account(machine, change)).await;
            let changed = changed.ok().flatten();
            if let Some(account) = changed {
                let settled = Message::Settled {
                    machine,
                    account,
                    held: None,
                };
                let _ = inbox.send(settled).await;
                if let Some(guest) = told.filter(|_| is_news) {
                    guest.notify_one();
                }
            }
            if let Some(reply) = reply {
                // Who asked may have left.
                let _ = reply.send(changed.map(drop).ok_or(CreditsError::Failed));
            }
        });
    }
}
