//! How the kernel schedules a thread (sched(7), sched_setattr(2)).

use std::fs;
use std::io;
use std::time::Duration;

use nix::libc;

/// `SCHED_EXT` of `include/uapi/linux/sched.h`.
const SCHED_EXT: i32 = 7;

/// How a thread is scheduled. What it starts (threads and processes) is scheduled as by default, whatever it is itself, but for what
/// is extensible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// `SCHED_OTHER`: a share of the CPU by weight.
    Fair {
        /// -20, the largest share, to 19.
        nice: i32,
        /// For how long it asks to run at a time: the shorter, the sooner it runs once it is woken. From Linux 6.12 on within 0.1 to
        /// 100 ms, before it is ignored. None is the kernel's own.
        slice: Option<Duration>,
    },
    /// `SCHED_IDLE`: only what nobody else wants, but for a 300th or so.
    Idle,
    /// `SCHED_RR`: before all fair ones, for as long as it wants, in turn with those of its priority.
    RoundRobin {
        /// 1 to 99, the most urgent.
        priority: u32,
    },
    /// `SCHED_FIFO`: the same, without turns.
    Fifo {
        /// 1 to 99, the most urgent.
        priority: u32,
    },
    /// `SCHED_EXT`: by the scheduler that was loaded (`sched_ext`), which holds for what it starts too. As a fair one where none is. From
    /// Linux 6.12 on with `CONFIG_SCHED_CLASS_EXT`.
    Extensible {
        /// What the scheduler takes for a weight, if it does; -20 to 19.
        nice: i32,
    },
    /// `SCHED_DEADLINE`: before all others for so long in each period, and not at all for the rest of it.
    Deadline {
        /// At least 1,024 ns.
        runtime: Duration,
        /// At least as long.
        period: Duration,
    },
}

// === impl Policy ===

impl Policy {
    /// As threads are by default.
    pub const DEFAULT: Self = Self::Fair { nice: 0, slice: None };

