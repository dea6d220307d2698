//! What was decided, handed to who carries it out.

use std::sync::Arc;
use std::time::Instant;

use stoker_policy::{
    Command, Completion, ContainerId, Decision, Kind, MachineId, Purpose, Reason, Refusal, RequestId, Shape,
};
use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::oneshot;

use super::{ContainerHandle, EventLoop, MachineHandle};
use crate::host::call::{Place, Placed, Told};
use crate::host::container::{self, Costs, Made};
use crate::host::error::InvokeError;
use crate::host::listing;
use crate::host::machine;
use crate::host::message::Message;
use crate::machines::{ContainerRecord, Spec, Stop, Stopper};

impl EventLoop {
    pub(super) fn carry_out(&mut self, decision: &Decision) {
        match &decision.command {
            Command::BootMachine {
                machine,
                runtime,
                shape,
                ..
            } => self.boot(*machine, runtime.clone(), *shape),
            Command::AssignMachine { machine, account } => {
                self.note(*machine, |record| record.account = Some(account.clone()));
                self.report_machine(*machine);
            }
            Command::CreateContainer {
                machine,
                container,
                kind,
                drive_mib,
                purpose,
            } => self.create(*machine, *container, *kind, *drive_mib, *purpose, &decision.reason),
            Command::Dispatch {
                machine,
                container,
                request,
            } => self.dispatch(*machine, *container, *request, &decision.reason),
            Command::StopContainer { machine, container } => {
                if let Some(handle) = self.containers.get_mut(container) {
                    handle.end_detail.get_or_insert_with(|| decision.reason.to_string());
                }
                let container = *container;
                match self.handle(*machine) {
                    Some(handle) => self.spawn_on(handle, |handle, _, inbox| container::stop(handle, container, inbox)),
                    None => self.tell(Message::ContainerStopped { container }),
                }
            }
            Command::DestroyMachine { machine, gently } => {
                // One that runs nothing weighs next to nothing, and could not even power itself off. A program may have much to do
                // before it ends.
                if self
                    .machines
                    .get(machine)
                    .is_some_and(|handle| handle.launched.is_none())
                {
                    self.weigh(*machine, self.host.world().rules().unowned_weight());
                }
                if let Some(handle) = self.machines.get(machine) {
                    let why = decision.reason.to_string();
                    handle.stopper.stop(match (*gently, &handle.launched) {
                        (true, Some(launched)) => launched.stop(why),
                        (true, None) => Stop::Gently(why),
                        (false, _) => Stop::Now(why),
                    });
                }
                if *gently {
                    self.give_balloon_back(*machine);
                }
                self.report_machine(*machine);
            }
            Command::WeighMachine { machine, weight, .. } => self.weigh(*machine, *weight),
            command @ (Command::SetCpu { .. }
            | Command::SettleCredits { .. }
            | Command::ChangePlan { .. }
            | Command::GrantCredits { .. }) => self.carry_out_credits(command),
            Command::Refuse { request, refusal } => self.refuse(*request, refusal),
            Command::SetAmount { code, kept } => self.set_amount(*code, *kept, &decision.reason),
            Command::Notify { notice } => self.notify(notice),
            Command::LaunchMachine {
                machine,
                account,
                launch,
            } => self.launch_machine(*machine, account, launch),
            Command::ResizeMachine { machine, number, asked } => {
                self.resize_machine(*machine, *number, *asked, &decision.reason);
            }
            Command::ReportResize { machine, .. } => self.report_resize(*machine, &decision.reason),
            Command::SetBalloon { machine, mib } => self.set_balloon(*machine, *mib, &decision.reason),
            Command::SetThresholds { machine, thresholds } => self.set_thresholds(*machine, thresholds),
            // The world knows: nobody else need do a thing.
            Command::CloseMachine { .. }
            | Command::KeepRoom { .. }
            | Command::KeepSize { .. }
            | Command::PutFirst { .. }
            | Command::ReleaseMachine { .. }
            | Command::SetLimits { .. }
            | Command::Wait { .. } => {}
        }
    }

    fn boot(&mut self, id: MachineId, runtime: Arc<str>, shape: Shape) {
        tracing::info!(machine = %id, %runtime, ?shape, "booting a machine");
        let machine = self.host.world().machine(id);
        let created = machine.map(|machine| machine.created.wall);
        let terms = machine.and_then(|machine| Some(machine.credits.as_ref()?.terms));
        let (stopper, stopped) = Stopper::new();
        self.machines.insert(id, MachineHandle::new(stopper));
        let spec = Spec {
            id: id.0,
            shape,
            ceiling: None,
            runtime,
            cpu_weight: self.host.world().rules().unowned_weight(),
            terms,
            created: created.unwrap_or_default(),
            launched: None,
        };
        self.spawn(|shared, inbox| {
            machine::live(id, inbox, shared.launcher.clone(), |launcher, reports| {
                launcher.live(spec, stopped, reports)
            })
        });
    }

    fn weigh(&mut self, machine: MachineId, weight: u32) {
        let Some(handle) = self.machines.get_mut(&machine) else {
            return;
        };
        match &handle.started {
            Some(started) => drop(started.cpu_weight.send_replace(Some(weight))),
            None => handle.weight = Some(weight),
        }
    }

