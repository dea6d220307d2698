//! The time that is left until all is made that a command takes.
//!
//! Each part of it has a cost: what it took on one machine, to compare it with the others. What the parts that are done took on this
//! machine says how fast this one is, the more so the more is done. So does a part that takes longer than it should.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How much of the estimate is taken on trust: as if parts of this cost had taken just that.
const TRUST: Duration = Duration::from_secs(30);

/// What is always said to be left of a part that takes longer than it should, of what it should take.
const LEAST: f64 = 0.1;

/// The parts of what a command has to make.
#[derive(Debug, Default)]
struct Parts(Vec<Part>);

#[derive(Debug)]
struct Part {
    name: &'static str,
    cost: Duration,
    state: State,
}

#[derive(Debug, Clone, Copy)]
enum State {
    ToDo,
    Begun(Instant),
    Took(Duration),
}

/// Those of this process, which does one thing, for one terminal.
static PARTS: Mutex<Parts> = Mutex::new(Parts(Vec::new()));

/// A part will have to be made, unless that was said before. `cost` is what it takes where the costs of all parts were measured: 2
/// CPUs with nothing else to do.
pub(crate) fn expect(name: &'static str, cost: Duration) {
    parts(|parts| parts.expect(name, cost));
}

/// A part begins, and what was begun before is done. Answers whether it was expected.
pub(crate) fn begin(name: &'static str) -> bool {
    parts(|parts| parts.begin(name, Instant::now()))
}

/// All that was begun is done.
pub(crate) fn end() {
    parts(|parts| parts.end(Instant::now()));
}

/// What is left in words, `about 4 min left`; nothing where nothing is expected.
pub(crate) fn words() -> String {
    parts(|parts| parts.left(Instant::now()).map_or_else(String::new, said))
}

fn parts<T>(work: impl FnOnce(&mut Parts) -> T) -> T {
    work(&mut PARTS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A duration as exactly as it can be known.
fn said(left: Duration) -> String {
    match left.as_secs() {
        0..=95 => format!("about {} s left", left.as_secs().div_ceil(10).max(1) * 10),
        seconds => format!("about {} min left", (seconds + 30) / 60),
    }
}

// === impl Parts ===

impl Parts {
    fn expect(&mut self, name: &'static str, cost: Duration) {
        if !self.0.iter().any(|part| part.name == name) {
            self.0.push(Part {
                name,
                cost,
                state: State::ToDo,
            });
        }
    }

    fn begin(&mut self, name: &str, now: Instant) -> bool {
        self.end(now);
        let part = self.0.iter_mut().find(|part| part.name == name);
        part.map(|part| part.state = State::Begun(now)).is_some()
    }

    fn end(&mut self, now: Instant) {
        for part in &mut self.0 {
            if let State::Begun(since) = part.state {
                part.state = State::Took(now.duration_since(since));
            }
        }
    }

    /// How much longer things take here than where the costs were measured.
    fn slowness(&self, now: Instant) -> f64 {
        let (mut took, mut cost) = (TRUST, TRUST);
        for part in &self.0 {
            if let State::Took(time) = part.state {
                took += time;
                cost += part.cost;
            }
        }
        let slowness = |took: Duration, cost: Duration| took.as_secs_f64() / cost.as_secs_f64();
        let done = slowness(took, cost);
        let begun = self.0.iter().filter_map(|part| match part.state {
            State::Begun(since) => Some(slowness(took + now.duration_since(since), cost + part.cost)),
            _ => None,
        });
        begun.fold(done, f64::max)
    }

    /// None where nothing is to be made any more.
    fn left(&self, now: Instant) -> Option<Duration> {
        let slowness = self.slowness(now);
        let of = |part: &Part| {
            let whole = part.cost.mul_f64(slowness);
            match part.state {
                State::ToDo => Some(whole),
                State::Begun(since) => Some(
                    whole
                        .saturating_sub(now.duration_since(since))
                        .max(whole.mul_f64(LEAST)),
                ),
                State::Took(_) => None,
            }
        };
        let left: Vec<Duration> = self.0.iter().filter_map(of).collect();
        (!left.is_empty()).then(|| left.iter().sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn at_first_the_costs_are_believed() {
        let (mut parts, now) = (Parts::default(), Instant::now());
        assert_eq!(parts.left(now), None, "nothing is to be made");
        parts.expect("a", 40 * S);
        parts.expect("b", 60 * S);
        parts.expect("a", 99 * S);
        assert_eq!(parts.left(now), Some(100 * S));
        assert!(parts.begin("a", now));
        assert_eq!(parts.left(now + 10 * S), Some(90 * S));
    }

    #[test]
    fn a_machine_that_was_slow_is_taken_for_slow() {
        let (mut parts, now) = (Parts::default(), Instant::now());
        parts.expect("a", 30 * S);
        parts.expect("b", 60 * S);
        parts.begin("a", now);
        parts.begin("b", now + 90 * S);
        // 30 on trust and 90 here, for 60: twice as slow.
        assert_eq!(parts.left(now + 90 * S), Some(120 * S));
        assert_eq!(parts.left(now + 150 * S), Some(60 * S));
        parts.end(now + 210 * S);
        assert_eq!(parts.left(now + 210 * S), None);
    }

    #[test]
    fn what_takes_longer_than_it_should_is_never_said_to_be_over() {
        let (mut parts, now) = (Parts::default(), Instant::now());
        parts.expect("a", 30 * S);
        parts.begin("a", now);
        // 30 on trust and 300 here, for 60, and a tenth of what that makes of it.
        assert_eq!(parts.left(now + 300 * S), Some(Duration::from_millis(16_500)));
        // What nobody expected changes nothing but that.
        assert!(!parts.begin("other", now + 300 * S));
        assert_eq!(parts.left(now + 300 * S), None);
    }

    #[test]
    fn it_is_said_as_exactly_as_it_is_known() {
        assert_eq!(said(Duration::ZERO), "about 10 s left");
        assert_eq!(said(41 * S), "about 50 s left");
        assert_eq!(said(95 * S), "about 100 s left");
        assert_eq!(said(100 * S), "about 2 min left");
        assert_eq!(said(449 * S), "about 7 min left");
    }
}
