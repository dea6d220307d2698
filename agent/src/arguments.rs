//! The arguments of `stokerd` and `stoker-controller`; those of `stoker` are in [`crate::cli`]. Here, and not beside the
//! programs, since manual pages and shell completion are made of them too.

use std::path::PathBuf;

use clap::Parser;

use crate::address::Address;

/// The agent of one host: takes functions in and runs them in microVMs.
#[derive(Debug, Parser)]
#[command(name = "stokerd", version)]
pub struct Stokerd {
    /// The configuration; without it /etc/stoker/stokerd.toml where that is there, else the defaults
    #[arg(long, short)]
    pub config: Option<PathBuf>,
    /// Only check the configuration
    #[arg(long)]
    pub check_config: bool,
    /// Print the default configuration with an explanation of each key
    #[arg(long, conflicts_with_all = ["config", "check_config"])]
    pub print_config: bool,
    /// Only decide the events again that were recorded to a file (`[journal] record`), and check that the same comes of them
    #[arg(long, value_name = "FILE", conflicts_with_all = ["config", "check_config", "print_config"])]
    pub replay: Option<PathBuf>,
}

/// Prints what agents report, a line an event, and acknowledges it.
#[derive(Debug, Parser)]
#[command(name = "stoker-controller", version)]
pub struct StokerController {
    /// Where to listen: `unix:/path` or `http://address:port`
    #[arg(long, default_value = "unix:/run/stoker/controller.sock")]
    pub listen: Address,
    /// Print each event as a JSON object on a line
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Stokerd::command().debug_assert();
        StokerController::command().debug_assert();
    }
}
