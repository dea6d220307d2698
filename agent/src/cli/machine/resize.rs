//! `stoker machine resize`, `stoker machine thresholds` and `stoker machine stop`

use std::time::Duration;

use clap::{Args, Subcommand};
use stoker_proto::v1;
use stoker_proto::v1::machines_client::MachinesClient;
use tonic::transport::Channel;

use super::{client, name_of, some_size, threshold};
use crate::cli::{Connection, Failure, amounts, json, print_json};
use crate::render::{duration, one_line, say};

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
    let (name, thresholds) = match thresholds {
        Thresholds::Set {
            machine,
            mut thresholds,
            add,
        } => {
            let name = name_of(&machine);
            if add {
                let mut all = present(&mut client, &name).await?;
                all.append(&mut thresholds);
                thresholds = all;
            }
            (name, thresholds)
        }
        Thresholds::Remove { machine, numbers, all } => {
            let name = name_of(&machine);
            let left = match all {
                true => Vec::new(),
                false => without(present(&mut client, &name).await?, &numbers)?,
            };
            (name, left)
        }
    };
    let request = v1::SetThresholdsRequest { name, thresholds };
    let machine = client.set_thresholds(request).await?.into_inner();
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

/// The thresholds that a machine has.
async fn present(client: &mut MachinesClient<Channel>, name: &str) -> Result<Vec<v1::Threshold>, Failure> {
    let request = v1::GetMachineRequest { name: name.to_owned() };
    let machine = client.get_machine(request).await?.into_inner();
    Ok(machine.launched.unwrap_or_default().thresholds)
}

/// Those whose numbers, from 1, are not given.
fn without(thresholds: Vec<v1::Threshold>, numbers: &[usize]) -> Result<Vec<v1::Threshold>, Failure> {
    let has = thresholds.len();
    if let Some(unknown) = numbers.iter().find(|number| !(1..=has).contains(*number)) {
        return Err(Failure::local(match has {
            0 => "the machine has no thresholds".to_owned(),
            has => format!("there is no threshold {unknown}; the machine has 1 to {has}"),
        }));
    }
    let numbered = thresholds.into_iter().zip(1..);
    let left = numbered.filter(|(_, number)| !numbers.contains(number));
    Ok(left.map(|(threshold, _)| threshold).collect())
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
        let left = without(all(), &[3, 1]).unwrap();
        assert_eq!(left, [threshold::parse("cpu_use < 20%: vcpus -1").unwrap()]);
        let refused = without(all(), &[1, 4]).unwrap_err().to_string();
        assert!(refused.contains("no threshold 4; the machine has 1 to 3"), "{refused}");
        assert!(without(all(), &[0]).is_err());
        assert!(
            without(Vec::new(), &[1])
                .unwrap_err()
                .to_string()
                .contains("no thresholds")
        );
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
