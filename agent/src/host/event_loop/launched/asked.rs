//! What is asked of machines that accounts launch.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_policy::scale::{ResizeError, SizeChange, Thresholds};
use stoker_policy::{Event, MachineId, Reason};
use stoker_proto::v1;
use tokio::sync::oneshot;
use ulid::Ulid;

use super::{LaunchedBefore, Launcher, Launching, is_taken, wait};
use crate::host::event_loop::EventLoop;
use crate::host::launched::{self, LaunchFailure, LaunchedError, Order, Reply, ResizeFailure, Resizing};
use crate::host::listing;
use crate::machines::{Guest, LaunchRequest, RecordFile, ResizeRecord, StopRecord};
use crate::uptime::uptime;

// === impl EventLoop ===

impl EventLoop {
    /// Who asked may have left.
    pub(in crate::host::event_loop) fn hear_order(&mut self, order: Order) {
        match order {
            Order::Launch { launching, reply } => self.launch(*launching, reply),
            Order::LaunchAgain {
                account,
                request,
                reply,
            } => drop(self.launch_again(&account, Some(&request), reply)),
            Order::Resize {
                machine,
                change,
                by,
                reply,
            } => drop(reply.send(self.resize(machine, change, by))),
            Order::SetThresholds {
                machine,
                thresholds,
                etag,
                by,
                reply,
            } => match self.may_set_thresholds(machine, etag.as_deref()) {
                Ok(record) => self.ask_for_thresholds(machine, thresholds, by, record, reply),
                Err(error) => drop(reply.send(Err(error))),
            },
            Order::Stop {
                machine,
                grace,
                by,
                reply,
            } => drop(reply.send(self.stop(machine, grace, by))),
            Order::End { machine, reply } => match self.launched_mut(machine) {
                Ok(launched) => wait(&mut launched.ending, reply),
                Err(LaunchedError::Ended(machine)) => drop(reply.send(*machine)),
                Err(_) => {}
            },
            Order::Resizes { machine, reply } => drop(reply.send(self.resizes(machine))),
            Order::Guest { machine, reply } => drop(reply.send(self.guest(machine))),
            Order::BoundsFor { account, reply } => {
                let world = self.host.world();
                let most = world.ceiling_for(&account);
                let _ = reply.send(world.bounds_for(&account, most, 0));
            }
            Order::BoundsOf { machine, reply } => drop(reply.send(self.host.world().bounds(machine))),
            Order::Resized { machine, number, taken } => self.resized(machine, number, taken),
            Order::Runs { machine } => self.program_runs(machine),
        }
    }

    fn launch(&mut self, wanted: crate::host::Launching, reply: Launcher) {
        let crate::host::Launching {
            account,
            request,
            image,
            digest,
            file,
            program,
            mut launch,
            by,
        } = wanted;
        let Some(reply) = self.launch_again(&account, request.as_ref(), reply) else {
            return;
        };
        launch.image = digest.as_str().into();
        if launch.drive_mib == 0 {
            launch.drive_mib = self.host.world().rules().standard.drive_mib;
        }
        let machine = MachineId(Ulid::generate());
        if let Err(error) = self.host.world().may_launch(machine, &account, &launch) {
            return drop(reply.send(Err(error.into())));
        }
        self.launching = Some(Launching {
            image,
            digest,
            file,
            program,
            request: request.clone(),
            reply,
        });
        let launch = Box::new(launch);
        self.step(Event::LaunchAsked {
            machine,
            account: account.clone(),
            launch,
            by,
        });
        match self.launching.take() {
            // Whatever was decided would have taken it.
            Some(Launching { reply, .. }) => drop(reply.send(Err(LaunchFailure::Gone))),
            None => {
                if let Some(request) = request {
                    self.note_request(account, request, machine);
                }
            }
        }
    }

    pub(in crate::host::event_loop) fn note_request(
        &mut self,
        account: Arc<str>,
        request: LaunchRequest,
        machine: MachineId,
    ) {
        let LaunchRequest { id, sha256 } = request;
        self.launches.insert((account, id), LaunchedBefore { machine, sha256 });
    }

    /// Who asks again is told the same. Where nobody asked before, who waits is handed back.
    fn launch_again(
        &mut self,
        account: &Arc<str>,
        request: Option<&LaunchRequest>,
        reply: Launcher,
    ) -> Option<Launcher> {
        let before = request.and_then(|request| {
            let before = self.launches.get(&(account.clone(), request.id.clone()))?;
            Some((before.machine, before.sha256 == request.sha256))
        });
        match before {
            None => return Some(reply),
            Some((machine, true)) => self.launched_before(machine, reply),
            Some((_, false)) => drop(reply.send(Err(LaunchFailure::Reused))),
        }
        None
    }

    fn launched_before(&mut self, machine: MachineId, reply: Launcher) {
        let ran = self.launch_ends.get(&machine).is_none_or(|end| end.ran);
        let answer = match self.launched_mut(machine) {
            Ok(launched) if !launched.runs => return wait(&mut launched.launching, reply),
            Ok(_) => self.shown(machine).ok_or(LaunchFailure::Gone),
            Err(LaunchedError::Ended(machine)) if ran => Ok(*machine),
            Err(LaunchedError::Ended(machine)) => Err(LaunchFailure::Ended(machine)),
            Err(_) => Err(LaunchFailure::Gone),
        };
        let _ = reply.send(answer);
    }

