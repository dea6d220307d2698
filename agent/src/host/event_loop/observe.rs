//! What happened: what it means for those who wait, for reports, and as an event.

use std::time::{Instant, SystemTime};

use stoker_policy::{
    Completion, ContainerFailure, ContainerId, ContainerState, Event, MachineId, MachineState, Purpose, RequestId,
};
use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::oneshot;
use ulid::Ulid;

use super::{BootFailures, CallHandle, EventLoop};
use crate::code::CodeError;
use crate::host::call::{Place, Told};
use crate::host::container::{self, Made, NotMade};
use crate::host::credits;
use crate::host::error::InvokeError;
use crate::host::listing;
use crate::host::message::{Answered, Ended, MachineReport};

/// How many machines that have ended are remembered.
const REMEMBERED: usize = 256;

impl EventLoop {
    pub(super) fn completed(
        &mut self,
        container: ContainerId,
        request: RequestId,
        completion: Completion,
        detail: Option<String>,
        again: Option<oneshot::Sender<Told>>,
    ) {
        let said = self
            .containers
            .get_mut(&container)
            .and_then(|handle| handle.end_detail.take());
        let gone = detail.or(said);
        if completion == Completion::NotBegun {
            if let Some(call) = self.calls.get_mut(&request) {
                // Where it was never told of its place, it listens as before.
                call.tell = again.or(call.tell.take());
                call.lost = None;
                let detail = gone.clone().unwrap_or_default();
                call.trouble = Some(InvokeError::Container { detail });
            }
        } else {
            self.calls.remove(&request);
        }
        let end = gone.and_then(|detail| {
            let mut end = self.container_end(container, &detail)?;
            end.invocations += u64::from(completion != Completion::NotBegun);
            Some(end)
        });
        self.step(Event::Completed {
            container,
            request,
            completion,
        });
        if let Some(end) = end
            && self.host.world().container(container).is_none()
        {
            self.report_container_end(container, end);
        }
    }

    pub(super) fn machine_reports(&mut self, id: MachineId, report: MachineReport) {
        let Some(handle) = self.machines.get_mut(&id) else {
            return;
        };
        match report {
            MachineReport::Started(started) => {
                let account = started.account;
                if let Some(weight) = handle.weight.take() {
                    started.cpu_weight.send_replace(Some(weight));
                }
                handle.started = Some(*started);
                if let Some(account) = account {
                    self.step(Event::CreditsSettled { machine: id, account });
                }
                // One that is found boots no more: it is what it was, until its guest has told.
                if !self.found.contains_key(&id) {
                    self.report_machine(id);
                }
            }
            MachineReport::Ready(answered) => {
                let Answered {
                    guest,
                    boot_duration,
                    containers,
                    running,
                    has_run,
                } = *answered;
                handle.boot_duration = Some(boot_duration);
                handle.guest = Some(guest);
                // One that is found was booted under an earlier agent.
                if !self.found.contains_key(&id) {
                    self.counts.boots.observe((), boot_duration);
                }
                let Some(machine) = self.host.world().machine(id) else {
                    return;
                };
                tracing::info!(machine = %id, runtime = %machine.runtime, ?boot_duration, "machine ready");
                self.boot_failures.remove(&machine.runtime);
                let is_launched = machine.launched.is_some();
                let is_found = self.found.contains_key(&id);
                if is_launched {
                    self.launched_ready(id, has_run);
                } else {
                    if let Some(handle) = self.handle(id) {
                        let interval = self.shared.watch_interval;
                        self.spawn_on(handle, |handle, _, inbox| container::watch(handle, id, interval, inbox));
                    }
                    match is_found {
                        true => self.adopt(id, &containers, &running),
                        false => self.step(Event::MachineReady { machine: id }),
                    }
                }
                // One that went to an account at once was reported as that.
                let state = self.host.world().machine(id).map(|machine| machine.state);
                if is_found || is_launched || state == Some(MachineState::Warming) {
                    self.report_machine(id);
                }
            }
            MachineReport::Ended(ended) => self.machine_ended(id, *ended),
        }
    }

