//! The launcher's side of a launch: a process with one thread, `stoker-init launch`, whose standard input is the socket to
//! init.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::syscall::syscall::SyscallType;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use seccompiler::BpfProgram;

use super::etc;
use super::executor::Filtered;
use super::wire::{self, WireError};
use super::{Command, Contents, Order, Report};
use crate::boot::precedence;
use crate::container::environment::RUNTIME_API;
use crate::container::seccomp::{self, Of};
use crate::container::spec::OPT;

/// Memory that one file or folder costs the kernel is not counted in a tmpfs's size, so their number is bounded: one for
/// each 4 KiB of size.
const BYTES_A_FILE: u64 = 4096;

/// What waits in sockets is memory of the kernel's, outside the container's limit: in its network namespace there are
/// few and small ones. Bytes: least, default, most; connections not yet accepted.
const NETWORK_SETTINGS: [(&str, &str); 3] = [
    ("ipv4/tcp_rmem", "4096 65536 262144"),
    ("ipv4/tcp_wmem", "4096 65536 262144"),
    ("core/somaxconn", "16"),
];

/// An image has the machine to itself, and is a server: what Linux has by default, and ports below 1024 for every user, as in
/// Docker's containers.
const NETWORK_SETTINGS_OF_IMAGES: [(&str, &str); 4] = [
    ("ipv4/tcp_rmem", "4096 131072 6291456"),
    ("ipv4/tcp_wmem", "4096 16384 4194304"),
    ("core/somaxconn", "4096"),
    ("ipv4/ip_unprivileged_port_start", "0"),
];

/// Makes one container and ends. Its exit status means nothing: init is told by message.
pub(crate) fn run() {
    precedence::ordinary();
    let socket = std::io::stdin();
    let made = prepare().and_then(|(listener, filter)| {
        wire::send(&socket, &Report::Ready, Some(listener.as_fd()))?;
        drop(listener);
        make(socket.as_fd(), filter)
    });
    match made {
        // What more there is to tell, the container's PID 1 tells.
        Ok(()) => {}
        // Init wants no container of this one, or is gone.
        Err(error) if matches!(error.downcast_ref(), Some(WireError::Closed)) => {}
        Err(error) => {
            let _ = wire::send(&socket, &Report::Failed(format!("{error:#}")), None);
        }
    }
}

/// All that does not depend on which container it will be.
fn prepare() -> anyhow::Result<(TcpListener, BpfProgram)> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")?;
    set_network(&NETWORK_SETTINGS)?;
    bring_loopback_up().context("cannot bring the loopback interface up")?;
    let listener =
        TcpListener::bind(RUNTIME_API).with_context(|| format!("cannot listen on {RUNTIME_API} in the container"))?;
    Ok((listener, filter(Of::Function)?))
}

fn filter(of: Of) -> anyhow::Result<BpfProgram> {
    seccomp::filter(of).context("cannot compile the system call filter")
}

/// Of the network namespace of this process.
fn set_network(settings: &[(&str, &str)]) -> anyhow::Result<()> {
    for (setting, value) in settings {
        let path = Path::new("/proc/sys/net").join(setting);
        std::fs::write(&path, value).with_context(|| format!("cannot set {}", path.display()))?;
    }
    Ok(())
}

fn make(socket: std::os::fd::BorrowedFd<'_>, of_function: BpfProgram) -> anyhow::Result<()> {
    let (Command::Order(order), Some(log)) = wire::receive(socket)? else {
        anyhow::bail!("init gave no order");
    };
    let bundle = mount_all(&order)?;
    let control = socket.try_clone_to_owned().context("cannot duplicate a socket")?;
    let executor = match &order.contents {
        Contents::Function { .. } => Filtered::new(of_function, control, None),
        Contents::Image(image) => {
            set_network(&NETWORK_SETTINGS_OF_IMAGES)?;
            Filtered::new(filter(Of::Image)?, control, Some(image.clone()))
        }
    };
    let mut container = build(&order, &bundle, log, executor)?;
    let pid = container.pid().context("libcontainer made no process")?;
    wire::send(socket, &Report::Created(pid.as_raw()), None)?;
    let (Command::Start, _) = wire::receive(socket)? else {
        anyhow::bail!("init did not say to start");
    };
    container.start().context("cannot start the container")
}

