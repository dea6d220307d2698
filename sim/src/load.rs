//! What machines want of the CPUs, over time.

use std::collections::BTreeMap;
use std::time::Duration;

/// How a machine's wish for CPU goes.
#[derive(Clone, Debug, PartialEq)]
pub enum Load {
    /// Nothing at all.
    Idle,
    /// Short work every now and then, as a service that is called: all its vCPUs for one second of each minute.
    Web,
    /// Long work a few times a day, as a nightly job: all its vCPUs for half an hour of each six.
    Batch,
    /// All that it can have, always.
    Hog,
    /// As it was recorded.
    Recorded(Recording),
}

/// What machines wanted, as it was recorded: from each time on so many millicores, by machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recording {
    /// Of each machine, in the order of time.
    machines: Vec<Vec<(Duration, u32)>>,
    /// When the last one ends; then all begin anew.
    length: Duration,
}

/// A recording that can't be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordingError {
    /// A line of it.
    #[error("line {line} is not `SECONDS,MACHINE,MILLICORES`, as `12.5,machine-1,300`: {text:?}")]
    Line {
        /// From 1.
        line: usize,
        /// What it is.
        text: String,
    },
    /// There is nothing in it.
    #[error("there is no line in the recording, or none after its first moment")]
    Empty,
}

// === impl Load ===

impl Load {
    /// The loads that are made up.
    pub const MADE_UP: [Self; 4] = [Self::Idle, Self::Web, Self::Batch, Self::Hog];

    /// What people call it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Web => "web",
            Self::Batch => "batch",
            Self::Hog => "hog",
            Self::Recorded(_) => "recorded",
        }
    }

    /// After what time it begins anew.
    pub(crate) fn period(&self) -> Duration {
        match self {
            Self::Idle | Self::Hog => Duration::ZERO,
            Self::Web => Duration::from_secs(60),
            Self::Batch => Duration::from_secs(6 * 3600),
            Self::Recorded(recording) => recording.length,
        }
    }

    /// What the `nth` machine of this load wants at a time, of the millicores of all its vCPUs.
    pub(crate) fn wants(&self, nth: usize, at: Duration, full_millis: u32) -> u32 {
        let within = |busy: Duration| {
            let period = self.period().as_nanos().max(1);
            at.as_nanos() % period < busy.as_nanos()
        };
        match self {
            Self::Idle => 0,
            Self::Hog => full_millis,
            Self::Web if within(Duration::from_secs(1)) => full_millis,
            Self::Batch if within(Duration::from_secs(1800)) => full_millis,
            Self::Web | Self::Batch => 0,
            Self::Recorded(recording) => recording.wants(nth, at).min(full_millis),
        }
    }
}

// === impl Recording ===

impl Recording {
    /// Reads lines of `SECONDS,MACHINE,MILLICORES`; those that are empty or begin with `#` are none. Machines may be mixed, the
    /// times of one may not go back.
    ///
    /// # Errors
    /// The first line that is not so.
    pub fn parse(text: &str) -> Result<Self, RecordingError> {
        let mut machines: BTreeMap<&str, Vec<(Duration, u32)>> = BTreeMap::new();
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let wrong = || RecordingError::Line {
                line: number + 1,
                text: line.chars().take(80).collect(),
            };
            let mut parts = line.split(',').map(str::trim);
            let (Some(at), Some(machine), Some(millis), None) =
                (parts.next(), parts.next(), parts.next(), parts.next())
            else {
                return Err(wrong());
            };
            let seconds: f64 = at.parse().map_err(|_| wrong())?;
            let at = Duration::try_from_secs_f64(seconds).map_err(|_| wrong())?;
            let millis = millis.parse().map_err(|_| wrong())?;
            let wants = machines.entry(machine).or_default();
            if wants.last().is_some_and(|(before, _)| *before > at) {
                return Err(wrong());
            }
            wants.push((at, millis));
        }
        let last = |wants: &Vec<(Duration, u32)>| wants.last().map(|(at, _)| *at);
        let length = machines.values().filter_map(last).max().unwrap_or_default();
        if length.is_zero() {
            return Err(RecordingError::Empty);
        }
        Ok(Self {
            machines: machines.into_values().collect(),
            length,
        })
    }

    fn wants(&self, nth: usize, at: Duration) -> u32 {
        let Some(wants) = nth
            .checked_rem(self.machines.len())
            .and_then(|nth| self.machines.get(nth))
        else {
            return 0;
        };
        let nanos = at.as_nanos() % self.length.as_nanos().max(1);
        let before = wants.partition_point(|(from, _)| from.as_nanos() <= nanos);
        let found = before.checked_sub(1).and_then(|at| wants.get(at));
        found.map_or(0, |(_, millis)| *millis)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn loads_that_are_made_up_repeat() {
        let of = |load: &Load, at| load.wants(0, seconds(at), 2000);
        assert_eq!(
            [of(&Load::Web, 0), of(&Load::Web, 1), of(&Load::Web, 60)],
            [2000, 0, 2000]
        );
        assert_eq!(
            [of(&Load::Batch, 1799), of(&Load::Batch, 1800), of(&Load::Batch, 21_600)],
            [2000, 0, 2000]
        );
        assert_eq!((of(&Load::Hog, 7), of(&Load::Idle, 7)), (2000, 0));
    }

    #[test]
    fn what_was_recorded_is_wanted_again_and_again() {
        let recording = Recording::parse("# a comment\n0,a,100\n5,a,0\n\n2.5,b,3000\n10,b,0\n").unwrap();
        let load = Load::Recorded(recording);
        let of = |nth, ms| load.wants(nth, Duration::from_millis(ms), 2000);
        assert_eq!([of(0, 0), of(0, 4999), of(0, 5000), of(0, 10_000)], [100, 100, 0, 100]);
        assert_eq!(
            [of(1, 0), of(1, 2500), of(1, 9999)],
            [0, 2000, 2000],
            "no more than it has"
        );
        assert_eq!(of(2, 0), 100, "there are two");
        assert_eq!((load.name(), load.period()), ("recorded", seconds(10)));
    }

    #[test]
    fn lines_that_are_wrong_are_named() {
        for (text, line) in [
            ("0,a", 1),
            ("0,a,1\nx,a,1", 2),
            ("0,a,1\n1,a,-1", 2),
            ("5,a,1\n4,a,1", 2),
            ("-1,a,1", 1),
            ("nan,a,1", 1),
            ("0,a,1,2", 1),
        ] {
            let error = Recording::parse(text).unwrap_err();
            assert!(
                matches!(error, RecordingError::Line { line: at, .. } if at == line),
                "{text:?}: {error}"
            );
        }
        assert_eq!(Recording::parse("0,a,5"), Err(RecordingError::Empty));
    }
}
