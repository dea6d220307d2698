//! Reads what is known of a host.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use nix::sys::resource::{Resource, getrlimit};
use nix::unistd::{AccessFlags, access};
use stoker_ebpf::{Ledger, Limits};
use stoker_linux::Cgroup;
use stoker_linux::kvm::{self, KvmError};

use super::facts::{Agent, Ebpf, Facts, Folder, FolderState, Kvm, SCRATCH_DIR, SchedExt};
use crate::capacity::free_disk;
use crate::config::Config;
use crate::{boot_files, error_chain, store};

// === impl Facts ===

impl Facts {
    /// Looks at this host, as an agent with this configuration would use it. Blocks.
    #[must_use]
    pub fn read(config: &Config) -> Self {
        let root = Path::new("/");
        let user = nix::unistd::geteuid().as_raw();
        let agent = agent(&config.api.socket);
        let mount = Cgroup::mount().ok();
        let way = mount.as_deref().map(|mount| way(mount, &config.machines.cgroup));
        let way = way.unwrap_or_default();
        Self {
            user,
            kernel: word(root, "proc/sys/kernel/osrelease").unwrap_or_default(),
            cpu_flags: cpu_flags(root),
            kvm: kvm(),
            ebpf: ebpf(user, &agent),
            sched_ext: sched_ext(root),
            cgroup_controllers: controllers(&way),
            cgroup_writable: way.last().is_some_and(|cgroup| writable(cgroup)),
            cgroup_mount: mount,
            open_files: getrlimit(Resource::RLIMIT_NOFILE).ok().map(|(_, most)| most),
            threads: threads(root),
            memory: stoker_linux::memory::total().ok(),
            swap: swap(root),
            page_merging: word(root, "sys/kernel/mm/ksm/run").is_some_and(|run| run == "1"),
            smt: word(root, "sys/devices/system/cpu/smt/active").map(|active| active == "1"),
            flaws: flaws(root),
            huge_pages: huge_pages(root),
            folders: folders(config),
            boot_files: boot_files::check(&config.machines)
                .map(|_| ())
                .map_err(|error| error.to_string()),
            clock_synchronised: clock_synchronised(),
            database: database(config, &agent),
            agent,
        }
    }
}

/// A small file of the kernel, without the space around it.
fn word(root: &Path, file: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(file)).ok()?;
    Some(text.trim().to_owned())
}

fn cpu_flags(root: &Path) -> Vec<String> {
    let text = word(root, "proc/cpuinfo").unwrap_or_default();
    let flags = text
        .lines()
        .find_map(|line| line.strip_prefix("flags")?.split_once(':'));
    let (_, flags) = flags.unwrap_or_default();
    flags.split_whitespace().map(str::to_owned).collect()
}

fn kvm() -> Kvm {
    match kvm::probe() {
        Ok(()) => Kvm::Runs,
        Err(KvmError::Open(error)) if error.kind() == io::ErrorKind::NotFound => Kvm::Missing,
        Err(KvmError::Open(error)) if error.kind() == io::ErrorKind::PermissionDenied => Kvm::Denied,
        Err(error) => Kvm::Unfit(error.to_string()),
    }
}

/// Loads the programs as the agent does, but pins none: they count nothing and are gone at once.
fn ebpf(user: u32, agent: &Agent) -> Ebpf {
    match agent {
        Agent::Runs => Ebpf::InUse,
        _ if user != 0 => Ebpf::NotRoot,
        _ => match Ledger::load(Limits::HOST) {
            Ok(_) => Ebpf::Loads,
            Err(error) => Ebpf::Refused(error_chain::whole(&error)),
        },
    }
}

fn sched_ext(root: &Path) -> SchedExt {
    let state = word(root, "sys/kernel/sched_ext/state");
    match state.as_deref() {
        None => SchedExt::Absent,
        Some("disabled") => SchedExt::Idle,
        Some(_) => SchedExt::Runs(word(root, "sys/kernel/sched_ext/root/ops").unwrap_or_default()),
    }
}

/// The cgroups that are there from the mount down to one below it.
fn way(mount: &Path, below: &Path) -> Vec<PathBuf> {
    let mut way = vec![mount.to_owned()];
    for part in below.components() {
        match way.last().map(|last| last.join(part)) {
            Some(next) if next.is_dir() => way.push(next),
            _ => break,
        }
    }
    way
}

/// What the agent can pass on to the cgroups below: the controllers of the highest in which it may do so.
fn controllers(way: &[PathBuf]) -> Vec<String> {
    let highest = way
        .iter()
        .find(|cgroup| writable(&cgroup.join("cgroup.subtree_control")));
    let controllers = highest
        .or(way.last())
        .map(|cgroup| Cgroup::at(cgroup.clone()).controllers());
    controllers.and_then(Result::ok).unwrap_or_default()
}

fn writable(path: &Path) -> bool {
    access(path, AccessFlags::W_OK).is_ok()
}

fn threads(root: &Path) -> Option<u64> {
    let limits = ["pid_max", "threads-max"].map(|name| word(root, &format!("proc/sys/kernel/{name}"))?.parse().ok());
    limits.into_iter().flatten().min()
}

fn swap(root: &Path) -> Vec<String> {
    let text = word(root, "proc/swaps").unwrap_or_default();
    let devices = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    devices.map(str::to_owned).collect()
}