    /// Schedules a thread so; 0 is this one.
    ///
    /// # Errors
    /// `ESRCH` where it has ended; `EPERM` where rights are missing, and for real-time policies where the kernel bounds them by
    /// cgroup (`CONFIG_RT_GROUP_SCHED`); `EBUSY` where more deadlines than can be held were promised.
    pub fn apply(self, thread: u32) -> io::Result<()> {
        let attributes = self.attributes();
        // SAFETY: the kernel reads `size` bytes of a struct that lives for the length of the call.
        let set = unsafe { libc::syscall(libc::SYS_sched_setattr, thread, &raw const attributes, 0) };
        match set {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// How a thread is scheduled; 0 is this one. A slice is one that was asked for, or the kernel's own; before Linux 6.12 it is none.
    ///
    /// # Errors
    /// `ESRCH` where it has ended; `EINVAL` where it is scheduled in none of these ways.
    pub fn of(thread: u32) -> io::Result<Self> {
        let mut told = empty();
        // SAFETY: the kernel writes at most `size` bytes to a struct of that size, which lives for the length of the call.
        let got = unsafe { libc::syscall(libc::SYS_sched_getattr, thread, &raw mut told, told.size, 0) };
        if got != 0 {
            return Err(io::Error::last_os_error());
        }
        let priority = told.sched_priority;
        match told.sched_policy.cast_signed() {
            libc::SCHED_OTHER | libc::SCHED_BATCH => Ok(Self::Fair {
                nice: told.sched_nice,
                slice: (told.sched_runtime > 0).then(|| Duration::from_nanos(told.sched_runtime)),
            }),
            libc::SCHED_IDLE => Ok(Self::Idle),
            SCHED_EXT => Ok(Self::Extensible { nice: told.sched_nice }),
            libc::SCHED_RR => Ok(Self::RoundRobin { priority }),
            libc::SCHED_FIFO => Ok(Self::Fifo { priority }),
            libc::SCHED_DEADLINE => Ok(Self::Deadline {
                runtime: Duration::from_nanos(told.sched_runtime),
                period: Duration::from_nanos(told.sched_period),
            }),
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    fn attributes(self) -> libc::sched_attr {
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let of = |policy: i32| libc::sched_attr {
            sched_policy: policy.cast_unsigned(),
            ..empty()
        };
        match self {
            Self::Fair { nice, slice } => libc::sched_attr {
                sched_nice: nice,
                sched_runtime: slice.map_or(0, ns),
                ..of(libc::SCHED_OTHER)
            },
            Self::Idle => of(libc::SCHED_IDLE),
            Self::Extensible { nice } => libc::sched_attr {
                sched_nice: nice,
                sched_flags: 0,
                ..of(SCHED_EXT)
            },
            Self::RoundRobin { priority } => libc::sched_attr {
                sched_priority: priority,
                ..of(libc::SCHED_RR)
            },
            Self::Fifo { priority } => libc::sched_attr {
                sched_priority: priority,
                ..of(libc::SCHED_FIFO)
            },
            Self::Deadline { runtime, period } => libc::sched_attr {
                sched_runtime: ns(runtime),
                sched_deadline: ns(period),
                sched_period: ns(period),
                ..of(libc::SCHED_DEADLINE)
            },
        }
    }
}

/// Whether the kernel takes the slices that threads ask for: from Linux 6.12 on.
///
/// # Errors
/// Where it does not say how this thread is scheduled.
pub fn takes_slices() -> io::Result<bool> {
    Ok(matches!(Policy::of(0)?, Policy::Fair { slice: Some(_), .. }))
}

/// The threads of a process.
///
/// # Errors
/// Where it has ended.
pub fn threads(process: u32) -> io::Result<Vec<u32>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/task"))? {
        threads.extend(entry?.file_name().to_str().and_then(|id| id.parse::<u32>().ok()));
    }
    Ok(threads)
}

/// The name of a thread of a process, at most 15 bytes (proc_pid_comm(5)).
///
/// # Errors
/// Where it has ended.
pub fn name(process: u32, thread: u32) -> io::Result<String> {
    let name = fs::read(format!("/proc/{process}/task/{thread}/comm"))?;
    Ok(String::from_utf8_lossy(&name).trim_end().to_owned())
}

fn empty() -> libc::sched_attr {
    libc::sched_attr {
        // The first version of the struct, which every kernel knows.
        size: size_of::<libc::sched_attr>() as u32,
        sched_policy: 0,
        sched_flags: libc::SCHED_FLAG_RESET_ON_FORK as u64,
        sched_nice: 0,
        sched_priority: 0,
        sched_runtime: 0,
        sched_deadline: 0,
        sched_period: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// In a thread of its own, which another test does not run in.
    fn alone(test: fn()) {
        std::thread::spawn(test).join().unwrap();
    }

    fn nice(nice: i32) -> Policy {
        Policy::Fair { nice, slice: None }
    }

    #[test]
    fn a_thread_is_scheduled_as_it_is_told() {
        alone(|| {
            let is = |policy: Policy| match (policy, Policy::of(0).unwrap()) {
                // The kernel's own slice.
                (Policy::Fair { nice, slice: None }, Policy::Fair { nice: is, .. }) => assert_eq!(is, nice),
                (asked, is) => assert_eq!(is, asked),
            };
            for policy in [nice(7), Policy::Idle, nice(7)] {
                policy.apply(0).unwrap();
                is(policy);
            }
            if !nix::unistd::geteuid().is_root() {
                return;
            }
            let deadline = Policy::Deadline {
                runtime: Duration::from_millis(1),
                period: Duration::from_millis(100),
            };
            for policy in [
                nice(-20),
                Policy::RoundRobin { priority: 1 },
                Policy::Fifo { priority: 2 },
                deadline,
                Policy::DEFAULT,
            ] {
                policy.apply(0).unwrap();
                is(policy);
            }
        });
    }

    #[test]
    fn a_slice_is_kept_where_the_kernel_takes_any() {
        alone(|| {
            let slice = Some(Duration::from_micros(200));
            Policy::Fair { nice: 0, slice }.apply(0).unwrap();
            let kept = match takes_slices().unwrap() {
                true => slice,
                false => None,
            };
            assert_eq!(Policy::of(0).unwrap(), Policy::Fair { nice: 0, slice: kept });
        });
    }

    #[test]
    fn what_a_thread_starts_is_scheduled_as_by_default() {
        if !nix::unistd::geteuid().is_root() {
            return eprintln!("skipped: only root may be urgent");
        }
        alone(|| {
            Policy::RoundRobin { priority: 1 }.apply(0).unwrap();
            let child = std::thread::spawn(|| Policy::of(0).unwrap()).join().unwrap();
            assert!(matches!(child, Policy::Fair { nice: 0, .. }), "{child:?}");
        });
    }

    #[test]
    fn what_is_extensible_starts_what_is_too() {
        alone(|| {
            let extensible = Policy::Extensible { nice: 3 };
            match extensible.apply(0) {
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                    return eprintln!("skipped: this kernel has no sched_ext");
                }
                applied => applied.unwrap(),
            }
            let child = std::thread::spawn(|| Policy::of(0).unwrap()).join().unwrap();
            assert_eq!((Policy::of(0).unwrap(), child), (extensible, extensible));
        });
    }

    #[test]
    fn a_thread_that_has_ended_is_an_error() {
        let gone = std::thread::spawn(|| nix::unistd::gettid().as_raw()).join().unwrap();
        let error = Policy::DEFAULT.apply(gone.cast_unsigned()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }

    #[test]
    fn threads_are_found_by_their_names() {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("vcpu0".into());
        let (told, id) = std::sync::mpsc::channel();
        let thread = thread.spawn(move || {
            told.send(nix::unistd::gettid().as_raw().cast_unsigned()).unwrap();
            let _ = stopped.recv();
        });
        let (id, this) = (id.recv().unwrap(), std::process::id());
        assert!(threads(this).unwrap().contains(&id));
        assert_eq!(name(this, id).unwrap(), "vcpu0");
        drop(stop);
        thread.unwrap().join().unwrap();
    }
}
