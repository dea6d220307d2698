//! Machines: VMM processes, their cgroups and files, and the connection to their guests.
//!
//! [`Machines`] is what all machines of this host share; [`Machines::spawn`] starts one. Its life is a straight line,
//! walked by one task of the host:
//!
//! ```text
//!  Machines::spawn ──► Process ── until_ready ──► Guest ── until_ended ──► Cause ── end ──► MachineEnd, Remains
//!                         └────────── it ends, hangs or is stopped before ──────┘
//! ```
//!
//! One that is there already when the agent starts enters that line where it waits for the guest, which dials again.
//!
//! The threads of its vCPUs and the others of its VMM are in two cgroups below the machine's (`cgroup`), so that what the guest
//! may use of the host's CPUs, and how soon, is set for it alone (`cpu`).
//!
//! Whatever happened, `end` leaves no process. Cgroup and folder remain until the end is recorded, which
//! [`Remains::remove`] is to be told by its caller. Where the agent dies, machines go on: `record` says what they are, the
//! next agent finds them (`found`) and takes them over, those too whose end is not recorded.

mod bounds;
mod calls;
mod ceiling;
mod cgroup;
mod claim;
mod cpu;
mod drive;
mod end;
mod found;
mod guest;
mod launched;
mod parts;
mod record;
mod setup;
mod size;
#[cfg(test)]
mod tests;
mod vmm;
mod vmm_process;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use stoker_credits::Terms;
use stoker_ebpf::Ledger;
use stoker_linux::{Cgroup, CgroupError, KILL_LIMIT};
use stoker_policy::{MAX_WEIGHT, Shape};
use stoker_proto::guest::HelloResponse;
use stoker_proto::v1;
use tokio::net::UnixListener;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use ulid::Ulid;

pub use ceiling::Ceiling;
pub use cgroup::{NoCgroup, ThreadCgroups};
pub use claim::Claim;
pub use cpu::{Cpu, CpuError, NoSchedExt};
pub use drive::{DriveError, ScratchDrive};
pub use guest::{Guest, GuestError};
pub use launched::{FromImage, LaunchRecord, LaunchRequest, Program, RESIZES, ResizeRecord, StopRecord};
pub(crate) use parts::{Incoming, Parts};
pub use record::{ContainerRecord, Record, RecordFile};
#[cfg(test)]
pub(crate) use size::tests::Played;
pub use size::{Amounts, ResizeError, Resizer, Size, Taken, Taking};

use self::ceiling::Ceilings;
use self::cpu::Schedulers;
use self::found::Found;
use self::guest::Connected;
use self::setup::{Setup, host_size};
use self::vmm::Folder;
use self::vmm_process::VmmProcess;
use crate::config;
use crate::failpoints::{self, Failpoint};
use crate::lock::LockError;
use crate::owner::Owner;

/// How long a machine may take to power itself off before it is killed.
const POWER_OFF: Duration = Duration::from_secs(3);

/// How long a VMM may take to end by itself once its guest has hung up.
const HANG_UP: Duration = Duration::from_secs(3);

/// How long a guest that has answered an agent before may take to dial the next one.
const DIAL_AGAIN: Duration = Duration::from_secs(15);

/// How long to wait before a VMM that did not end is killed again.
const KILL_AGAIN: Duration = Duration::from_secs(5);

/// How many bytes are kept of each text in which a guest says what went wrong.
const MAX_DETAIL: usize = 8 << 10;

/// What all machines of this host share.
#[derive(Clone, Debug)]
pub struct Machines {
    setup: Arc<Setup>,
}

/// The machine to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Names its folder and its cgroup.
    pub id: Ulid,
    /// What it starts with.
    pub shape: Shape,
    /// The most that it may ever have; what is configured where it is absent.
    pub ceiling: Option<Ceiling>,
    /// What it loads before it is ready.
    pub runtime: Arc<str>,
    /// Its `cpu.weight` until it has an account.
    pub cpu_weight: u32,
    /// What its account of credits goes by; nothing where it has none.
    pub terms: Option<Terms>,
    /// When it was decided to make it: time since 1970.
    pub created: Duration,
    /// What it runs, where an account launches it: then it loads no runtime.
    pub launched: Option<FromImage>,
}

