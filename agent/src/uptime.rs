//! The clock that nobody sets, and that goes on under the next agent: of what is kept as long as the host runs.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// The time since the host was booted, sleep included (CLOCK_BOOTTIME, clock_gettime(2)); 0 where the kernel does not say.
pub(crate) fn uptime() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
