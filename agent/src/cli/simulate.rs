//! `stoker simulate`

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};
use stoker_sim::{Load, Outcome, Recording, Setup};

use super::{Connection, Failure, print_json};
use crate::config::{Config, CreditMode};
use crate::render::{Table, say};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// What machines of some loads would get of a host's CPUs by their credits; asks no agent
    Credits(Credits),
}

/// Decisions and accounts are the agent's own. Loads and who gets how much of busy CPUs are a model: each machine its baseline
/// first, then those of the class high, then all others alike.
#[derive(Debug, Args)]
pub(super) struct Credits {
    /// CPUs of the host
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// How many machines of a load: idle, web (a second of each minute), batch (half an hour of each six), hog (always)
    #[arg(long = "load", value_name = "LOAD=MACHINES", value_parser = parse_load)]
    loads: Vec<(Load, usize)>,
    /// A file of lines `SECONDS,MACHINE,MILLICORES`: from then on that machine wants so much. It is repeated.
    #[arg(long, requires = "recorded_machines")]
    recorded: Option<PathBuf>,
    /// How many machines have a load as recorded
    #[arg(long, value_name = "MACHINES", requires = "recorded")]
    recorded_machines: Option<usize>,
    /// How long, as `24h`
    #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
    length: Duration,
    /// How much time passes at once, as `1s`: the longer, the faster and the less exact
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    step: Duration,
    /// Of two runs with the same seed all is the same
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The agent's configuration, of which [credits], machines.vcpus and pool.cpu_overcommit count; its defaults where not given
    #[arg(long)]
    config: Option<PathBuf>,
    /// vCPUs of a machine, in place of machines.vcpus
    #[arg(long)]
    vcpus: Option<u32>,
    /// In place of credits.baseline_percent
    #[arg(long, value_name = "PERCENT")]
    baseline: Option<f64>,
    /// Machines borrow, and are billed
    #[arg(long)]
    unlimited: bool,
}

pub(super) fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    let Command::Credits(credits) = command;
    let setup = setup(credits)?;
    let outcome = stoker_sim::credits(&setup).map_err(|error| Failure::local(error.to_string()))?;
    if connection.json {
        print_json(&json(&outcome));
        return Ok(());
    }
    say!(
        "{} of {} machines admitted; {:.1}% of the CPUs used on average, {:.1}% at most; {} changes of class or limit",
        outcome.admitted,
        outcome.asked,
        outcome.used * 100.0,
        outcome.busiest * 100.0,
        outcome.changes
    );
    table(&outcome).print();
    Ok(())
}

fn setup(given: Credits) -> Result<Setup, Failure> {
    let mut config = match &given.config {
        Some(file) => Config::load(file).map_err(|error| Failure::local(error.to_string()))?,
        None => Config::default(),
    };
    if let Some(percent) = given.baseline {
        config.credits.baseline_percent = Some(percent);
    }
    if given.unlimited {
        config.credits.mode = CreditMode::Unlimited;
    }
    config.check().map_err(|error| Failure::local(error.to_string()))?;
    let mut loads = given.loads;
    if let (Some(file), Some(machines)) = (&given.recorded, given.recorded_machines) {
        let of_file = |error: String| Failure::local(format!("{}: {error}", file.display()));
        let text = std::fs::read_to_string(file).map_err(|error| of_file(error.to_string()))?;
        let recording = Recording::parse(&text).map_err(|error| of_file(error.to_string()))?;
        loads.push((Load::Recorded(recording), machines));
    }
    if loads.is_empty() {
        loads = vec![(Load::Web, 6), (Load::Hog, 2)];
    }
    Ok(Setup {
        cpus: given.cpus,
        vcpus: given.vcpus.unwrap_or(config.machines.vcpus),
        cpu_overcommit: config.pool.cpu_overcommit,
        vcpu_plan: config.credits.vcpu_plan(config.pool.cpu_overcommit),
        loads,
        length: given.length,
        step: given.step,
        seed: given.seed,
    })
}

fn parse_load(text: &str) -> Result<(Load, usize), String> {
    let known = || Load::MADE_UP.map(|load| load.name()).join(", ");
    let (name, machines) = text
        .split_once('=')
        .ok_or_else(|| format!("must be LOAD=MACHINES, as `web=6`; loads are {}", known()))?;
    let load = Load::MADE_UP.into_iter().find(|load| load.name() == name);
    let load = load.ok_or_else(|| format!("there is no load {name:?}; there are {}", known()))?;
    // More would take more memory than most have.
    let machines = machines.parse().ok().filter(|machines| *machines <= 1_000_000);
    Ok((
        load,
        machines.ok_or("so many machines can't be simulated: 0 to 1000000")?,
    ))
}

fn table(outcome: &Outcome) -> Table {
    let mut table = Table::new(&[
        "LOAD",
        ">MACHINES",
        ">WANTED",
        ">GOT",
        ">WORST",
        ">HIGH",
        ">FULL",
        ">SLOWED",
        ">EXHAUSTED",
        ">LEFT",
        ">BILLED",
    ]);
    let part = |part: f64| format!("{:.1}%", part * 100.0);
    for load in &outcome.loads {
        table.row([
            load.load.to_owned(),
            load.machines.to_string(),
            part(load.wanted_millis / 1000.0),
            part(load.got_millis / 1000.0),
            part(load.worst),
            part(load.high),
            part(load.full),
            part(load.slowed),
            part(load.exhausted),
            format!("{:.1}", load.left),
            format!("{:.1}", load.billed),
        ]);
    }
    table
}

fn json(outcome: &Outcome) -> serde_json::Value {
    let loads = outcome.loads.iter().map(|load| {
        serde_json::json!({
            "load": load.load,
            "machines": load.machines,
            "wantedMillis": load.wanted_millis,
            "gotMillis": load.got_millis,
            "worst": load.worst,
            "high": load.high,
            "full": load.full,
            "slowed": load.slowed,
            "exhausted": load.exhausted,
            "leftCredits": load.left,
            "billedCredits": load.billed,
        })
    });
    serde_json::json!({
        "asked": outcome.asked,
        "admitted": outcome.admitted,
        "used": outcome.used,
        "busiest": outcome.busiest,
        "changes": outcome.changes,
        "loads": loads.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loads_are_named_with_how_many_machines() {
        assert_eq!(parse_load("web=6"), Ok((Load::Web, 6)));
        for (text, says) in [
            ("web", "LOAD=MACHINES"),
            ("wep=1", "idle, web, batch, hog"),
            ("web=-1", "0 to 1000000"),
            ("web=1000001", "0 to 1000000"),
        ] {
            let error = parse_load(text).unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn each_load_is_a_line() {
        let setup = Setup {
            cpus: 1,
            vcpus: 1,
            cpu_overcommit: 8.0,
            vcpu_plan: config_plan(),
            loads: vec![(Load::Idle, 1), (Load::Hog, 2)],
            length: Duration::from_secs(60),
            step: Duration::from_secs(1),
            seed: 1,
        };
        let outcome = stoker_sim::credits(&setup).unwrap();
        let lines = table(&outcome).lines(None);
        assert!(
            lines[1].starts_with("idle  ") && lines[2].starts_with("hog "),
            "{lines:?}"
        );
        assert!(lines[2].contains(" 100.0%  "), "wanted: {lines:?}");
        assert_eq!(json(&outcome)["loads"][1]["machines"], 2);
    }

    fn config_plan() -> stoker_credits::Plan {
        Config::default().credits.vcpu_plan(8.0)
    }
}
