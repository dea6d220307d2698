//! What is known of a host. What could not be read is absent.

use std::collections::BTreeMap;
use std::path::PathBuf;

/// A host, as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The user that looked.
    pub user: u32,
    /// The kernel's release, as `6.12.95+deb12-amd64`.
    pub kernel: String,
    /// The flags of its CPUs, as `vmx`.
    pub cpu_flags: Vec<String>,
    /// Virtualisation.
    pub kvm: Kvm,
    /// Counting.
    pub ebpf: Ebpf,
    /// Scheduling by programs.
    pub sched_ext: SchedExt,
    /// Where cgroup v2 is mounted.
    pub cgroup_mount: Option<PathBuf>,
    /// The controllers that can be passed on to `machines.cgroup`.
    pub cgroup_controllers: Vec<String>,
    /// Whether it, or the first that is missing above it, can be made.
    pub cgroup_writable: bool,
    /// The most files that a process of this user may open.
    pub open_files: Option<u64>,
    /// The most processes and threads of the host: the least of the kernel's limits.
    pub threads: Option<u64>,
    /// The host's memory in bytes.
    pub memory: Option<u64>,
    /// The devices and files that memory is swapped to.
    pub swap: Vec<String>,
    /// Whether the kernel merges equal pages of several processes.
    pub page_merging: bool,
    /// Whether several threads share a core.
    pub smt: Option<bool>,
    /// What the kernel says of each flaw of the CPUs, by the flaw's name.
    pub flaws: BTreeMap<String, String>,
    /// Transparent huge pages: `always`, `madvise` or `never`.
    pub huge_pages: Option<String>,
    /// The folders that the agent writes to, by the configuration's key.
    pub folders: Vec<Folder>,
    /// What is wrong with the files that machines boot.
    pub boot_files: Result<(), String>,
    /// Whether the clock is kept right.
    pub clock_synchronised: Option<bool>,
    /// Whether an agent runs.
    pub agent: Agent,
    /// What is wrong with the database; `None` where it was not looked at, since there is none or an agent has it open.
    pub database: Option<Result<(), String>>,
}

/// What became of a small machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kvm {
    /// It ran as fast as the hardware.
    Runs,
    /// There is no `/dev/kvm`.
    Missing,
    /// This user may not open it.
    Denied,
    /// It did not run, or too slowly; says why.
    Unfit(String),
}

/// What became of the programs that count.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ebpf {
    /// They were loaded.
    Loads,
    /// They were not tried, since an agent has loaded them.
    InUse,
    /// They were not tried, since this user may not.
    NotRoot,
    /// They were refused; says why.
    Refused(String),
}

/// What the kernel has of `sched_ext`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SchedExt {
    /// Nothing.
    Absent,
    /// It has it, and no scheduler is loaded.
    Idle,
    /// This scheduler runs.
    Runs(String),
}

/// A folder of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// The key of the configuration, as `store.path`.
    pub key: &'static str,
    /// Where it is.
    pub path: PathBuf,
    /// What is there.
    pub state: FolderState,
    /// How many bytes may be written there.
    pub free: Option<u64>,
}

/// The key of the folder of the machines' scratch disks.
pub(super) const SCRATCH_DIR: &str = "machines.scratch_dir";

/// What is at the path of a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FolderState {
    /// Nothing; the agent makes it.
    Missing,
    /// It can't be looked at.
    Unreadable(String),
    /// Something that is no folder.
    NotAFolder,
    /// A folder.
    There {
        /// Whose it is.
        owner: u32,
        /// Its permissions.
        mode: u32,
    },
}

/// What listens on the agent's socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Agent {
    /// An agent.
    Runs,
    /// Nobody.
    Stopped,
    /// It is not known; says why.
    Unknown(String),
}
