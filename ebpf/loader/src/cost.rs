//! What the programs cost.

use std::os::fd::OwnedFd;
use std::time::Duration;

/// As long as it lives the kernel measures how long each eBPF program runs (`BPF_ENABLE_STATS`); that itself costs
/// some tens of ns a run.
#[derive(Debug)]
pub struct Measuring {
    pub(crate) _enabled: OwnedFd,
}

/// What one program has cost since it was loaded, while somebody [measured](Measuring).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramCost {
    /// Its name: `sched_stat_runtime`, `sched_switch`, `sched_wakeup`, `sched_wakeup_new`, `kvm_entry`, `rss_stat`, `kvm_exit`,
    /// `settle`, `account`; of these as many as are needed on this kernel.
    pub program: &'static str,
    /// The kernel's number of it, as in `bpftool prog show id`.
    pub id: u32,
    /// How often it ran.
    pub runs: u64,
    /// For how long in all.
    pub run_time: Duration,
    /// How many instructions the kernel looked at to verify it, of a million that it allows; from kernel 5.16 on.
    pub verified_instructions: Option<u32>,
}