    fn machine_ended(&mut self, id: MachineId, ended: Ended) {
        let Ended {
            mut end,
            usage,
            credits,
            leftovers,
        } = ended;
        end.end_time = Some(SystemTime::now().into());
        let (reason, end_detail) = (end.reason(), end.detail.clone());
        let asked = matches!(
            reason,
            v1::machine_end::Reason::Stopped | v1::machine_end::Reason::ProgramEnded
        );
        self.counts.ends.count(reason);
        if let Some(usage) = &usage {
            self.used.add(usage);
        }
        if let Some(standing) = &credits {
            self.closed.add(&standing.account);
        }
        if asked {
            tracing::info!(machine = %id, detail = end.detail, "machine ended");
        } else {
            let console = end.console_tail.as_str();
            tracing::warn!(machine = %id, ?reason, detail = end.detail, console, "machine ended");
        }
        // As it was before the world lets it go: whose, and with what in it.
        let known = self.host.world().machine(id).map(|machine| {
            let containers: Vec<_> = machine.containers.iter().copied().collect();
            let proto = listing::machine(machine, self.machines.get(&id));
            (proto, machine.runtime.clone(), containers)
        });
        let Some((mut proto, runtime, containers)) = known else {
            self.machines.remove(&id);
            return;
        };
        let booted = self.machines.get(&id).is_some_and(|handle| handle.guest.is_some());
        let is_launched = proto.launched.is_some();
        if !booted && !asked {
            self.counts.boot_failures.count(reason);
        }
        // That one does not boot which is an account's own says nothing of others.
        if !booted && !asked && !is_launched {
            let before = self.boot_failures.get(&runtime).map_or(0, |boots| boots.count);
            let failures = BootFailures {
                count: before.saturating_add(1),
                at: Instant::now(),
                why: end.detail.clone(),
            };
            self.boot_failures.insert(runtime, failures);
        }
        for container in &containers {
            let state = self.host.world().container(*container).map(|there| there.state);
            if let Some(ContainerState::Busy(request) | ContainerState::Starting(Purpose::Serve(request))) = state
                && let Some(call) = self.calls.get_mut(&request)
            {
                let detail = end.detail.clone();
                call.trouble = Some(InvokeError::MachineLost { detail });
            }
        }
        let with_it = format!("its machine ended: {end_detail}");
        for container in containers {
            if let Some(end) = self.container_end(container, &with_it) {
                self.report_container_end(container, end);
            }
        }
        self.step(Event::MachineEnded { machine: id });
        let launched = self.machines.remove(&id).and_then(|handle| handle.launched);
        self.found.remove(&id);
        self.lose(id, &end_detail);
        proto.state = v1::machine::State::Ended.into();
        (proto.pid, proto.allocated) = (0, None);
        if let Some(launched) = &launched {
            end.exit_status = end.exit_status.or(launched.exit_status());
        }
        (proto.usage, proto.end) = (usage, Some(end));
        proto.credits = credits.map(|standing| credits::of_ended(id, &proto.account, &standing));
        self.recorder.machine_ended(proto.clone(), leftovers);
        if let Some(launched) = launched {
            self.launch_ended(id, *launched, &proto);
        }
        self.ended.push_back(proto);
        while self.ended.len() > REMEMBERED {
            if let Some(oldest) = self
                .ended
                .pop_front()
                .and_then(|machine| listing::machine_id(&machine.name))
            {
                self.forget_launch(oldest);
            }
        }
    }

