//! A function that was given the wrong amount, and gets the right one while it is called.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{path::Path, process::Output};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use super::{
    show::{Program, heading, indent, ms, text},
    table::Table,
};
use crate::{agent::Agent, process};

const FUNCTION: &str = "accounts/fits/functions/uses";
/// What it is given at first: a quarter of the CPU that it could use, and memory for what it needs at first.
const FIRST: &str = "250m,128MiB";
/// What it needs at first, and later: it fills twice as much as it was given.
const COMPUTES: Needs = Needs { seconds: 0.3, mib: 20 };
const FILLS: Needs = Needs { seconds: 0.3, mib: 150 };
/// By then, at the latest, it has what it needs: CPU rises after five calls, and memory after one.
const MOST_CALLS: usize = 30;
/// Calls that are shown with what is right.
const AFTER: usize = 2;

#[derive(Clone, Copy)]
struct Needs {
    seconds: f64,
    mib: u32,
}

/// A call, for what it shows.
struct Call {
    given: Amount,
    run_ms: String,
    /// What its caller was told of its amount.
    told: String,
    killed: bool,
}

/// Millicores and MiB.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Amount {
    cpu_millis: u64,
    memory_mib: u64,
}

/// Shows it with the function in that folder.
pub(super) fn show(agent: &Agent, folder: &Path) -> Result<()> {
    heading("A function that is given what it turns out to need");
    let folder = folder.display().to_string();
    let function = Program {
        name: FUNCTION,
        runtime: "python3.11",
        handler: "uses.handler",
        amount: FIRST,
        options: &["--resizing", "auto"],
        code: &folder,
    };
    function.deploy(agent)?;
    let headings = [
        "call",
        "computes",
        "fills",
        "it had",
        "took ms",
        "what its caller is told",
    ];
    let mut table = Table::new(&headings, usize::MAX);
    let mut number = 0;
    let mut say = |needs: Needs, call: &Call| {
        number += 1;
        let took = match call.killed {
            true => "killed".to_owned(),
            false => call.run_ms.clone(),
        };
        table.row(vec![
            number.to_string(),
            format!("{} s", needs.seconds),
            format!("{} MiB", needs.mib),
            call.given.to_string(),
            took,
            call.told.clone(),
        ]);
    };
    println!(
        "  $ stoker invoke {FUNCTION} --payload '{}'   # again and again",
        COMPUTES.payload()
    );
    let first = until_it_fits(agent, COMPUTES, &mut say, |call, first| {
        call.given.cpu_millis > first.cpu_millis
    })?;
    println!(
        "  $ stoker invoke {FUNCTION} --payload '{}'   # it needs more memory from now on",
        FILLS.payload()
    );
    let then = until_it_fits(agent, FILLS, &mut say, |call, first| {
        call.given.memory_mib > first.memory_mib
    })?;
    print!("\n{table}");
    println!(
        "\n  It was deployed with {FIRST}, came to {first}, and then to {then}: later calls run in another container."
    );
    println!("  $ stoker function resize-history {FUNCTION}");
    let history = process::output(&mut agent.command(&["function", "resize-history", FUNCTION]))?;
    print!("{}", indent(&history));
    agent.ask(&["function", "delete", FUNCTION])?;
    Ok(())
}

/// Calls it until a call has more than the first, and some times more. What the last had.
fn until_it_fits(
    agent: &Agent,
    needs: Needs,
    say: &mut impl FnMut(Needs, &Call),
    fits: impl Fn(&Call, Amount) -> bool,
) -> Result<Amount> {
    let (mut first, mut after) = (None, 0);
    for _ in 0..MOST_CALLS {
        let call = call(agent, needs)?;
        say(needs, &call);
        let first = *first.get_or_insert(call.given);
        if fits(&call, first) {
            ensure!(!call.killed, "it was killed with {}", call.given);
            after += 1;
        }
        if after > AFTER {
            return Ok(call.given);
        }
    }
    anyhow::bail!("after {MOST_CALLS} calls it has what it had")
}

fn call(agent: &Agent, needs: Needs) -> Result<Call> {
    let payload = needs.payload().to_string();
    // It tells of a function that failed by its exit code too.
    let mut command = agent.command(&["invoke", FUNCTION, "--payload", &payload, "--json"]);
    let Output { stdout, stderr, .. } = command.output().context("start stoker")?;
    let response = serde_json::from_slice(&stdout)
        .with_context(|| format!("understand what stoker printed: {}", process::tail(&stderr)))?;
    understood(&response)
}

fn understood(response: &Value) -> Result<Call> {
    let killed = match response["functionError"].as_str().unwrap_or_default() {
        "" => false,
        _ => {
            let error = &response["payload"]["errorType"];
            ensure!(
                error == "Runtime.OutOfMemory",
                "the function failed: {}",
                response["payload"]
            );
            true
        }
    };
    let amount = &response["placement"]["amount"];
    let part = |name: &str| amount[name].as_u64().with_context(|| format!("no {name} in {amount}"));
    Ok(Call {
        given: Amount {
            cpu_millis: part("cpuMillis")?,
            memory_mib: part("memoryMib")?,
        },
        run_ms: ms(&response["latency"]["run"]),
        told: told(&response["notification"]),
        killed,
    })
}

/// A notification in a line; nothing where there is none.
fn told(notification: &Value) -> String {
    match notification {
        Value::Null => String::new(),
        notification => {
            let kind = text(&notification["kind"]).to_lowercase().replace('_', " ");
            format!("{kind}: {}", text(&notification["detail"]))
        }
    }
}

// === impl Needs ===

impl Needs {
    fn payload(self) -> Value {
        json!({ "seconds": self.seconds, "mib": self.mib })
    }
}

// === impl Amount ===

impl std::fmt::Display for Amount {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}m,{}MiB", self.cpu_millis, self.memory_mib)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_told_with_what_it_had_and_what_its_caller_was_told() {
        let response = json!({
            "payload": {"mib": 20},
            "placement": {"amount": {"cpuMillis": 250, "memoryMib": 128}},
            "latency": {"run": "1.25s"},
            "notification": {"kind": "INCREASE_BY", "detail": "the last 3 took 1200.0 ms"},
        });
        let call = understood(&response).unwrap();
        assert_eq!(call.given.to_string(), "250m,128MiB");
        assert_eq!((&*call.run_ms, call.killed), ("1250", false));
        assert_eq!(call.told, "increase by: the last 3 took 1200.0 ms");
        let killed = |error: &str| {
            let failed = json!({"functionError": "Unhandled", "payload": {"errorType": error}, "placement": response["placement"]});
            understood(&failed)
        };
        assert!(killed("Runtime.OutOfMemory").unwrap().killed);
        assert!(killed("KeyError").is_err());
        assert!(understood(&json!({})).is_err());
    }
}