/// A machine's process, from its start until it is cleared away.
#[derive(Debug)]
pub struct Process {
    id: Ulid,
    setup: Arc<Setup>,
    folder: Folder,
    cgroup: Cgroup,
    vmm: VmmProcess,
    record: RecordFile,
    drive: ScratchDrive,
    cpu: Cpu,
    resizer: Resizer,
    /// Waits for the guest to dial and to answer, until somebody waits for that.
    connecting: Option<AbortOnDropHandle<Result<Connected, GuestError>>>,
    runtime: Arc<str>,
    started: Instant,
}

/// Cgroup and folder of a machine that has ended. Until they are removed the next agent finds the machine.
#[derive(Debug)]
pub struct Remains {
    cgroup: Cgroup,
    folder: Folder,
}

/// A guest that has answered.
#[derive(Debug)]
pub struct Ready {
    /// The connection to it.
    pub guest: Guest,
    /// From spawning the VMM to the first answer.
    pub boot_duration: Duration,
    /// What it told of itself.
    pub hello: HelloResponse,
    /// Completes when the guest has hung up, with how.
    pub hung_up: oneshot::Receiver<Status>,
}

/// Ends a machine; the first call counts, unless a later one leaves it less time.
#[derive(Clone, Debug)]
pub struct Stopper(Arc<watch::Sender<Option<Stop>>>);

/// Hears a [`Stopper`].
pub type Stopped = watch::Receiver<Option<Stop>>;

/// Why a machine is ended by the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Nobody needs it; its guest is asked to power off first.
    Gently(String),
    /// It has to go now.
    Now(String),
    /// Its guest can't be relied on any more.
    Broken(String),
    /// Nobody needs it; the program of its image is asked to end first, and its guest to power off then.
    AfterProgram {
        /// Why.
        why: String,
        /// The number of the signal that asks it to.
        signal: i32,
        /// How long it has for that.
        grace: Duration,
    },
    /// The program of its image has ended.
    ProgramEnded {
        /// How, in words.
        detail: String,
        /// What it exited with, or 128 and the number of the signal that ended it, as far as its guest says so.
        exit_status: Option<i32>,
    },
    /// The program of its image could not be started.
    ProgramFailed(String),
}

/// What ended a machine.
#[derive(Debug)]
pub enum Cause {
    /// The agent.
    Stopped(Stop),
    /// Its VMM ended.
    Exited(io::Result<Option<ExitStatus>>),
    /// Its guest had not answered within this time of its start.
    NoAnswer(Duration),
    /// Its guest, which an earlier agent left, had not dialled within this time.
    NotBack(Duration),
    /// Its guest hung up, or answered wrongly.
    HungUp(String),
    /// Its guest could not load the runtime.
    NoRuntime(String),
    /// Its guest could not use the scratch drive that it has.
    NoDrive(String),
}

