//! `stoker machine resize`, `stoker machine thresholds` and `stoker machine stop`

use std::time::Duration;

use clap::{Args, Subcommand};
use stoker_proto::v1;
use stoker_proto::v1::machines_client::MachinesClient;
use tonic::Code;
use tonic::transport::Channel;

use super::{client, name_of, some_size, threshold};
use crate::cli::{Connection, Failure, amounts, json, print_json};
use crate::render::{duration, one_line, say};

/// How often a change of thresholds is tried that others change at the same time.
const ATTEMPTS: u32 = 10;

#[derive(Debug, Args)]
pub(in crate::cli) struct Resize {
    /// machines/MACHINE, or its id alone
    machine: String,
    /// How many vCPUs it is to have
    #[arg(long, required_unless_present_any = ["cpu", "memory"])]
    vcpus: Option<u32>,
    /// What all its vCPUs may use together, as `500m` or `1.5`
    #[arg(long, value_parser = amounts::parse_cpu)]
    cpu: Option<u32>,
    /// Its memory, as `512MiB` or `2GiB`
    #[arg(long, value_parser = amounts::parse_memory)]
    memory: Option<u32>,
    /// How long to wait for the guest to take it, at most 60s; 10s where not given
    #[arg(long, value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
}

#[derive(Debug, Subcommand)]
pub(in crate::cli) enum Thresholds {
    /// Go by these thresholds in place of those that it has
    Set {
        /// machines/MACHINE, or its id alone
        machine: String,
        /// When it grows or shrinks, as 'cpu_use > 80% for 10s: vcpus +1, at most 4, every 60s'
        #[arg(required = true, value_name = "SPEC", value_parser = threshold::parse)]
        thresholds: Vec<v1::Threshold>,
        /// Beside those that it has
        #[arg(long)]
        add: bool,
    },
    /// Remove thresholds
    Remove {
        /// machines/MACHINE, or its id alone
        machine: String,
        /// Their numbers, as `stoker machine show` has them
        #[arg(required_unless_present = "all", value_name = "NUMBER")]
        numbers: Vec<usize>,
        /// All of them
        #[arg(long, conflicts_with = "numbers")]
        all: bool,
    },
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Stop {
    /// machines/MACHINE, or its id alone
    machine: String,
    /// How long its program may take to end once it was asked to, at most 10m; 10s where not given
    #[arg(long, value_parser = humantime::parse_duration)]
    grace: Option<Duration>,
}

pub(super) async fn run(connection: &Connection, resize: Resize) -> Result<(), Failure> {
    let request = v1::ResizeMachineRequest {
        name: name_of(&resize.machine),
        size: Some(v1::MachineSize {
            vcpus: resize.vcpus.unwrap_or_default(),
            cpu_millis: resize.cpu.unwrap_or_default(),
            memory_mib: resize.memory.unwrap_or_default(),
        }),
        timeout: time("--timeout", resize.timeout)?,
    };
    let response = client(connection).await?.resize_machine(request).await?.into_inner();
    if connection.json {
        print_json(&json("ResizeMachineResponse", &response)?);
        return Ok(());
    }
    say!("{}", resized(&response.resize.unwrap_or_default()));
    Ok(())
}

fn resized(resize: &v1::Resize) -> String {
    let (before, asked) = (some_size(resize.before.as_ref()), some_size(resize.asked.as_ref()));
    let taken = match resize.duration {
        Some(_) => format!("taken in {}", duration(resize.duration)),
        None => format!(
            "the guest has {} so far; `stoker machine show` says when it has all",
            some_size(resize.taken.as_ref())
        ),
    };
    format!("from {before} to {asked}: {taken}")
}

pub(super) async fn thresholds(connection: &Connection, thresholds: Thresholds) -> Result<(), Failure> {
    let mut client = client(connection).await?;
    let machine = match thresholds {
        Thresholds::Set {
            machine,
            thresholds,
            add: false,
        } => replace(&mut client, name_of(&machine), thresholds).await?,
        Thresholds::Set {
            machine, thresholds, ..
        } => {
            let add = |mut all: Vec<_>| {
                all.extend_from_slice(&thresholds);
                all
            };
            let name = name_of(&machine);
            let present = present(&mut client, &name).await?;
            change(&mut client, &name, present, add).await?
        }
        Thresholds::Remove { machine, all: true, .. } => replace(&mut client, name_of(&machine), Vec::new()).await?,
        Thresholds::Remove { machine, numbers, .. } => {
            let name = name_of(&machine);
            let present = present(&mut client, &name).await?;
            // Once others come or go, other thresholds have these numbers.
            let removed = numbered(&present.thresholds, &numbers)?;
            change(&mut client, &name, present, |all| without(all, &removed)).await?
        }
    };
    if connection.json {
        print_json(&json("Machine", &machine)?);
        return Ok(());
    }
    let launched = machine.launched.unwrap_or_default();
    if launched.thresholds.is_empty() {
        say!("it goes by no thresholds");
    }
    for (given, number) in launched.thresholds.iter().zip(1..) {
        say!("{number:>2}  {}", threshold::shown(given));
    }
    Ok(())
}

/// What there is of a machine that was launched, with its thresholds.
async fn present(client: &mut MachinesClient<Channel>, name: &str) -> Result<v1::Launched, Failure> {
    let request = v1::GetMachineRequest { name: name.to_owned() };
    let machine = client.get_machine(request).await?.into_inner();
    Ok(machine.launched.unwrap_or_default())
}

/// Lets a machine go by these thresholds, whatever others it had.
async fn replace(
    client: &mut MachinesClient<Channel>,
    name: String,
    thresholds: Vec<v1::Threshold>,
) -> Result<v1::Machine, Failure> {
    let request = v1::SetThresholdsRequest {
        name,
        thresholds,
        etag: String::new(),
    };
    Ok(client.set_thresholds(request).await?.into_inner())
}

/// Changes the thresholds that a machine has, and none that somebody else changes meanwhile: then it is tried again with those.
async fn change(
    client: &mut MachinesClient<Channel>,
    name: &str,
    mut present: v1::Launched,
    change: impl Fn(Vec<v1::Threshold>) -> Vec<v1::Threshold>,
) -> Result<v1::Machine, Failure> {
    let mut attempts = 0;
    loop {
        let request = v1::SetThresholdsRequest {
            name: name.to_owned(),
            thresholds: change(present.thresholds),
            etag: present.thresholds_etag,
        };
        attempts += 1;
        match client.set_thresholds(request).await {
            Err(status) if status.code() == Code::Aborted && attempts < ATTEMPTS => {
                present = self::present(client, name).await?;
            }
            set => return Ok(set?.into_inner()),
        }
    }
}

/// Those of these numbers, from 1.
fn numbered(thresholds: &[v1::Threshold], numbers: &[usize]) -> Result<Vec<v1::Threshold>, Failure> {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    numbers.dedup();
    let of = |number: usize| {
        let threshold = number.checked_sub(1).and_then(|index| thresholds.get(index));
        threshold.cloned().ok_or_else(|| {
            Failure::local(match thresholds.len() {
                0 => "the machine has no thresholds".to_owned(),
                has => format!("there is no threshold {number}; the machine has 1 to {has}"),
            })
        })
    };
    numbers.into_iter().map(of).collect()
}

/// What is left without these, as far as they are there still.
fn without(mut thresholds: Vec<v1::Threshold>, removed: &[v1::Threshold]) -> Vec<v1::Threshold> {
    for threshold in removed {
        if let Some(index) = thresholds.iter().position(|there| there == threshold) {
            thresholds.remove(index);
        }
    }
    thresholds
}

pub(super) async fn stop(connection: &Connection, stop: Stop) -> Result<(), Failure> {
    let request = v1::StopMachineRequest {
        name: name_of(&stop.machine),
        grace: time("--grace", stop.grace)?,
    };
    let machine = client(connection).await?.stop_machine(request).await?.into_inner();
    if connection.json {
        print_json(&json("Machine", &machine)?);
        return Ok(());
    }
    let end = machine.end.unwrap_or_default();
    let reason = end.reason().as_str_name().to_lowercase();
    say!("{}: {reason}: {}", machine.name, one_line(&end.detail));
    Ok(())
}

fn time(option: &str, given: Option<Duration>) -> Result<Option<prost_types::Duration>, Failure> {
    let time = given.map(prost_types::Duration::try_from).transpose();
    time.map_err(|error| Failure::local(format!("{option}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_removed_by_their_numbers() {
        let all = || -> Vec<_> {
            [
                "cpu_use > 80%: vcpus +1",
                "cpu_use < 20%: vcpus -1",
                "credits < 1: cpu -10%",
            ]
            .map(|text| threshold::parse(text).unwrap())
            .into()
        };
        let three = all();
        let [up, down, share] = &three[..] else {
            panic!("{three:?}")
        };
        let removed = numbered(&all(), &[3, 1, 3]).unwrap();
        assert_eq!(removed, [up.clone(), share.clone()]);
        assert_eq!(without(all(), &removed), std::slice::from_ref(down));
        // Somebody else has removed one and added others meanwhile.
        let meanwhile = vec![down.clone(), down.clone(), share.clone()];
        assert_eq!(without(meanwhile, &removed), [down.clone(), down.clone()]);
        let refused = numbered(&all(), &[1, 4]).unwrap_err().to_string();
        assert!(refused.contains("no threshold 4; the machine has 1 to 3"), "{refused}");
        assert!(numbered(&all(), &[0]).is_err());
        assert!(numbered(&[], &[1]).unwrap_err().to_string().contains("no thresholds"));
    }

    #[test]
    fn a_resize_says_what_the_guest_has() {
        let memory = |memory_mib| {
            Some(v1::MachineSize {
                vcpus: 1,
                cpu_millis: 1000,
                memory_mib,
            })
        };
        let mut resize = v1::Resize {
            before: memory(512),
            asked: memory(1024),
            taken: memory(700),
            ..Default::default()
        };
        let said = resized(&resize);
        assert!(
            said.starts_with("from 1 vCPU, 512 MiB to 1 vCPU, 1024 MiB: the guest has 1 vCPU, 700 MiB so far"),
            "{said}"
        );
        resize.duration = Some(prost_types::Duration { seconds: 1, nanos: 0 });
        assert!(resized(&resize).ends_with("1024 MiB: taken in 1.00 s"));
    }
}