    fn resize(&mut self, machine: MachineId, change: SizeChange, by: Arc<str>) -> Result<Resizing, ResizeFailure> {
        if let Err(LaunchedError::Ended(machine)) = self.launched_mut(machine) {
            return Err(ResizeFailure::Ended(machine));
        }
        let asked = self.host.world().resize_for(machine, change)?;
        let before = self.known(machine).ok_or(ResizeError::Unknown)?.asked;
        if asked != before {
            self.step(Event::ResizeAsked { machine, change, by });
        }
        let known = self.known(machine).ok_or(ResizeError::Unknown)?;
        let now = ResizeRecord {
            at: listing::since_1970(SystemTime::now()),
            before,
            asked: known.asked,
            taken: known.taken,
            took: is_taken(known).then_some(Duration::ZERO),
            reason: "it is to have that already".to_owned(),
            metrics: BTreeMap::new(),
        };
        let launched = self.launched_mut(machine).map_err(|_| ResizeError::Unknown)?;
        let (tell, taken) = oneshot::channel();
        let resize = match launched.resizes.back() {
            Some(last) if asked != before => last.clone(),
            _ => now,
        };
        match resize.took {
            Some(_) => drop(tell.send(resize.clone())),
            None => wait(&mut launched.resizing, tell),
        }
        Ok(Resizing { resize, taken })
    }

    /// Whether its thresholds may be replaced by who knows them by this; where that is written down.
    fn may_set_thresholds(&mut self, machine: MachineId, etag: Option<&str>) -> Result<RecordFile, LaunchedError> {
        self.lasting(machine)?;
        let known = self.known(machine).ok_or(LaunchedError::Unknown)?;
        if etag.is_some_and(|etag| etag != launched::etag(known)) {
            return Err(LaunchedError::Changed);
        }
        // Before it is spawned there is none.
        self.record_of(machine).ok_or(LaunchedError::Starting)
    }

    /// It is written down before it is answered.
    fn ask_for_thresholds(
        &mut self,
        machine: MachineId,
        thresholds: Thresholds,
        by: Arc<str>,
        record: RecordFile,
        reply: Reply<Result<v1::Machine, LaunchedError>>,
    ) {
        self.step(Event::ThresholdsAsked {
            machine,
            thresholds,
            by,
        });
        let shown = self.shown(machine);
        self.spawn(|_, _| async move {
            let saved = record.save().await;
            if let Err(error) = &saved {
                tracing::error!(%machine, %error, "the next agent will not know a machine's thresholds");
            }
            let done = shown.filter(|_| saved.is_ok());
            let _ = reply.send(done.ok_or(LaunchedError::Failed));
        });
    }

    fn stop(
        &mut self,
        machine: MachineId,
        grace: Duration,
        by: Arc<str>,
    ) -> Result<oneshot::Receiver<v1::Machine>, LaunchedError> {
        let (tell, ended) = oneshot::channel();
        match self.launched_mut(machine) {
            Ok(launched) => {
                wait(&mut launched.ending, tell);
                self.note_stop(machine, &by, grace);
                self.end_within(machine, grace, by);
            }
            Err(LaunchedError::Ended(machine)) => drop(tell.send(*machine)),
            Err(error) => return Err(error),
        }
        Ok(ended)
    }

    /// Lets one end once its program has had so long. One that ends already may be left less time by that.
    pub(super) fn end_within(&mut self, machine: MachineId, grace: Duration, by: Arc<str>) {
        let Ok(launched) = self.launched_mut(machine) else {
            return;
        };
        launched.grace = grace;
        let sooner = launched.stop(Reason::Asked { by: by.clone() }.to_string());
        let ends = self.lasting(machine).is_err();
        match self.machines.get(&machine).filter(|_| ends) {
            Some(handle) => handle.stopper.stop(sooner),
            None => self.step(Event::EndAsked { machine, by }),
        }
    }

    /// The next agent is to carry it on, with no more time than any that was given.
    fn note_stop(&self, machine: MachineId, by: &Arc<str>, grace: Duration) {
        let until = uptime() + grace;
        self.note_launched(machine, |record| {
            if record.stop.as_ref().is_none_or(|stop| until < stop.until) {
                let by = by.clone();
                record.stop = Some(StopRecord { by, until, grace });
            }
        });
        self.save(machine);
    }

    fn resizes(&self, machine: MachineId) -> Option<VecDeque<ResizeRecord>> {
        let launched = self.machines.get(&machine).and_then(|handle| handle.launched.as_ref());
        let resizes = launched.map(|launched| &launched.resizes);
        let ended = || self.launch_ends.get(&machine).map(|end| &end.resizes);
        resizes.or_else(ended).cloned()
    }

    fn guest(&mut self, machine: MachineId) -> Result<Guest, LaunchedError> {
        self.lasting(machine)?;
        let launched = self.launched_mut(machine)?;
        let runs = launched.runs;
        let guest = self.machines.get(&machine).and_then(|handle| handle.guest.clone());
        guest.filter(|_| runs).ok_or(LaunchedError::Starting)
    }
}