    fn create(
        &mut self,
        machine: MachineId,
        id: ContainerId,
        kind: Kind,
        drive_mib: u32,
        purpose: Purpose,
        reason: &Reason,
    ) {
        let function = match purpose {
            Purpose::Serve(request) => self.calls.get_mut(&request).map(|call| {
                let source = match reason {
                    Reason::WarmingMachine { .. } => v1::placement::Source::WarmingMachine,
                    Reason::NewMachine { .. } => v1::placement::Source::NewMachine,
                    _ => v1::placement::Source::ActiveMachine,
                };
                call.made = Some((source, Instant::now()));
                call.costs = Costs::default();
                call.function.clone()
            }),
            Purpose::Ahead => (self.shared.find)(kind.code.uid),
        };
        let started = self.machines.get(&machine).and_then(|handle| handle.started.as_ref());
        let parts = started.map(|started| (started.record.clone(), started.drive.clone()));
        let (Some(handle), Some(function), Some((record, drive))) = (self.handle(machine), function, parts) else {
            tracing::error!(container = %id, ?purpose, "a container is to be made where or of what there is not");
            let made = Made::not("its machine or its function is not there".into());
            return self.tell(Message::ContainerMade { container: id, made });
        };
        let asked = proto::CreateContainerRequest {
            id: id.to_string(),
            function_name: function.name.to_string(),
            runtime: function.runtime.clone(),
            handler: function.handler.clone(),
            environment: function.environment.clone().into_iter().collect(),
            amount: Some(listing::proto_amount(kind.amount)),
            code_sha256: function.code_sha256.clone(),
            account: function.name.account().to_owned(),
            init_timeout: self.shared.init_timeout.try_into().ok(),
            timeout: function.timeout.try_into().ok(),
            freeze: Some(function.freeze),
            scratch_mib: function.ephemeral_storage_mib,
            layers_sha256: function.layers.iter().map(|layer| layer.code_sha256.clone()).collect(),
            drive_mib,
        };
        let created = self.host.world().container(id).map(|container| container.created.wall);
        let known = ContainerRecord {
            kind,
            function: function.name.clone(),
            created: created.unwrap_or_default(),
        };
        self.keep_log(machine, id, &known);
        // Its drive too: it is not made larger before that is written down.
        record.change(|record| {
            record.shape.drive_mib = drive_mib;
            record.containers.insert(id, known);
        });
        let made = ContainerHandle {
            machine,
            function: function.name.clone(),
            end_detail: None,
        };
        self.containers.insert(id, made);
        self.spawn_on(handle, |handle, shared, inbox| async move {
            let made = container::create(&shared, &record, &drive, handle, asked).await;
            if let Some(made) = made {
                let _ = inbox.send(Message::ContainerMade { container: id, made }).await;
            }
        });
    }

    fn dispatch(&mut self, machine: MachineId, container: ContainerId, request: RequestId, reason: &Reason) {
        let over = |completion, detail| Message::Completed {
            container,
            request,
            completion,
            detail,
            again: None,
            executed: None,
        };
        let Some(handle) = self.handle(machine) else {
            tracing::error!(%request, "a request is to run in a machine that is not there");
            return self.tell(over(Completion::NotBegun, Some("its machine is not there".into())));
        };
        let Some(call) = self.calls.get_mut(&request) else {
            tracing::error!(%request, "a request is to run that nobody waits for");
            return self.tell(over(Completion::Answered, None));
        };
        let made = call.made.take().filter(|_| matches!(reason, Reason::MadeForIt));
        let costs = match made {
            Some(_) => std::mem::take(&mut call.costs),
            None => Costs::default(),
        };
        let (source, since) = made.unwrap_or_else(|| (v1::placement::Source::IdleContainer, Instant::now()));
        let given = self.host.world().container(container).map(|there| there.kind.amount);
        let (lose, lost) = oneshot::channel();
        call.lost = Some(lose);
        let placed = Placed {
            handle,
            place: Place {
                machine,
                container,
                amount: given.unwrap_or(call.amount),
                source,
                since,
                costs,
            },
            lost,
        };
        let told = call.tell.take().map(|tell| tell.send(Told::Placed(Box::new(placed))));
        if !matches!(told, Some(Ok(()))) {
            // Its task panicked: nothing runs, and the container takes the next.
            self.tell(over(Completion::Answered, None));
        }
    }

    /// The loop hears this from itself, once it has carried out what else was decided.
    fn tell(&self, message: Message) {
        self.spawn(|_, inbox| async move {
            let _ = inbox.send(message).await;
        });
    }

    fn refuse(&mut self, request: RequestId, refusal: &Refusal) {
        let Some(call) = self.calls.remove(&request) else {
            return;
        };
        let runtime = call.function.runtime.as_str();
        let boot = self.boot_failures.get(runtime).map(|boots| boots.why.clone());
        let error = match refusal {
            Refusal::QueueFull { waiting } => InvokeError::QueueFull {
                waiting: *waiting,
                boot,
            },
            Refusal::AccountQueueFull { limit } => InvokeError::AccountQueueFull { limit: *limit, boot },
            Refusal::QueueTimeout { waited } => InvokeError::QueueTimeout { waited: *waited, boot },
            Refusal::TooLarge { largest } => InvokeError::TooLarge {
                asked: call.amount,
                largest: *largest,
            },
            Refusal::BootFailing => InvokeError::BootFailing {
                runtime: runtime.to_owned(),
                detail: boot.unwrap_or_else(|| "its guest ended at once".into()),
            },
            Refusal::MachineLost => call.trouble.unwrap_or_else(|| InvokeError::MachineLost {
                detail: "it had to be ended".into(),
            }),
            Refusal::FunctionDeleted => InvokeError::FunctionDeleted,
            Refusal::Draining => InvokeError::Draining,
            Refusal::CallerLeft => InvokeError::CallerLeft,
        };
        // It has its answer, or it panicked.
        match (call.tell, call.lost) {
            (Some(tell), _) => drop(tell.send(Told::Refused(error))),
            (None, Some(lost)) => drop(lost.send(error)),
            (None, None) => {}
        }
    }
}
