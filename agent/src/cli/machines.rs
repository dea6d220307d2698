//! `stoker machine` and `stoker container`

use std::collections::HashMap;

use clap::Subcommand;
use stoker_proto::v1;
use stoker_proto::v1::credits_client::CreditsClient;
use stoker_proto::v1::machines_client::MachinesClient;
use tonic::Code;

use super::{Connection, Failure, PAGE_SIZE, all_pages, credits, json, print_json};
use crate::render::{Table, age, bytes, duration, nanos, one_line, say, some_amount, text};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List machines
    List {
        /// Those that have ended, with why, rather than those that are there
        #[arg(long)]
        ended: bool,
    },
    /// Show a machine; one that has ended with why
    Get {
        /// machines/MACHINE, or its id alone
        name: String,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum ContainerCommand {
    /// List containers
    List {
        /// Only those in this machine: machines/MACHINE, or its id alone
        #[arg(long, default_value = "machines/-", hide_default_value = true)]
        machine: String,
    },
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::List { ended } => list(connection, ended).await,
        Command::Get { name } => get(connection, machine_name(&name)).await,
    }
}

async fn get(connection: &Connection, name: String) -> Result<(), Failure> {
    let channel = connection.channel().await?;
    let of_it = credits::name(&name);
    let request = v1::GetMachineRequest { name };
    let mut machine = MachinesClient::new(channel.clone())
        .get_machine(request)
        .await?
        .into_inner();
    if connection.json {
        print_json(&json("Machine", &machine)?);
        return Ok(());
    }
    if machine.end.is_none() {
        let request = v1::GetMachineCreditsRequest { name: of_it };
        machine.credits = match CreditsClient::new(channel).get_machine_credits(request).await {
            Ok(found) => Some(found.into_inner()),
            // It has no account yet, or has ended meanwhile.
            Err(status) if status.code() == Code::NotFound => None,
            Err(status) => return Err(status.into()),
        };
    }
    show(&machine);
    Ok(())
}

async fn list(connection: &Connection, ended: bool) -> Result<(), Failure> {
    let channel = connection.channel().await?;
    let mut client = MachinesClient::new(channel.clone());
    let mut machines = all_pages(async |page_token| {
        let request = v1::ListMachinesRequest {
            page_size: PAGE_SIZE,
            page_token,
            include_ended: ended,
        };
        let page = client.list_machines(request).await?.into_inner();
        Ok((page.machines, page.next_page_token))
    })
    .await?;
    if ended {
        machines.retain(|machine| machine.state() == v1::machine::State::Ended);
    }
    if connection.json {
        let all = v1::ListMachinesResponse {
            machines,
            next_page_token: String::new(),
        };
        print_json(&json("ListMachinesResponse", &all)?);
        return Ok(());
    }
    if machines.is_empty() {
        match ended {
            true => say!("no machine has ended since the agent was started"),
            false => say!("no machines"),
        }
        return Ok(());
    }
    match ended {
        // Whole: a cause that is cut tells nothing.
        true => of_ended(&machines).lines(None).iter().for_each(|line| say!("{line}")),
        false => {
            let credits = credits::all(&mut CreditsClient::new(channel), credits::ALL_MACHINES).await?;
            of_present(&machines, &credits).print();
        }
    }
    Ok(())
}

fn of_present(machines: &[v1::Machine], credits: &[v1::MachineCredits]) -> Table {
    let classes: HashMap<_, _> = credits
        .iter()
        .map(|credits| (credits.name.trim_end_matches("/credits"), credits::class(credits)))
        .collect();
    let mut table = Table::new(&[
        "MACHINE", "STATE", "RUNTIME", "ACCOUNT", "CLASS", ">SIZE", ">GIVEN", ">SCRATCH", ">PID", ">BOOT", ">AGE",
    ]);
    for machine in machines {
        table.row([
            id(&machine.name).to_owned(),
            machine.state().as_str_name().to_lowercase(),
            machine.runtime.clone(),
            text(machine.account.trim_start_matches("accounts/")),
            classes.get(&*machine.name).map_or_else(|| "-".to_owned(), Clone::clone),
            some_amount(machine.amount.as_ref()),
            some_amount(machine.allocated.as_ref()),
            scratch(machine),
            if machine.pid == 0 {
                "-".to_owned()
            } else {
                machine.pid.to_string()
            },
            duration(machine.boot_duration),
            age(machine.create_time),
        ]);
    }
    table
}

/// What of its scratch disk was given to containers, and what it has.
fn scratch(machine: &v1::Machine) -> String {
    match machine.scratch_mib {
        0 => "-".to_owned(),
        mib => format!("{}/{mib} MiB", machine.scratch_allocated_mib),
    }
}

/// The last that ended comes last.
fn of_ended(machines: &[v1::Machine]) -> Table {
    let mut machines: Vec<_> = machines
        .iter()
        .map(|machine| (machine, machine.end.clone().unwrap_or_default()))
        .collect();
    machines.sort_by_key(|(_, end)| end.end_time.map(|time| (time.seconds, time.nanos)));
    let mut table = Table::new(&["MACHINE", "RUNTIME", "ACCOUNT", ">ENDED", "REASON", "CAUSE"]);
    for (machine, end) in machines {
        table.row([
            id(&machine.name).to_owned(),
            machine.runtime.clone(),
            text(machine.account.trim_start_matches("accounts/")),
            format!("{} ago", age(end.end_time)),
            end.reason().as_str_name().to_lowercase(),
            one_line(&end.detail),
        ]);
    }
    table
}

