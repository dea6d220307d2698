//! `stoker account`

use clap::{Args, Subcommand};
use stoker_proto::v1;
use stoker_proto::v1::account_limit::Source;
use stoker_proto::v1::accounts_client::AccountsClient;
use tonic::transport::Channel;

use super::names::{VARIABLE, parse};
use super::settings::Settings;
use super::{Connection, Failure, PAGE_SIZE, all_pages, amounts, json, print_json};
use crate::accounts::Limit;
use crate::names::AccountName;
use crate::render::{Table, say};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// List accounts with what they have, of what they may have
    List,
    /// Show what an account has, what it may have, and where each limit comes from
    Show {
        /// ACCOUNT, or accounts/ACCOUNT; without it the one that is set
        #[arg(env = VARIABLE, value_parser = parse)]
        account: Option<AccountName>,
    },
    /// Change what an account may have, at once and until it is changed again (administrators only)
    ///
    /// Nothing that runs ends by less: the account has nothing more until it has less.
    Limit(SetLimits),
    /// Set the account that you work in: `stoker invoke resize` is then accounts/ACCOUNT/functions/resize
    #[command(name = "set-default")]
    Set {
        /// ACCOUNT, or accounts/ACCOUNT
        #[arg(value_parser = parse)]
        account: AccountName,
    },
    /// Show the account that is set
    #[command(name = "show-default")]
    ShowDefault,
    /// Set none
    #[command(name = "unset-default")]
    Unset,
}

#[derive(Debug, Args)]
pub(super) struct SetLimits {
    /// ACCOUNT, or accounts/ACCOUNT
    #[arg(value_parser = parse)]
    account: AccountName,
    /// The most machines, of functions and launched ones
    #[arg(long, value_name = "COUNT", required_unless_present_any = ["vcpus", "memory", "functions", "concurrency", "waiting", "share", "reset"])]
    machines: Option<u32>,
    /// The most vCPUs that its machines may have
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u32>,
    /// The most memory that its machines may have, as `512MiB` or `64GiB`
    #[arg(long, value_name = "MEMORY", value_parser = amounts::parse_memory)]
    memory: Option<u32>,
    /// The most functions
    #[arg(long, value_name = "COUNT")]
    functions: Option<u32>,
    /// The most invocations that run at a time; more wait
    #[arg(long, value_name = "COUNT")]
    concurrency: Option<u32>,
    /// The most invocations that wait; more are refused
    #[arg(long, value_name = "COUNT")]
    waiting: Option<u32>,
    /// Its weight where accounts contend
    #[arg(long, value_name = "WEIGHT")]
    share: Option<u32>,
    /// What is to be as the agent's configuration says again: limits as they are called here, or `all` that are not given
    #[arg(long, value_name = "LIMIT", value_delimiter = ',', value_parser = parse_reset)]
    reset: Vec<Reset>,
}

/// What goes back to what the configuration says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reset {
    One(Limit),
    All,
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::List => list(connection).await,
        Command::Show { account } => {
            let name = match (account, Settings::read()?.account) {
                (Some(account), _) => account.to_string(),
                (None, Some(set)) => format!("accounts/{set}"),
                (None, None) => {
                    let problem = "name an account, or set yours by `stoker account set-default ACCOUNT`";
                    return Err(Failure::local(problem));
                }
            };
            let account = client(connection)
                .await?
                .get_account(v1::GetAccountRequest { name })
                .await?;
            show(connection, &account.into_inner())
        }
        Command::Limit(limits) => {
            let request = request(&limits)?;
            let account = client(connection).await?.set_account_limits(request).await?;
            show(connection, &account.into_inner())
        }
        Command::Set { account } => {
            let mut settings = Settings::read()?;
            settings.account = Some(account.account().to_owned());
            settings.write()?;
            show_default(connection, settings.account)
        }
        Command::ShowDefault => show_default(connection, Settings::read()?.account),
        Command::Unset => {
            let mut settings = Settings::read()?;
            settings.account = None;
            settings.write()?;
            show_default(connection, settings.account)
        }
    }
}

async fn client(connection: &Connection) -> Result<AccountsClient<Channel>, Failure> {
    Ok(AccountsClient::new(connection.channel().await?))
}

