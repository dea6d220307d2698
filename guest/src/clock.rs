//! The machine's clock follows its host's: what functions read of it signs requests, names files and judges certificates.
//!
//! The kernel takes its first time from the host and goes on by itself. From then on the two drift apart, and the host's may be
//! set. So before an invocation, once in a while, the host's is read: by `ptp_kvm` (Documentation/virt/kvm/x86/hypercalls.rst,
//! `KVM_HC_CLOCK_PAIRING`) where the host's own clock allows for that, else as the agent has told it with the invocation. A
//! machine in which nothing is invoked does nothing.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// How often the host's clock is looked at, at most.
const INTERVAL: Duration = Duration::from_secs(1);
/// A difference that nobody minds, in ns: reading two clocks takes some of it.
const SMALL_NS: i64 = 1_000_000;
/// One that is made up for at once, in ns; a smaller one little by little, so that time does not go back.
const LARGE_NS: i64 = 100_000_000;
/// How many times that were told are compared before the clock is set back: each comes late, nobody knows how late.
const TOLD: u32 = 8;

/// What to do about a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Correction {
    None,
    /// Little by little, by so many ns in all.
    Slew(i64),
    /// At once, by so many ns.
    Step(i64),
}

/// How far the host's clock is ahead, by what it was told to be. It comes late, so that each is the least it can be.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    /// The most of the differences, in ns.
    ahead_ns: i64,
    count: u32,
}

/// The machine's clock.
pub(crate) struct Clock {
    /// The host's, as the kernel can read it.
    host: Option<File>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When the difference was last looked at, since the kernel's start.
    looked: Option<Duration>,
    told: Told,
}

// === impl Correction ===

impl Correction {
    /// For a host's clock that is so many ns ahead.
    fn of(ahead_ns: i64) -> Self {
        match ahead_ns.saturating_abs() {
            0..SMALL_NS => Self::None,
            SMALL_NS..LARGE_NS => Self::Slew(ahead_ns),
            _ => Self::Step(ahead_ns),
        }
    }
}

// === impl Told ===

impl Told {
    /// One more time was told, so many ns ahead of the machine's clock when it came.
    fn correct(&mut self, ahead_ns: i64) -> Correction {
        self.ahead_ns = if self.count == 0 {
            ahead_ns
        } else {
            self.ahead_ns.max(ahead_ns)
        };
        self.count += 1;
        // The host's clock is at least so far ahead.
        if ahead_ns >= SMALL_NS {
            *self = Self::default();
            return Correction::of(ahead_ns);
        }
        if self.count < TOLD {
            return Correction::None;
        }
        let least = std::mem::take(self).ahead_ns;
        // Of a small difference it is not known whether it is one.
        match Correction::of(least) {
            Correction::Step(by) => Correction::Step(by),
            Correction::Slew(_) | Correction::None => Correction::None,
        }
    }
}

// === impl Clock ===

impl Clock {
    pub(crate) fn new() -> Self {
        let host = host_clock(Path::new("/sys/class/ptp")).and_then(|device| File::open(device).ok());
        Self {
            host,
            state: Mutex::default(),
        }
    }

    /// Looks at the host's clock, where it has not for a while, and follows it. `told_ns` is what the agent says it is, in ns since
    /// 1970; 0 where it does not.
    pub(crate) fn follow(&self, told_ns: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
        if state.looked.is_some_and(|looked| now < looked + INTERVAL) {
            return;
        }
        state.looked = Some(now);
        let host = self.host.as_ref().and_then(|host| ahead_of(host).ok());
        let correction = match host {
            Some(ahead_ns) => Correction::of(ahead_ns),
            None if told_ns > 0 => {
                let (told, own) = (
                    i64::try_from(told_ns).unwrap_or(i64::MAX),
                    now_ns(ClockId::CLOCK_REALTIME),
                );
                own.map_or(Correction::None, |own| state.told.correct(told.saturating_sub(own)))
            }
            None => Correction::None,
        };
        if let Err(error) = carry_out(correction) {
            tracing::error!("cannot set the clock ({correction:?}): {error}");
        }
    }
}

