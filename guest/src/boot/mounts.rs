//! The file systems of the guest.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};
use stoker_linux::Cgroup;

use super::BootError;

const DRIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Limits of containers hang on these.
const REQUIRED_CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Mounts what the kernel offers: every program expects some of it.
pub(super) fn kernel_filesystems() -> Result<(), BootError> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    let device_flags = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    mount_new("proc", "/proc", flags, None)?;
    mount_new("sysfs", "/sys", flags, None)?;
    mount_new("devtmpfs", "/dev", device_flags, Some("mode=0755"))?;
    mount_new("devpts", "/dev/pts", device_flags, Some("mode=0620,ptmxmode=0666"))?;
    mount_new("tmpfs", "/dev/shm", flags, Some("mode=1777,size=1m"))?;
    mount_new(
        "tmpfs",
        "/run",
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some("mode=0755"),
    )?;
    mount_new("cgroup2", "/sys/fs/cgroup", flags, Some("nsdelegate"))?;
    // Telemetry tells where it misses these.
    for (kind, on) in [("tracefs", "/sys/kernel/tracing"), ("bpf", "/sys/fs/bpf")] {
        if let Err(error) = mount_new(kind, on, flags, None) {
            tracing::warn!("{error}");
        }
    }
    Ok(())
}

/// Lets nobody but PID 1 ask the kernel for what only an attacker wants. A kernel without one of them is no worse off.
pub(super) fn harden() {
    for (setting, value) in [
        ("kernel/dmesg_restrict", "1"),
        ("kernel/kptr_restrict", "2"),
        ("kernel/unprivileged_bpf_disabled", "1"),
        ("kernel/sysrq", "0"),
        ("user/max_user_namespaces", "0"),
        // A container that eats memory is killed by its own cgroup's limit: no machine-wide overcommit heuristics.
        ("vm/overcommit_memory", "1"),
        // The kernel derives these from the little memory there is, and containers share them: one at its limits must not
        // keep others, or this program, from starting a thread. Each container's cgroup bounds its own.
        ("kernel/threads-max", "1000000"),
        ("kernel/pid_max", "4194304"),
        ("fs/file-max", "10000000"),
    ] {
        let _ = std::fs::write(Path::new("/proc/sys").join(setting), value);
    }
}

/// Mounts `/` over itself, before anything else is mounted. The root that the kernel starts with (rootfs) has no parent
/// mount, and `pivot_root(2)`, by which containers leave, refuses such a one.
pub(super) fn root_that_can_be_pivoted() -> Result<(), BootError> {
    let none = None::<&str>;
    let over = Path::new("/root");
    make_directory(over)?;
    mount(Some("/"), over, none, MsFlags::MS_BIND, none)
        .and_then(|()| chdir(over))
        .and_then(|()| mount(Some("."), "/", none, MsFlags::MS_MOVE, none))
        .and_then(|()| chroot("."))
        .and_then(|()| chdir("/"))
        .map_err(BootError::Root)
}

/// Waits for a drive and mounts the image that is on it on the folder `on`.
pub(crate) fn mount_image(drive: &Path, on: &Path) -> Result<(), BootError> {
    let begin = Instant::now();
    while !drive.exists() {
        if begin.elapsed() > DRIVE_TIMEOUT {
            return Err(BootError::NoDrive {
                device: drive.display().to_string(),
                seconds: DRIVE_TIMEOUT.as_secs(),
            });
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    make_directory(on)?;
    mount(
        Some(drive),
        on,
        Some("erofs"),
        MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        None::<&str>,
    )
    .map_err(|source| BootError::Mount {
        what: drive.display().to_string(),
        on: on.to_owned(),
        source,
    })
}

/// Makes `parent`, a cgroup, and lets groups in it limit CPU, memory and number of processes, and I/O where the kernel
/// can.
pub(crate) fn delegate_controllers(parent: &Path) -> Result<(), BootError> {
    make_directory(parent)?;
    let above = parent.parent().unwrap_or(parent);
    for path in [above, parent] {
        let cgroup = Cgroup::at(path.to_owned());
        REQUIRED_CONTROLLERS.iter().try_for_each(|name| cgroup.enable(name))?;
        let _ = cgroup.enable("io");
    }
    Ok(())
}

fn mount_new(kind: &'static str, on: &str, flags: MsFlags, data: Option<&str>) -> Result<(), BootError> {
    let on = Path::new(on);
    make_directory(on)?;
    match mount(Some(kind), on, Some(kind), flags, data) {
        // The kernel mounts devtmpfs itself where it was built so.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(source) => Err(BootError::Mount {
            what: kind.to_owned(),
            on: on.to_owned(),
            source,
        }),
    }
}

fn make_directory(path: &Path) -> Result<(), BootError> {
    std::fs::create_dir_all(path).map_err(|source| BootError::Directory {
        path: path.to_owned(),
        source,
    })
}
