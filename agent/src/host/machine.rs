//! Machines' lives: each is walked by one task, which reports to the loop.

use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use stoker_ebpf::CgroupId;
use stoker_linux::Cgroup;
use stoker_policy::MachineId;
use stoker_proto::v1;
use tokio::sync::{mpsc, watch};

use super::error::HostError;
use super::message::{Ended, MachineReport, Message, Started};
use crate::config;
use crate::machines::{Guest, Machines, Spec, Stopped};
use crate::owner::Owner;
use crate::telemetry;

/// How machines come to be: microVMs, or in a test whatever serves a guest's protocol.
pub trait Launcher: fmt::Debug + Send + Sync + 'static {
    /// Starts a machine, reports it as started and as ready, and walks with it until it has ended of itself or is told to
    /// by `stopped`. Nothing is left of it then.
    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life;

    /// What each machine that is counted has used so far. May block for some microseconds a machine.
    fn usage(&self) -> HashMap<CgroupId, v1::Usage>;
}

/// A machine's life.
pub type Life = Pin<Box<dyn Future<Output = Ended> + Send>>;

/// Where a machine's life is reported.
#[derive(Debug)]
pub struct Reports {
    machine: MachineId,
    inbox: mpsc::Sender<Message>,
}

/// Launches microVMs, and counts what they use.
#[derive(Clone, Debug)]
pub struct MicroVms {
    machines: Machines,
    telemetry: telemetry::Host,
}

/// The task of a machine.
pub(super) async fn live(
    launcher: Arc<dyn Launcher>,
    spec: Spec,
    machine: MachineId,
    stopped: Stopped,
    inbox: mpsc::Sender<Message>,
) {
    let reports = Reports { machine, inbox };
    let tell = reports.again();
    let ended = launcher.live(spec, stopped, reports).await;
    tell.send(MachineReport::Ended(Box::new(ended))).await;
}

// === impl Reports ===

impl Reports {
    /// Its process runs.
    pub async fn started(&self, started: Started) {
        self.send(MachineReport::Started(started)).await;
    }

    /// Its guest has answered.
    pub async fn ready(&self, guest: Guest, boot_duration: Duration) {
        let guest = Box::new(guest);
        self.send(MachineReport::Ready { guest, boot_duration }).await;
    }

    async fn send(&self, report: MachineReport) {
        let machine = self.machine;
        // Without a loop nobody needs to know.
        let _ = self.inbox.send(Message::Machine { machine, report }).await;
    }

    fn again(&self) -> Self {
        Self {
            machine: self.machine,
            inbox: self.inbox.clone(),
        }
    }
}

// === impl MicroVms ===

impl MicroVms {
    /// Ends the machines that this agent left when it died, and sets the eBPF programs to work. Blocks.
    ///
    /// # Errors
    /// [`HostError`] says what is missing and what to do.
    pub fn open(config: &config::Machines, owner: Owner) -> Result<Self, HostError> {
        Ok(Self {
            machines: Machines::open(config, owner)?,
            telemetry: telemetry::Host::load()?,
        })
    }

    async fn walk(self, spec: Spec, mut stopped: Stopped, reports: Reports) -> Ended {
        let mut counted = None;
        let spawned = self
            .machines
            .spawn(spec, |cgroup| counted = self.telemetry.add(cgroup))
            .await;
        let end = match spawned {
            Err(error) => v1::MachineEnd {
                reason: v1::machine_end::Reason::VmmError.into(),
                detail: error.to_string(),
                console_tail: String::new(),
            },
            Ok(mut process) => {
                let (weight, weights) = watch::channel(None);
                tokio::spawn(weigh(process.cgroup().clone(), weights));
                let started = Started {
                    pid: process.pid(),
                    cgroup: process.cgroup_below_mount(),
                    cgroup_id: counted,
                    cpu_weight: weight,
                };
                reports.started(started).await;
                let cause = match process.until_ready(&mut stopped).await {
                    Ok(ready) => {
                        reports.ready(ready.guest.clone(), ready.boot_duration).await;
                        process.until_ended(ready, &mut stopped).await
                    }
                    Err(cause) => cause,
                };
                process.clear_away(cause).await
            }
        };
        let usage = counted.and_then(|id| self.telemetry.remove(id));
        Ended { end, usage }
    }
}

impl Launcher for MicroVms {
    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life {
        Box::pin(self.clone().walk(spec, stopped, reports))
    }

    fn usage(&self) -> HashMap<CgroupId, v1::Usage> {
        self.telemetry.read()
    }
}

/// Gives a cgroup the weights that are asked for until nobody can ask any more; only the last of several counts.
async fn weigh(cgroup: Cgroup, mut weights: watch::Receiver<Option<u32>>) {
    while weights.changed().await.is_ok() {
        let Some(weight) = *weights.borrow_and_update() else {
            continue;
        };
        let cgroup = cgroup.clone();
        // Without the controller there is nothing to weigh.
        let _ = tokio::task::spawn_blocking(move || cgroup.write("cpu.weight", &weight.to_string())).await;
    }
}
