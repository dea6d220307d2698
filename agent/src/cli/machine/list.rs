//! `stoker machine list`

use std::collections::HashMap;

use stoker_proto::v1;
use stoker_proto::v1::credits_client::CreditsClient;
use stoker_proto::v1::machines_client::MachinesClient;

use super::{id, runs, scratch};
use crate::cli::{Connection, Failure, PAGE_SIZE, all_pages, credits, json, print_json};
use crate::render::{Table, age, duration, one_line, say, some_amount, text};

pub(super) async fn run(connection: &Connection, ended: bool) -> Result<(), Failure> {
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
        "MACHINE", "STATE", "RUNS", "ACCOUNT", "CLASS", ">SIZE", ">GIVEN", ">SCRATCH", ">PID", ">BOOT", ">AGE",
    ]);
    for machine in machines {
        table.row([
            id(&machine.name).to_owned(),
            machine.state().as_str_name().to_lowercase(),
            text(runs(machine)),
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

/// The last that ended comes last.
fn of_ended(machines: &[v1::Machine]) -> Table {
    let mut machines: Vec<_> = machines
        .iter()
        .map(|machine| (machine, machine.end.clone().unwrap_or_default()))
        .collect();
    machines.sort_by_key(|(_, end)| end.end_time.map(|time| (time.seconds, time.nanos)));
    let mut table = Table::new(&["MACHINE", "RUNS", "ACCOUNT", ">ENDED", "REASON", "CAUSE"]);
    for (machine, end) in machines {
        table.row([
            id(&machine.name).to_owned(),
            text(runs(machine)),
            text(machine.account.trim_start_matches("accounts/")),
            format!("{} ago", age(end.end_time)),
            end.reason().as_str_name().to_lowercase(),
            one_line(&end.detail),
        ]);
    }
    table
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
            ..Default::default()
        };
        credits.set_class(v1::machine_credits::Class::High);
        let lines = of_present(&[machine("A"), machine("B")], std::slice::from_ref(&credits)).lines(None);
        assert!(lines[1].contains("acme     -      "), "{lines:?}");
        assert!(lines[2].contains("acme     high   "), "{lines:?}");
    }

    #[test]
    fn what_was_launched_is_listed_with_its_image() {
        let machine = v1::Machine {
            name: "machines/A".into(),
            scratch_mib: 512,
            launched: Some(v1::Launched {
                image: "accounts/acme/images/web".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let lines = of_present(&[machine], &[]).lines(None);
        assert!(
            lines[1].contains("  web   ") && lines[1].contains("512 MiB"),
            "{lines:?}"
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
