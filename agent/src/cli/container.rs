//! `stoker container`

use clap::Subcommand;
use stoker_proto::v1;
use stoker_proto::v1::machines_client::MachinesClient;

use super::machine::{id, name_of};
use super::{Connection, Failure, PAGE_SIZE, all_pages, json, print_json};
use crate::render::{Table, age, bytes, nanos, say, some_amount};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List containers
    List {
        /// Only those in this machine: machines/MACHINE, or its id alone
        #[arg(long, default_value = "machines/-", hide_default_value = true)]
        machine: String,
    },
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    let Command::List { machine } = command;
    let mut client = MachinesClient::new(connection.channel().await?);
    let containers = all_pages(async |page_token| {
        let request = v1::ListContainersRequest {
            parent: name_of(&machine),
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
