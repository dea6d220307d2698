//! CPUs that the machine is plugged while it runs. The kernel finds each by ACPI and leaves it to user space to run on it; one that the
//! host wants back it leaves and gives back by itself.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::timeout;

use crate::blocking;
use crate::uevents::Uevents;

/// Where the kernel has its CPUs.
const FOLDER: &str = "/sys/devices/system/cpu";
/// What its messages of a new one begin with, before the number.
const ADDED: &[u8] = b"add@/devices/system/cpu/cpu";
/// When one that could not be started is tried again: the kernel had no memory for it, or the host no time.
const AGAIN: Duration = Duration::from_secs(30);

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
        let messages = Uevents::listen()?;
        // Those that came before anybody listened.
        let mut runs_on_all = self.start_all().await;
        loop {
            let next = messages.next(added);
            let heard = match runs_on_all {
                true => next.await?,
                false => timeout(AGAIN, next).await.unwrap_or(Ok(None))?,
            };
            match heard {
                Some(Some(number)) => runs_on_all &= self.start(number).await,
                Some(None) => {}
                None => runs_on_all = self.start_all().await,
            }
        }
    }

    /// Runs on those that are there and not run on. False where that is to be tried again.
    async fn start_all(&self) -> bool {
        let Ok(entries) = std::fs::read_dir(&self.0) else {
            return true;
        };
        let mut numbers: Vec<u32> = entries
            .filter_map(|entry| number(entry.ok()?.file_name().as_encoded_bytes().strip_prefix(b"cpu")?))
            .collect();
        numbers.sort_unstable();
        let mut runs_on_all = true;
        for number in numbers {
            let online = std::fs::read(self.file(number));
            if online.is_ok_and(|online| online.starts_with(b"0")) {
                runs_on_all &= self.start(number).await;
            }
        }
        runs_on_all
    }

    /// False where that is to be tried again.
    async fn start(&self, number: u32) -> bool {
        let file = self.file(number);
        // The kernel takes a millisecond and more, and longer where the host is busy.
        let started = blocking::on_a_thread("cpus", move || write_one(&file)).await.flatten();
        match started {
            Ok(()) => true,
            // It went again meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => true,
            Err(error) => {
                tracing::warn!(cpu = number, %error, "this CPU is not used");
                false
            }
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

/// The CPU of which a message says that it has come.
fn added(message: &[u8]) -> Option<u32> {
    number(message.strip_prefix(ADDED)?)
}

/// A number of nothing but digits.
fn number(text: &[u8]) -> Option<u32> {
    let digits = text.iter().all(u8::is_ascii_digit);
    std::str::from_utf8(text).ok().filter(|_| digits)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::{AsRawFd as _, FromRawFd as _};

    use nix::fcntl::{FcntlArg, SealFlag, fcntl};

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
        assert_eq!(of("add@/devices/system/cpu/cpu7"), Some(7));
        assert_eq!(of("add@/devices/system/cpu/cpu63"), Some(63));
        for other in [
            "",
            "remove@/devices/system/cpu/cpu7",
            "add@/devices/system/cpu/cpu7/cache",
            "add@/devices/system/cpu/cpu",
            "add@/devices/system/cpu/cpu+7",
            "add@/devices/system/cpu/cpu99999999999",
            "add@/devices/system/cpu/cpufreq",
            "add@/devices/virtual/block/loop0",
        ] {
            assert_eq!(of(other), None, "{other:?}");
        }
    }

    #[tokio::test]
    async fn those_that_are_off_are_started() {
        let (_folder, cpus) = folder("0-9\n", &[(1, "1\n"), (2, "0\n"), (9, "0\n")]);
        assert!(cpus.more_may_come());
        assert!(cpus.start_all().await);
        assert_eq!([1, 2, 9].map(|number| online(&cpus, number)), ["1\n", "1\n", "1\n"]);
        // One that went meanwhile is none the worse.
        assert!(cpus.start(5).await);
        assert!(!cpus.file(5).exists());
    }

    #[tokio::test]
    async fn one_that_can_not_be_started_is_to_be_tried_again() {
        let (_folder, cpus) = folder("0-2\n", &[(1, "0\n"), (2, "0\n")]);
        // A file that is off, and takes nothing.
        let sealed = sealed(b"0\n");
        fs::remove_file(cpus.file(1)).unwrap();
        std::os::unix::fs::symlink(format!("/proc/self/fd/{}", sealed.as_raw_fd()), cpus.file(1)).unwrap();
        assert!(!cpus.start_all().await);
        assert_eq!(online(&cpus, 2), "1\n", "the others are started");
        fs::remove_file(cpus.file(1)).unwrap();
        fs::write(cpus.file(1), "0\n").unwrap();
        assert!(cpus.start_all().await);
        assert_eq!(online(&cpus, 1), "1\n");
    }

    /// A file of this content that nobody can write to any more.
    fn sealed(content: &[u8]) -> File {
        // SAFETY: the name is a string; the descriptor is new and nobody else's.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"off".as_ptr(), libc::MFD_ALLOW_SEALING)) };
        (&file).write_all(content).unwrap();
        let seal = FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_WRITE);
        fcntl(&file, seal).unwrap();
        file
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