    pub(super) fn container_made(&mut self, id: ContainerId, made: Made) {
        let Made {
            result,
            costs,
            execution,
        } = made;
        let notification = self.initialised(id, execution, result.as_ref().err());
        let Some(container) = self.host.world().container(id) else {
            return;
        };
        let serves = match container.state {
            ContainerState::Starting(Purpose::Serve(request)) => Some(request),
            _ => None,
        };
        let (machine, amount) = (container.machine, container.kind.amount);
        let mut proto = listing::container(container, self.containers.get(&id));
        let said = self.containers.get_mut(&id).and_then(|handle| handle.end_detail.take());
        // One that ended as soon as it was made is as good as not made.
        let result = result.and_then(|()| said.map_or(Ok(()), |detail| Err(NotMade::Setup(detail))));
        let call = serves.and_then(|request| self.calls.get_mut(&request));
        let Err(why) = result else {
            if let Some(call) = call {
                call.costs = costs;
            }
            proto.state = v1::container::State::Idle.into();
            self.recorder.container(proto);
            return self.step(Event::ContainerReady { container: id });
        };
        let (failure, detail) = match &why {
            NotMade::Function(error) => (
                ContainerFailure::Settled,
                format!("{}: {}", error.r#type, error.message),
            ),
            NotMade::Code(error) => (ContainerFailure::Settled, error.to_string()),
            NotMade::Setup(detail) => {
                tracing::warn!(detail, "a guest could not make a container");
                if let Some(call) = call {
                    let detail = detail.clone();
                    call.trouble = Some(InvokeError::Container { detail });
                }
                (ContainerFailure::Lost, detail.clone())
            }
        };
        if failure == ContainerFailure::Settled
            && let Some(call) = serves.and_then(|request| self.calls.remove(&request))
        {
            let place = Place {
                machine,
                container: id,
                amount,
                source: v1::placement::Source::ActiveMachine,
                since: Instant::now(),
                costs,
            };
            call.settle(place, why, &detail, notification);
        }
        if let Some(end) = self.container_end(id, &detail) {
            self.report_container_end(id, end);
        }
        self.step(Event::ContainerFailed { container: id, failure });
    }

    /// A guest may name any container: only its own are listened to.
    pub(super) fn guest_said(&mut self, machine: MachineId, said: proto::WatchResponse) {
        if self
            .machines
            .get(&machine)
            .is_some_and(|handle| handle.launched.is_some())
        {
            return self.program_said(machine, said);
        }
        let used = said.containers.iter().filter_map(|used| {
            let id = Ulid::from_string(&used.id).ok()?;
            Some((ContainerId(id), listing::usage(used.usage.as_ref()?)))
        });
        let containers: Vec<_> = used.collect();
        if !containers.is_empty() {
            self.step(Event::Used { machine, containers });
        }
        for ended in said.ended {
            let Ok(id) = Ulid::from_string(&ended.id).map(ContainerId) else {
                continue;
            };
            let container = self.host.world().container(id);
            let Some(container) = container.filter(|container| container.machine == machine) else {
                continue;
            };
            let detail = match ended.error {
                Some(error) => format!("{}: {}", error.r#type, error.message),
                None => "it ended".to_owned(),
            };
            match container.state {
                // It is over once who makes it or runs in it has told of that.
                ContainerState::Starting(_) | ContainerState::Busy(_) => {
                    if let Some(handle) = self.containers.get_mut(&id) {
                        handle.end_detail.get_or_insert(detail);
                    }
                    self.step(Event::ContainerEnded { container: id });
                }
                ContainerState::Idle | ContainerState::Stopping => self.container_ended(id, detail),
            }
        }
    }

    pub(super) fn container_ended(&mut self, id: ContainerId, detail: String) {
        let known = self.containers.get_mut(&id).and_then(|handle| handle.end_detail.take());
        if let Some(end) = self.container_end(id, &known.unwrap_or(detail)) {
            self.report_container_end(id, end);
            self.step(Event::ContainerEnded { container: id });
        }
    }
}

// === impl CallHandle ===

impl CallHandle {
    /// Its container could not be made, and that is its answer.
    fn settle(self, mut place: Place, why: NotMade, detail: &str, notification: Option<v1::Notification>) {
        let Some(tell) = self.tell else { return };
        if let Some((source, since)) = self.made {
            (place.source, place.since) = (source, since);
        }
        let told = match why {
            NotMade::Function(error) => Told::InitFailed(Box::new(place), error, notification.map(Box::new)),
            // Code goes with the last function that needs it.
            NotMade::Code(CodeError::Missing(_)) => Told::Refused(InvokeError::FunctionDeleted),
            NotMade::Code(_) | NotMade::Setup(_) => Told::Refused(InvokeError::Container {
                detail: detail.to_owned(),
            }),
        };
        // A call that panicked hears nothing.
        let _ = tell.send(told);
    }
}
