//! How long an invocation takes: cold in a machine from the warming pool, cold in a machine of the account, warm.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{fs, path::Path};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::{Bar, sample::Sample};
use crate::{
    agent::{Agent, Kernel},
    cache::Cache,
};

const RUNTIME: &str = "python3.11";
const CODE: &str = "def handler(event, context):\n    return event\n";

/// The kinds of invocation, in the order in which each account makes them.
const KINDS: [(&str, &str, &str); 3] = [
    (
        "first",
        "WARMING_MACHINE",
        "invocation, cold in a warm machine (Python)",
    ),
    (
        "second",
        "ACTIVE_MACHINE",
        "invocation, cold in the account's machine (Python)",
    ),
    ("first", "IDLE_CONTAINER", "invocation, warm (Python)"),
];

pub(super) fn bars(cache: &Cache, binaries: &Path, runs: u32) -> Result<Vec<Bar>> {
    let mut agent = Agent::start(cache, binaries, Kernel::Tuned, json!({ RUNTIME: 1 }))?;
    let code = agent.path("function");
    fs::create_dir(&code).context("make a folder for the function")?;
    fs::write(code.join("app.py"), CODE).context("write the function")?;
    let mut figures: [Vec<f64>; 3] = Default::default();
    for run in 1..=runs {
        // An account a run: its first invocation takes a machine of its own.
        let account = format!("accounts/run-{run}");
        let functions = ["first", "second"].map(|name| format!("{account}/functions/{name}"));
        for name in &functions {
            let arguments = [
                "function",
                "create",
                name,
                "--runtime",
                RUNTIME,
                "--handler",
                "app.handler",
            ];
            agent.ask(
                &[
                    arguments.as_slice(),
                    &["--amount", "500m,96MiB", &code.display().to_string()],
                ]
                .concat(),
            )?;
        }
        agent.until_warm(1)?;
        for ((function, source, _), figures) in KINDS.iter().zip(&mut figures) {
            let response = agent.ask(&["invoke", &format!("{account}/functions/{function}"), "--payload", "{}"])?;
            let went = &response["placement"]["source"];
            ensure!(went == source, "an invocation went to {went}, not to {source}");
            let total = response["latency"]["total"]
                .as_str()
                .context("an invocation has a latency")?;
            let seconds: f64 = total
                .trim_end_matches('s')
                .parse()
                .context("a latency is a number of seconds")?;
            figures.push(seconds * 1e3);
        }
        // The account's machine goes with them and makes room.
        for name in &functions {
            agent.ask(&["function", "delete", name])?;
        }
    }
    KINDS
        .iter()
        .zip(figures)
        .map(|((_, _, name), figures)| Ok(Bar::told(name, "ms", Sample::new(figures)?)))
        .collect()
}