/// Mounts the overlay and the file system in memory, in a namespace that ends with the container. Returns the OCI bundle.
fn mount_all(order: &Order) -> anyhow::Result<PathBuf> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make the mount namespace private")?;
    let tmpfs = &order.tmpfs;
    let files = order.tmpfs_bytes / BYTES_A_FILE;
    let size = format!("mode=0755,size={},nr_inodes={files}", order.tmpfs_bytes);
    mount(
        Some("tmpfs"),
        tmpfs,
        Some("tmpfs"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(size.as_str()),
    )
    .context("cannot mount the container's file system in memory")?;
    for (folder, mode) in [("shm", 0o1777), ("state", 0o700), ("bundle", 0o700)] {
        directory(&tmpfs.join(folder), mode)?;
    }
    match &order.contents {
        Contents::Function { uid, image, layers } => {
            let upper = writable(tmpfs)?;
            directory(&tmpfs.join("tmp"), 0o1777)?;
            etc::write(image, &upper, &order.id, *uid)?;
            mount_root(&order.root, image, tmpfs, MsFlags::MS_NOSUID | MsFlags::MS_NODEV)?;
            if !layers.is_empty() {
                mount_layers(tmpfs, image, layers)?;
            }
        }
        Contents::Image(image) => {
            let layer = image.layer.as_deref().unwrap_or(tmpfs);
            let upper = writable(layer)?;
            be_like(&upper, &image.lower)?;
            etc::write_for_image(&image.lower, &upper, &image.hostname)?;
            // Its programs with set-user-ID have their effect.
            mount_root(&order.root, &image.lower, layer, MsFlags::MS_NODEV)?;
        }
    }
    let bundle = tmpfs.join("bundle");
    std::fs::write(bundle.join("config.json"), order.spec.to_string())
        .context("cannot write the container's specification")?;
    Ok(bundle)
}

/// Makes what an overlay writes to, in a folder. Returns where that is.
fn writable(folder: &Path) -> anyhow::Result<PathBuf> {
    let upper = folder.join("upper");
    directory(&upper, 0o755)?;
    directory(&folder.join("work"), 0o755)?;
    Ok(upper)
}

/// Gives a folder the mode and owner of another: what is written is laid over it, and counts for the root itself.
fn be_like(folder: &Path, other: &Path) -> anyhow::Result<()> {
    let found = other.metadata();
    let found = found.with_context(|| format!("cannot look at {}", other.display()))?;
    let mode = std::fs::Permissions::from_mode(found.mode() & 0o7777);
    chown(folder, Some(found.uid()), Some(found.gid()))
        .and_then(|()| std::fs::set_permissions(folder, mode))
        .with_context(|| format!("cannot change {}", folder.display()))
}

/// Mounts what is written to `folder` over `image`.
fn mount_root(root: &Path, image: &Path, folder: &Path, flags: MsFlags) -> anyhow::Result<()> {
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        image.display(),
        folder.join("upper").display(),
        folder.join("work").display()
    );
    mount(Some("overlay"), root, Some("overlay"), flags, Some(layers.as_str()))
        .with_context(|| format!("cannot mount an overlay on the image {}", image.display()))
}

/// Mounts the function's layers over each other and over the image's `/opt`.
fn mount_layers(tmpfs: &Path, image: &Path, layers: &[PathBuf]) -> anyhow::Result<()> {
    let on = tmpfs.join(OPT);
    directory(&on, 0o755)?;
    let image = image.join(OPT);
    let mut from_top: Vec<String> = Vec::new();
    for folder in layers.iter().rev().chain([&image]) {
        let folder = folder.display().to_string();
        // The kernel takes none twice; and one that lies above itself adds nothing.
        if !from_top.contains(&folder) {
            from_top.push(folder);
        }
    }
    let layers = format!("lowerdir={}", from_top.join(":"));
    mount(
        Some("overlay"),
        &on,
        Some("overlay"),
        MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
        Some(layers.as_str()),
    )
    .context("cannot mount the function's layers")
}

fn build(
    order: &Order,
    bundle: &Path,
    log: OwnedFd,
    executor: Filtered,
) -> anyhow::Result<libcontainer::container::Container> {
    let error_log = log.try_clone().context("cannot duplicate the log")?;
    let nothing = File::open("/dev/null").context("cannot open /dev/null")?;
    ContainerBuilder::new(order.id.clone(), SyscallType::default())
        .with_root_path(order.tmpfs.join("state"))?
        .with_executor(executor)
        .with_stdin(nothing)
        .with_stdout(log)
        .with_stderr(error_log)
        .validate_id()?
        .as_init(bundle)
        .with_systemd(false)
        .with_detach(true)
        .build()
        .context("libcontainer cannot make the container")
}

/// Makes a folder with exactly this mode.
pub(super) fn directory(path: &Path, mode: u32) -> anyhow::Result<()> {
    std::fs::create_dir(path)
        .and_then(|()| std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)))
        .with_context(|| format!("cannot make {}", path.display()))
}

/// `SIOCSIFFLAGS`, netdevice(7).
fn bring_loopback_up() -> std::io::Result<()> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
    // SAFETY: an all-zero `ifreq` is a valid value of it.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the call reads an `ifreq`, which `request` is and stays for the time of the call.
    let done = unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS, &request) };
    if done == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
