//! Amounts that fit (issue 13), in real microVMs: what `cargo xtask bench amounts` runs, in a host that can run them. The first argument
//! says what; it tells its progress on standard error, and prints a line of JSON a result.
//!
//! | argument | measures | module |
//! |---|---|---|
//! | `plug RUNS QEMU` | how soon vCPUs and memory come and go, beside QEMU's q35, by the VMM alone | `plug`, `vmms`, `guest` |
//! | `functions ROUNDS EXECUTIONS` | functions whose amounts do not fit; so many executions come before anything falls | `functions` |
//! | `machines ROUNDS SECONDS IMAGE` | a web server of that image under a load that steps up and down, so long for each step | `machines`, `load` |
//!
//! It is also process 1 of the guests that are plugged.

mod functions;
mod guest;
mod load;
mod machines;
mod plug;
mod vmms;

use std::path::Path;

use anyhow::{Context as _, bail};

fn main() -> anyhow::Result<()> {
    if std::process::id() == 1 {
        guest::run();
    }
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
    let runtime = || tokio::runtime::Runtime::new().context("start tokio");
    match *arguments.as_slice() {
        ["plug", runs, qemu] => plug::measure(runs.parse()?, Path::new(qemu)),
        ["functions", rounds, executions] => {
            runtime()?.block_on(functions::measure(rounds.parse()?, executions.parse()?))
        }
        ["machines", rounds, seconds, image] => {
            runtime()?.block_on(machines::measure(rounds.parse()?, seconds.parse()?, Path::new(image)))
        }
        _ => bail!("say what is to be measured"),
    }
}
