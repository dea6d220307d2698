//! Machines' lives: each is walked by one task, which reports to the loop.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stoker_credits::{Account, Terms};
use stoker_ebpf::{CgroupId, Time};
use stoker_linux::Cgroup;
use stoker_policy::{Cpu, MachineId};
use stoker_proto::v1;
use tokio::sync::{mpsc, watch};
use ulid::Ulid;

use super::error::HostError;
use super::message::{Answered, Decided, Ended, MachineReport, Message, Started};
use crate::config;
use crate::machines::{self, Claim, Machines, MachinesError, Process, Record, Remains, Spec, Stopped};
use crate::owner::Owner;
use crate::telemetry;
use crate::telemetry::credits::{Change, Crossing, Standing, now_ns};

/// How machines come to be: microVMs, or in a test whatever serves a guest's protocol.
pub trait Launcher: fmt::Debug + Send + Sync + 'static {
    /// The machines that an earlier run of this agent left, each of which is to be taken over.
    fn found(&self) -> BTreeMap<MachineId, Record>;

    /// Takes one of these over: reports it as started, and as ready once its guest has answered anew, and walks with it as
    /// with one that it started. Its account goes by these terms from now on.
    fn take_over(&self, machine: MachineId, terms: Option<Terms>, stopped: Stopped, reports: Reports) -> Life;

    /// Starts a machine, reports it as started and as ready, and walks with it until it has ended of itself or is told to
    /// by `stopped`. Nothing is left of it then.
    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life;

    /// Ends what is left of a machine whose life was not walked to its end. Nothing is left of it then.
    fn clear_away(&self, machine: MachineId, why: String) -> Life;

    /// What each machine that is counted has used so far. May block for some microseconds a machine.
    fn usage(&self) -> HashMap<CgroupId, v1::Usage>;

    /// What the vCPUs of a machine that is counted have used and waited for so far; nothing where that can't be read. May block for
    /// some microseconds.
    fn vcpu_time(&self, machine: CgroupId) -> Option<Time>;

    /// Changes the account of a machine, and says what it is then; nothing where it has none. May block for some microseconds.
    fn change_account(&self, machine: MachineId, change: Change) -> Option<Account>;

    /// The accounts of all machines. May block for about a microsecond a machine.
    fn accounts(&self) -> HashMap<MachineId, Standing>;

    /// The account of a machine; nothing where it has none. May block for about a microsecond.
    fn account(&self, machine: MachineId) -> Option<Standing>;

    /// Writes the accounts of all machines down. Blocks until they are on disk.
    fn save_accounts(&self);

    /// The last that is known of the account of a machine that was gone when the agent started. To be asked before any is saved.
    fn account_of_gone(&self, machine: MachineId) -> Option<Standing>;

    /// Resolves with machines whose levels have changed since the last call, once there are some.
    fn crossed(&self) -> Crossed;
}

/// Machines whose levels have changed.
pub type Crossed = Pin<Box<dyn Future<Output = Vec<Crossing>> + Send>>;

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

