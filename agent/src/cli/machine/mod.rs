//! `stoker machine`

mod exec;
mod forward;
mod history;
mod launch;
mod list;
mod resize;
mod show;
mod terminal;
mod threshold;

use std::process::ExitCode;

use clap::Subcommand;
use stoker_proto::v1;
use stoker_proto::v1::machines_client::MachinesClient;
use tonic::transport::Channel;

use super::{Connection, Failure, logs};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Make a machine from an image, and run its program
    Launch(launch::Launch),
    /// List machines
    List {
        /// Those that have ended, with why, rather than those that are there
        #[arg(long)]
        ended: bool,
    },
    /// Show a machine; of one that was launched its thresholds and how its size changed, of one that has ended why
    #[command(alias = "get")]
    Show {
        /// machines/MACHINE, or its id alone
        machine: String,
    },
    /// Show what the program of a machine that was launched wrote
    Logs {
        /// machines/MACHINE, or its id alone
        machine: String,
        #[command(flatten)]
        which: logs::Which,
    },
    /// Run another program in a machine that was launched; it ends with this command, which exits as it does
    Exec(exec::Exec),
    /// Listen on ports of this host's loopback, and pass connections on to a machine that was launched
    PortForward(forward::Forward),
    /// Give a machine that was launched another size; what is not given stays as it is
    Resize(resize::Resize),
    /// Change the thresholds by which a machine that was launched grows and shrinks
    #[command(subcommand)]
    Thresholds(resize::Thresholds),
    /// End a machine that was launched
    Stop(resize::Stop),
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Exec(exec) => return Ok(exec::run(connection, exec).await),
        Command::Launch(launch) => launch::run(connection, launch).await,
        Command::List { ended } => list::run(connection, ended).await,
        Command::Show { machine } => show::run(connection, name_of(&machine)).await,
        Command::Logs { machine, which } => logs::read(connection, name_of(&machine), which).await,
        Command::PortForward(forward) => forward::run(connection, forward).await,
        Command::Resize(resize) => resize::run(connection, resize).await,
        Command::Thresholds(thresholds) => resize::thresholds(connection, thresholds).await,
        Command::Stop(stop) => resize::stop(connection, stop).await,
    }
    .map(|()| ExitCode::SUCCESS)
}

async fn client(connection: &Connection) -> Result<MachinesClient<Channel>, Failure> {
    Ok(MachinesClient::new(connection.channel().await?))
}

/// The name in full.
pub(super) fn name_of(given: &str) -> String {
    match given.contains('/') {
        true => given.to_owned(),
        false => format!("machines/{given}"),
    }
}

/// What tells it from others of its kind.
pub(super) fn id(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// What of its scratch disk was given to containers, and what it has.
fn scratch(machine: &v1::Machine) -> String {
    match machine.scratch_mib {
        0 => "-".to_owned(),
        mib if machine.launched.is_some() => format!("{mib} MiB"),
        mib => format!("{}/{mib} MiB", machine.scratch_allocated_mib),
    }
}

/// What runs in it: a runtime, or the image that it was launched from.
fn runs(machine: &v1::Machine) -> &str {
    match &machine.launched {
        Some(launched) => id(&launched.image),
        None => &machine.runtime,
    }
}

/// `2 vCPUs, 1500m, 1024 MiB`, without the CPU share where that is all of the vCPUs.
fn size(size: &v1::MachineSize) -> String {
    let vcpus = match size.vcpus {
        1 => "1 vCPU".to_owned(),
        vcpus => format!("{vcpus} vCPUs"),
    };
    let is_whole = size.cpu_millis == 0 || size.cpu_millis == size.vcpus.saturating_mul(1000);
    let share = match is_whole {
        true => String::new(),
        false => format!("{}m, ", size.cpu_millis),
    };
    format!("{vcpus}, {share}{} MiB", size.memory_mib)
}

/// As [`size`]; `-` where there is none.
fn some_size(given: Option<&v1::MachineSize>) -> String {
    given.map_or_else(|| "-".to_owned(), size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_shown_with_their_share_where_it_is_a_part() {
        let of = |vcpus, cpu_millis, memory_mib| {
            size(&v1::MachineSize {
                vcpus,
                cpu_millis,
                memory_mib,
            })
        };
        assert_eq!(of(1, 1000, 512), "1 vCPU, 512 MiB");
        assert_eq!(of(2, 1500, 512), "2 vCPUs, 1500m, 512 MiB");
    }

    #[test]
    fn machines_may_be_named_by_their_ids() {
        assert_eq!(name_of("01J"), "machines/01J");
        assert_eq!(name_of("machines/01J"), "machines/01J");
        assert_eq!(id("machines/01J"), "01J");
    }
}
