//! One that wakes up now and then for a little work, and those that compute without pause: what benches of scheduling measure with,
//! as processes and as functions in machines.

use std::hint::black_box;
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, ClockNanosleepFlags, clock_gettime, clock_nanosleep};

/// How long one that wakes up works, by the clock and on a CPU of its own.
pub const WORK: Duration = Duration::from_micros(200);

/// How often it wakes up, a little sooner or later at random, so that it does not keep time with the scheduler.
pub const EVERY: Duration = Duration::from_millis(50);
const JITTER: Duration = Duration::from_millis(5);

/// How often one that computes without pause looks at the clock, for each time that the other works.
const LOOKS: u64 = 8;

/// What one that computes without pause has done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Hog {
    /// The CPU time it had, in ns.
    pub cpu_ns: u64,
    /// Turns of its loop.
    pub turns: u64,
    /// The longest time in which it did not run, in ns.
    pub longest_wait_ns: u64,
}

/// How many turns of the loop take [`WORK`] on a CPU of their own: the most of several tries.
///
/// # Errors
///
/// As clock_gettime(2).
pub fn calibrate() -> nix::Result<u64> {
    const TURNS: u64 = 1 << 16;
    let mut quickest = u64::MAX;
    for _ in 0..50 {
        let start = now_ns()?;
        work(TURNS);
        quickest = quickest.min(now_ns()? - start);
    }
    let turns = WORK.as_nanos() as u64 * TURNS / quickest.max(1);
    Ok(turns.max(LOOKS))
}

/// Works for so many turns of a loop that touches nothing but the processor.
pub fn work(turns: u64) {
    let mut sum = 0_u64;
    for turn in 0..turns {
        sum = black_box(sum.wrapping_add(turn));
    }
}

/// The monotonic clock, in ns.
///
/// # Errors
///
/// As clock_gettime(2).
pub fn now_ns() -> nix::Result<u64> {
    ns_of(ClockId::CLOCK_MONOTONIC)
}

fn ns_of(clock: ClockId) -> nix::Result<u64> {
    Ok(Duration::from(clock_gettime(clock)?).as_nanos() as u64)
}

/// Sleeps until a moment of the monotonic clock, in ns.
///
/// # Errors
///
/// As clock_nanosleep(2).
pub fn sleep_until(ns: u64) -> nix::Result<()> {
    let time = TimeSpec::from(Duration::from_nanos(ns));
    clock_nanosleep(ClockId::CLOCK_MONOTONIC, ClockNanosleepFlags::TIMER_ABSTIME, &time).map(drop)
}

/// The moments at which somebody wakes up, in ns, from the first until one work is over before the end.
pub fn dues(first_ns: u64, end_ns: u64) -> impl Iterator<Item = u64> {
    let every = EVERY.as_nanos() as u64;
    let mut random = first_ns | 1;
    (0..)
        .map(move |count: u64| {
            // xorshift64 (Marsaglia, 2003).
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            first_ns + count * every + random % JITTER.as_nanos() as u64
        })
        .take_while(move |due| due + every < end_ns)
}

/// Computes without pause until a moment of the monotonic clock, in ns.
///
/// # Errors
///
/// As clock_gettime(2).
pub fn hog(turns: u64, end_ns: u64) -> nix::Result<Hog> {
    let cpu_start = ns_of(ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    let mut hog = Hog::default();
    let chunk = turns / LOOKS;
    let mut last = now_ns()?;
    while last < end_ns {
        work(chunk);
        let now = now_ns()?;
        hog.turns += chunk;
        hog.longest_wait_ns = hog.longest_wait_ns.max(now - last);
        last = now;
    }
    hog.cpu_ns = ns_of(ClockId::CLOCK_THREAD_CPUTIME_ID)? - cpu_start;
    Ok(hog)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wake_ups_are_about_as_far_apart_and_end_before_the_end() {
        let (first, end) = (1_025_000_000, 3_000_000_000);
        let dues: Vec<_> = dues(first, end).collect();
        assert!((37..=40).contains(&dues.len()), "{}", dues.len());
        let apart = dues.windows(2).map(|pair| pair[1] - pair[0]);
        assert!(apart.into_iter().all(|ns| (45_000_000..=55_000_000).contains(&ns)));
        assert!(dues.iter().all(|due| (first..2_950_000_000).contains(due)));
    }

    #[test]
    fn a_hog_computes_to_its_end() {
        let turns = calibrate().unwrap();
        // On a busy machine it may not run for a while.
        let end = now_ns().unwrap() + 500_000_000;
        let hog = hog(turns, end).unwrap();
        assert!(now_ns().unwrap() >= end);
        assert!(hog.turns >= turns / LOOKS && hog.cpu_ns > 0 && hog.longest_wait_ns > 0);
    }
}