fn flaws(root: &Path) -> std::collections::BTreeMap<String, String> {
    let folder = "sys/devices/system/cpu/vulnerabilities";
    let entries = fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter_map(|name| word(root, &format!("{folder}/{name}")).map(|says| (name, says)))
        .collect()
}

/// The file has all values, and the one that is set in brackets.
fn huge_pages(root: &Path) -> Option<String> {
    let text = word(root, "sys/kernel/mm/transparent_hugepage/enabled")?;
    let (_, set) = text.split_once('[')?;
    Some(set.split_once(']')?.0.to_owned())
}

fn folders(config: &Config) -> Vec<Folder> {
    let folder = |key, path: &Path| Folder {
        key,
        path: path.to_owned(),
        state: folder_state(path),
        free: free_disk(path).ok(),
    };
    vec![
        folder("store.path", &config.store.path),
        folder("code.path", &config.code.path),
        folder("machines.run_dir", &config.machines.run_dir),
        folder(SCRATCH_DIR, &config.machines.scratch_dir),
    ]
}

fn folder_state(path: &Path) -> FolderState {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => FolderState::Missing,
        Err(error) => FolderState::Unreadable(error.to_string()),
        Ok(found) if !found.is_dir() => FolderState::NotAFolder,
        Ok(found) => FolderState::There {
            owner: found.uid(),
            mode: found.permissions().mode() & 0o7777,
        },
    }
}

/// As the kernel says of it (adjtimex(2)): whether anything keeps it right.
fn clock_synchronised() -> Option<bool> {
    // SAFETY: all zeros are a valid `timex`: it is made of numbers, and no mode means that nothing is set.
    let mut clock: nix::libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a `timex` of this function.
    let state = unsafe { nix::libc::adjtimex(&raw mut clock) };
    (state >= 0).then_some(state != nix::libc::TIME_ERROR && clock.status & nix::libc::STA_UNSYNC == 0)
}

fn agent(socket: &Path) -> Agent {
    match UnixStream::connect(socket) {
        Ok(_) => Agent::Runs,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            Agent::Stopped
        }
        Err(error) => Agent::Unknown(format!("{}: {error}", socket.display())),
    }
}

fn database(config: &Config, agent: &Agent) -> Option<Result<(), String>> {
    if *agent != Agent::Stopped || !store::file(&config.store.path).exists() {
        return None;
    }
    Some(match store::check(&config.store.path, &config.store.key()) {
        Ok((problems, _)) if problems.is_empty() => Ok(()),
        Ok((problems, _)) => Err(problems.join("; ")),
        Err(error) => Err(error.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (file, text) in files {
            let path = root.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn the_kernels_files_are_understood() {
        let host = host(&[
            (
                "proc/cpuinfo",
                "processor\t: 0\nflags\t\t: fpu vmx hypervisor\nbugs\t: x\n",
            ),
            (
                "proc/swaps",
                "Filename\tType\tSize\tUsed\tPriority\n/dev/sda2 partition 1000 0 -2\n",
            ),
            ("proc/sys/kernel/pid_max", "4194304\n"),
            ("proc/sys/kernel/threads-max", "31000\n"),
            (
                "sys/devices/system/cpu/vulnerabilities/mds",
                "Vulnerable: no microcode\n",
            ),
            ("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n"),
        ]);
        let root = host.path();
        assert_eq!(cpu_flags(root), ["fpu", "vmx", "hypervisor"]);
        assert_eq!(swap(root), ["/dev/sda2"]);
        assert_eq!(threads(root), Some(31_000));
        assert_eq!(flaws(root)["mds"], "Vulnerable: no microcode");
        assert_eq!(huge_pages(root).as_deref(), Some("madvise"));
    }

    #[test]
    fn controllers_are_those_that_can_be_passed_down() {
        let host = host(&[
            ("cgroup.controllers", "cpu io memory\n"),
            ("cgroup.subtree_control", ""),
            ("a/cgroup.controllers", "cpu\n"),
        ]);
        let root = host.path();
        let found = way(root, Path::new("a/b"));
        assert_eq!(found, [root.to_owned(), root.join("a")]);
        assert_eq!(controllers(&found), ["cpu", "io", "memory"]);
        fs::remove_file(root.join("cgroup.subtree_control")).unwrap();
        assert_eq!(controllers(&found), ["cpu"]);
        assert!(controllers(&[]).is_empty());
    }

    #[test]
    fn what_is_not_there_is_absent() {
        let host = host(&[]);
        let root = host.path();
        assert!(cpu_flags(root).is_empty() && swap(root).is_empty() && flaws(root).is_empty());
        assert_eq!((threads(root), huge_pages(root)), (None, None));
        let missing = root.join("a/b");
        assert_eq!(folder_state(&missing), FolderState::Missing);
        assert_eq!(free_disk(&missing).is_ok(), free_disk(root).is_ok());
        assert_eq!(agent(&missing), Agent::Stopped);
        assert_eq!(way(root, Path::new("stoker/machines")), [root]);
    }

    #[test]
    fn this_host_is_read_and_left_as_it_is() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::default();
        config.store.path = dir.path().join("state");
        config.code.path = dir.path().join("code");
        config.api.socket = dir.path().join("stokerd.sock");
        let facts = Facts::read(&config);
        assert!(!facts.kernel.is_empty());
        assert_eq!((facts.agent, facts.database), (Agent::Stopped, None));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