/// What keeps machines from being run on this host.
#[derive(Debug, thiserror::Error)]
pub enum MachinesError {
    /// The virtualisation of the host can't be used.
    #[error("can't open /dev/kvm: {source}; load kvm_intel or kvm_amd, and run stokerd as root or in the group kvm")]
    NoKvm {
        /// The underlying error.
        source: io::Error,
    },
    /// A file or folder of machines could not be used.
    #[error("can't {operation} {}: {source}", path.display())]
    Folder {
        /// What was being done.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// A cgroup could not be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Machines could not be bounded.
    #[error(transparent)]
    NoCgroup(#[from] NoCgroup),
    /// A machine could not be bounded, so it was not started.
    #[error(
        "the machine was not started, for it can't be bounded: {source}; restart stokerd, which enables the controllers again"
    )]
    Unbounded {
        /// Which file of its cgroup.
        source: CgroupError,
    },
    /// Machines can't be scheduled as is configured.
    #[error("machines.scheduler: {0}; or let it be \"auto\"")]
    Scheduler(#[from] NoSchedExt),
    /// Another agent uses the folder or the cgroup.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It was taken over before, or never found.
    #[error("no machine of that id was found when the agent started")]
    NotFound,
    /// The VMM could not be started.
    #[error("can't start {}: {source}{}", path.display(), not_started_hint(.source))]
    Spawn {
        /// The program.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
}

// === impl Machines ===

impl Machines {
    /// Finds the machines that an earlier run of this agent left. All have their accounts in this ledger. Blocks.
    ///
    /// # Errors
    /// [`MachinesError`] says what is missing and what to do.
    pub fn open(
        claim: Claim,
        config: &config::Machines,
        owner: Owner,
        ledger: &Arc<Ledger>,
    ) -> Result<(Self, Vec<Process>), MachinesError> {
        let machines = Self {
            setup: Arc::new(Setup {
                vmm: claim.vmm,
                kernel: config.kernel.clone(),
                initramfs: config.initramfs.clone(),
                image: config.image.clone(),
                boot_timeout: config.boot_timeout,
                ceilings: Ceilings::new(config, host_size()),
                run_dir: claim.run_dir,
                scratch_dir: config.scratch_dir.clone(),
                cgroup: claim.cgroup,
                mount: claim.mount,
                controllers: &cgroup::CONTROLLERS,
                schedulers: Schedulers::start(config.scheduler, ledger)?,
                next_cid: AtomicU32::new(0),
                owner,
                _locks: claim.locks,
            }),
        };
        let found = machines.found()?;
        Ok((machines, found))
    }

    /// The machines that an earlier run of this agent left.
    fn found(&self) -> Result<Vec<Process>, MachinesError> {
        let setup = &self.setup;
        let found = found::look(&setup.cgroup, &setup.mount, &setup.run_dir, &setup.owner)?;
        let process = |found| Process::found(setup.clone(), found);
        Ok(found.into_iter().map(process).collect())
    }

    /// Starts a machine. `before_start` is called with its cgroup before anything runs in it.
    ///
    /// # Errors
    /// [`MachinesError`]; nothing is left then.
    pub async fn spawn(&self, spec: Spec, before_start: impl FnOnce(&Cgroup) + Send) -> Result<Process, MachinesError> {
        let setup = self.setup.clone();
        let folder = Folder::new(&setup.run_dir, &spec.id.to_string());
        folder.create().map_err(during("make a folder in", &setup.run_dir))?;
        failpoints::reach(Failpoint::MachineFolderMade);
        let (cgroup, record) = match setup.make_cgroup(&folder, &spec) {
            Ok(made) => made,
            Err(error) => {
                remove(&folder);
                return Err(error);
            }
        };
        failpoints::reach(Failpoint::MachineCgroupMade);
        before_start(&cgroup);
        let spawned = guest::listen(&folder.vsock())
            .map_err(during("listen for a guest in", &setup.run_dir))
            .and_then(|listener| {
                failpoints::reach(Failpoint::MachineListens);
                let parts = ThreadCgroups::of(&cgroup);
                Ok((listener, vmm::spawn(&setup, &spec, setup.cid(), &folder, &parts)?))
            });
        failpoints::reach(Failpoint::MachineSpawned);
        match spawned {
            Ok((listener, child)) => {
                let vmm = VmmProcess::Child(child);
                let (cpu, resizer) = setup.sized(spec.id, &folder, &cgroup, vmm.pid(), &record);
                Ok(Process {
                    connecting: Some(connect(Ok(listener), &spec.runtime)),
                    id: spec.id,
                    setup,
                    drive: ScratchDrive::of_vmm(folder.control(), spec.shape.drive_mib),
                    cpu,
                    resizer,
                    folder,
                    cgroup,
                    vmm,
                    record,
                    runtime: spec.runtime,
                    started: Instant::now(),
                })
            }
            Err(error) => {
                empty(&cgroup).await;
                Remains { cgroup, folder }.remove().await;
                Err(error)
            }
        }
    }
}

impl Machines {
    /// Ends what is left of a machine that has no [`Process`] any more; answers with it, and with the id of its cgroup where
    /// that was there.
    pub async fn clear_away(&self, id: Ulid) -> (Remains, Option<u64>) {
        let setup = &self.setup;
        let name = id.to_string();
        let folder = Folder::new(&setup.run_dir, &name);
        // One that was found may have its cgroup where an earlier configuration wanted it.
        let cgroup = match RecordFile::find(folder.path()) {
            Ok(Some(record)) => Cgroup::at(setup.mount.join(record.get().cgroup)),
            _ => Cgroup::at(setup.cgroup.path().join(&name)),
        };
        let cgroup_id = cgroup.id().ok();
        calm_and_empty(&setup.schedulers, id, &cgroup).await;
        (Remains { cgroup, folder }, cgroup_id)
    }
}

// === impl Process ===

impl Process {
    fn found(setup: Arc<Setup>, found: Found) -> Self {
        let Found {
            id,
            folder,
            cgroup,
            record,
            vmm,
        } = found;
        let runtime = record.get().runtime;
        // One that an earlier version made has none.
        if let Err(error) = ThreadCgroups::create(&cgroup, setup.controllers) {
            tracing::error!(machine = %id, %error, "what its guest uses of the host's CPUs can't be limited");
        }
        let (cpu, resizer) = setup.sized(id, &folder, &cgroup, vmm.pid(), &record);
        Self {
            id,
            setup,
            cpu,
            resizer,
            // At once: the guest dials while the agent still starts.
            connecting: Some(connect(guest::listen(&folder.vsock()), &runtime)),
            // It may have ended between writing down that it is made larger and having it done.
            drive: ScratchDrive::of_vmm(folder.control(), 0),
            folder,
            cgroup,
            vmm,
            runtime,
            record,
            started: Instant::now(),
        }
    }

    /// The machine's id.
    pub fn id(&self) -> Ulid {
        self.id
    }

    /// What the next agent will know of it.
    pub fn record(&self) -> &RecordFile {
        &self.record
    }

    /// Its scratch drive.
    pub fn drive(&self) -> &ScratchDrive {
        &self.drive
    }

    /// The VMM's process id; 0 once it is gone.
    pub fn pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// The machine's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Sees to it that the threads of a machine that was found are in the parts of its cgroup, and scheduled as any others. To be
    /// called once those are counted.
    pub async fn take_threads(&self) {
        let (cgroup, pid, cpu) = (self.cgroup.clone(), self.pid(), self.cpu.clone());
        let taken = tokio::task::spawn_blocking(move || {
            ThreadCgroups::of(&cgroup)
                .take(&cgroup, pid)
                .map_err(io::Error::other)?;
            cpu.reset()
        });
        if let Err(error) = taken.await.map_err(io::Error::from).flatten() {
            tracing::error!(machine = %self.id, %error, "what its guest uses of the host's CPUs can't be limited");
        }
        // Its guest may have taken something, or given it back, while nobody looked.
        if self.record.get().size.is_some()
            && let Err(error) = self.resizer.amounts().await
        {
            tracing::warn!(machine = %self.id, %error, "what the machine may have of the host may be more than it has");
        }
    }

    /// How soon and how much its threads run.
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// What changes its size.
    pub fn resizer(&self) -> &Resizer {
        &self.resizer
    }

    /// The machine's cgroup as a path below the cgroup v2 mount.
    pub fn cgroup_below_mount(&self) -> String {
        self.setup.below_mount(&self.cgroup).display().to_string()
    }

    /// Waits until the guest has loaded the runtime and answered. One that was found dials again.
    ///
    /// # Errors
    /// What came instead.
    pub async fn until_ready(&mut self, stopped: &mut Stopped) -> Result<Ready, Cause> {
        let connecting = self.connecting.take();
        let connected = async {
            match connecting {
                Some(connecting) => connecting
                    .await
                    .map_err(|error| error.to_string())?
                    .map_err(|error| error.to_string()),
                None => std::future::pending().await,
            }
        };
        let Record {
            boot_duration: booted,
            shape,
            ..
        } = self.record.get();
        let limit = booted.map_or(self.setup.boot_timeout, |_| DIAL_AGAIN);
        let left = limit.saturating_sub(self.started.elapsed());
        // A program that runs is to have its time, and is asked to end by its guest.
        let at_once = |stop: &Stop| booted.is_none() || !matches!(stop, Stop::AfterProgram { .. });
        tokio::select! {
            biased;
            exit = self.vmm.wait() => Err(Cause::Exited(exit)),
            stop = told(stopped, at_once) => Err(Cause::Stopped(stop)),
            connected = tokio::time::timeout(left, connected) => match connected {
                Ok(Ok((_, hello, _))) if !hello.runtime_error.is_empty() => {
                    Err(Cause::NoRuntime(hello.runtime_error))
                }
                // What its containers write would else be in memory that nobody has counted.
                Ok(Ok((_, hello, _))) if shape.drive_mib > 0 && !hello.scratch_error.is_empty() => {
                    Err(Cause::NoDrive(hello.scratch_error))
                }
                Ok(Ok((guest, hello, hung_up))) => {
                    let boot_duration = booted.unwrap_or_else(|| self.started.elapsed());
                    tracing::debug!(?hello, ?boot_duration, "a guest answered");
                    self.record.change(|record| record.boot_duration = Some(boot_duration));
                    if let Err(error) = self.record.save().await {
                        tracing::warn!(%error, "it is not written that a machine has booted");
                    }
                    Ok(Ready { guest, boot_duration, hello, hung_up })
                }
                Ok(Err(error)) => Err(self.exit_or(Cause::HungUp(error)).await),
                Err(_) => Err(booted.map_or(Cause::NoAnswer(limit), |_| Cause::NotBack(limit))),
            },
        }
    }

    /// Waits until the machine has ended, or has to.
    pub async fn until_ended(&mut self, ready: Ready, stopped: &mut Stopped) -> Cause {
        let Ready { guest, hung_up, .. } = ready;
        tokio::select! {
            biased;
            exit = self.vmm.wait() => Cause::Exited(exit),
            stop = stop(stopped) => {
                let stop = self.end_program(&guest, stop, stopped).await;
                match &stop {
                    Stop::Gently(_) | Stop::AfterProgram { .. } | Stop::ProgramEnded { .. } | Stop::ProgramFailed(_) => {
                        self.power_off(&guest).await;
                        Cause::Stopped(stop)
                    }
                    // A call that fails may be the first to tell that the VMM has ended.
                    Stop::Broken(_) => self.exit_or(Cause::Stopped(stop)).await,
                    Stop::Now(_) => Cause::Stopped(stop),
                }
            }
            why = hung_up => {
                let why = why.map_or_else(|_| "it is not listened to any more".to_owned(), |status| status.message().to_owned());
                self.exit_or(Cause::HungUp(why)).await
            }
        }
    }

    /// Lets the guest power itself off; where it can't, it is killed.
    async fn power_off(&mut self, guest: &Guest) {
        let off = async {
            let _ = guest.power_off().await;
            let _ = self.vmm.wait().await;
        };
        let _ = tokio::time::timeout(POWER_OFF, off).await;
    }

    /// Ends the program of the image where it is to end first, also where the machine ends before that. What the machine is told then:
    /// somebody may have left it less time meanwhile.
    async fn end_program(&mut self, guest: &Guest, mut stop: Stop, stopped: &mut Stopped) -> Stop {
        while let Stop::AfterProgram { signal, grace, .. } = stop {
            tokio::select! {
                biased;
                _ = self.vmm.wait() => break,
                sooner = next(stopped) => stop = sooner,
                ended = guest.stop_image(signal, grace) => {
                    if let Err(error) = ended {
                        tracing::warn!(machine = %self.id, %error, "a program ends with its machine");
                    }
                    break;
                }
            }
        }
        stop
    }

    /// A guest that hangs up has mostly ended: then its VMM tells why.
    async fn exit_or(&mut self, cause: Cause) -> Cause {
        match tokio::time::timeout(HANG_UP, self.vmm.wait()).await {
            Ok(exit) => Cause::Exited(exit),
            Err(_) => cause,
        }
    }

    /// Ends what is left of the machine, and says why it ended.
    pub async fn end(mut self, cause: Cause) -> (v1::MachineEnd, Remains) {
        calm_and_empty(&self.setup.schedulers, self.id, &self.cgroup).await;
        failpoints::reach(Failpoint::MachineEmptied);
        // Where it was killed with its cgroup this leaves no zombie.
        let exit = self.vmm.wait().await.ok().flatten();
        let Self { cgroup, folder, .. } = self;
        let end = end::of(cause, &self.runtime, &vmm::left(&folder, &cgroup, exit));
        (end, Remains { cgroup, folder })
    }
}

/// Begins to wait for a guest that dials.
fn connect(listener: io::Result<UnixListener>, runtime: &Arc<str>) -> AbortOnDropHandle<Result<Connected, GuestError>> {
    let runtime = runtime.clone();
    AbortOnDropHandle::new(tokio::spawn(async move {
        guest::connect(listener.map_err(GuestError::Listen)?, &runtime).await
    }))
}

// === impl Remains ===

impl Remains {
    /// Removes them, once the machine's end is recorded: that a folder has no cgroup any more says so.
    pub async fn remove(self) {
        let path = self.cgroup.path().to_owned();
        let removed = tokio::task::spawn_blocking(move || {
            let Self { cgroup, folder } = self;
            cgroup.destroy().map_err(io::Error::other)?;
            failpoints::reach(Failpoint::MachineCgroupRemoved);
            remove(&folder);
            Ok::<_, io::Error>(())
        });
        if let Err(error) = removed.await.map_err(io::Error::from).flatten() {
            tracing::error!(%error, path = %path.display(), "a machine's cgroup is left over");
        }
    }
}

// === impl Stopper ===

impl Stopper {
    /// A stopper and what hears it.
    #[must_use]
    pub fn new() -> (Self, Stopped) {
        let (sender, receiver) = watch::channel(None);
        (Self(Arc::new(sender)), receiver)
    }

    /// Ends the machine, unless that was said before and left it no more time.
    pub fn stop(&self, why: Stop) {
        self.0.send_if_modified(|stop| {
            let counts = stop.as_ref().is_none_or(|before| why.is_sooner_than(before));
            if counts {
                *stop = Some(why);
            }
            counts
        });
    }
}

// === impl Stop ===

impl Stop {
    /// A program has less time by this than by what was said before. Whatever else was said is done at once.
    fn is_sooner_than(&self, before: &Self) -> bool {
        match (before, self) {
            (Self::AfterProgram { .. }, Self::Now(_)) => true,
            (Self::AfterProgram { grace: before, .. }, Self::AfterProgram { grace, .. }) => grace < before,
            _ => false,
        }
    }
}

/// Waits until the machine is to end. A stopper that is gone never stops it.
async fn stop(stopped: &mut Stopped) -> Stop {
    told(stopped, |_| true).await
}

/// The same, where that fits.
async fn told(stopped: &mut Stopped, fits: impl Fn(&Stop) -> bool) -> Stop {
    let said = stopped
        .wait_for(|stop| stop.as_ref().is_some_and(&fits))
        .await
        .ok()
        .and_then(|stop| stop.clone());
    match said {
        Some(stop) => stop,
        None => std::future::pending().await,
    }
}

/// Waits until it is told something else than before.
async fn next(stopped: &mut Stopped) -> Stop {
    if stopped.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
    stop(stopped).await
}

/// Lets a machine be urgent no more, and [empties](empty) its cgroup.
async fn calm_and_empty(schedulers: &Schedulers, id: Ulid, cgroup: &Cgroup) {
    let leaves = schedulers.clone();
    let left = tokio::task::spawn_blocking(move || leaves.leave(id)).await;
    if let Err(error) = left.map_err(io::Error::from).flatten() {
        tracing::warn!(machine = %id, %error, "it may still be urgent");
    }
    empty(cgroup).await;
    if let Err(error) = schedulers.forget(id) {
        tracing::warn!(machine = %id, %error, "its place in the scheduler stays taken");
    }
}

/// Cuts a text of a guest to what is kept of it, and gives the rest of its memory back.
fn cut(text: &mut String) {
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL));
        text.shrink_to_fit();
    }
}

