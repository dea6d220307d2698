//! How fast machines and containers use what they use, from one sample to the next.

use std::collections::HashMap;
use std::time::SystemTime;

use stoker_proto::v1;

/// What was last measured of machines and containers.
#[derive(Debug, Default)]
pub(super) struct Rates(HashMap<String, Seen>);

/// What was last measured of one, and its rate up to then, once it was measured twice.
#[derive(Clone, Copy, Debug)]
struct Seen {
    usage: v1::Usage,
    rate: Option<Rate>,
}

/// Percent of one CPU over a time.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rate {
    /// That it ran.
    pub(super) cpu: f64,
    /// That it was runnable and waited.
    pub(super) wait: f64,
}

// === impl Rates ===

impl Rates {
    /// Takes the next samples. What was not measured again since keeps its rate, what is not among them is forgotten.
    pub(super) fn take(&mut self, samples: &[v1::UseSample]) {
        let now = |sample: &v1::UseSample| {
            let usage = sample.usage?;
            let seen = match self.0.get(&sample.name) {
                Some(last) if last.usage.measure_time == usage.measure_time => *last,
                last => Seen {
                    usage,
                    rate: last.and_then(|last| Rate::between(&last.usage, &usage)),
                },
            };
            Some((sample.name.clone(), seen))
        };
        self.0 = samples.iter().filter_map(now).collect();
    }

    /// Of a machine or container, by its name.
    pub(super) fn of(&self, name: &str) -> Option<Rate> {
        self.0.get(name)?.rate
    }
}

// === impl Rate ===

impl Rate {
    fn between(from: &v1::Usage, to: &v1::Usage) -> Option<Self> {
        let time = |usage: &v1::Usage| SystemTime::try_from(usage.measure_time?).ok();
        let took = time(to)?.duration_since(time(from)?).ok()?;
        if took.is_zero() {
            return None;
        }
        let percent = |from: u64, to: u64| to.saturating_sub(from) as f64 / took.as_nanos() as f64 * 100.0;
        Some(Self {
            cpu: percent(from.cpu_ns, to.cpu_ns),
            wait: percent(from.wait_ns, to.wait_ns),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_stays_until_it_is_measured_again() {
        let name = "machines/MA";
        let mut rates = Rates::default();
        let mut share = |seconds, cpu_ns| {
            let sample = v1::UseSample {
                name: name.into(),
                usage: Some(v1::Usage {
                    cpu_ns,
                    measure_time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
                    ..Default::default()
                }),
                ..Default::default()
            };
            rates.take(&[sample]);
            rates.of(name).map(|rate| rate.cpu)
        };
        assert_eq!(share(10, 0), None);
        assert_eq!(share(12, 500_000_000), Some(25.0));
        assert_eq!(share(12, 500_000_000), Some(25.0));
        assert_eq!(share(14, 1_500_000_000), Some(50.0));
        assert_eq!(share(13, 1_500_000_000), None, "a clock that was set back");
        rates.take(&[]);
        assert_eq!(rates.of(name), None);
    }
}
