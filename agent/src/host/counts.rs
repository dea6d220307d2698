//! What is counted of invocations and machines, for Prometheus.

use std::time::Duration;

use stoker_proto::v1::machine_end::Reason;
use stoker_proto::v1::placement::Source;
use tonic::Code;

use super::error::InvokeError;
use super::memory::MemoryFull;
use crate::metrics::{Counters, Histograms, Label};

/// Counts since the agent's start.
#[derive(Debug, Default)]
pub struct Counts {
    /// Invocations that had a place, and what came of them.
    pub invocations: Counters<Invocation>,
    /// Invocations that did not run.
    pub refusals: Counters<Refusal>,
    /// From an invocation's arrival to its answer, by where it ran.
    pub durations: Histograms<Source>,
    /// The parts of that.
    pub phases: Histograms<Phase>,
    /// From a machine's start to its guest's first answer.
    pub boots: Histograms<()>,
    /// Machines that ended unasked before that.
    pub boot_failures: Counters<Reason>,
    /// All machines that ended.
    pub ends: Counters<Reason>,
    /// Changes of the sizes of machines that accounts launched.
    pub resizes: Counters<ResizedBy>,
    /// From such a change until the guest had all of it.
    pub resize_durations: Histograms<()>,
    /// Changes of what balloons are to have.
    pub balloons: Counters<BalloonBy>,
    /// From the moment at which a machine's balance of credits fell to another level until the machine ran by it.
    pub cpu_delays: Histograms<()>,
}

/// What came of an invocation that had a place, and which.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invocation {
    /// What came of it.
    pub outcome: Outcome,
    /// Where its container came from.
    pub source: Source,
}

/// What came of an invocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The function answered.
    Success,
    /// The function failed, which is an answer too.
    FunctionError,
    /// Its machine ended before there was an answer; it may have run.
    Lost,
}

/// Why an invocation did not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// As many wait on this host as may.
    QueueFull,
    /// As many of its account wait as may.
    AccountQueueFull,
    /// No memory for its message on this host.
    MemoryFull,
    /// Its account's messages take all the memory that they may.
    AccountMemoryFull,
    /// It waited too long.
    QueueTimeout,
    /// No machine could hold it.
    TooLarge,
    /// Machines of its runtime do not boot.
    BootFailing,
    /// Machines ended before it could begin in them.
    MachineLost,
    /// Its container could not be made.
    ContainerFailed,
    /// Its function was deleted meanwhile.
    FunctionDeleted,
    /// The id of its request was another's.
    RequestIdReused,
    /// The id of its request could not be kept.
    NotKept,
    /// It had run before, and its answer was streamed.
    AlreadyStreamed,
    /// The agent is shutting down.
    Draining,
    /// Its caller left before it had a place.
    CallerLeft,
    /// A field of the request is wrong.
    InvalidArgument,
    /// There is no such function.
    FunctionNotFound,
}

/// Who changed a machine's size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResizedBy {
    /// One of its thresholds.
    Threshold,
    /// Somebody who asked for it.
    Request,
}

/// Why a balloon is to have something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonBy {
    /// The host is short of memory.
    Pressed,
    /// The host has enough.
    Eased,
    /// The machine's guest is short of it, or silent.
    Short,
}

/// A part of an invocation's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Waiting for a place.
    Wait,
    /// Bringing the code into the machine, where a container was made.
    Code,
    /// Making the container and initialising the function in it, likewise.
    Init,
    /// From handing it to the container to its answer.
    Run,
}

/// The parts of an invocation's time as the agent measured them; they add up to `total`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Latency {
    pub(super) total: Duration,
    pub(super) wait: Duration,
    pub(super) code: Duration,
    pub(super) init: Duration,
    pub(super) run: Duration,
}

// === impl Counts ===

impl Counts {
    /// An invocation has its answer.
    pub(super) fn answered(&self, source: Source, failed: bool, latency: &Latency) {
        let outcome = match failed {
            true => Outcome::FunctionError,
            false => Outcome::Success,
        };
        self.invocations.count(Invocation { outcome, source });
        self.durations.observe(source, latency.total);
        self.phases.observe(Phase::Wait, latency.wait);
        if source != Source::IdleContainer {
            self.phases.observe(Phase::Code, latency.code);
            self.phases.observe(Phase::Init, latency.init);
        }
        self.phases.observe(Phase::Run, latency.run);
    }

    /// An invocation ends without an answer; where it has a place still, it may have run.
    pub(super) fn failed(&self, place: Option<Source>, error: &InvokeError) {
        match (place, error) {
            (Some(source), InvokeError::MachineLost { .. }) => self.invocations.count(Invocation {
                outcome: Outcome::Lost,
                source,
            }),
            // Counted by who found that there is none.
            (_, InvokeError::MemoryFull(_)) => {}
            (_, error) => self.refusals.count(error.into()),
        }
    }

