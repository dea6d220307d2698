//! Guests whose process 1 is the program that boots them: what packs it, and what it begins with.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};

use crate::cpio::Archive;

/// Where the modules lie that a guest loads, by their order: `0.ko.xz`, `1.ko.xz` ...
const MODULES: &str = "modules";

/// The kernel unpacks the module itself (`MODULE_INIT_COMPRESSED_FILE`, finit_module(2)).
const COMPRESSED: ModuleInitFlags = ModuleInitFlags::from_bits_retain(4);

/// More than the kernel says of a device at once (`UEVENT_BUFFER_SIZE` and a header, `lib/kobject_uevent.c` in Linux).
const UEVENT_BYTES: usize = 4096;

/// An initramfs whose `/init` is this very program, with the libraries that it is linked to and these modules, compressed by xz, in
/// the order in which they are loaded.
///
/// # Errors
///
/// Where a file of them can't be read.
pub fn initramfs(modules: &[PathBuf]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", MODULES] {
        archive.folder(folder);
    }
    archive.file("init", 0o755, &this_program()?);
    let maps = fs::read_to_string("/proc/self/maps").context("find the libraries of this program")?;
    let libraries: BTreeSet<&str> = maps
        .lines()
        .filter_map(|line| line.split_whitespace().nth(5))
        .filter(|path| path.starts_with('/') && path.contains(".so"))
        .collect();
    for path in libraries {
        let content = fs::read(path).with_context(|| format!("read {path}"))?;
        archive.file(path.trim_start_matches('/'), 0o755, &content);
        // Where programs look for it, whatever it is a link to here.
        if path.contains("/ld-linux") {
            archive.file("lib64/ld-linux-x86-64.so.2", 0o755, &content);
        }
    }
    for (index, module) in modules.iter().enumerate() {
        let content = fs::read(module).with_context(|| format!("read {}", module.display()))?;
        archive.file(&format!("{MODULES}/{index}.ko.xz"), 0o644, &content);
    }
    Ok(archive.finish())
}

/// Without what only debuggers read, where there is a strip(1).
fn this_program() -> Result<Vec<u8>> {
    let this = std::env::current_exe().context("find this program")?;
    let stripped = tempfile::NamedTempFile::new().context("make a file")?;
    let strip = Command::new("strip").arg("-o").arg(stripped.path()).arg(&this).status();
    let program = match strip.is_ok_and(|status| status.success()) {
        true => stripped.path(),
        false => &this,
    };
    fs::read(program).with_context(|| format!("read {}", program.display()))
}

/// Mounts what every program expects and loads the modules: the first that process 1 does.
///
/// # Errors
///
/// What cannot be mounted or loaded, and why.
pub fn begin() -> Result<()> {
    for (target, kind) in [("/dev", "devtmpfs"), ("/proc", "proc"), ("/sys", "sysfs")] {
        let mounted = mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>);
        mounted.with_context(|| format!("mount {target}"))?;
    }
    for index in 0.. {
        let path = format!("/{MODULES}/{index}.ko.xz");
        let Ok(file) = File::open(&path) else { break };
        finit_module(&file, c"", COMPRESSED).with_context(|| format!("load {path}"))?;
    }
    Ok(())
}

/// The value of `NAME=` on the kernel's command line.
///
/// # Errors
///
/// Where `/proc` is not mounted, or nothing of that name is there.
pub fn option(name: &str) -> Result<String> {
    let words = fs::read_to_string("/proc/cmdline").context("read /proc/cmdline")?;
    let value = words
        .split_whitespace()
        .find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
    Ok(value.with_context(|| format!("no {name}= in {words}"))?.to_owned())
}

/// A line of `/proc/meminfo`, as `MemTotal`, in KiB.
///
/// # Errors
///
/// Where there is no such line.
pub fn meminfo_kib(field: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .with_context(|| format!("no {field} in /proc/meminfo"))?;
    line.trim()
        .trim_end_matches(" kB")
        .parse()
        .with_context(|| format!("understand {line}"))
}

/// What the kernel tells of devices that come and go.
#[derive(Debug)]
pub struct Uevents(OwnedFd);

// === impl Uevents ===

impl Uevents {
    /// From now on.
    ///
    /// # Errors
    ///
    /// What socket(2) and bind(2) return.
    pub fn listen() -> Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 1))?;
        Ok(Self(socket))
    }

    /// Waits for the next: what has become of a device, as `add`, and its path below `/sys`.
    ///
    /// # Errors
    ///
    /// What recv(2) returns, or where the message is none.
    pub fn wait(&self) -> Result<(String, String)> {
        let mut message = [0; UEVENT_BYTES];
        let length = recv(self.0.as_raw_fd(), &mut message, MsgFlags::empty())?;
        parse(message.get(..length).unwrap_or_default())
    }
}

fn parse(message: &[u8]) -> Result<(String, String)> {
    let head = message.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(head).context("understand what the kernel says")?;
    let (action, path) = text.split_once('@').with_context(|| format!("understand {text}"))?;
    ensure!(path.starts_with('/'), "no path in {text}");
    Ok((action.to_owned(), path.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_the_kernel_are_understood() {
        let message = b"add@/devices/system/cpu/cpu3\0ACTION=add\0DEVPATH=/devices/system/cpu/cpu3\0";
        let (action, path) = parse(message).unwrap();
        assert_eq!((&*action, &*path), ("add", "/devices/system/cpu/cpu3"));
        for wrong in [&b""[..], b"libudev\0", b"add@", b"\xff@/a"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn memory_and_options_are_read_from_proc() {
        assert!(meminfo_kib("MemTotal").unwrap() > meminfo_kib("MemFree").unwrap());
        assert!(meminfo_kib("MemTot").is_err());
        assert!(option("no-such-option").is_err());
    }

    #[test]
    fn this_program_and_its_libraries_are_packed() {
        let archive = initramfs(&[]).unwrap();
        let has = |name: &[u8]| archive.windows(name.len()).any(|at| at == name);
        assert!(has(b"lib64/ld-linux-x86-64.so.2\0") && has(b"init\0") && has(b"modules\0"));
        assert!(initramfs(&["/no/such/module".into()]).is_err());
    }
}