/// What a machine is counted by.
struct Counted {
    id: CgroupId,
    /// Its account as it was then, if it has one.
    account: Option<Account>,
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
        self.send(MachineReport::Started(Box::new(started))).await;
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
        // Another agent's programs are left alone.
        let claim = Claim::new(config)?;
        let telemetry = telemetry::Host::open(&owner)?;
        let (machines, found) =
            Machines::open(claim, config, owner, telemetry.ledger()).inspect_err(|_| telemetry.unpin())?;
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
        let (id, terms) = (spec.id, spec.terms);
        let mut counted = None;
        let spawned = self
            .machines
            .spawn(spec, |cgroup| counted = self.count(id, cgroup, terms))
            .await;
        match spawned {
            Ok(process) => self.walk(process, counted, stopped, reports).await,
            Err(error) => self.not_started(id, &error, counted),
        }
    }

    /// Counts what a machine uses, and keeps its account. Blocks.
    fn count(&self, machine: Ulid, cgroup: &Cgroup, terms: Option<Terms>) -> Option<Counted> {
        let id = self.telemetry.add(cgroup)?;
        let accounts = self.telemetry.accounts();
        let account = terms.and_then(|terms| accounts.open(machine, cgroup, id, &terms));
        Some(Counted { id, account })
    }

    async fn walk(
        self,
        mut process: Process,
        counted: Option<Counted>,
        mut stopped: Stopped,
        reports: Reports,
    ) -> Ended {
        let (weight, weights) = watch::channel(None);
        let threads = process.cpu().clone();
        tokio::spawn(weigh(threads.clone(), weights));
        let (cpu, decided) = watch::channel(None);
        tokio::spawn(enforce(threads.clone(), decided));
        self.hold_at_once(process.id(), threads);
        let (id, machine) = (process.id(), counted.as_ref().map(|counted| counted.id));
        let runs = process.pid() != 0;
        let started = Started {
            pid: process.pid(),
            cgroup: process.cgroup_below_mount(),
            cgroup_id: machine,
            account: counted.and_then(|counted| counted.account),
            cpu_weight: weight,
            cpu: cpu.clone(),
            record: process.record().clone(),
            drive: process.drive().clone(),
            resizer: process.resizer().clone(),
        };
        // Of one that had ended before it was found the end alone is told, in case that was told before.
        if runs {
            reports.started(started).await;
        }
        let cause = match process.until_ready(&mut stopped).await {
            Ok(ready) => {
                // It has threads now that were not there before.
                cpu.send_modify(|_| ());
                drop(cpu);
                let answered = Answered::new(ready.guest.clone(), ready.boot_duration, &ready.hello);
                reports.ready(answered).await;
                process.until_ended(ready, &mut stopped).await
            }
            Err(cause) => cause,
        };
        let (end, remains) = process.end(cause).await;
        self.ended(id, end, remains, machine)
    }

    /// Holds a machine whose level falls to what it may use, before the event loop knows.
    fn hold_at_once(&self, machine: Ulid, cpu: machines::Cpu) {
        let hold = move |class, allowed_millis| {
            cpu.hold(class, allowed_millis).unwrap_or_else(|error| {
                // It may have ended.
                tracing::debug!(%machine, %error, ?class, allowed_millis, "not held at once");
                false
            })
        };
        self.telemetry.accounts().hold_by(machine, Arc::new(hold));
    }

    fn ended(self, id: Ulid, end: v1::MachineEnd, machine: Remains, counted: Option<CgroupId>) -> Ended {
        let usage = counted.and_then(|id| self.telemetry.total(id));
        let credits = self.telemetry.accounts().close(id);
        let leftovers = Leftovers {
            machine,
            counted,
            telemetry: self.telemetry,
        };
        Ended {
            end,
            usage,
            credits,
            leftovers: Some(leftovers),
        }
    }

    fn not_started(&self, id: Ulid, error: &MachinesError, counted: Option<Counted>) -> Ended {
        let end = v1::MachineEnd {
            reason: v1::machine_end::Reason::VmmError.into(),
            detail: error.to_string(),
            ..Default::default()
        };
        // Nothing has run in it.
        if let Some(Counted { id: counted, .. }) = counted {
            self.telemetry.accounts().close(id);
            self.telemetry.remove(counted);
        }
        Ended {
            end,
            usage: None,
            credits: None,
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

    fn take_over(&self, machine: MachineId, terms: Option<Terms>, stopped: Stopped, reports: Reports) -> Life {
        let found = self
            .found
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&machine);
        let this = self.clone();
        Box::pin(async move {
            match found {
                Some(process) => {
                    let counted = this.count(machine.0, process.cgroup(), terms);
                    process.take_threads().await;
                    this.walk(process, counted, stopped, reports).await
                }
                None => this.not_started(machine.0, &MachinesError::NotFound, None),
            }
        })
    }

    fn live(&self, spec: Spec, stopped: Stopped, reports: Reports) -> Life {
        Box::pin(self.clone().start(spec, stopped, reports))
    }

    fn clear_away(&self, machine: MachineId, why: String) -> Life {
        let this = self.clone();
        Box::pin(async move {
            let (remains, cgroup) = this.machines.clear_away(machine.0).await;
            let end = v1::MachineEnd {
                reason: v1::machine_end::Reason::Killed.into(),
                detail: why,
                ..Default::default()
            };
            this.ended(machine.0, end, remains, cgroup.map(Into::into))
        })
    }

    fn usage(&self) -> HashMap<CgroupId, v1::Usage> {
        self.telemetry.read()
    }

    fn vcpu_time(&self, machine: CgroupId) -> Option<Time> {
        self.telemetry.vcpus(machine)
    }

    fn change_account(&self, machine: MachineId, change: Change) -> Option<Account> {
        self.telemetry.accounts().change(machine.0, change)
    }

    fn accounts(&self) -> HashMap<MachineId, Standing> {
        let all = self.telemetry.accounts().all();
        all.into_iter()
            .map(|(id, standing)| (MachineId(id), standing))
            .collect()
    }

    fn account(&self, machine: MachineId) -> Option<Standing> {
        self.telemetry.accounts().one(machine.0)
    }

    fn save_accounts(&self) {
        self.telemetry.accounts().save();
    }

    fn account_of_gone(&self, machine: MachineId) -> Option<Standing> {
        self.telemetry.accounts().of_gone(machine.0)
    }

    fn crossed(&self) -> Crossed {
        let accounts = self.telemetry.accounts().clone();
        Box::pin(async move { accounts.crossed().await })
    }
}

/// Gives a machine the weights that are asked for until nobody can ask any more; only the last of several counts.
async fn weigh(cpu: machines::Cpu, mut weights: watch::Receiver<Option<u32>>) {
    while weights.changed().await.is_ok() {
        let Some(weight) = *weights.borrow_and_update() else {
            continue;
        };
        let cpu = cpu.clone();
        // Without the controller there is nothing to weigh.
        let _ = tokio::task::spawn_blocking(move || cpu.weigh(weight)).await;
    }
}

/// Lets a machine run as is decided; only the last of several counts.
async fn enforce(cpu: machines::Cpu, mut decided: watch::Receiver<Option<Decided>>) {
    // What is set once more has been told of.
    let mut told = None;
    while decided.changed().await.is_ok() {
        let Some(decided) = decided.borrow_and_update().clone() else {
            continue;
        };
        let Cpu { class, allowed_millis } = decided.cpu;
        let cpu = cpu.clone();
        match tokio::task::spawn_blocking(move || cpu.set(class, allowed_millis)).await {
            Ok(Ok(())) if decided.fell_ns != told => {
                told = decided.fell_ns;
                let delay = told.map(|since| Duration::from_nanos(now_ns().saturating_sub(since)));
                if let Some(delay) = delay {
                    decided.delays.observe((), delay);
                    tracing::debug!(?class, allowed_millis, ?delay, "a machine runs as its balance says");
                }
            }
            // One that has ended can't be set either.
            Ok(Err(error)) => tracing::debug!(%error, ?class, allowed_millis, "a machine does not run as was decided"),
            _ => {}
        }
    }
}
