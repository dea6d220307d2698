//! The agent is killed in the middle of a call, and the call is answered.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{path::Path, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::show::{Program, answer, heading, last, text};
use crate::{
    agent::{Agent, list},
    process,
};

pub(super) const COUNTER: &str = "accounts/demo/functions/counter";
/// Long enough for an agent to be killed and started again, also in the lab.
const LONG: &str = r#"{"seconds": 4}"#;
const SHORT: &str = r#"{"seconds": 0}"#;
const ID: &str = "an-id-of-my-own";

/// Shows it with the function in that folder, which counts its runs.
pub(super) fn show(agent: &mut Agent, folder: &Path) -> Result<()> {
    heading("Kill the agent in the middle of a call");
    let folder = folder.display().to_string();
    let counter = Program {
        name: COUNTER,
        runtime: "python3.11",
        handler: "counter.handler",
        amount: "250m,64MiB",
        options: &[],
        code: &folder,
    };
    counter.deploy(agent)?;
    let asked = ["invoke", COUNTER, "--payload", SHORT];
    println!("  $ stoker {}", shown(&asked));
    let first = agent.ask(&asked)?;
    println!("    {}", ran(&first)?);
    let container = &first["placement"]["container"];
    let before = vmm(agent, &first)?;

    let asked = ["invoke", COUNTER, "--payload", LONG, "--request-id", ID];
    println!("  $ stoker {} &", shown(&asked));
    let call = agent
        .command(&asked)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("start stoker")?;
    agent.until("the call runs", |agent| {
        let containers = list(&agent.ask(&["container", "list"])?, "containers");
        Ok(containers
            .iter()
            .any(|busy| busy["name"] == *container && busy["state"] == "BUSY"))
    })?;
    println!("  $ kill -9 {}   # stokerd", agent.pid()?);
    agent.kill_and_start()?;
    let served = agent.age();
    let lost = call.wait_with_output().context("wait for stoker")?;
    ensure!(!lost.status.success(), "the call's connection did not break");
    println!("    {}", process::tail(&lost.stderr).lines().next().unwrap_or_default());
    println!(
        "  Started again, stokerd serves after {:.1} s; ask again with the same id:",
        served.as_secs_f64()
    );
    println!("  $ stoker {}", shown(&asked));
    let again = agent.ask(&asked)?;
    println!("    {}", ran(&again)?);
    ensure!(answer(&again)?["run"] == 2, "it ran {} times", answer(&again)?["run"]);
    ensure!(
        again["placement"]["container"] == *container && vmm(agent, &again)? == before,
        "it did not stay where it was"
    );
    println!("  The same machine, of the same process {before}, and the same container; it ran once.");
    Ok(())
}

fn shown(arguments: &[&str]) -> String {
    let quoted = arguments.iter().map(|argument| match argument.contains(' ') {
        true => format!("'{argument}'"),
        false => (*argument).to_owned(),
    });
    quoted.collect::<Vec<_>>().join(" ")
}

fn ran(response: &Value) -> Result<String> {
    let place = &response["placement"];
    Ok(format!(
        "{} in machine {}, container {}",
        answer(response)?,
        last(&place["machine"]),
        last(&place["container"])
    ))
}

/// The process of the machine that it ran in.
fn vmm(agent: &Agent, response: &Value) -> Result<String> {
    let machines = agent.machines()?;
    let machine = machines
        .iter()
        .find(|machine| machine["name"] == response["placement"]["machine"]);
    Ok(text(&machine.context("its machine is not there")?["pid"]))
}