    /// The API did not let an invocation in, for this reason.
    pub(crate) fn not_let_in(&self, code: Code) {
        match code {
            Code::NotFound => self.refusals.count(Refusal::FunctionNotFound),
            Code::InvalidArgument => self.refusals.count(Refusal::InvalidArgument),
            // For lack of memory, which is counted there.
            _ => {}
        }
    }
}

// === labels ===

impl Label for Invocation {
    #[allow(
        clippy::indexing_slicing,
        reason = "where an index were too high, it would not compile"
    )]
    const ALL: &'static [Self] = &{
        let mut all = [Self {
            outcome: Outcome::Success,
            source: Source::Unspecified,
        }; Outcome::ALL.len() * Source::ALL.len()];
        let mut at = 0;
        while at < all.len() {
            all[at] = Self {
                outcome: Outcome::ALL[at / Source::ALL.len()],
                source: Source::ALL[at % Source::ALL.len()],
            };
            at += 1;
        }
        all
    };

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let outcome = match self.outcome {
            Outcome::Success => "success",
            Outcome::FunctionError => "function_error",
            Outcome::Lost => "lost",
        };
        let mut labels = vec![("result", outcome)];
        labels.extend(self.source.labels());
        labels
    }
}

impl Outcome {
    const ALL: [Self; 3] = [Self::Success, Self::FunctionError, Self::Lost];
}

impl Label for Source {
    const ALL: &'static [Self] = &[
        Self::IdleContainer,
        Self::ActiveMachine,
        Self::WarmingMachine,
        Self::NewMachine,
    ];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let source = match self {
            Self::Unspecified => "unknown",
            Self::IdleContainer => "idle_container",
            Self::ActiveMachine => "active_machine",
            Self::WarmingMachine => "warming_machine",
            Self::NewMachine => "new_machine",
        };
        vec![("source", source)]
    }
}

impl Label for Refusal {
    const ALL: &'static [Self] = &[
        Self::QueueFull,
        Self::AccountQueueFull,
        Self::MemoryFull,
        Self::AccountMemoryFull,
        Self::QueueTimeout,
        Self::TooLarge,
        Self::BootFailing,
        Self::MachineLost,
        Self::ContainerFailed,
        Self::FunctionDeleted,
        Self::RequestIdReused,
        Self::NotKept,
        Self::AlreadyStreamed,
        Self::Draining,
        Self::CallerLeft,
        Self::InvalidArgument,
        Self::FunctionNotFound,
    ];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let reason = match self {
            Self::QueueFull => "queue_full",
            Self::AccountQueueFull => "account_queue_full",
            Self::MemoryFull => "memory_full",
            Self::AccountMemoryFull => "account_memory_full",
            Self::QueueTimeout => "queue_timeout",
            Self::TooLarge => "too_large",
            Self::BootFailing => "boot_failing",
            Self::MachineLost => "machine_lost",
            Self::ContainerFailed => "container_failed",
            Self::FunctionDeleted => "function_deleted",
            Self::RequestIdReused => "request_id_reused",
            Self::NotKept => "not_kept",
            Self::AlreadyStreamed => "already_streamed",
            Self::Draining => "draining",
            Self::CallerLeft => "caller_left",
            Self::InvalidArgument => "invalid_argument",
            Self::FunctionNotFound => "function_not_found",
        };
        vec![("reason", reason)]
    }
}

impl From<&InvokeError> for Refusal {
    fn from(error: &InvokeError) -> Self {
        match error {
            InvokeError::QueueFull { .. } => Self::QueueFull,
            InvokeError::AccountQueueFull { .. } => Self::AccountQueueFull,
            InvokeError::MemoryFull(full) => full.into(),
            InvokeError::QueueTimeout { .. } => Self::QueueTimeout,
            InvokeError::TooLarge { .. } => Self::TooLarge,
            InvokeError::BootFailing { .. } => Self::BootFailing,
            InvokeError::MachineLost { .. } => Self::MachineLost,
            InvokeError::Streamed => Self::AlreadyStreamed,
            InvokeError::Container { .. } => Self::ContainerFailed,
            InvokeError::FunctionDeleted => Self::FunctionDeleted,
            InvokeError::RequestReused => Self::RequestIdReused,
            InvokeError::NotKept { .. } => Self::NotKept,
            InvokeError::Draining => Self::Draining,
            InvokeError::CallerLeft => Self::CallerLeft,
        }
    }
}

impl From<&MemoryFull> for Refusal {
    fn from(full: &MemoryFull) -> Self {
        match full {
            MemoryFull::Host { .. } => Self::MemoryFull,
            MemoryFull::Account { .. } => Self::AccountMemoryFull,
        }
    }
}

impl Label for Phase {
    const ALL: &'static [Self] = &[Self::Wait, Self::Code, Self::Init, Self::Run];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let phase = match self {
            Self::Wait => "wait",
            Self::Code => "code",
            Self::Init => "init",
            Self::Run => "run",
        };
        vec![("phase", phase)]
    }
}

