//! Alarms: user space is told when a subject has used so much CPU time.

/// What `ALARMS` holds for a slot.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Alarm {
    /// The generation of the slot's owner whose alarm it is: see [`Subject::generation`](crate::Subject::generation).
    pub generation: u64,
    /// It is told once its own cgroup has used so much in all, in ns: as [`Times::cpu_ns`](crate::Times::cpu_ns).
    pub at_ns: u64,
}

impl Alarm {
    /// An `at_ns` at which nothing is told.
    pub const NEVER: u64 = u64::MAX;
}

/// A record of `RANG`: an alarm was due. It is not set any more.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rang {
    /// The slot of the subject.
    pub slot: u32,
    /// Its generation.
    pub generation: u32,
}
