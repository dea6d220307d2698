//! What this kernel has of what not every kernel has, found out before the programs are loaded.

use std::fmt;
use std::fs;

use stoker_ebpf_types::{KvmExitFields, RssStatFields, ThrottleFields};

use crate::btf::Btf;
use crate::error::LoadError;
use crate::tracepoint;

/// The kernel's own type information.
const BTF: &str = "/sys/kernel/btf/vmlinux";

/// What programs are loaded by: another kernel, or the same after a change of its modules, may give another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Kernel {
    pub(crate) rss_stat: RssStatFields,
    /// All zero where it is not known.
    pub(crate) throttle: ThrottleFields,
    pub(crate) kvm_exit: Option<KvmExitFields>,
}

/// Something that is not counted here, since this kernel does not tell it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Lack {
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
            kvm_exit: None,
        };
        let mut lacks = Vec::new();
        if machines {
            match throttle() {
                Ok(fields) => kernel.throttle = fields,
                Err(why) => lacks.push(Lack::Throttling { why }),
            }
            match tracepoint::kvm_exit() {
                Ok(fields) => kernel.kvm_exit = Some(fields),
                Err(error) => lacks.push(Lack::Guest { why: error.to_string() }),
            }
        }
        Ok((kernel, lacks))
    }
}

fn throttle() -> Result<ThrottleFields, &'static str> {
    let bytes = fs::read(BTF).map_err(|_| "the kernel has no type information (CONFIG_DEBUG_INFO_BTF)")?;
    let btf = Btf::parse(&bytes).ok_or("the kernel's type information can't be read")?;
    throttle_fields(&btf).ok_or("the kernel limits no cgroup's CPU time (CONFIG_CFS_BANDWIDTH)")
}

fn throttle_fields(btf: &Btf<'_>) -> Option<ThrottleFields> {
    let entity = btf.offset("task_struct", "se")?;
    Some(ThrottleFields {
        cfs_rq: entity.checked_add(btf.offset("sched_entity", "cfs_rq")?)?,
        throttle_count: btf.offset("cfs_rq", "throttle_count")?,
    })
}
