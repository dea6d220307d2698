//! Schedules processes by `sched_ext` as its standard input says, for `cargo xtask bench credits`: a line for each, answered once
//! it is so. The scheduler ends with it.

#![allow(clippy::print_stdout, reason = "it answers there")]

use std::io::{self, BufRead as _};

use anyhow::{Context as _, bail};
use stoker_ebpf::scheduler::{Scheduler, Share};

fn main() -> anyhow::Result<()> {
    let scheduler = Scheduler::load(None)?;
    println!("ready");
    let mut urgent_vcpus = 0;
    for line in io::stdin().lock().lines() {
        let line = line?;
        let numbers: Result<Vec<u64>, _> = line.split(' ').map(str::parse).collect();
        let [process, high, baseline_millis] = numbers.context("numbers")?[..] else {
            bail!("a line is PROCESS HIGH BASELINE_MILLIS, not {line:?}");
        };
        let mut share = Share {
            high: u32::from(high != 0),
            ..Share::default()
        };
        if baseline_millis != 0 {
            share.allowed_millis = u32::try_from(baseline_millis)?;
        }
        scheduler.set(u32::try_from(process)?, share)?;
        urgent_vcpus += u64::from(share.high);
        scheduler.set_urgent_vcpus(urgent_vcpus)?;
        println!("set");
    }
    if let Some(why) = scheduler.ended() {
        bail!("the scheduler had ended: {why}");
    }
    Ok(())
}
