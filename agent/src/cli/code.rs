//! `stoker code`

use std::time::Duration;

use clap::Subcommand;
use stoker_proto::v1;
use stoker_proto::v1::code_client::CodeClient;

use super::{Connection, Failure, PAGE_SIZE, all_pages, json, print_json};
use crate::render::{Table, age, bytes, say};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List code that no function needs, as far as the agent's database knows
    Orphans,
    /// Remove code that no function has needed for a while
    RemoveOrphans {
        /// Only what no function has needed for this long, as `48h`; the agent's `code.orphan_grace` where not given
        #[arg(long, value_parser = humantime::parse_duration)]
        older_than: Option<Duration>,
    },
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::Orphans => orphans(connection).await,
        Command::RemoveOrphans { older_than } => remove_orphans(connection, older_than).await,
    }
}

async fn orphans(connection: &Connection) -> Result<(), Failure> {
    let mut client = CodeClient::new(connection.channel().await?);
    let orphans = all_pages(async |page_token| {
        let request = v1::ListOrphansRequest {
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_orphans(request).await?.into_inner();
        Ok((page.orphans, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListOrphansResponse {
            orphans,
            next_page_token: String::new(),
        };
        print_json(&json("ListOrphansResponse", &all)?);
        return Ok(());
    }
    if orphans.is_empty() {
        say!("no orphans: functions need all the code that there is");
        return Ok(());
    }
    let mut table = Table::new(&["SHA-256", ">CODE", ">ORPHAN FOR"]);
    for orphan in orphans {
        table.row([orphan.code_sha256, bytes(orphan.size_bytes), age(orphan.orphan_time)]);
    }
    table.print();
    Ok(())
}

async fn remove_orphans(connection: &Connection, older_than: Option<Duration>) -> Result<(), Failure> {
    let older_than = older_than
        .map(prost_types::Duration::try_from)
        .transpose()
        .map_err(|error| Failure::local(format!("--older-than: {error}")))?;
    let mut client = CodeClient::new(connection.channel().await?);
    let request = v1::RemoveOrphansRequest { older_than };
    let removed = client.remove_orphans(request).await?.into_inner();
    if connection.json {
        print_json(&json("RemoveOrphansResponse", &removed)?);
    } else {
        say!("removed {} ({})", removed.removed, bytes(removed.removed_bytes));
    }
    Ok(())
}