/// Ends what is in a cgroup; resolves when nothing runs in it, however long that takes, for until then it has its memory.
async fn empty(cgroup: &Cgroup) {
    end(cgroup, KILL_LIMIT, KILL_AGAIN).await;
}

/// The same, where that may take so long before it is killed again, after a pause.
async fn end(cgroup: &Cgroup, limit: Duration, pause: Duration) {
    // Killed, it takes CPU only to be gone, and gives its memory back when it is.
    let weighed = cgroup.write("cpu.weight", &MAX_WEIGHT.to_string());
    for error in [weighed, cpu::lift_limit(&ThreadCgroups::of(cgroup))]
        .into_iter()
        .filter_map(Result::err)
    {
        tracing::debug!(%error, "a machine may take longer to end");
    }
    loop {
        let again = cgroup.clone();
        let emptied = tokio::task::spawn_blocking(move || again.empty(limit)).await;
        match emptied.map_err(io::Error::from) {
            Ok(Ok(())) => return,
            Ok(Err(error @ CgroupError::StillThere { .. })) => {
                tracing::error!(%error, "a machine does not end; what it has stays counted");
            }
            Ok(Err(error)) => return tracing::error!(%error, "can't tell whether a machine has ended"),
            Err(error) => {
                let path = cgroup.path().display();
                return tracing::error!(%error, %path, "can't tell whether a machine has ended");
            }
        }
        tokio::time::sleep(pause).await;
    }
}

/// What to do where a VMM can't be started: its program can't be executed, or it can't enter its cgroup before that.
fn not_started_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => "; machines.vmm must name a program",
        // EOPNOTSUPP and EBUSY.
        io::ErrorKind::Unsupported | io::ErrorKind::ResourceBusy => {
            "; the kernel does not let it into its cgroup: restart stokerd, which sets machines.cgroup up again or says what is \
             wrong with it"
        }
        _ => "",
    }
}

/// The error of something that was done on a folder.
fn during(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> MachinesError {
    let path = path.to_owned();
    move |source| MachinesError::Folder {
        operation,
        path,
        source,
    }
}

fn remove(folder: &Folder) {
    if let Err(error) = folder.remove() {
        tracing::error!(%error, ?folder, "a machine's folder is left over");
    }
}
