//! What this kernel has of what not every kernel has, found out before the programs are loaded.

use std::fmt;
use std::fs;

use nix::time::{ClockId, clock_getres};
use stoker_ebpf_types::{KvmExitFields, RssStatFields, ThrottleFields, WaitFields};

use crate::btf::Btf;
use crate::error::LoadError;
use crate::tracepoint;

/// The kernel's own type information.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// A change of level may be seen so much too late, in ns.
const SHORT_NS: u32 = 1_000_000;

const NO_LIMITS: &str = "the kernel limits no cgroup's CPU time (CONFIG_CFS_BANDWIDTH)";

/// What programs are loaded by: another kernel, or the same after a change of its modules, may give another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub(crate) rss_stat: RssStatFields,
    /// All zero where it is not known.
    pub(crate) waits: WaitFields,
    /// Likewise. Known only where the former is.
    pub(crate) throttle: ThrottleFields,
    pub(crate) kvm_exit: Option<KvmExitFields>,
    /// [`stoker_ebpf_types::Settings::uncharged_ns`].
    pub(crate) uncharged_ns: u32,
}

/// Something that is not counted here, or at a higher cost, since this kernel does not tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lack {
    /// How long a thread has waited: that is counted all the same, from each wake-up of any thread on.
    Waits {
        /// What is missing.
        why: &'static str,
    },
    /// How much of a wait was throttling: [`crate::Time::throttled_ns`] stays 0.
    Throttling {
        /// What is missing.
        why: &'static str,
    },
    /// What KVM does for a machine: [`crate::Ledger::guest`] tells nothing.
    Guest {
        /// What is missing.
        why: String,
    },
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Waits { why } => write!(f, "waiting is counted at each wake-up, which costs more: {why}"),
            Self::Throttling { why } => write!(f, "waiting is not split into contention and throttling: {why}"),
            Self::Guest { why } => write!(f, "guest time and exits are not counted: {why}"),
        }
    }
}

// === impl Kernel ===

impl Kernel {
    /// Looks at this kernel. `machines` says whether that is of use which machines alone have.
    pub(crate) fn look(machines: bool) -> Result<(Self, Vec<Lack>), LoadError> {
        let mut kernel = Self {
            rss_stat: tracepoint::rss_stat()?,
            throttle: ThrottleFields::default(),
            waits: WaitFields::default(),
            kvm_exit: None,
            uncharged_ns: 0,
        };
        let mut lacks = Vec::new();
        // In a guest there are few wake-ups, and to read the kernel's types would take longer than all else.
        if machines {
            kernel.uncharged_ns = tick_ns().filter(|&tick| tick > SHORT_NS).unwrap_or(0);
            match Types::read() {
                Ok(types) => {
                    kernel.waits = types.waits;
                    match types.throttle {
                        Some(fields) => kernel.throttle = fields,
                        None => lacks.push(Lack::Throttling { why: NO_LIMITS }),
                    }
                }
                Err(why) => lacks.extend([Lack::Waits { why }, Lack::Throttling { why }]),
            }
            match tracepoint::kvm_exit() {
                Ok(fields) => kernel.kvm_exit = Some(fields),
                Err(error) => lacks.push(Lack::Guest { why: error.to_string() }),
            }
        }
        Ok((kernel, lacks))
    }
}

/// How far the kernel's ticks are apart, in ns: the resolution of the clock that they drive (`clock_getres(2)`).
fn tick_ns() -> Option<u32> {
    let tick = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).ok()?;
    u32::try_from(tick.tv_nsec()).ok()
}

/// What the kernel's type information says of how threads wait.
struct Types {
    waits: WaitFields,
    throttle: Option<ThrottleFields>,
}

impl Types {
    fn read() -> Result<Self, &'static str> {
        let types = fs::read(BTF).map_err(|_| "the kernel has no type information (CONFIG_DEBUG_INFO_BTF)")?;
        let types = Btf::parse(&types).ok_or("the kernel's type information can't be read")?;
        Ok(Self {
            waits: wait_fields(&types).ok_or("the kernel counts no thread's waiting (CONFIG_SCHED_INFO)")?,
            throttle: throttle_fields(&types),
        })
    }
}

fn wait_fields(types: &Btf<'_>) -> Option<WaitFields> {
    let info = types.offset("task_struct", "sched_info")?;
    Some(WaitFields {
        run_delay: info.checked_add(types.offset("sched_info", "run_delay")?)?,
        pcount: info.checked_add(types.offset("sched_info", "pcount")?)?,
    })
}

fn throttle_fields(types: &Btf<'_>) -> Option<ThrottleFields> {
    let entity = types.offset("task_struct", "se")?;
    Some(ThrottleFields {
        cfs_rq: entity.checked_add(types.offset("sched_entity", "cfs_rq")?)?,
        throttle_count: types.offset("cfs_rq", "throttle_count")?,
    })
}