async fn list(connection: &Connection) -> Result<(), Failure> {
    let client = client(connection).await?;
    let accounts = all_pages(async |page_token| {
        let request = v1::ListAccountsRequest {
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.clone().list_accounts(request).await?.into_inner();
        Ok((page.accounts, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListAccountsResponse {
            accounts,
            next_page_token: String::new(),
        };
        print_json(&json("ListAccountsResponse", &all)?);
        return Ok(());
    }
    if accounts.is_empty() {
        say!("no accounts");
        return Ok(());
    }
    table(&accounts).print();
    Ok(())
}

/// Each as what it has of what it may have.
fn table(accounts: &[v1::Account]) -> Table {
    let mut table = Table::new(&[
        "ACCOUNT",
        ">MACHINES",
        ">VCPUS",
        ">MEMORY",
        ">FUNCTIONS",
        ">RUNNING",
        ">WAITING",
        ">SHARE",
    ]);
    for account in accounts {
        let rows = rows(account).map(|row| match row.used {
            Some(used) => format!("{used} of {}", row.limit),
            None => row.limit,
        });
        let name = account.name.trim_start_matches("accounts/").to_owned();
        table.row(std::iter::once(name).chain(rows));
    }
    table
}

fn show(connection: &Connection, account: &v1::Account) -> Result<(), Failure> {
    if connection.json {
        print_json(&json("Account", account)?);
        return Ok(());
    }
    lines(account).into_iter().for_each(|line| say!("{line}"));
    Ok(())
}

fn lines(account: &v1::Account) -> Vec<String> {
    let mut table = Table::new(&["LIMIT", ">HAS", ">MAY HAVE", "FROM"]);
    for row in rows(account) {
        let used = row.used.unwrap_or_else(|| "-".to_owned());
        table.row([option(row.of).to_owned(), used, row.limit, row.source.to_owned()]);
    }
    let used = account.r#use.unwrap_or_default();
    let given = format!(
        "{} of its machines were launched; its containers and these were given {} mCPU",
        used.launched_machines, used.cpu_millis
    );
    let lines = table.lines(None).into_iter().map(|line| format!("  {line}"));
    let all = std::iter::once(account.name.clone()).chain(lines);
    all.chain([format!("  {given}")]).collect()
}

/// A limit as it is shown.
struct Row {
    of: Limit,
    /// Nothing for what is no count of anything.
    used: Option<String>,
    limit: String,
    source: &'static str,
}

fn rows(account: &v1::Account) -> [Row; Limit::ALL.len()] {
    let limits = account.limits.unwrap_or_default();
    let used = account.r#use.unwrap_or_default();
    Limit::ALL.map(|of| {
        let (limit, used) = match of {
            Limit::Machines => (limits.machines, Some(used.machines.into())),
            Limit::Vcpus => (limits.vcpus, Some(used.vcpus.into())),
            Limit::MemoryMib => (limits.memory_mib, Some(used.memory_mib)),
            Limit::Functions => (limits.functions, Some(used.functions.into())),
            Limit::Concurrency => (limits.concurrency, Some(used.running.into())),
            Limit::Waiting => (limits.waiting, Some(used.waiting.into())),
            Limit::Share => (limits.share, None),
        };
        let limit = limit.unwrap_or_default();
        let shown = |value: u64| match (of, u32::try_from(value)) {
            (Limit::MemoryMib, Ok(mib)) => amounts::memory_shown(mib),
            _ => value.to_string(),
        };
        Row {
            of,
            used: used.map(shown),
            limit: limit.value.map_or_else(|| "any".to_owned(), shown),
            source: match limit.source() {
                Source::Unspecified => "-",
                Source::Default => "default",
                Source::Configuration => "configuration",
                Source::Set => "set",
            },
        }
    })
}

/// What the command line calls it.
fn option(limit: Limit) -> &'static str {
    match limit {
        Limit::MemoryMib => "memory",
        other => other.name(),
    }
}

fn parse_reset(text: &str) -> Result<Reset, String> {
    let one = || Limit::ALL.into_iter().find(|limit| option(*limit) == text);
    let reset = match text {
        "all" => Some(Reset::All),
        _ => one().map(Reset::One),
    };
    reset.ok_or_else(|| format!("{text:?} must be one of {}, or all", Limit::ALL.map(option).join(", ")))
}

fn request(given: &SetLimits) -> Result<v1::SetAccountLimitsRequest, Failure> {
    let values = v1::AccountLimitValues {
        machines: given.machines,
        vcpus: given.vcpus,
        memory_mib: given.memory.map(u64::from),
        functions: given.functions,
        concurrency: given.concurrency,
        waiting: given.waiting,
        share: given.share,
    };
    let is_given = |limit: Limit| match limit {
        Limit::Machines => values.machines.is_some(),
        Limit::Vcpus => values.vcpus.is_some(),
        Limit::MemoryMib => values.memory_mib.is_some(),
        Limit::Functions => values.functions.is_some(),
        Limit::Concurrency => values.concurrency.is_some(),
        Limit::Waiting => values.waiting.is_some(),
        Limit::Share => values.share.is_some(),
    };
    let is_reset = |limit: Limit| given.reset.contains(&Reset::One(limit));
    if let Some(both) = Limit::ALL
        .into_iter()
        .find(|limit| is_given(*limit) && is_reset(*limit))
    {
        let option = option(both);
        return Err(Failure::local(format!("--{option} has a value and is to be reset")));
    }
    let all = given.reset.contains(&Reset::All);
    let paths = Limit::ALL
        .into_iter()
        .filter(|limit| all || is_given(*limit) || is_reset(*limit));
    Ok(v1::SetAccountLimitsRequest {
        name: given.account.to_string(),
        limits: Some(values),
        update_mask: Some(prost_types::FieldMask {
            paths: paths.map(|limit| limit.name().to_owned()).collect(),
        }),
    })
}

fn show_default(connection: &Connection, account: Option<String>) -> Result<(), Failure> {
    let name = account.map(|account| format!("accounts/{account}"));
    if connection.json {
        print_json(&serde_json::json!({ "account": name }));
        return Ok(());
    }
    match name {
        Some(name) => say!("{name} ({})", Settings::path()?.display()),
        None => say!("none; `stoker account set-default ACCOUNT` sets one"),
    }
    if let Some(other) = std::env::var_os(VARIABLE) {
        say!("{VARIABLE} is set and goes first: {}", other.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn account() -> v1::Account {
        let limit = |value, source: Source| {
            Some(v1::AccountLimit {
                value,
                source: source.into(),
            })
        };
        v1::Account {
            name: "accounts/acme".into(),
            limits: Some(v1::AccountLimits {
                machines: limit(Some(4), Source::Set),
                vcpus: limit(None, Source::Default),
                memory_mib: limit(Some(2048), Source::Configuration),
                functions: limit(Some(100), Source::Set),
                concurrency: limit(None, Source::Default),
                waiting: limit(Some(0), Source::Set),
                share: limit(Some(1), Source::Default),
            }),
            r#use: Some(v1::AccountUse {
                machines: 2,
                launched_machines: 1,
                vcpus: 6,
                memory_mib: 1536,
                cpu_millis: 2500,
                functions: 7,
                running: 3,
                waiting: 0,
            }),
        }
    }

    #[test]
    fn each_account_is_a_line_of_what_it_has_and_may_have() {
        let lines = table(&[account()]).lines(None);
        let cells: Vec<_> = lines[1]
            .split("  ")
            .map(str::trim)
            .filter(|cell| !cell.is_empty())
            .collect();
        assert_eq!(
            cells,
            [
                "acme",
                "2 of 4",
                "6 of any",
                "1536MiB of 2GiB",
                "7 of 100",
                "3 of any",
                "0 of 0",
                "1"
            ]
        );
    }

    #[test]
    fn one_account_is_told_of_with_where_its_limits_come_from() {
        let lines = lines(&account());
        let has = |words: &[&str]| {
            let line = lines.iter().find(|line| line.trim_start().starts_with(words[0]));
            let found: Vec<_> = line.unwrap().split_whitespace().collect();
            assert_eq!(found, words);
        };
        has(&["machines", "2", "4", "set"]);
        has(&["vcpus", "6", "any", "default"]);
        has(&["memory", "1536MiB", "2GiB", "configuration"]);
        has(&["share", "-", "1", "default"]);
        assert!(lines.last().unwrap().contains("1 of its machines were launched"));
    }

    fn parsed(args: &[&str]) -> Result<v1::SetAccountLimitsRequest, String> {
        #[derive(Debug, clap::Parser)]
        struct Line {
            #[command(flatten)]
            limits: SetLimits,
        }
        let line = ["limit", "acme"].iter().chain(args);
        let line: Line = clap::Parser::try_parse_from(line).map_err(|error: clap::Error| error.to_string())?;
        request(&line.limits).map_err(|failure| failure.to_string())
    }

    #[test]
    fn limits_have_values_or_are_reset() {
        let asked = parsed(&["--machines", "4", "--memory", "2GiB", "--reset", "share,functions"]).unwrap();
        let values = v1::AccountLimitValues {
            machines: Some(4),
            memory_mib: Some(2048),
            ..Default::default()
        };
        assert_eq!((asked.name.as_str(), asked.limits), ("accounts/acme", Some(values)));
        let paths = |asked: v1::SetAccountLimitsRequest| asked.update_mask.unwrap().paths;
        assert_eq!(paths(asked), ["machines", "memory_mib", "functions", "share"]);
        let all = parsed(&["--waiting", "0", "--reset", "all"]).unwrap();
        assert_eq!(all.limits.unwrap().waiting, Some(0));
        assert_eq!(paths(all).len(), Limit::ALL.len());
        assert!(parsed(&[]).is_err());
        let wrong = parsed(&["--reset", "memory_mib"]).unwrap_err();
        assert!(wrong.contains("memory, functions"), "{wrong}");
        let both = parsed(&["--memory", "1GiB", "--reset", "memory"]).unwrap_err();
        assert!(both.contains("--memory has a value and is to be reset"), "{both}");
    }
}
