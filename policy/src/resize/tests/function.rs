//! A function in a plain model: CPU time on so many threads, time in which it waits, and a peak of memory.

use std::sync::Arc;
use std::time::Duration;

use crate::resize::{Change, Sizer};
use crate::{Amount, Mono, Resize, ResizeMode, Sample};

/// What one execution needs.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    pub(super) cpu: Duration,
    pub(super) threads: u32,
    pub(super) waits: Duration,
    pub(super) peak_mib: u32,
}

/// Executions one after the other, each with the amount that was determined by then.
pub(super) struct Runner {
    pub(super) settings: Arc<Resize>,
    pub(super) limit: Amount,
    pub(super) sizer: Sizer,
    pub(super) now: Mono,
    /// Between two executions.
    pub(super) every: Duration,
    pub(super) executions: u32,
    pub(super) killed: u32,
    /// Each with how many executions there were by then.
    pub(super) changes: Vec<(u32, Change)>,
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// Computes and nothing else.
pub(super) const COMPUTES: Needs = Needs {
    cpu: ms(400),
    threads: 1,
    waits: ms(0),
    peak_mib: 80,
};

/// Waits for others, nearly all of the time.
pub(super) const WAITS: Needs = Needs {
    cpu: ms(10),
    threads: 1,
    waits: ms(490),
    peak_mib: 80,
};

/// Some of each.
pub(super) const BOTH: Needs = Needs {
    cpu: ms(100),
    threads: 2,
    waits: ms(150),
    peak_mib: 200,
};

impl Needs {
    /// What comes of it with an amount. A thread that runs uses a whole CPU; a quota is used up in turn.
    pub(super) fn run(self, amount: Amount) -> Sample {
        let Self {
            cpu,
            threads,
            waits,
            peak_mib,
        } = self;
        let freely = cpu / threads;
        let within = cpu * 1000 / amount.cpu_millis;
        let oom_killed = peak_mib > amount.memory_mib;
        let ns = |time: Duration| u64::try_from(time.as_nanos()).unwrap();
        Sample {
            wall_ns: ns(waits + freely.max(within)),
            cpu_ns: ns(cpu),
            throttled_ns: ns(within.saturating_sub(freely)),
            wait_ns: 0,
            memory_peak_bytes: u64::from(peak_mib.min(amount.memory_mib)) << 20,
            oom_killed,
            amount,
        }
    }

    /// What an execution costs with an amount; nothing where it is killed.
    pub(super) fn cost(self, amount: Amount) -> Option<u128> {
        let sample = self.run(amount);
        (!sample.oom_killed).then(|| u128::from(sample.wall_ns) * u128::from(amount.price()))
    }
}

impl Runner {
    pub(super) fn new(first: (u32, u32)) -> Self {
        Self::with(
            first,
            Resize {
                mode: ResizeMode::Auto,
                ..Resize::default()
            },
        )
    }

    pub(super) fn with(first: (u32, u32), settings: Resize) -> Self {
        assert_eq!(settings.check(first.into()), Ok(()));
        Self {
            settings: Arc::new(settings),
            limit: (8000, 16_384).into(),
            sizer: Sizer::new(first.into(), Mono::ZERO),
            now: Mono::ZERO,
            every: Duration::from_secs(10),
            executions: 0,
            killed: 0,
            changes: Vec::new(),
        }
    }

    pub(super) fn amount(&self) -> Amount {
        self.sizer.target()
    }

    pub(super) fn run(&mut self, needs: Needs) -> Option<Change> {
        self.take(needs.run(self.amount()))
    }

    pub(super) fn take(&mut self, sample: Sample) -> Option<Change> {
        self.now += self.every;
        self.executions += 1;
        self.killed += u32::from(sample.oom_killed);
        let change = self.sizer.take(&self.settings, self.limit, &sample, self.now);
        self.changes.extend(change.map(|change| (self.executions, change)));
        change
    }

    pub(super) fn run_times(&mut self, times: u32, needs: Needs) {
        for _ in 0..times {
            self.run(needs);
        }
    }

    /// Until nothing has changed for this many executions; with how many it was right.
    pub(super) fn settle(&mut self, quiet: u32, mut needs: impl FnMut(u32) -> Needs) -> u32 {
        let last = |runner: &Self| runner.changes.last().map_or(0, |(executions, _)| *executions);
        while self.executions < last(self) + quiet {
            self.run(needs(self.executions));
        }
        last(self)
    }
}