fn show(machine: &v1::Machine) {
    say!("{}", machine.name);
    let usage = machine.usage.unwrap_or_default();
    let mut lines = vec![
        ("state", machine.state().as_str_name().to_lowercase()),
        ("runtime", text(&machine.runtime)),
        ("account", text(&machine.account)),
        ("size", some_amount(machine.amount.as_ref())),
        ("given", some_amount(machine.allocated.as_ref())),
        ("scratch", scratch(machine)),
        (
            "pid",
            if machine.pid == 0 {
                "-".to_owned()
            } else {
                machine.pid.to_string()
            },
        ),
        ("cgroup", text(&machine.cgroup)),
        (
            "created",
            machine
                .create_time
                .map_or_else(|| "-".to_owned(), |time| time.to_string()),
        ),
        ("boot", duration(machine.boot_duration)),
        (
            "use",
            format!(
                "{} CPU, {} waited, {} now, {} peak",
                nanos(usage.cpu_ns),
                nanos(usage.wait_ns),
                bytes(usage.memory_bytes),
                bytes(usage.memory_peak_bytes)
            ),
        ),
    ];
    if let Some(credits) = &machine.credits {
        lines.push(("credits", held(credits)));
    }
    if let Some(end) = &machine.end {
        lines.push((
            "end",
            format!("{}: {}", end.reason().as_str_name().to_lowercase(), end.detail),
        ));
    }
    for (key, value) in lines {
        say!("  {key:<8} {value}");
    }
    if let Some(end) = &machine.end
        && !end.console_tail.is_empty()
    {
        say!("  console");
        for line in end.console_tail.lines() {
            // A guest's console must not drive the reader's terminal.
            let line: String = line.chars().filter(|c| !c.is_control()).collect();
            say!("    {line}");
        }
    }
}

/// A machine's credits in a line; `stoker credits get` tells all.
fn held(credits: &v1::MachineCredits) -> String {
    format!(
        "{}, {} left, {} owed, may use {} of {} vCPUs, empty in {}",
        credits::class(credits),
        credits::amount(credits.balance + credits.launch),
        credits::amount(credits.owed),
        credits::cpu(credits.allowed_millis),
        credits.vcpus,
        duration(credits.time_to_empty)
    )
}

pub(super) async fn run_container(connection: &Connection, command: ContainerCommand) -> Result<(), Failure> {
    let ContainerCommand::List { machine } = command;
    let mut client = MachinesClient::new(connection.channel().await?);
    let containers = all_pages(async |page_token| {
        let request = v1::ListContainersRequest {
            parent: machine_name(&machine),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_containers(request).await?.into_inner();
        Ok((page.containers, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListContainersResponse {
            containers,
            next_page_token: String::new(),
        };
        print_json(&json("ListContainersResponse", &all)?);
        return Ok(());
    }
    if containers.is_empty() {
        say!("no containers; the first invocation of a function makes one");
        return Ok(());
    }
    let mut table = Table::new(&[
        "CONTAINER",
        "MACHINE",
        "FUNCTION",
        ">VER",
        "STATE",
        ">AMOUNT",
        ">CALLS",
        ">CPU",
        ">PEAK",
        ">AGE",
    ]);
    for container in containers {
        let usage = container.usage.unwrap_or_default();
        let machine = container.name.split('/').nth(1).unwrap_or_default().to_owned();
        table.row([
            id(&container.name).to_owned(),
            machine,
            container.function.clone(),
            container.version.to_string(),
            container.state().as_str_name().to_lowercase(),
            some_amount(container.amount.as_ref()),
            container.invocations.to_string(),
            nanos(usage.cpu_ns),
            bytes(usage.memory_peak_bytes),
            age(container.create_time),
        ]);
    }
    table.print();
    Ok(())
}

fn machine_name(given: &str) -> String {
    if given.contains('/') {
        given.to_owned()
    } else {
        format!("machines/{given}")
    }
}

fn id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use stoker_proto::v1::machine_end::Reason;

    use super::*;

    #[test]
    fn machines_are_listed_with_their_classes() {
        let machine = |name: &str| v1::Machine {
            name: format!("machines/{name}"),
            account: "accounts/acme".into(),
            ..Default::default()
        };
        let mut credits = v1::MachineCredits {
            name: "machines/B/credits".into(),
            vcpus: 2,
            allowed_millis: 2000,
            balance: 3.5,
            launch: 1.0,
            ..Default::default()
        };
        credits.set_class(v1::machine_credits::Class::High);
        let lines = of_present(&[machine("A"), machine("B")], std::slice::from_ref(&credits)).lines(None);
        assert!(lines[1].contains("acme     -      "), "{lines:?}");
        assert!(lines[2].contains("acme     high   "), "{lines:?}");
        assert_eq!(
            held(&credits),
            "high, 4.500 left, 0.000 owed, may use 200.0% of 2 vCPUs, empty in -"
        );
    }

    #[test]
    fn each_end_is_listed_with_its_cause() {
        let ended = |name: &str, reason: Reason, detail: &str, seconds| v1::Machine {
            name: format!("machines/{name}"),
            runtime: "python3.11".into(),
            end: Some(v1::MachineEnd {
                reason: reason.into(),
                detail: detail.into(),
                end_time: Some(prost_types::Timestamp { seconds, nanos: 0 }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let lines = of_ended(&[
            ended("B", Reason::OutOfMemory, "the kernel killed it", 2),
            ended("A", Reason::VmmError, "it said:\nno such file", 1),
        ])
        .lines(None);
        assert!(lines[0].ends_with("REASON         CAUSE"), "{lines:?}");
        assert!(
            lines[1].starts_with('A') && lines[1].ends_with("ago  vmm_error      it said: / no such file"),
            "{lines:?}"
        );
        assert!(
            lines[2].starts_with('B') && lines[2].ends_with("ago  out_of_memory  the kernel killed it"),
            "{lines:?}"
        );
    }
}
