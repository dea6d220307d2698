//! CPUs that the machine is plugged while it runs. The kernel finds each by ACPI and leaves it to user space to run on it; one that the
//! host wants back it leaves and gives back by itself.
//!
//! Nothing polls: the kernel tells of every device that comes, by a message on a socket (`lib/kobject_uevent.c` in Linux).

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::blocking;

/// Where the kernel has its CPUs.
const FOLDER: &str = "/sys/devices/system/cpu";
/// What its messages of a new one begin with, before the number.
const ADDED: &[u8] = b"add@/devices/system/cpu/cpu";
/// The group of those that hear its messages.
const GROUP: u32 = 1;
/// More than the kernel says at once (`UEVENT_BUFFER_SIZE` and a header).
const MESSAGE_BYTES: usize = 4096;

/// Runs on every CPU that is there or comes. Never returns, but where no CPU can come.
pub(crate) async fn run_on_all() {
    let cpus = Cpus(FOLDER.into());
    if !cpus.more_may_come() {
        return;
    }
    if let Err(error) = cpus.follow().await {
        tracing::warn!(%error, "CPUs that are plugged from now on are not used");
    }
}

/// The kernel's folder of CPUs.
struct Cpus(PathBuf);

// === impl Cpus ===

impl Cpus {
    /// Whether the machine may ever have more than one.
    fn more_may_come(&self) -> bool {
        std::fs::read_to_string(self.0.join("possible")).is_ok_and(|possible| possible.trim() != "0")
    }

    async fn follow(&self) -> io::Result<()> {
        // SAFETY: the descriptor is owned by what is registered and stays the same, so it is open for as long as that is.
        let messages =
            unsafe { AsyncFd::register_with_interest(listen()?, Interest::READABLE) }.map_err(io::Error::from)?;
        // Those that came before anybody listened.
        self.start_all().await;
        loop {
            let received = messages
                .async_io(Interest::READABLE, |socket| Ok(receive(socket)?))
                .await;
            match received {
                Ok(Some(number)) => self.start(number).await,
                Ok(None) => {}
                // Messages were lost.
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => self.start_all().await,
                Err(error) => return Err(error),
            }
        }
    }

    /// Runs on those that are there and not run on.
    async fn start_all(&self) {
        let Ok(entries) = std::fs::read_dir(&self.0) else {
            return;
        };
        let mut numbers: Vec<u32> = entries
            .filter_map(|entry| number(entry.ok()?.file_name().as_encoded_bytes().strip_prefix(b"cpu")?))
            .collect();
        numbers.sort_unstable();
        for number in numbers {
            let online = std::fs::read(self.file(number));
            if online.is_ok_and(|online| online.starts_with(b"0")) {
                self.start(number).await;
            }
        }
    }

    async fn start(&self, number: u32) {
        let file = self.file(number);
        // The kernel takes a millisecond and more, and longer where the host is busy.
        let started = blocking::on_a_thread("cpus", move || write_one(&file)).await.flatten();
        if let Err(error) = started {
            // Where it went again meanwhile, that is told so too.
            tracing::warn!(cpu = number, %error, "this CPU is not used");
        }
    }

    fn file(&self, number: u32) -> PathBuf {
        self.0.join(format!("cpu{number}/online"))
    }
}

/// Writes a 1 to a file that is there.
fn write_one(file: &Path) -> io::Result<()> {
    File::options().write(true).open(file)?.write_all(b"1")
}

/// A socket that hears of devices.
fn listen() -> nix::Result<OwnedFd> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        SockProtocol::NetlinkKObjectUEvent,
    )?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
    Ok(socket)
}

/// Takes a message: the number of the CPU that it says has come, if it does.
fn receive(socket: &OwnedFd) -> nix::Result<Option<u32>> {
    let mut message = [0; MESSAGE_BYTES];
    let length = recv(socket.as_raw_fd(), &mut message, MsgFlags::empty())?;
    Ok(message.get(..length).and_then(added))
}

/// The CPU of which a message says that it has come.
fn added(message: &[u8]) -> Option<u32> {
    let path = message.split(|byte| *byte == 0).next()?;
    number(path.strip_prefix(ADDED)?)
}

/// A number of nothing but digits.
fn number(text: &[u8]) -> Option<u32> {
    let digits = text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    /// A folder as the kernel's, with these files `online`, none for the first CPU.
    fn folder(possible: &str, online: &[(u32, &str)]) -> (tempfile::TempDir, Cpus) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("possible"), possible).unwrap();
        for name in ["cpu0", "cpufreq", "cpuidle", "hotplug"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        for (number, state) in online {
            fs::create_dir(folder.path().join(format!("cpu{number}"))).unwrap();
            fs::write(folder.path().join(format!("cpu{number}/online")), state).unwrap();
        }
        let cpus = Cpus(folder.path().to_owned());
        (folder, cpus)
    }

    fn online(cpus: &Cpus, number: u32) -> String {
        fs::read_to_string(cpus.file(number)).unwrap()
    }

    #[test]
    fn messages_name_cpus_that_came() {
        let of = |text: &str| added(text.as_bytes());
        assert_eq!(of("add@/devices/system/cpu/cpu7\0ACTION=add\0"), Some(7));
        assert_eq!(of("add@/devices/system/cpu/cpu63"), Some(63));
        for other in [
            "",
            "\0add@/devices/system/cpu/cpu7",
            "remove@/devices/system/cpu/cpu7\0ACTION=remove\0",
            "add@/devices/system/cpu/cpu7/cache\0",
            "add@/devices/system/cpu/cpu\0",
            "add@/devices/system/cpu/cpu+7\0",
            "add@/devices/system/cpu/cpu99999999999\0",
            "add@/devices/system/cpu/cpufreq\0",
            "add@/devices/virtual/block/loop0\0",
        ] {
            assert_eq!(of(other), None, "{other:?}");
        }
    }

    #[tokio::test]
    async fn those_that_are_off_are_started() {
        let (_folder, cpus) = folder("0-9\n", &[(1, "1\n"), (2, "0\n"), (9, "0\n")]);
        assert!(cpus.more_may_come());
        cpus.start_all().await;
        assert_eq!([1, 2, 9].map(|number| online(&cpus, number)), ["1\n", "1\n", "1\n"]);
        // One that went meanwhile is none the worse.
        cpus.start(5).await;
        assert!(!cpus.file(5).exists());
    }

    #[test]
    fn with_one_possible_cpu_none_can_come() {
        assert!(!folder("0\n", &[]).1.more_may_come());
        assert!(!Cpus("/nowhere".into()).more_may_come());
    }

    /// The kernel itself tells of a CPU, as it does when it is asked to say so again; what is started is in a folder of the test's.
    #[tokio::test]
    async fn the_kernel_tells_of_cpus() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let (_folder, cpus) = folder("0-1\n", &[]);
        // Not off, so that it is not found without the message.
        fs::write(cpus.file(0), "").unwrap();
        let told = async {
            while online(&cpus, 0).is_empty() {
                // It is heard once somebody listens, which is soon.
                if let Err(error) = fs::write("/sys/devices/system/cpu/cpu0/uevent", "add") {
                    eprintln!("skipped: {error}");
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::select! {
            () = told => {}
            followed = cpus.follow() => panic!("{followed:?}"),
            () = tokio::time::sleep(Duration::from_secs(60)) => panic!("it never told"),
        }
    }
}
