//! One VMM process: its folder, its configuration, its start in its cgroup, and what it left when it ended.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use nix::sys::signal::Signal;
use stoker_linux::Cgroup;
use stoker_proto::v1;
use stoker_proto::v1::machine_end::Reason;
use stoker_vmm::config::{DriveConfig, MachineConfig, VsockConfig};
use stoker_vmm::exit_report::{self, ExitReport};
use tokio::process::{Child, Command};

use super::{MachinesError, Setup, Spec, record};
use crate::failpoints::{self, Failpoint};

/// How much of a console or log is kept of a machine that ended, in bytes.
const TAIL: u64 = 4096;

/// What every guest's kernel is told; Linux's kernel-parameters.txt explains the words. `panic=-1 reboot=t`: a guest that
/// panics resets at once, which the VMM sees.
///
/// The rest leaves out what costs a tenth of a boot and serves nobody. `noreplace-smp`: a kernel that finds one CPU else
/// takes the lock prefixes out of its code one by one, and would put them back where a second is plugged in.
/// `pci=noearly`: looking for quirks of PCI devices, where there is only a host bridge. `initcall_blacklist`: writing the
/// names of constants into the texts that describe trace events to people, making hundreds of files of the slab caches
/// and the built-in modules' parameters in sysfs, and probing for performance counters, which no guest has.
const COMMAND_LINE: &str = include_str!("../../../guest/kernel/command-line").trim_ascii();

/// Signals that a program gets for what it does itself.
const OWN_FAULTS: [Signal; 7] = [
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGSEGV,
    Signal::SIGSYS,
    Signal::SIGTRAP,
];

/// The folder of one machine and the names of what is in it.
#[derive(Clone, Debug)]
pub(super) struct Folder(PathBuf);

// === impl Folder ===

impl Folder {
    pub(super) fn new(run_dir: &Path, id: &str) -> Self {
        Self(run_dir.join(id))
    }

    /// Only the agent's user enters it: the sockets in it give power over the machine.
    pub(super) fn create(&self) -> io::Result<()> {
        fs::DirBuilder::new().mode(0o700).create(&self.0)
    }

    /// Removes it. What says whose it is goes last.
    pub(super) fn remove(&self) -> io::Result<()> {
        let remove = || {
            for entry in fs::read_dir(&self.0)?.flatten() {
                if entry.file_name() != record::FILE {
                    // What can't be removed is told below.
                    let _ = fs::remove_file(entry.path());
                    failpoints::reach(Failpoint::MachineFileRemoved);
                }
            }
            fs::remove_dir_all(&self.0)
        };
        match remove() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    pub(super) fn vsock(&self) -> PathBuf {
        self.0.join("vsock.sock")
    }

    fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    fn config(&self) -> PathBuf {
        self.0.join("config.json")
    }

    fn console(&self) -> PathBuf {
        self.0.join("console.log")
    }

    /// Standard output and error go to files and not to pipes, so that the VMM outlives its agent.
    fn exit_report(&self) -> PathBuf {
        self.0.join("exit_report")
    }

    fn log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }
}

/// Starts the VMM of a machine in its cgroup.
pub(super) fn spawn(
    setup: &Setup,
    spec: &Spec,
    cid: u32,
    folder: &Folder,
    cgroup: &Cgroup,
) -> Result<Child, MachinesError> {
    let config = MachineConfig {
        id: spec.id.to_string(),
        vcpus: spec.shape.vcpus,
        memory_mib: spec.shape.memory_mib,
        kernel: setup.kernel.clone(),
        initramfs: Some(setup.initramfs.clone()),
        cmdline: COMMAND_LINE.to_owned(),
        drives: vec![DriveConfig {
            path: setup.image.clone(),
            read_only: true,
        }],
        vsock: Some(VsockConfig {
            cid,
            socket: folder.vsock(),
        }),
        control: Some(folder.control()),
        console: Some(folder.console()),
    };
    let write = |source| MachinesError::Folder {
        operation: "write",
        path: folder.0.clone(),
        source,
    };
    let text = serde_json::to_vec_pretty(&config).map_err(|error| write(error.into()))?;
    fs::write(folder.config(), text).map_err(write)?;
    let create = |path: PathBuf| {
        File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(write)
    };
    let mut procs_file = cgroup.procs_file()?;
    let mut command = Command::new(&setup.vmm);
    command
        .arg("--config")
        .arg(folder.config())
        .env_clear()
        .current_dir(&folder.0)
        .stdin(Stdio::null())
        .stdout(create(folder.exit_report())?)
        .stderr(create(folder.log())?)
        // What a terminal sends to the agent's group is not meant for machines.
        .process_group(0)
        .kill_on_drop(false);
    // SAFETY: between fork and exec the closure makes one write(2) to a file opened before; it allocates nothing and takes
    // no lock.
    unsafe { command.pre_exec(move || procs_file.write_all(b"0")) };
    command.spawn().map_err(|source| MachinesError::Spawn {
        path: setup.vmm.clone(),
        source,
    })
}