impl Label for ResizedBy {
    const ALL: &'static [Self] = &[Self::Threshold, Self::Request];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let by = match self {
            Self::Threshold => "threshold",
            Self::Request => "request",
        };
        vec![("by", by)]
    }
}

impl Label for BalloonBy {
    const ALL: &'static [Self] = &[Self::Pressed, Self::Eased, Self::Short];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let by = match self {
            Self::Pressed => "pressed",
            Self::Eased => "eased",
            Self::Short => "short",
        };
        vec![("by", by)]
    }
}

impl Label for Reason {
    const ALL: &'static [Self] = &[
        Self::Stopped,
        Self::GuestOff,
        Self::GuestPanic,
        Self::GuestHung,
        Self::Killed,
        Self::VmmError,
        Self::RuntimeFailed,
        Self::OutOfMemory,
        Self::BootTimedOut,
        Self::Lost,
        Self::ScratchFailed,
        Self::ProgramEnded,
        Self::ProgramFailed,
    ];

    fn labels(self) -> Vec<(&'static str, &'static str)> {
        let reason = match self {
            Self::Unspecified => "unknown",
            Self::Stopped => "stopped",
            Self::GuestOff => "guest_off",
            Self::GuestPanic => "guest_panic",
            Self::GuestHung => "guest_hung",
            Self::Killed => "killed",
            Self::VmmError => "vmm_error",
            Self::RuntimeFailed => "runtime_failed",
            Self::OutOfMemory => "out_of_memory",
            Self::BootTimedOut => "boot_timed_out",
            Self::Lost => "lost",
            Self::ScratchFailed => "scratch_failed",
            Self::ProgramEnded => "program_ended",
            Self::ProgramFailed => "program_failed",
        };
        vec![("reason", reason)]
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn are_distinct<L: Label>() {
        let labels: BTreeSet<_> = L::ALL.iter().map(|label| label.labels()).collect();
        assert_eq!(labels.len(), L::ALL.len(), "{labels:?}");
    }

    #[test]
    fn labels_are_distinct_and_none_is_missing() {
        are_distinct::<Invocation>();
        are_distinct::<Refusal>();
        are_distinct::<Phase>();
        are_distinct::<ResizedBy>();
        are_distinct::<BalloonBy>();
        let named = |name: &str| vec![name.to_lowercase()];
        let values = |labels: Vec<(&str, &str)>| {
            labels
                .into_iter()
                .map(|(_, value)| value.to_owned())
                .collect::<Vec<_>>()
        };
        for number in 1..100 {
            if let Ok(reason) = Reason::try_from(number) {
                assert!(Reason::ALL.contains(&reason), "{reason:?}");
                assert_eq!(values(reason.labels()), named(reason.as_str_name()));
            }
            if let Ok(source) = Source::try_from(number) {
                assert!(Source::ALL.contains(&source), "{source:?}");
                assert_eq!(values(source.labels()), named(source.as_str_name()));
            }
        }
    }

    #[test]
    fn code_and_init_are_of_containers_that_were_made() {
        let counts = Counts::default();
        let ms = Duration::from_millis;
        let latency = Latency {
            total: ms(10),
            wait: ms(1),
            code: ms(2),
            init: ms(3),
            run: ms(4),
        };
        counts.answered(Source::IdleContainer, false, &latency);
        counts.answered(Source::NewMachine, true, &latency);
        let observed = Phase::ALL.iter().map(|phase| counts.phases.count(*phase));
        assert_eq!(observed.collect::<Vec<_>>(), [2, 1, 1, 2]);
        assert_eq!(counts.durations.count(Source::NewMachine), 1);
        let count = |outcome, source| counts.invocations.get(Invocation { outcome, source });
        assert_eq!(count(Outcome::Success, Source::IdleContainer), 1);
        assert_eq!(count(Outcome::FunctionError, Source::NewMachine), 1);
    }

    #[test]
    fn what_had_a_place_may_have_run_and_what_had_none_did_not() {
        let counts = Counts::default();
        let lost = InvokeError::MachineLost { detail: String::new() };
        counts.failed(Some(Source::ActiveMachine), &lost);
        counts.failed(None, &lost);
        counts.failed(Some(Source::IdleContainer), &InvokeError::Draining);
        let outcome = Outcome::Lost;
        let source = Source::ActiveMachine;
        assert_eq!(counts.invocations.get(Invocation { outcome, source }), 1);
        assert_eq!(counts.refusals.get(Refusal::MachineLost), 1);
        assert_eq!(counts.refusals.get(Refusal::Draining), 1);
        counts.failed(None, &MemoryFull::Host { limit: 1 }.into());
        assert_eq!(
            counts.refusals.get(Refusal::MemoryFull),
            0,
            "it was counted where it was found"
        );
    }
}
