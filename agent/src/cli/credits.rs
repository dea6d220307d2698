//! `stoker credits`

use clap::{Subcommand, ValueEnum};
use stoker_proto::v1;
use stoker_proto::v1::credits_client::CreditsClient;
use stoker_proto::v1::machine_credits::{Class, Mode};
use tonic::transport::Channel;

use super::{Connection, Failure, PAGE_SIZE, all_pages, json, names, print_json};
use crate::names::AccountName;
use crate::render::{Table, duration, say, text};

/// The parent of the credits of all machines.
pub(super) const ALL_MACHINES: &str = "machines/-";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List machines with their balances, and how they run by them
    List {
        /// Only machines that serve this account: ACCOUNT, or accounts/ACCOUNT
        #[arg(long, value_parser = names::parse)]
        account: Option<AccountName>,
    },
    /// Show a machine's credits
    Get {
        /// machines/MACHINE, or its id alone
        machine: String,
    },
    /// Change what a machine goes by (administrators only)
    Update {
        /// machines/MACHINE, or its id alone
        machine: String,
        /// What it earns and may always use, in millicores of one CPU, for all its vCPUs together
        #[arg(long, value_name = "MILLICORES", required_unless_present = "mode")]
        baseline: Option<u32>,
        /// What becomes of it when it has spent all
        #[arg(long)]
        mode: Option<GivenMode>,
    },
    /// Give a machine credits, which are spent first and outside the cap (administrators only)
    Grant {
        /// machines/MACHINE, or its id alone
        machine: String,
        /// How many; one is a CPU for a minute
        credits: f64,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum GivenMode {
    /// It falls to its baseline
    Standard,
    /// It runs on, and is billed for what it does not earn later
    Unlimited,
}

impl From<GivenMode> for Mode {
    fn from(mode: GivenMode) -> Self {
        match mode {
            GivenMode::Standard => Self::Standard,
            GivenMode::Unlimited => Self::Unlimited,
        }
    }
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    let mut client = CreditsClient::new(connection.channel().await?);
    match command {
        Command::List { account } => list(connection, &mut client, account).await,
        Command::Get { machine } => {
            let name = name(&machine);
            let credits = client
                .get_machine_credits(v1::GetMachineCreditsRequest { name })
                .await?;
            show(connection, &credits.into_inner())
        }
        Command::Update {
            machine,
            baseline,
            mode,
        } => {
            let request = update(&machine, baseline, mode);
            show(connection, &client.update_machine_credits(request).await?.into_inner())
        }
        Command::Grant { machine, credits } => {
            let name = name(&machine);
            let request = v1::GrantMachineCreditsRequest { name, credits };
            show(connection, &client.grant_machine_credits(request).await?.into_inner())
        }
    }
}

async fn list(
    connection: &Connection,
    client: &mut CreditsClient<Channel>,
    account: Option<AccountName>,
) -> Result<(), Failure> {
    let parent = account.map_or_else(|| ALL_MACHINES.to_owned(), |account| account.to_string());
    let machine_credits = all(client, &parent).await?;
    if connection.json {
        let all = v1::ListMachineCreditsResponse {
            machine_credits,
            next_page_token: String::new(),
        };
        print_json(&json("ListMachineCreditsResponse", &all)?);
        return Ok(());
    }
    if machine_credits.is_empty() {
        say!("no machines");
        return Ok(());
    }
    table(&machine_credits).print();
    Ok(())
}

/// The credits of the machines of a parent: an account's, or [`ALL_MACHINES`].
pub(super) async fn all(
    client: &mut CreditsClient<Channel>,
    parent: &str,
) -> Result<Vec<v1::MachineCredits>, tonic::Status> {
    all_pages(async |page_token| {
        let request = v1::ListMachineCreditsRequest {
            parent: parent.to_owned(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_machine_credits(request).await?.into_inner();
        Ok((page.machine_credits, page.next_page_token))
    })
    .await
}

/// What matters less further right, where a narrow terminal cuts.
fn table(all: &[v1::MachineCredits]) -> Table {
    let mut table = Table::new(&[
        "MACHINE",
        "ACCOUNT",
        "CLASS",
        ">LEFT",
        ">OWED",
        ">USES",
        ">MAY USE",
        ">EMPTY IN",
        ">FULL IN",
        ">BASELINE",
        "MODE",
    ]);
    for credits in all {
        table.row([
            id(&credits.name).to_owned(),
            text(credits.account.trim_start_matches("accounts/")),
            class(credits),
            amount(credits.balance + credits.launch),
            match credits.owed {
                0.0 => "-".to_owned(),
                owed => amount(owed),
            },
            cpu(credits.used_millis),
            cpu(credits.allowed_millis),
            duration(credits.time_to_empty),
            duration(credits.time_to_full),
            cpu(credits.baseline_millis),
            mode(credits),
        ]);
    }
    table
}

fn show(connection: &Connection, credits: &v1::MachineCredits) -> Result<(), Failure> {
    if connection.json {
        print_json(&json("MachineCredits", credits)?);
        return Ok(());
    }
    lines(credits).into_iter().for_each(|line| say!("{line}"));
    Ok(())
}

fn lines(credits: &v1::MachineCredits) -> Vec<String> {
    let totals = credits.totals.unwrap_or_default();
    let of_vcpus = format!("{} vCPUs", credits.vcpus);
    let each = [
        ("account", text(&credits.account)),
        ("class", format!("{}, level {} of 9", class(credits), credits.level)),
        ("may use", format!("{} of {of_vcpus}", cpu(credits.allowed_millis))),
        ("uses", cpu(credits.used_millis)),
        (
            "left",
            format!(
                "{} earned (of {} at most), {} given",
                amount(credits.balance),
                amount(credits.cap),
                amount(credits.launch)
            ),
        ),
        ("owes", amount(credits.owed)),
        ("empty in", duration(credits.time_to_empty)),
        ("full in", duration(credits.time_to_full)),
        (
            "earns",
            format!(
                "{} credits an hour, for a baseline of {}",
                amount(credits.earned_per_hour),
                cpu(credits.baseline_millis)
            ),
        ),
        ("mode", mode(credits)),
        (
            "in all",
            format!(
                "{} earned, {} given, {} spent, {} discarded, {} borrowed",
                amount(totals.earned),
                amount(totals.granted),
                amount(totals.spent),
                amount(totals.discarded),
                amount(totals.borrowed)
            ),
        ),
        (
            "billed",
            format!("{} ({} forgiven)", amount(totals.billed), amount(totals.forgiven)),
        ),
    ];
    let lines = each.into_iter().map(|(key, value)| format!("  {key:<9} {value}"));
    std::iter::once(credits.name.clone()).chain(lines).collect()
}

fn update(machine: &str, baseline: Option<u32>, mode: Option<GivenMode>) -> v1::UpdateMachineCreditsRequest {
    let paths = [baseline.map(|_| "baseline_millis"), mode.map(|_| "mode")];
    let mut credits = v1::MachineCredits {
        name: name(machine),
        baseline_millis: baseline.unwrap_or_default(),
        ..Default::default()
    };
    if let Some(mode) = mode {
        credits.set_mode(mode.into());
    }
    v1::UpdateMachineCreditsRequest {
        machine_credits: Some(credits),
        update_mask: Some(prost_types::FieldMask {
            paths: paths.into_iter().flatten().map(str::to_owned).collect(),
        }),
    }
}

/// `machines/{machine}/credits`, of a machine as people name it.
pub(super) fn name(given: &str) -> String {
    let id = given.trim_start_matches("machines/").trim_end_matches("/credits");
    format!("machines/{id}/credits")
}

fn id(name: &str) -> &str {
    name.split('/').nth(1).unwrap_or(name)
}

pub(super) fn class(credits: &v1::MachineCredits) -> String {
    match credits.class() {
        Class::Unspecified => "-".to_owned(),
        class => class.as_str_name().to_lowercase(),
    }
}

pub(super) fn mode(credits: &v1::MachineCredits) -> String {
    match credits.mode() {
        Mode::Unspecified => "-".to_owned(),
        mode => mode.as_str_name().to_lowercase(),
    }
}

pub(super) fn amount(credits: f64) -> String {
    format!("{credits:.3}")
}

/// As a part of one CPU.
pub(super) fn cpu(millis: u32) -> String {
    format!("{:.1}%", f64::from(millis) / 10.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credits() -> v1::MachineCredits {
        let mut credits = v1::MachineCredits {
            name: "machines/MA/credits".into(),
            account: "accounts/acme".into(),
            vcpus: 2,
            baseline_millis: 200,
            level: 4,
            allowed_millis: 1100,
            balance: 5.5,
            launch: 0.25,
            cap: 288.0,
            earned_per_hour: 12.0,
            used_millis: 1100,
            time_to_empty: Some(prost_types::Duration { seconds: 383, nanos: 5 }),
            ..Default::default()
        };
        credits.set_class(Class::Normal);
        credits.set_mode(Mode::Standard);
        credits
    }

    #[test]
    fn each_machine_is_a_line_and_what_matters_comes_first() {
        let lines = table(&[credits()]).lines(None);
        let shown: Vec<_> = lines[1].split_whitespace().collect();
        assert_eq!(
            shown,
            [
                "MA", "acme", "normal", "5.750", "-", "110.0%", "110.0%", "6m", "23s", "-", "20.0%", "standard"
            ]
        );
        assert!(table(&[credits()]).lines(Some(80))[0].contains("EMPTY IN"));
    }

    #[test]
    fn one_machine_is_told_of_in_full() {
        let lines = lines(&credits());
        let has = |text: &str| assert!(lines.iter().any(|line| line.contains(text)), "{text}: {lines:?}");
        has("level 4 of 9");
        has("110.0% of 2 vCPUs");
        has("5.500 earned (of 288.000 at most), 0.250 given");
        has("12.000 credits an hour");
    }

    #[test]
    fn names_are_short_or_whole() {
        for given in ["MA", "machines/MA", "machines/MA/credits"] {
            assert_eq!(name(given), "machines/MA/credits");
        }
        let request = update("MA", Some(300), None);
        assert_eq!(request.update_mask.unwrap().paths, ["baseline_millis"]);
    }
}
