//! `stoker account`

use clap::Subcommand;

use super::names::{VARIABLE, parse};
use super::settings::Settings;
use super::{Connection, Failure, print_json};
use crate::names::AccountName;
use crate::render::say;

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Set the account that you work in: `stoker invoke resize` is then accounts/ACCOUNT/functions/resize
    #[command(name = "set-default")]
    Set {
        /// ACCOUNT, or accounts/ACCOUNT
        #[arg(value_parser = parse)]
        account: AccountName,
    },
    /// Show the account that is set
    #[command(name = "show-default")]
    Show,
    /// Set none
    #[command(name = "unset-default")]
    Unset,
}

pub(super) fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    let mut settings = Settings::read()?;
    match command {
        Command::Set { account } => {
            settings.account = Some(account.account().to_owned());
            settings.write()?;
        }
        Command::Show => {}
        Command::Unset => {
            settings.account = None;
            settings.write()?;
        }
    }
    show(connection, settings.account)
}

fn show(connection: &Connection, account: Option<String>) -> Result<(), Failure> {
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
