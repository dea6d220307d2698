//! The Debian packages, from their installation to their removal, in a Debian with systemd.

use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use stoker_tests::code::COUNTER;
use stoker_tests::debian::Debian;
use stoker_tests::{cache, packages};

const FUNCTION: &str = "accounts/acme/functions/counts";

/// Calls the function with a time to sleep in s and a request id, until it is answered: a caller asks again.
fn invoke(seconds: u32, id: u32) -> String {
    format!("stoker invoke {FUNCTION} --payload {seconds} --request-id 00000000-0000-4000-8000-{id:012}")
}

/// The machines, as `NAME PID`; those that boot, and those whose guest has not answered this agent yet, where `all` are wanted.
fn machines(debian: &Debian, all: bool) -> anyhow::Result<Vec<String>> {
    let list: Value = serde_json::from_str(&debian.run("stoker machine list --json")?)?;
    let machines = list.get("machines").and_then(Value::as_array).context("a list")?;
    let mut booted = Vec::new();
    for machine in machines {
        let text = |key: &str| machine.get(key).map(Value::to_string).unwrap_or_default();
        if all || text("state") != "\"BOOTING\"" {
            booted.push(format!("{} {}", text("name"), text("pid")));
        }
    }
    Ok(booted)
}

/// Does something to the agent while a call runs, which takes so many seconds: no machine notices, and who asks again has the
/// answer.
fn outlives(debian: &Debian, number: u32, seconds: u32, what: &str) -> anyhow::Result<()> {
    let before = machines(debian, false)?;
    ensure!(!before.is_empty(), "{what}: no machine to outlive the agent");
    let mut command = debian.command(&invoke(seconds, number));
    let mut call = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    debian.until("stoker container list --json", |list| list.contains("\"BUSY\""))?;
    let agent = debian.run("systemctl show --property MainPID stokerd")?;
    let begun = Instant::now();
    debian.run(what)?;
    debian.until("systemctl show --property MainPID stokerd", |now| {
        now != agent && now != "MainPID=0"
    })?;
    debian.until("stoker machine list", |_| true)?;
    println!("{what}: served again after {:.1} s", begun.elapsed().as_secs_f64());
    let after = machines(debian, true)?;
    ensure!(
        before.iter().all(|machine| after.contains(machine)),
        "{what}: {before:?} became {after:?}"
    );
    // Its connection broke; the id makes it the same invocation.
    call.wait()?;
    ensure!(
        debian.run(&invoke(seconds, number))? == number.to_string(),
        "{what}: it ran once"
    );
    ensure!(debian.run("systemctl is-active stokerd stoker-machines")? == "active\nactive");
    Ok(())
}

#[test]
fn installed_upgraded_and_removed() -> anyhow::Result<()> {
    let begun = Instant::now();
    let debian = Debian::boot(&cache("lab/debian")?, &packages()?)?;
    println!("up after {:.1} s", begun.elapsed().as_secs_f64());
    let went = install_upgrade_and_remove(&debian);
    went.with_context(|| debian.run("journalctl --no-pager --lines 200").unwrap_or_default())
}

fn install_upgrade_and_remove(debian: &Debian) -> anyhow::Result<()> {
    let begun = Instant::now();
    debian.run("apt-get install --yes /srv/1/stoker_*.deb /srv/1/stoker-guest_*.deb")?;
    println!("apt install: {:.1} s", begun.elapsed().as_secs_f64());
    ensure!(debian.run("systemctl is-active stokerd stoker-machines")? == "active\nactive");
    debian.run(&format!(
        "mkdir /root/counts && printf '{COUNTER}' > /root/counts/app.py"
    ))?;
    debian.run(&format!(
        "stoker function create {FUNCTION} --runtime python3.11 --handler app.handler --timeout 60s /root/counts"
    ))?;
    debian.until(&invoke(0, 1), |answer| answer == "1")?;
    println!(
        "from `apt install` to the first answer: 3 commands, {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    let socket = debian.run("stat --format '%U:%G %a' /run/stoker /run/stoker/stokerd.sock")?;
    ensure!(socket == "root:stoker 750\nroot:stoker 660", "{socket}");
    debian.run(
        "test -s /usr/share/man/man1/stoker-function-create.1.gz -a -s /usr/share/bash-completion/completions/stoker \
         -a -s /usr/share/stoker/grafana/stoker.json",
    )?;

    outlives(debian, 2, 8, "systemctl restart stokerd")?;
    outlives(debian, 3, 8, "systemctl kill --signal KILL stokerd")?;
    outlives(debian, 4, 20, "apt-get install --yes /srv/2/stoker_*.deb")?;
    let version = debian.run("dpkg-query --show --showformat '${Version}' stoker")?;
    ensure!(version.ends_with("-2"), "{version}");

    // Reloaded, it is the same process.
    let agent = debian.run("systemctl show --property MainPID stokerd")?;
    debian.run("systemctl reload stokerd && systemctl is-active stokerd")?;
    ensure!(debian.run("systemctl show --property MainPID stokerd")? == agent);

    // Removed, its machines are ended; functions stay until it is purged.
    debian.run("apt-get remove --yes stoker")?;
    let left = debian.run("grep -l stoker /proc/[0-9]*/comm || true; ls -d /run/stoker /sys/fs/bpf/stoker* || true")?;
    ensure!(left.is_empty(), "left behind: {left}");
    let units = debian
        .run("systemctl is-active stokerd stoker-machines || true; ls -d /sys/fs/cgroup/stoker.slice/*/ || true")?;
    ensure!(units == "inactive\ninactive", "{units}");
    debian.run("test -s /var/lib/stoker/state/state.db -a -s /etc/stoker/stokerd.toml")?;
    debian.run("apt-get install --yes /srv/2/stoker_*.deb && stoker function get accounts/acme/functions/counts")?;
    debian.run("apt-get purge --yes stoker stoker-guest")?;
    debian.run("test ! -e /var/lib/stoker -a ! -e /etc/stoker -a ! -e /usr/lib/stoker")?;
    Ok(())
}
