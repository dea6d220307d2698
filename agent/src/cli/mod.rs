//! `stoker`, the command line: functions, images, invocations, machines and use, for people and (with `--json`) for programs.

mod account;
mod admin;
mod amounts;
mod code;
mod container;
mod credits;
mod doctor;
mod failure;
mod function;
mod image;
mod invoke;
mod logs;
mod machine;
mod names;
mod progress;
mod rates;
mod resizing;
mod retry;
mod settings;
mod simulate;
mod top;
mod usage;
mod why;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use prost::Message;
use tonic::transport::Channel;

use crate::address::Address;
use crate::render::say;
pub use failure::Failure;

/// The largest message either way, in bytes: a payload of 64 MiB, the most that can be configured, and what is around it.
const MAX_MESSAGE: usize = 66 << 20;

/// What a list call is asked for at a time.
const PAGE_SIZE: i32 = 1000;

const EXIT_CODES: &str = "Exit codes: 0 done; 1 the agent refused or failed, or a check found something; 2 wrong usage; 3 the agent can't be reached; \
4 the function itself failed. `machine exec` exits as its program does, and with 125 where that is not known.";

/// Talks to the Stoker agent of this host.
#[derive(Debug, Parser)]
#[command(name = "stoker", version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct Connection {
    /// Where the agent listens: the path of its Unix socket, or `http://127.0.0.1:PORT`
    #[arg(
        long,
        global = true,
        env = "STOKER_SOCKET",
        default_value = "/run/stoker/stokerd.sock",
        value_parser = parse_socket
    )]
    socket: Address,
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Deploy, show and delete functions
    #[command(subcommand)]
    Function(function::Command),
    /// Take in, show and remove container images
    #[command(subcommand)]
    Image(image::Command),
    /// Show and remove code that no function needs
    #[command(subcommand)]
    Code(code::Command),
    /// Run a function once and print its answer
    Invoke(invoke::Invoke),
    /// Show what a function wrote
    Logs(logs::Logs),
    /// Show what accounts were told of the amounts of their functions
    Notifications(resizing::Notifications),
    /// Launch machines, show, resize and end them, and run programs in them
    #[command(subcommand)]
    Machine(machine::Command),
    /// Show containers
    #[command(subcommand)]
    Container(container::Command),
    /// Show what machines and containers use, as eBPF counts it
    Usage(usage::Usage),
    /// Show and change machines' credits of CPU time
    #[command(subcommand)]
    Credits(credits::Command),
    /// Find out what machines would get of a host before it is bought
    #[command(subcommand)]
    Simulate(simulate::Command),
    /// Show machines live: their state, use and its history
    Top(top::Top),
    /// Show what was decided about a machine, container or request, and why
    Why(why::Why),
    /// Show accounts, change what they may have, and set the one whose functions have short names
    #[command(subcommand)]
    Account(account::Command),
    /// Check whether this host is fit to run machines
    Doctor(doctor::Doctor),
    /// Care for what this host keeps on its disk
    #[command(subcommand)]
    Admin(admin::Command),
}

/// Runs the command that the arguments name and prints what comes of it.
pub async fn run(cli: Cli) -> ExitCode {
    let Cli { connection, command } = cli;
    match dispatch(&connection, command).await {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}

async fn dispatch(connection: &Connection, command: Command) -> Result<ExitCode, Failure> {
    match command {
        // `exec` exits as its program does.
        Command::Machine(command) => return machine::run(connection, command).await,
        Command::Function(command) => function::run(connection, command).await,
        Command::Image(command) => image::run(connection, command).await,
        Command::Code(command) => code::run(connection, command).await,
        Command::Invoke(invoke) => invoke::run(connection, invoke).await,
        Command::Logs(logs) => logs::run(connection, logs).await,
        Command::Notifications(args) => resizing::notifications(connection, args).await,
        Command::Container(command) => container::run(connection, command).await,
        Command::Usage(usage) => usage::run(connection, usage).await,
        Command::Credits(command) => credits::run(connection, command).await,
        Command::Simulate(command) => simulate::run(connection, command),
        Command::Top(top) => top::run(connection, top).await,
        Command::Why(why) => why::run(connection, why).await,
        Command::Account(command) => account::run(connection, command).await,
        Command::Doctor(doctor) => doctor::run(connection, doctor).await,
        Command::Admin(command) => admin::run(connection, command).await,
    }
    .map(|()| ExitCode::SUCCESS)
}

// === impl Connection ===

impl Connection {
    async fn channel(&self) -> Result<Channel, Failure> {
        self.socket
            .connect()
            .await
            .map_err(|source| Failure::unreachable(&self.socket, source))
    }
}

fn parse_socket(text: &str) -> Result<Address, String> {
    if text.contains(':') && !text.starts_with(['/', '.']) {
        return text
            .parse()
            .map_err(|error: crate::address::AddressError| error.to_string());
    }
    std::path::absolute(text)
        .map(Address::Unix)
        .map_err(|error| format!("{text:?}: {error}"))
}

/// An environment variable, `NAME=VALUE`.
fn parse_env(text: &str) -> Result<(String, String), String> {
    text.split_once('=')
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .ok_or_else(|| "must be NAME=VALUE".to_owned())
}

/// All that a list call has. `page` asks for the page that a token names, the first where it is empty, and returns what is on
/// it with the token of the next.
async fn all_pages<T>(
    mut page: impl AsyncFnMut(String) -> Result<(Vec<T>, String), tonic::Status>,
) -> Result<Vec<T>, tonic::Status> {
    let mut all = Vec::new();
    let mut token = String::new();
    loop {
        let (items, next) = page(token).await?;
        all.extend(items);
        if next.is_empty() {
            return Ok(all);
        }
        token = next;
    }
}

/// A message as JSON.
fn json(name: &'static str, message: &impl Message) -> Result<serde_json::Value, Failure> {
    crate::json::of(name, message).map_err(|error| Failure::local(error.to_string()))
}

/// Prints JSON, indented.
fn print_json(value: &serde_json::Value) {
    say!("{value:#}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn sockets_are_paths_or_urls() {
        assert_eq!(parse_socket("/run/s.sock"), Ok(Address::Unix("/run/s.sock".into())));
        assert_eq!(
            parse_socket("unix:/run/s.sock"),
            Ok(Address::Unix("/run/s.sock".into()))
        );
        assert_eq!(
            parse_socket("http://127.0.0.1:7"),
            Ok(Address::Tcp("127.0.0.1:7".into()))
        );
        assert!(matches!(parse_socket("s.sock"), Ok(Address::Unix(path)) if path.is_absolute()));
        assert!(parse_socket("https://x:1").is_err());
    }
}