/// The device by which the kernel reads the host's clock.
fn host_clock(class: &Path) -> Option<PathBuf> {
    let devices = std::fs::read_dir(class).ok()?;
    devices.flatten().find_map(|device| {
        let name = std::fs::read_to_string(device.path().join("clock_name")).ok()?;
        (name.trim() == "KVM virtual PTP").then(|| Path::new("/dev").join(device.file_name()))
    })
}

/// How many ns the host's clock is ahead of the machine's.
fn ahead_of(host: &File) -> nix::Result<i64> {
    // A clock behind a descriptor (clock_getres(2), "Dynamic clocks").
    let clock = ClockId::from_raw((!host.as_raw_fd() << 3) | 3);
    let before = now_ns(ClockId::CLOCK_REALTIME)?;
    let host = now_ns(clock)?;
    let after = now_ns(ClockId::CLOCK_REALTIME)?;
    Ok(host.saturating_sub(before.midpoint(after)))
}

fn now_ns(clock: ClockId) -> nix::Result<i64> {
    let now = Duration::from(clock_gettime(clock)?);
    Ok(i64::try_from(now.as_nanos()).unwrap_or(i64::MAX))
}

fn carry_out(correction: Correction) -> io::Result<()> {
    let mut order = timex();
    match correction {
        Correction::None => return Ok(()),
        Correction::Slew(ns) => {
            order.modes = libc::ADJ_OFFSET_SINGLESHOT;
            order.offset = ns / 1000;
        }
        Correction::Step(ns) => {
            order.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
            order.time.tv_sec = ns.div_euclid(1_000_000_000);
            order.time.tv_usec = ns.rem_euclid(1_000_000_000);
        }
    }
    // SAFETY: the kernel reads and writes one `timex`, which `order` is.
    let done = unsafe { libc::adjtimex(&mut order) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    if let Correction::Step(ns) = correction {
        tracing::warn!("the clock was set by {:?}", Duration::from_nanos(ns.unsigned_abs()));
    }
    Ok(())
}

fn timex() -> libc::timex {
    // SAFETY: `timex` is made of numbers alone, of which 0 is a valid one.
    unsafe { std::mem::zeroed() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: i64 = 1_000_000;

    #[test]
    fn a_small_difference_stays_a_larger_one_goes_slowly_and_a_large_one_at_once() {
        for (ahead, correction) in [
            (0, Correction::None),
            (-MS + 1, Correction::None),
            (MS, Correction::Slew(MS)),
            (-99 * MS, Correction::Slew(-99 * MS)),
            (100 * MS, Correction::Step(100 * MS)),
            (-86_400_000 * MS, Correction::Step(-86_400_000 * MS)),
            (i64::MIN, Correction::Step(i64::MIN)),
        ] {
            assert_eq!(Correction::of(ahead), correction);
        }
    }

    #[test]
    fn what_is_told_comes_late() {
        let mut told = Told::default();
        // The clocks agree: each time comes a little late, some later.
        for _ in 0..10 * TOLD {
            assert_eq!(told.correct(-2 * MS), Correction::None);
            assert_eq!(told.correct(-900 * MS), Correction::None);
        }
        // The host's is ahead of ours by a day, less what it took to come.
        assert_eq!(
            Told::default().correct(86_400_000 * MS),
            Correction::Step(86_400_000 * MS)
        );
        assert_eq!(Told::default().correct(5 * MS), Correction::Slew(5 * MS));
        // It was set back by an hour.
        let mut told = Told::default();
        for late in 1..i64::from(TOLD) {
            assert_eq!(told.correct(-3_600_000 * MS - late * 10 * MS), Correction::None);
        }
        assert_eq!(
            told.correct(-3_600_000 * MS - 500 * MS),
            Correction::Step(-3_600_000 * MS - 10 * MS)
        );
    }

    #[test]
    fn the_hosts_clock_is_found_by_its_name() {
        let class = tempfile::tempdir().unwrap();
        assert_eq!(host_clock(class.path()), None);
        for (device, name) in [("ptp0", "some network card\n"), ("ptp1", "KVM virtual PTP\n")] {
            std::fs::create_dir(class.path().join(device)).unwrap();
            std::fs::write(class.path().join(device).join("clock_name"), name).unwrap();
        }
        assert_eq!(host_clock(class.path()), Some("/dev/ptp1".into()));
        assert_eq!(host_clock(Path::new("/nowhere")), None);
    }
}
