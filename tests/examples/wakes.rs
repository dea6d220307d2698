//! A `provided` function for `cargo xtask bench credits`: what a machine does that wakes up now and then, and one that computes
//! without pause. Its payload says which:
//!
//! | `do` | does | answers |
//! |---|---|---|
//! | `calibrate` | finds out how many `turns` of its loop take 0.2 ms of a CPU of its own | them |
//! | `work` | works for so many `turns`: the call itself is what wakes it | nothing |
//! | `timer` | for so many `ms` sleeps until the next wake-up is due, and works | the ns from each due time to when it had worked |
//! | `pipe` | the same, where another process sleeps, and wakes the one that works by a pipe | the same |
//! | `hog` | computes for so many `ms` | its CPU time and the longest time in which it did not run, in ns |
//!
//! All times are of the machine's monotonic clock: a time that a machine waits passes there too.

use std::io::{Read as _, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail, ensure};
use nix::sys::prctl::set_timerslack;
use serde_json::{Value, json};
use stoker_testkit::wake;
use stoker_tests::runtime_api::RuntimeApi;

/// What the process is told that is woken by a pipe, its only argument: the turns that it works for.
const WOKEN: &str = "--woken=";

fn main() -> anyhow::Result<()> {
    // What hypervisors' timers have: none. Where that may not be, wake-ups are as much later.
    let _ = set_timerslack(1);
    let argument = std::env::args().nth(1).unwrap_or_default();
    if let Some(turns) = argument.strip_prefix(WOKEN) {
        return woken(turns.parse()?);
    }
    let mut api = RuntimeApi::connect()?;
    loop {
        let invocation = api.next_invocation()?;
        let answer = obey(&serde_json::from_slice(&invocation.payload)?)?;
        api.answer(&invocation.id, answer.to_string().as_bytes())?;
    }
}

fn obey(order: &Value) -> anyhow::Result<Value> {
    let number = |name| order.get(name).and_then(Value::as_u64);
    let turns = || number("turns").context("no `turns`");
    let end_ns = || anyhow::Ok(wake::now_ns()? + number("ms").context("no `ms`")? * 1_000_000);
    Ok(match order.get("do").and_then(Value::as_str) {
        Some("calibrate") => json!(wake::calibrate()?),
        Some("work") => {
            wake::work(turns()?);
            Value::Null
        }
        Some("timer") => json!(by_timer(turns()?, end_ns()?)?),
        Some("pipe") => json!(by_pipe(turns()?, end_ns()?)?),
        Some("hog") => {
            let hog = wake::hog(turns()?, end_ns()?)?;
            json!({ "cpu_ns": hog.cpu_ns, "longest_wait_ns": hog.longest_wait_ns })
        }
        other => bail!("there is no order {other:?}"),
    })
}

fn by_timer(turns: u64, end_ns: u64) -> anyhow::Result<Vec<u64>> {
    let mut took = Vec::new();
    for due in wake::dues(wake::now_ns()?, end_ns) {
        wake::sleep_until(due)?;
        wake::work(turns);
        took.push(wake::now_ns()?.saturating_sub(due));
    }
    Ok(took)
}

fn by_pipe(turns: u64, end_ns: u64) -> anyhow::Result<Vec<u64>> {
    let mut other = Command::new("/proc/self/exe")
        .arg(format!("{WOKEN}{turns}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("start the process that is woken")?;
    let mut pipe = other.stdin.take().context("it has no input")?;
    // It is there before the first wake-up.
    let mut ready = [0];
    let mut output = other.stdout.take().context("it has no output")?;
    output.read_exact(&mut ready)?;
    for due in wake::dues(wake::now_ns()?, end_ns) {
        wake::sleep_until(due)?;
        pipe.write_all(&due.to_ne_bytes())?;
    }
    drop(pipe);
    let mut told = String::new();
    output.read_to_string(&mut told)?;
    ensure!(other.wait()?.success(), "the process that is woken failed");
    Ok(serde_json::from_str(&told)?)
}

/// What is woken by its standard input: it reads when each wake-up was due, and tells how long after that it had worked.
fn woken(turns: u64) -> anyhow::Result<()> {
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    output.write_all(b"r")?;
    output.flush()?;
    let (mut took, mut due) = (Vec::new(), [0; 8]);
    while input.read_exact(&mut due).is_ok() {
        wake::work(turns);
        took.push(wake::now_ns()?.saturating_sub(u64::from_ne_bytes(due)));
    }
    output.write_all(json!(took).to_string().as_bytes())?;
    Ok(())
}
