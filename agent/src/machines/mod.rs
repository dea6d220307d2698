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
mod process;
mod record;
mod remains;
mod setup;
mod size;
mod stop;
#[cfg(test)]
mod tests;
mod vmm;
mod vmm_process;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use stoker_credits::Terms;
use stoker_ebpf::Ledger;
use stoker_linux::{Cgroup, CgroupError};
use stoker_policy::Shape;
use ulid::Ulid;

pub use ceiling::Ceiling;
pub use cgroup::{NoCgroup, ThreadCgroups};
pub use claim::Claim;
pub use cpu::{Cpu, CpuError, NoSchedExt};
pub use drive::{DriveError, ScratchDrive};
pub use guest::{Guest, GuestError};
pub use launched::{FromImage, LaunchRecord, LaunchRequest, Program, RESIZES, ResizeRecord, StopRecord};
pub(crate) use parts::{Incoming, Parts};
pub use process::{Cause, Process, Ready};
pub use record::{ContainerRecord, Record, RecordFile};
pub use remains::Remains;
#[cfg(test)]
pub(crate) use size::tests::Played;
pub use size::{Amounts, ResizeError, Resizer, Size, Taken, Taking};
pub use stop::{Stop, Stopped, Stopper};

use self::ceiling::Ceilings;
use self::cpu::Schedulers;
use self::process::Machine;
use self::remains::{calm_and_empty, empty, remove};
use self::setup::{Setup, host_size};
use self::vmm::Folder;
use self::vmm_process::VmmProcess;
use crate::config;
use crate::failpoints::{self, Failpoint};
use crate::lock::LockError;
use crate::owner::Owner;

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
        let process = |machine| Process::found(setup.clone(), machine);
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
                let machine = Machine {
                    id: spec.id,
                    folder,
                    cgroup,
                    record,
                    vmm: VmmProcess::Child(child),
                };
                Ok(Process::new(setup, machine, Ok(listener), spec.shape.drive_mib))
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

/// Cuts a text of a guest to what is kept of it, and gives the rest of its memory back.
fn cut(text: &mut String) {
    if text.len() > MAX_DETAIL {
        text.truncate(text.floor_char_boundary(MAX_DETAIL));
        text.shrink_to_fit();
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
