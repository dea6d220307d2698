//! A quiet machine among others that compute without pause: how soon it is done when it wakes up, with credits and without.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{collections::HashMap, num::NonZero, path::Path, slice, thread};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use stoker_testkit::permille::permille;

use super::{
    bars::Bars,
    show::{Program, WARM, answer, heading, indent, text},
};
use crate::{
    agent::{Agent, list},
    process,
};

const QUIET: &str = "accounts/quiet/functions/wake";
/// How often it wakes up each time; every 50 ms, so this is for 12 s.
const TIMES: usize = 240;
/// Enough to be of the class high, whatever is left of those that a machine has at its start.
const CREDITS: &str = "60";

/// What was measured of the quiet machine.
#[derive(Debug)]
struct Measured {
    machine: String,
    /// The work that it does when it wakes up.
    rounds: u64,
    /// From when that was due to when it was done, in ascending order.
    ns: Vec<u64>,
}

/// Shows it with the functions in that folder. Those that are deployed make room for them.
pub(super) fn show(agent: &mut Agent, folder: &Path, deployed: &[&str]) -> Result<()> {
    heading("A quiet machine among busy ones: how soon it is done when it wakes up");
    for function in deployed {
        println!("  $ stoker function delete {function}");
        agent.ask(&["function", "delete", function])?;
    }
    until_active(agent, 0)?;
    let busy: Vec<_> = (1..=busy_machines())
        .map(|number| format!("accounts/busy-{number}/functions/compute"))
        .collect();
    let folder = folder.display().to_string();
    deploy(agent, &folder, &busy)?;
    until_active(agent, busy.len() + 1)?;

    let alone = measure(agent, None)?;
    println!("    alone: nothing else computes");
    if let Some(first) = busy.first() {
        println!("  $ stoker invoke {first}   # and the same for the others");
    }
    each(agent, &busy, &json!({}))?;
    let normal = among(agent, &alone, "NORMAL")?;
    println!("    its class is normal, as that of the others");
    println!("  $ stoker credits grant {} {CREDITS}", alone.machine);
    let granted = agent.ask(&["credits", "grant", &alone.machine, CREDITS])?;
    println!("    it has {:.1} credits", left(&granted));
    agent.until("the quiet machine is of the class high", |agent| {
        Ok(agent.ask(&["credits", "get", &alone.machine])?["class"] == "HIGH")
    })?;
    let high = among(agent, &alone, "HIGH")?;
    println!("    its class is high");
    println!("  $ stoker credits list");
    print!(
        "{}",
        indent(&process::output(&mut agent.command(&["credits", "list"]))?)
    );

    print!("\n{}", drawn(&alone, &normal, &high, busy.len()));
    println!("\n  {}", said(&alone, &normal, &high, busy.len()));
    for function in busy.iter().map(String::as_str).chain([QUIET]) {
        agent.ask(&["function", "delete", function])?;
    }
    until_active(agent, 0)
}

/// One for each CPU, which computes on all its vCPUs: at least 3, and at most 8, which have room in the 8 GB of memory that the demo
/// asks for.
fn busy_machines() -> usize {
    let cpus = thread::available_parallelism().map_or(1, NonZero::get);
    // By default machines have 2 vCPUs, and together 8 for each CPU. Some are warm, and one is the quiet one.
    let room = 4 * cpus - WARM - 1;
    cpus.clamp(3, 8).min(room)
}

