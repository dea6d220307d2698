use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A moment on the monotonic clock: the time since some fixed start.
pub type Mono = Duration;

/// The moment at which something happens, from outside: neither clock is read in this crate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Now {
    /// Time since some fixed start; never goes back. All waiting is measured by it.
    pub mono: Mono,
    /// Time since 1970-01-01 UTC; may jump. Only for ids and for what people read.
    pub wall: Duration,
}
