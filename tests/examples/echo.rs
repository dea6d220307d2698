//! A `provided` function that answers what it is asked: the least that a function can be, so that what is measured with it is
//! everything else. With the handler `exit-at-init`, `exit-in-call` or `exit-after-answer` it ends there. With `counts` it does
//! as [`stoker_tests::code::COUNTS`]. With `works` it works for a while, and answers how much CPU time it has used since its
//! last answer.

use std::time::{Duration, Instant, SystemTime};

use nix::time::{ClockId, clock_gettime};
use stoker_tests::runtime_api::RuntimeApi;

/// How long `works` works for a call where nothing disturbs it.
const WORK: Duration = Duration::from_millis(2);
/// How often it is measured how much work takes that.
const TRIES: u32 = 20;
/// Steps of the work that are measured with.
const STEPS: u64 = 100_000;

fn main() -> anyhow::Result<()> {
    let handler = std::env::var("_HANDLER").unwrap_or_default();
    if handler == "exit-at-init" {
        return Ok(());
    }
    let steps = if handler == "works" { steps_of_a_call() } else { 0 };
    let mut api = RuntimeApi::connect()?;
    let (container, mut run) = (SystemTime::UNIX_EPOCH.elapsed()?.as_nanos(), 0);
    let mut told = cpu_time()?;
    loop {
        let invocation = api.next_invocation()?;
        let mut payload = invocation.payload;
        match handler.as_str() {
            "exit-in-call" => return Ok(()),
            "counts" => {
                run += 1;
                let ms = std::str::from_utf8(&payload)?.parse()?;
                std::thread::sleep(Duration::from_millis(ms));
                payload = format!(r#"{{"container": "{container}", "run": {run}}}"#).into_bytes();
            }
            "works" => {
                work(steps);
                let now = cpu_time()?;
                payload = format!(r#"{{"own_cpu_ns": {}}}"#, (now - told).as_nanos()).into_bytes();
                told = now;
            }
            _ => {}
        }
        api.answer(&invocation.id, &payload)?;
        if handler == "exit-after-answer" {
            return Ok(());
        }
    }
}

/// CPU time that this process has used.
fn cpu_time() -> nix::Result<Duration> {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from)
}

/// As many steps of work as take [`WORK`] where nothing disturbs: the quickest of several tries counts.
fn steps_of_a_call() -> u64 {
    let quickest = (0..TRIES).map(|_| {
        let began = Instant::now();
        work(STEPS);
        began.elapsed()
    });
    let quickest = quickest.min().unwrap_or(WORK).max(Duration::from_nanos(1));
    (WORK.as_secs_f64() / quickest.as_secs_f64() * STEPS as f64) as u64
}

/// Work that touches nothing but the processor.
fn work(steps: u64) {
    for step in 0..steps {
        std::hint::black_box(step);
    }
}
