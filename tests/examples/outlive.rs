//! Kills, restarts and upgrades an agent under load ([`stoker_tests::outlive`]). `cargo xtask bench outlive` runs it, in a host
//! that can run microVMs. It tells faults and its progress on standard error, and prints a line of JSON.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde_json::json;
use stoker_tests::outlive::{Fault, Plan, run};
use stoker_tests::{binary, code};

/// Machines that serve all the time.
const MACHINES: u32 = 10;

fn ms(times: &[Duration]) -> Vec<f64> {
    times.iter().map(|time| time.as_secs_f64() * 1e3).collect()
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let numbers: Vec<_> = std::env::args().skip(1).map(|number| number.parse::<u32>()).collect();
    let &[Ok(kills), Ok(restarts), Ok(upgrades), Ok(seed)] = numbers.as_slice() else {
        bail!("say how many kills, restarts and upgrades there are to be, and the seed");
    };
    let other = std::env::var_os("STOKER_OTHER_BUILD").context("STOKER_OTHER_BUILD is not set")?;
    let outcome = run(Plan {
        seed: seed.into(),
        kills,
        restarts,
        upgrades,
        machines: MACHINES,
        native: Some(code::echo()?),
        builds: vec![other.into(), binary("stokerd")?],
    })
    .await?;
    if let Some(out) = std::env::var_os("STOKER_LAB_OUT") {
        std::fs::write(Path::new(&out).join("outlive-stokerd.log"), &outcome.log)?;
    }
    let seen = &outcome.seen;
    println!(
        "{}",
        json!({
            "kills": outcome.kills,
            "guests": outcome.guests,
            "calls": seen.calls,
            "asked_again": seen.asked_again,
            "writes": seen.writes,
            "broken": seen.broken,
            "first_answer_ms": ms(&outcome.first_answer),
            "taken_over_ms": ms(&outcome.taken_over),
            "gaps_ms": ms(&outcome.gaps),
            "counted_off_percent": outcome.counted_off,
            "ended": outcome.count(Fault::Ended),
            "writes_lost": outcome.count(Fault::WriteLost),
            "ran_twice": outcome.count(Fault::RanTwice),
            "no_answer": outcome.count(Fault::NoAnswer),
            "left_over": outcome.count(Fault::LeftOver),
        })
    );
    Ok(())
}
