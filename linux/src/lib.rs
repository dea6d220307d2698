//! What host and guest read and set through the kernel's files, each in one way. How it is used, as which limits are set,
//! is for its users to say. All of it blocks.

mod cgroup;
mod cpu_max;
#[cfg(feature = "kvm")]
pub mod kvm;
pub mod memory;
pub mod pressure;
pub mod sched;
pub mod users;

pub use cgroup::{CPU_PERIOD_US, Cgroup, CgroupError, KILL_LIMIT, cpu_weight};
pub use cpu_max::CpuMax;