/// Why a VMM that nobody asked to end did, from its exit, where that is known, and what it left in its folder.
pub(super) fn machine_end(folder: &Folder, cgroup: &Cgroup, exit: Option<ExitStatus>) -> v1::MachineEnd {
    let report = ExitReport::find(&tail(&folder.exit_report(), 16 * TAIL));
    let console_tail = match &report {
        Some(report) if !report.console_tail.is_empty() => clean(&report.console_tail),
        _ => console_tail(folder),
    };
    let out_of_memory = || {
        let kills = cgroup.keyed_number("memory.events", "oom_kill");
        kills.is_some_and(|kills| kills > 0)
    };
    let (reason, detail) = match (report, exit.and_then(|exit| exit.signal())) {
        (Some(report), _) => {
            let reason = match report.reason {
                exit_report::Reason::GuestOff | exit_report::Reason::GuestReset => Reason::GuestOff,
                exit_report::Reason::GuestPanic => Reason::GuestPanic,
                exit_report::Reason::Stopped | exit_report::Reason::Killed => Reason::Killed,
                exit_report::Reason::Error => Reason::VmmError,
            };
            (reason, report.detail)
        }
        (None, Some(signal)) => {
            let signal = Signal::try_from(signal).map_err(|_| signal);
            let name = match signal {
                Ok(signal) => format!("{} ({signal})", signal as i32),
                Err(number) => number.to_string(),
            };
            if signal.is_ok_and(|signal| OWN_FAULTS.contains(&signal)) {
                let detail = format!(
                    "the VMM died of a fault of its own, signal {name}: {}",
                    last_said(folder)
                );
                (Reason::VmmError, detail)
            } else {
                let mut detail = format!("the VMM was killed by signal {name}");
                if out_of_memory() {
                    detail.push_str(": its cgroup was out of memory");
                }
                (Reason::Killed, detail)
            }
        }
        (None, None) if exit.is_none() && out_of_memory() => (
            Reason::Killed,
            "the VMM was killed: its cgroup was out of memory".to_owned(),
        ),
        (None, None) => {
            let log = last_said(folder);
            let how = exit.map_or_else(|| "without an agent".to_owned(), |exit| format!("with {exit}"));
            (
                Reason::VmmError,
                format!("the VMM ended {how} and no exit report: {log}"),
            )
        }
    };
    v1::MachineEnd {
        reason: reason.into(),
        detail: clean(&detail),
        console_tail,
    }
}

/// The last of what a VMM wrote to its standard error.
fn last_said(folder: &Folder) -> String {
    let log = tail(&folder.log(), TAIL);
    match log.trim() {
        "" => "it said nothing".to_owned(),
        log => clean(log),
    }
}

/// The last lines of a machine's serial console.
pub(super) fn console_tail(folder: &Folder) -> String {
    clean(&tail(&folder.console(), TAIL))
}

/// The last bytes of a file as text; nothing where it can't be read.
fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(bytes)))?;
        let mut text = Vec::new();
        file.take(bytes).read_to_end(&mut text)?;
        Ok(text)
    };
    String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
}

/// Takes out what a guest could do to a terminal with.
fn clean(text: &str) -> String {
    text.chars()
        .filter(|c| *c != '\r')
        .map(|c| {
            if c.is_control() && c != '\n' && c != '\t' {
                char::REPLACEMENT_CHARACTER
            } else {
                c
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tail_is_bounded_and_clean() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        fs::write(&path, [b"x".repeat(10_000), b"\x1b[2Jend\r\n".to_vec()].concat()).unwrap();
        let text = clean(&tail(&path, TAIL));
        assert!(text.len() < 4200 && text.ends_with("\u{fffd}[2Jend\n"), "{text:?}");
        assert_eq!(tail(&dir.path().join("none"), TAIL), "");
    }

    #[test]
    fn every_end_has_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), "m");
        folder.create().unwrap();
        let cgroup = Cgroup::at(dir.path().join("cgroup"));
        let end = |raw: i32| machine_end(&folder, &cgroup, Some(ExitStatus::from_raw(raw)));
        let killed = end(9);
        assert_eq!(killed.reason(), Reason::Killed);
        assert!(killed.detail.contains("SIGKILL"), "{}", killed.detail);
        fs::write(folder.log(), "thread 'main' panicked").unwrap();
        let faulty = end(11);
        assert_eq!(faulty.reason(), Reason::VmmError);
        for word in ["fault of its own", "SIGSEGV", "panicked"] {
            assert!(faulty.detail.contains(word), "{word}: {}", faulty.detail);
        }
        let unknown = end(64);
        assert_eq!(unknown.detail, "the VMM was killed by signal 64");
        let failed = end(101 << 8);
        assert_eq!(failed.reason(), Reason::VmmError);
        assert!(failed.detail.contains("panicked"), "{}", failed.detail);
        let unseen = machine_end(&folder, &cgroup, None);
        assert_eq!(unseen.reason(), Reason::VmmError);
        assert!(unseen.detail.contains("ended without an agent"), "{}", unseen.detail);
        for (said, reason) in [
            (exit_report::Reason::GuestPanic, Reason::GuestPanic),
            (exit_report::Reason::GuestReset, Reason::GuestOff),
            (exit_report::Reason::Killed, Reason::Killed),
            (exit_report::Reason::Error, Reason::VmmError),
        ] {
            let report = ExitReport {
                reason: said,
                detail: "why".into(),
                uptime_us: 1,
                console_tail: "last".into(),
            };
            fs::write(folder.exit_report(), format!("{}\n", report.to_line())).unwrap();
            let end = end(i32::from(said.exit_code()) << 8);
            assert_eq!(
                (end.reason(), &*end.detail, &*end.console_tail),
                (reason, "why", "last")
            );
        }
        folder.remove().unwrap();
        folder.remove().unwrap();
    }
}
