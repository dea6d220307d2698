//! Machines' lives: each is walked by one task, which reports to the loop.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use stoker_ebpf::CgroupId;
use stoker_linux::Cgroup;
use stoker_policy::MachineId;
use stoker_proto::v1;
use tokio::sync::{mpsc, watch};

use super::error::HostError;
use super::message::{Answered, Ended, MachineReport, Message, Started};
use crate::config;
use crate::machines::{Machines, MachinesError, Process, Record, Remains, Spec, Stopped};
use crate::owner::Owner;
use crate::telemetry;

/// How machines come to be: microVMs, or in a test whatever serves a guest's protocol.
pub trait Launcher: fmt::Debug + Send + Sync + 'static {
    /// The machines that an earlier run of this agent left, each of which is to be taken over.
    fn found(&self) -> BTreeMap<MachineId, Record>;

    /// Takes one of these over: reports it as started, and as ready once its guest has answered anew, and walks with it as
    /// with one that it started.
    fn take_over(&self, machine: MachineId, stopped: Stopped, reports: Reports) -> Life;

    /// Starts a machine, reports it as started and as ready, and walks with it until it has ended of itself or is told to
    /// by `stopped`. Nothing is left of it then.
    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life;

    /// Ends what is left of a machine whose life was not walked to its end. Nothing is left of it then.
    fn clear_away(&self, machine: MachineId, why: String) -> Life;

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
    /// Those that were found and not taken over yet.
    found: Arc<Mutex<BTreeMap<MachineId, Process>>>,
}

/// What there is of a machine that has ended, for as long as its end is not recorded: the next agent finds the machine by it,
/// and what that used.
#[derive(Debug)]
pub struct Leftovers {
    machine: Remains,
    counted: Option<CgroupId>,
    telemetry: telemetry::Host,
}

/// The task of a machine. A panic in its life ends it.
pub(super) async fn live(
    machine: MachineId,
    inbox: mpsc::Sender<Message>,
    launcher: Arc<dyn Launcher>,
    life: impl FnOnce(&dyn Launcher, Reports) -> Life + Send + 'static,
) {
    let reports = Reports { machine, inbox };
    let tell = reports.again();
    let lives = launcher.clone();
    let ended = match tokio::spawn(async move { life(&*lives, reports).await }).await {
        Ok(ended) => ended,
        Err(error) => {
            tracing::error!(%machine, %error, "the task of a machine panicked; the machine is ended");
            launcher
                .clear_away(machine, "the agent's task for it panicked".into())
                .await
        }
    };
    tell.send(MachineReport::Ended(Box::new(ended))).await;
}

// === impl Reports ===

impl Reports {
    /// Its process runs.
    pub async fn started(&self, started: Started) {
        self.send(MachineReport::Started(started)).await;
    }

