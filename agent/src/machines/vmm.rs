//! One VMM process: its folder, its configuration, its start in its cgroup, and what it left when it ended.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use stoker_linux::Cgroup;
use stoker_vmm::config::{DriveConfig, MachineConfig, ScratchConfig, VsockConfig};
use stoker_vmm::exit_report::ExitReport;
use tokio::process::{Child, Command};

use super::end::{Left, OutOfMemory};
use super::{MachinesError, Setup, Spec, ThreadCgroups, record};
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

    pub(super) fn control(&self) -> PathBuf {
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

/// Starts the VMM of a machine in its part of the machine's cgroup, from which its vCPUs' threads move to theirs.
pub(super) fn spawn(
    setup: &Setup,
    spec: &Spec,
    cid: u32,
    folder: &Folder,
    cgroup: &ThreadCgroups,
) -> Result<Child, MachinesError> {
    let ceiling = setup.ceiling(spec);
    let config = MachineConfig {
        id: spec.id.to_string(),
        vcpus: spec.shape.vcpus,
        // Of what can't change the machine has no device.
        max_vcpus: (ceiling.vcpus > spec.shape.vcpus).then_some(ceiling.vcpus),
        memory_mib: spec.shape.memory_mib,
        max_memory_mib: (ceiling.memory_mib > spec.shape.memory_mib).then_some(ceiling.memory_mib),
        // Memory of functions' machines is promised whole, and warm calls would have to fault it in anew.
        balloon: spec.launched.is_some(),
        kernel: setup.kernel.clone(),
        initramfs: Some(setup.initramfs.clone()),
        cmdline: command_line(spec),
        drives: drives(setup, spec),
        scratch: (spec.shape.drive_mib > 0).then(|| ScratchConfig {
            folder: setup.scratch_dir.clone(),
            size_mib: spec.shape.drive_mib,
        }),
        vsock: Some(VsockConfig {
            cid,
            socket: folder.vsock(),
        }),
        control: Some(folder.control()),
        vcpus_cgroup: Some(cgroup.vcpus.path().to_owned()),
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
    let mut procs_file = cgroup.vmm.procs_file()?;
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
    if let Some(launched) = &spec.launched {
        let file = launched.file.clone();
        // SAFETY: the same; one fcntl(2), on a descriptor that is open as long as the closure is there.
        unsafe { command.pre_exec(move || Ok(rustix::io::fcntl_setfd(&*file, rustix::io::FdFlags::empty())?)) };
    }
    command.spawn().map_err(|source| MachinesError::Spawn {
        path: setup.vmm.clone(),
        source,
    })
}

/// What its guest's kernel is told. The image of a machine that was launched is the drive behind the one that guests boot from, and the
/// scratch drive comes last. Thresholds go by pressure, which some kernels count only where they are told to.
fn command_line(spec: &Spec) -> String {
    match (&spec.launched, spec.shape.drive_mib) {
        (None, _) => COMMAND_LINE.to_owned(),
        (Some(_), 0) => format!("{COMMAND_LINE} psi=1 stoker.image=/dev/vdb"),
        (Some(_), _) => format!("{COMMAND_LINE} psi=1 stoker.image=/dev/vdb stoker.scratch=/dev/vdc"),
    }
}

/// Its drives but for the scratch drive. An image is handed on open: it may have no name any more.
fn drives(setup: &Setup, spec: &Spec) -> Vec<DriveConfig> {
    let image = spec.launched.as_ref().map(|launched| {
        let fd = launched.file.as_raw_fd();
        format!("/proc/self/fd/{fd}").into()
    });
    let paths = [Some(setup.image.clone()), image];
    let drive = |path| DriveConfig { path, read_only: true };
    paths.into_iter().flatten().map(drive).collect()
}

/// What a VMM left that runs no more; its exit status, where that is known.
pub(super) fn left(folder: &Folder, cgroup: &Cgroup, exit: Option<ExitStatus>) -> Left {
    let report = ExitReport::find(&tail(&folder.exit_report(), 16 * TAIL)).map(|report| ExitReport {
        detail: clean(&report.detail),
        console_tail: clean(&report.console_tail),
        ..report
    });
    let console = match &report {
        Some(report) if !report.console_tail.is_empty() => report.console_tail.clone(),
        _ => clean(&tail(&folder.console(), TAIL)),
    };
    Left {
        report,
        exit,
        out_of_memory: out_of_memory(cgroup),
        log: clean(tail(&folder.log(), TAIL).trim()),
        console,
    }
}

/// Whether the kernel killed for memory in a cgroup: its own limit counts there as `oom`, and whoever killed as `oom_kill`
/// (`memory.events` in cgroup-v2.rst).
fn out_of_memory(cgroup: &Cgroup) -> Option<OutOfMemory> {
    let event = |key| cgroup.keyed_number("memory.events", key).unwrap_or(0);
    match (event("oom_kill"), event("oom")) {
        (0, _) => None,
        (_, 0) => Some(OutOfMemory::OfHost),
        _ => Some(OutOfMemory::OfCgroup(cgroup.number("memory.max"))),
    }
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
    fn what_is_left_is_found_and_clean() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::new(dir.path(), "m");
        folder.create().unwrap();
        let cgroup = dir.path().join("cgroup");
        fs::create_dir(&cgroup).unwrap();
        let nothing = left(&folder, &Cgroup::at(cgroup.clone()), None);
        assert!(nothing.report.is_none() && nothing.exit.is_none() && nothing.out_of_memory.is_none());
        assert_eq!((&*nothing.log, &*nothing.console), ("", ""));

        fs::write(folder.log(), "\x1b panicked\n").unwrap();
        fs::write(folder.console(), "the last\r\n").unwrap();
        let report = ExitReport {
            reason: stoker_vmm::exit_report::Reason::Error,
            detail: "why\x1b".into(),
            uptime_us: 1,
            console_tail: String::new(),
        };
        fs::write(folder.exit_report(), format!("{}\n", report.to_line())).unwrap();
        fs::write(cgroup.join("memory.max"), "4096\n").unwrap();
        for (events, expected) in [
            ("oom 0\noom_kill 0\n", None),
            ("oom 0\noom_kill 1\n", Some(OutOfMemory::OfHost)),
            ("oom 1\noom_kill 2\n", Some(OutOfMemory::OfCgroup(Some(4096)))),
        ] {
            fs::write(cgroup.join("memory.events"), events).unwrap();
            let all = left(&folder, &Cgroup::at(cgroup.clone()), None);
            assert_eq!(all.out_of_memory, expected);
            assert_eq!((&*all.log, &*all.console), ("\u{fffd} panicked", "the last\n"));
            assert_eq!(all.report.unwrap().detail, "why\u{fffd}");
        }
        folder.remove().unwrap();
        folder.remove().unwrap();
    }
}
