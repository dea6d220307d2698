//! A machine's process, and the straight line of its life.

use std::io;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_linux::Cgroup;
use stoker_proto::guest::HelloResponse;
use stoker_proto::v1;
use tokio::net::UnixListener;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use ulid::Ulid;

use super::guest::Connected;
use super::remains::calm_and_empty;
use super::setup::Setup;
use super::vmm::Folder;
use super::vmm_process::VmmProcess;
use super::{
    Cpu, Guest, GuestError, Record, RecordFile, Remains, Resizer, ScratchDrive, Stop, Stopped, ThreadCgroups, end,
    guest, vmm,
};
use crate::failpoints::{self, Failpoint};

/// How long a machine may take to power itself off before it is killed.
const POWER_OFF: Duration = Duration::from_secs(3);

/// How long a VMM may take to end by itself once its guest has hung up.
const HANG_UP: Duration = Duration::from_secs(3);

/// How long a guest that has answered an agent before may take to dial the next one.
const DIAL_AGAIN: Duration = Duration::from_secs(15);

/// A machine of this agent on this host, whose VMM may have ended.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) id: Ulid,
    pub(super) folder: Folder,
    pub(super) cgroup: Cgroup,
    pub(super) record: RecordFile,
    pub(super) vmm: VmmProcess,
}

/// A machine's process, from its start until it is cleared away.
#[derive(Debug)]
pub struct Process {
    id: Ulid,
    setup: Arc<Setup>,
    pub(super) folder: Folder,
    pub(super) cgroup: Cgroup,
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

// === impl Process ===

impl Process {
    /// One whose guest is to dial there. Its scratch drive is to have so many MiB; what it has where that is 0.
    pub(super) fn new(setup: Arc<Setup>, machine: Machine, listener: io::Result<UnixListener>, drive_mib: u32) -> Self {
        let Machine {
            id,
            folder,
            cgroup,
            record,
            vmm,
        } = machine;
        let runtime = record.get().runtime;
        let (cpu, resizer) = setup.sized(id, &folder, &cgroup, vmm.pid(), &record);
        Self {
            id,
            setup,
            cpu,
            resizer,
            connecting: Some(connect(listener, &runtime)),
            drive: ScratchDrive::of_vmm(folder.control(), drive_mib),
            folder,
            cgroup,
            vmm,
            runtime,
            record,
            started: Instant::now(),
        }
    }

    /// One that an earlier agent left.
    pub(super) fn found(setup: Arc<Setup>, machine: Machine) -> Self {
        // One that an earlier version made has none.
        if let Err(error) = ThreadCgroups::create(&machine.cgroup, setup.controllers) {
            tracing::error!(machine = %machine.id, %error, "what its guest uses of the host's CPUs can't be limited");
        }
        // At once: the guest dials while the agent still starts.
        let listener = guest::listen(&machine.folder.vsock());
        // It may have ended between writing down that its drive is made larger and having it done.
        Self::new(setup, machine, listener, 0)
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
            stop = stopped.told(at_once) => Err(Cause::Stopped(stop)),
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
            stop = stopped.stop() => {
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
                sooner = stopped.next() => stop = sooner,
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