    /// Its guest has answered.
    pub async fn ready(&self, answered: Answered) {
        self.send(MachineReport::Ready(Box::new(answered))).await;
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

// === impl Leftovers ===

impl Leftovers {
    /// Removes it, once the machine's end is recorded.
    pub(super) async fn remove(self) {
        self.machine.remove().await;
        // Last, so that who tells the end again tells the same.
        if let Some(id) = self.counted {
            self.telemetry.remove(id);
        }
    }
}

// === impl MicroVms ===

impl MicroVms {
    /// Finds the machines that this agent left when it died, and sets the eBPF programs to work. Blocks.
    ///
    /// # Errors
    /// [`HostError`] says what is missing and what to do.
    pub fn open(config: &config::Machines, owner: Owner) -> Result<Self, HostError> {
        let host = owner.host;
        let (machines, found) = Machines::open(config, owner)?;
        let telemetry = telemetry::Host::open(host)?;
        let cgroups: Vec<_> = found.iter().map(|process| process.cgroup().clone()).collect();
        telemetry.retain(&cgroups);
        let found = found.into_iter().map(|process| (MachineId(process.id()), process));
        Ok(Self {
            machines,
            telemetry,
            found: Arc::new(Mutex::new(found.collect())),
        })
    }

    /// To be called once no machine is left: nothing is counted then until the next start.
    pub fn stop_counting(&self) {
        self.telemetry.unpin();
    }

    /// What counts the use of machines.
    #[must_use]
    pub fn telemetry(&self) -> &telemetry::Host {
        &self.telemetry
    }

    async fn start(self, spec: Spec, stopped: Stopped, reports: Reports) -> Ended {
        let mut counted = None;
        let spawned = self
            .machines
            .spawn(spec, |cgroup| counted = self.telemetry.add(cgroup))
            .await;
        match spawned {
            Ok(process) => self.walk(process, counted, stopped, reports).await,
            Err(error) => self.not_started(&error, counted),
        }
    }

    async fn walk(
        self,
        mut process: Process,
        counted: Option<CgroupId>,
        mut stopped: Stopped,
        reports: Reports,
    ) -> Ended {
        let (weight, weights) = watch::channel(None);
        tokio::spawn(weigh(process.cgroup().clone(), weights));
        let runs = process.pid() != 0;
        let started = Started {
            pid: process.pid(),
            cgroup: process.cgroup_below_mount(),
            cgroup_id: counted,
            cpu_weight: weight,
            record: process.record().clone(),
            drive: process.drive().clone(),
        };
        // Of one that had ended before it was found the end alone is told, in case that was told before.
        if runs {
            reports.started(started).await;
        }
        let cause = match process.until_ready(&mut stopped).await {
            Ok(ready) => {
                let answered = Answered::new(ready.guest.clone(), ready.boot_duration, &ready.hello);
                reports.ready(answered).await;
                process.until_ended(ready, &mut stopped).await
            }
            Err(cause) => cause,
        };
        let (end, machine) = process.end(cause).await;
        self.ended(end, machine, counted)
    }

    fn ended(self, end: v1::MachineEnd, machine: Remains, counted: Option<CgroupId>) -> Ended {
        let usage = counted.and_then(|id| self.telemetry.total(id));
        let leftovers = Leftovers {
            machine,
            counted,
            telemetry: self.telemetry,
        };
        Ended {
            end,
            usage,
            leftovers: Some(leftovers),
        }
    }

    fn not_started(&self, error: &MachinesError, counted: Option<CgroupId>) -> Ended {
        let end = v1::MachineEnd {
            reason: v1::machine_end::Reason::VmmError.into(),
            detail: error.to_string(),
            ..Default::default()
        };
        // Nothing has run in it.
        if let Some(id) = counted {
            self.telemetry.remove(id);
        }
        Ended {
            end,
            usage: None,
            leftovers: None,
        }
    }
}

impl Launcher for MicroVms {
    fn found(&self) -> BTreeMap<MachineId, Record> {
        let found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found
            .iter()
            .map(|(id, process)| (*id, process.record().get()))
            .collect()
    }

    fn take_over(&self, machine: MachineId, stopped: Stopped, reports: Reports) -> Life {
        let found = self
            .found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&machine);
        let this = self.clone();
        Box::pin(async move {
            match found {
                Some(process) => {
                    let counted = this.telemetry.add(process.cgroup());
                    this.walk(process, counted, stopped, reports).await
                }
                None => this.not_started(&MachinesError::NotFound, None),
            }
        })
    }

    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life {
        Box::pin(self.clone().start(spec, stopped, reports))
    }

    fn clear_away(&self, machine: MachineId, why: String) -> Life {
        let this = self.clone();
        Box::pin(async move {
            let (machine, cgroup) = this.machines.clear_away(machine.0).await;
            let end = v1::MachineEnd {
                reason: v1::machine_end::Reason::Killed.into(),
                detail: why,
                ..Default::default()
            };
            this.ended(end, machine, cgroup.map(Into::into))
        })
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
