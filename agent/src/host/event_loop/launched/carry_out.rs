//! What was decided of machines that accounts launch, handed to who carries it out.

use std::collections::VecDeque;
use std::sync::Arc;

use stoker_policy::scale::{Size, Taken, Thresholds};
use stoker_policy::{Launch, MachineId, Reason, Shape};

use super::{LaunchHandle, Launching};
use crate::host::counts::ResizedBy;
use crate::host::event_loop::{EventLoop, MachineHandle};
use crate::host::launched::{Asked, metrics};
use crate::host::machine;
use crate::machines::{Ceiling, FromImage, LaunchRecord, RESIZES, ResizeRecord, Spec, Stopper};

// === impl EventLoop ===

impl EventLoop {
    pub(in crate::host::event_loop) fn launch_machine(&mut self, id: MachineId, account: &Arc<str>, launch: &Launch) {
        let Some(Launching {
            image,
            digest,
            file,
            program,
            request,
            reply,
        }) = self.launching.take()
        else {
            tracing::error!(machine = %id, "a machine is to be launched that nobody asked for");
            return;
        };
        tracing::info!(machine = %id, %account, %image, size = %launch.size, "launching a machine");
        let known = self.host.world().machine(id);
        let created = known.map(|known| known.created.wall).unwrap_or_default();
        let terms = known.and_then(|known| Some(known.credits.as_ref()?.terms));
        let baseline_millis = known.map_or(0, |known| known.shape.baseline_millis);
        let record = LaunchRecord {
            launch: launch.clone(),
            counts: Taken {
                vcpus: launch.size.vcpus,
                memory_mib: launch.size.memory_mib,
            },
            image,
            digest,
            program,
            request,
            resizes: VecDeque::new(),
            ran: false,
            stop: None,
        };
        let (stopper, stopped) = Stopper::new();
        let mut launched = LaunchHandle::new(&record);
        launched.launching.push(reply);
        let handle = MachineHandle {
            launched: Some(Box::new(launched)),
            ..MachineHandle::new(stopper)
        };
        self.machines.insert(id, handle);
        let spec = Spec {
            id: id.0,
            // The rest of its memory is plugged once its guest has answered.
            shape: Shape {
                vcpus: launch.size.vcpus,
                memory_mib: launch.base_mib,
                drive_mib: launch.drive_mib,
                baseline_millis,
            },
            ceiling: Some(Ceiling {
                vcpus: launch.ceiling.vcpus,
                memory_mib: launch.ceiling.memory_mib,
            }),
            runtime: "".into(),
            cpu_weight: self.host.world().rules().unowned_weight(),
            terms,
            created,
            launched: Some(FromImage {
                account: account.clone(),
                record,
                file,
            }),
        };
        self.spawn(|shared, inbox| {
            machine::live(id, inbox, shared.launcher.clone(), |launcher, reports| {
                launcher.live(spec, stopped, reports)
            })
        });
    }

    /// Its devices are asked, and nobody waits for its guest.
    pub(in crate::host::event_loop) fn resize_machine(
        &mut self,
        id: MachineId,
        number: u64,
        asked: Size,
        reason: &Reason,
    ) {
        let known = self.known(id);
        let Some((last, taken, metrics)) =
            known.and_then(|known| Some((*known.resizes.back()?, known.taken, metrics(known))))
        else {
            return;
        };
        tracing::info!(machine = %id, before = %last.before, %asked, why = %reason, "resizing a machine");
        self.counts.resizes.count(match reason {
            Reason::Crossed(_) => ResizedBy::Threshold,
            _ => ResizedBy::Request,
        });
        let resize = ResizeRecord {
            at: last.at.wall,
            before: last.before,
            asked,
            taken,
            took: last.took,
            reason: reason.to_string(),
            metrics,
        };
        self.change_resizes(id, |resizes| {
            if resizes.len() >= RESIZES {
                resizes.pop_front();
            }
            resizes.push_back(resize.clone());
        });
        // It is written down before its devices are asked.
        self.note_launched(id, |record| record.launch.size = asked);
        if let Ok(launched) = self.launched_mut(id) {
            // Who waits for the one before waits for what can't be any more.
            launched.resizing.clear();
            launched.asked.send_replace(Asked { number, size: asked });
        }
        self.report_machine(id);
    }

    /// Its guest has what was asked for, or has had long enough for that.
    pub(in crate::host::event_loop) fn report_resize(&mut self, id: MachineId, reason: &Reason) {
        match reason {
            Reason::Taken { took } => {
                let took = *took;
                tracing::info!(machine = %id, ?took, "a machine has the size that was decided");
                let is_earlier = self
                    .launched_mut(id)
                    .is_ok_and(|launched| launched.asked.borrow().number == 0 && !launched.resizes.is_empty());
                // How long what an earlier agent asked for took is seen by when that was.
                if !is_earlier {
                    self.counts.resize_durations.observe((), took);
                    self.change_resizes(id, |resizes| {
                        if let Some(last) = resizes.back_mut() {
                            last.took.get_or_insert(took);
                        }
                    });
                }
            }
            reason => tracing::warn!(machine = %id, why = %reason, "a guest does not take what it was asked to have"),
        }
        self.report_machine(id);
    }

    pub(in crate::host::event_loop) fn set_thresholds(&mut self, id: MachineId, thresholds: &Thresholds) {
        self.note_launched(id, |record| record.launch.thresholds = thresholds.clone());
        self.report_machine(id);
    }
}