/// Deploys all functions, and has a container made of each, which does nothing yet.
fn deploy(agent: &Agent, folder: &str, busy: &[String]) -> Result<()> {
    let quiet = Program {
        name: QUIET,
        runtime: "python3.11",
        handler: "quiet.handler",
        amount: "1000m,64MiB",
        options: &[],
        code: folder,
    };
    quiet.deploy(agent)?;
    for (at, name) in busy.iter().enumerate() {
        let busy = Program {
            name,
            handler: "busy.handler",
            amount: "2000m,64MiB",
            // It goes on when its call is answered.
            options: &["--no-freeze"],
            ..quiet
        };
        match at {
            0 => busy.deploy(agent)?,
            _ => drop(busy.create(agent)?),
        }
    }
    if busy.len() > 1 {
        println!("    and the same for the accounts busy-2 to busy-{}", busy.len());
    }
    // One after the other: a slow host has no room for all at once within the minute that a call waits.
    each(agent, &[QUIET.to_owned()], &json!({"times": 0, "rounds": 1}))?;
    busy.iter()
        .try_for_each(|function| each(agent, slice::from_ref(function), &json!({"processes": 0})))
}

/// Invokes each of these functions, all at once.
fn each(agent: &Agent, functions: &[String], payload: &Value) -> Result<()> {
    let payload = payload.to_string();
    thread::scope(|scope| {
        let call = |function| agent.ask(&["invoke", function, "--payload", &payload]);
        let calls: Vec<_> = functions
            .iter()
            .map(|function| scope.spawn(move || answer(&call(function)?).map(drop)))
            .collect();
        calls
            .into_iter()
            .try_for_each(|call| call.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a call panicked"))))
    })
}

/// Waits until so many machines serve accounts, the others are warm, and none boots or ends.
fn until_active(agent: &mut Agent, count: usize) -> Result<()> {
    agent.until("no machine boots or ends", |agent| {
        let machines = agent.machines()?;
        let of = |state: &str| machines.iter().filter(|machine| machine["state"] == state).count();
        let (active, warm) = (of("ACTIVE"), of("WARMING"));
        Ok(active == count && warm >= WARM && active + warm == machines.len())
    })
}

/// Has the quiet function wake up, with the work that it did before.
fn measure(agent: &Agent, before: Option<&Measured>) -> Result<Measured> {
    let payload = match before {
        Some(before) => json!({"times": TIMES, "rounds": before.rounds}),
        None => json!({"times": TIMES}),
    };
    println!("  $ stoker invoke {QUIET} --payload '{payload}'");
    let response = agent.ask(&["invoke", QUIET, "--payload", &payload.to_string()])?;
    let measured = measured(&response)?;
    if let Some(before) = before {
        ensure!(
            measured.machine == before.machine,
            "it ran in {}, not in {}",
            measured.machine,
            before.machine
        );
    }
    Ok(measured)
}

fn measured(response: &Value) -> Result<Measured> {
    let answer = answer(response)?;
    let ns: Option<Vec<_>> = list(answer, "ns").iter().map(Value::as_u64).collect();
    let mut ns = ns.context("a time is no number")?;
    ensure!(ns.len() == TIMES, "it woke up {} times, not {TIMES}", ns.len());
    ns.sort_unstable();
    Ok(Measured {
        machine: text(&response["placement"]["machine"]),
        rounds: answer["rounds"].as_u64().context("it does not say what it did")?,
        ns,
    })
}

/// The same while the others compute, with its machine of this class.
fn among(agent: &Agent, alone: &Measured, class: &str) -> Result<Measured> {
    let before = accounts(agent)?;
    let measured = measure(agent, Some(alone))?;
    let after = accounts(agent)?;
    let spent = |credits: &Value| credits["totals"]["spent"].as_f64().unwrap_or(0.0);
    for (machine, now) in &after {
        if *machine == alone.machine {
            ensure!(now["class"] == class, "its class is {}, not {class}", now["class"]);
        } else if text(&now["account"]).starts_with("accounts/busy-") {
            let used = spent(now) - before.get(machine).map_or(0.0, spent);
            // A credit is a CPU for a minute, and they compute for 12 s: at least one of it.
            ensure!(used > 1.0 / 60.0, "{machine} did not compute");
        }
    }
    Ok(measured)
}

/// The credits of all machines, by their names.
fn accounts(agent: &Agent) -> Result<HashMap<String, Value>> {
    let all = list(&agent.ask(&["credits", "list"])?, "machineCredits");
    let named = |credits: Value| (text(&credits["name"]).trim_end_matches("/credits").to_owned(), credits);
    Ok(all.into_iter().map(named).collect())
}

/// What a machine has to spend.
fn left(credits: &Value) -> f64 {
    let of = |name: &str| credits[name].as_f64().unwrap_or(0.0);
    of("balance") + of("launch")
}

fn drawn(alone: &Measured, normal: &Measured, high: &Measured, busy: usize) -> Bars {
    let mut bars = Bars::default();
    for (percentile, thousandths) in [("p50", 500), ("p99", 990)] {
        for (label, measured) in [
            ("alone".to_owned(), alone),
            (format!("among {busy}, without credits (normal)"), normal),
            (format!("among {busy}, with credits (high)"), high),
        ] {
            bars.bar(format!("{percentile}  {label}"), measured.ms(thousandths));
        }
    }
    bars
}

fn said(alone: &Measured, normal: &Measured, high: &Measured, busy: usize) -> String {
    let [alone, normal, high] = [alone, normal, high].map(|measured| measured.ms(990));
    format!(
        "Work of 0.2 ms that is due every 50 ms was done within {alone:.2} ms alone, at p99; among {busy} machines that compute \
         without pause\n  within {normal:.2} ms without credits ({:.1} times as long), and within {high:.2} ms with them ({:.1} times).",
        normal / alone,
        high / alone
    )
}

// === impl Measured ===

impl Measured {
    /// What so many thousandths of the times do not exceed, in ms.
    fn ms(&self, thousandths: usize) -> f64 {
        permille(&self.ns, thousandths).map_or(f64::NAN, |ns| ns as f64 / 1e6)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(ns: &[u64]) -> Value {
        json!({
            "placement": {"machine": "machines/M"},
            "payload": {"rounds": 7, "ns": ns},
        })
    }

    #[test]
    fn what_was_measured_is_told_as_it_was() {
        // In steps of 0.01 ms, and last of all 50 ms.
        let mut ns: Vec<u64> = (1..TIMES as u64).rev().map(|step| step * 10_000).collect();
        ns.push(50_000_000);
        let alone = measured(&response(&ns)).unwrap();
        assert_eq!((alone.machine.as_str(), alone.rounds), ("machines/M", 7));
        assert_eq!((alone.ms(500), alone.ms(990), alone.ms(1000)), (1.2, 2.38, 50.0));
        let slow: Vec<_> = ns.iter().map(|ns| ns * 10).collect();
        let slow = measured(&response(&slow)).unwrap();
        let bars = drawn(&alone, &slow, &alone, 3).to_string();
        let lines: Vec<_> = bars.lines().collect();
        assert_eq!(lines.len(), 6);
        assert!(lines[0].starts_with("  p50  alone    "), "{bars}");
        assert!(
            lines[4].contains("p99  among 3, without credits (normal)  ████") && lines[4].ends_with("23.80 ms"),
            "{bars}"
        );
        let said = said(&alone, &slow, &alone, 3);
        assert!(
            said.contains("23.80 ms without credits (10.0 times") && said.contains("2.38 ms with them (1.0 times)"),
            "{said}"
        );
    }

    #[test]
    fn what_was_not_measured_is_not_shown() {
        for wrong in [
            json!({"rounds": 7, "ns": [1]}),
            json!({"ns": vec![1; TIMES]}),
            json!("no"),
        ] {
            let response = json!({"placement": {"machine": "machines/M"}, "payload": wrong});
            assert!(measured(&response).is_err(), "{response}");
        }
        let failed = json!({"functionError": "Unhandled", "payload": {"rounds": 7, "ns": vec![1; TIMES]}});
        assert!(measured(&failed).is_err());
    }
}
