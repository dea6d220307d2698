//! A machine that is launched from an image, and grows and shrinks by its thresholds.

#![allow(clippy::indexing_slicing, reason = "a JSON value that lacks a name reads as null")]

use std::{
    path::Path,
    process::{Child, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::show::{heading, indent, last, text};
use crate::{agent::Agent, process};

const IMAGE: &str = "accounts/shop/images/web";
const THRESHOLDS: [&str; 2] = [
    "cpu_use > 70% for 2s: vcpus +1, at most 2, every 3s",
    "cpu_use < 20% for 3s: vcpus -1, at least 1, every 3s",
];
/// Work for all that it has at first: a shell that computes without pause.
const BUSY: [&str; 3] = ["/bin/sh", "-c", "while :; do :; done"];
/// What its server answers.
const PAGE: &str = "It works.";

/// A command that runs meanwhile. Dropped, it is ended.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended of itself; either way nothing is left to do about it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Shows it with the image in that archive.
pub(super) fn show(agent: &mut Agent, archive: &Path) -> Result<()> {
    heading("A machine from a container image, which grows and shrinks with what it has to do");
    let file = archive.file_name().unwrap_or_default().to_string_lossy();
    println!("  $ stoker image import {IMAGE} {file}   # Debian's nginx");
    let image = agent.ask(&["image", "import", IMAGE, &archive.display().to_string()])?;
    println!("    {}", text(&image["digest"]).get(..19).unwrap_or_default());
    let launch = [
        "machine",
        "launch",
        IMAGE,
        "--vcpus",
        "1",
        "--memory",
        "256MiB",
        "--threshold",
        THRESHOLDS[0],
        "--threshold",
        THRESHOLDS[1],
    ];
    println!("  $ stoker machine launch {IMAGE} --vcpus 1 --memory 256MiB \\");
    println!(
        "      --threshold '{}' \\\n      --threshold '{}'",
        THRESHOLDS[0], THRESHOLDS[1]
    );
    let machine = text(&agent.ask(&launch)?["name"]);
    let id = last(&Value::from(machine.as_str()));
    println!("    {id} runs");
    let page =
        process::output(&mut agent.command(&["machine", "exec", &machine, "--", "cat", "/var/www/html/index.html"]))?;
    ensure!(page.contains(PAGE), "its page is {page:?}");

    println!(
        "  $ stoker machine exec {id} -- {} '{}' &",
        BUSY[..2].join(" "),
        BUSY[2]
    );
    let began = Instant::now();
    let exec = [&["machine", "exec", &machine, "--"][..], &BUSY[..]].concat();
    let busy = Running(
        agent
            .command(&exec)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start stoker")?,
    );
    follow(agent, &machine, began, 2)?;
    drop(busy);
    println!("  The program was ended.");
    follow(agent, &machine, Instant::now(), 1)?;
    println!("  $ stoker machine show {id}");
    print!(
        "{}",
        indent(&process::output(&mut agent.command(&["machine", "show", &machine]))?)
    );
    println!("  $ stoker machine stop {id}");
    agent.ask(&["machine", "stop", &machine])?;
    agent.ask(&["image", "remove", IMAGE])?;
    Ok(())
}

/// Shows each change of the machine until its guest has so many vCPUs.
fn follow(agent: &mut Agent, machine: &str, began: Instant, vcpus: u64) -> Result<()> {
    let mut shown = String::new();
    agent.until("the machine follows what it has to do", |agent| {
        let machine = agent.ask(&["machine", "show", machine])?;
        let launched = &machine["launched"];
        let line = state(launched);
        if line != shown {
            println!("    after {:4.1} s: {line}", began.elapsed().as_secs_f64());
            shown = line;
        }
        Ok(launched["taken"]["vcpus"] == vcpus && launched["size"]["vcpus"] == vcpus)
    })
}

/// What it is to have, has and uses. Use in steps of a quarter, so that what differs is seen.
fn state(launched: &Value) -> String {
    let vcpus = |of: &str| launched[of]["vcpus"].as_u64().unwrap_or(0);
    let used = match launched["metrics"]["cpu_use"].as_f64() {
        Some(percent) => format!("uses about {:.0}%", (percent / 25.0).round() * 25.0),
        None => "its use is not known yet".to_owned(),
    };
    format!(
        "asked {} vCPUs, its guest has {}, {used}",
        vcpus("size"),
        vcpus("taken")
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_machine_is_told_by_what_it_has_and_uses() {
        let launched = json!({"size": {"vcpus": 2}, "taken": {"vcpus": 1}, "metrics": {"cpu_use": 96.2}});
        assert_eq!(state(&launched), "asked 2 vCPUs, its guest has 1, uses about 100%");
        assert!(state(&json!({"size": {"vcpus": 1}})).ends_with("not known yet"));
    }
}
