//! Containers: where one function version runs, with its own amount of resources; or, in a machine that was launched from one, an
//! image ([`workload`]).

pub(crate) mod cgroup;
mod containers;
mod end;
mod environment;
mod exec_wrapper;
mod execution;
mod extensions;
mod freezer;
pub(crate) mod launch;
mod life;
mod log;
mod seccomp;
mod shutdown;
mod spec;
mod warm_up;
pub(crate) mod workload;

use std::collections::BTreeMap;
use std::time::Duration;

use stoker_proto::runtimes;
use stoker_proto::v1::Amount;

pub(crate) use containers::{Containers, Creation, Places};
pub(crate) use end::{End, Failure, FailureKind};
pub(crate) use execution::Execution;
pub(crate) use workload::{LaunchedFrom, Workload};

/// The software that runs a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Runtime {
    /// Python 3.11 with `awslambdaric`.
    Python311,
    /// The function's own `bootstrap`.
    Provided,
}

/// A function, as far as its containers need to know it.
#[derive(Clone, Debug)]
pub(crate) struct Function {
    /// `accounts/{account}/functions/{function}`, or the last part of it.
    pub(crate) name: String,
    pub(crate) account: String,
    pub(crate) runtime: Runtime,
    pub(crate) handler: String,
    pub(crate) environment: BTreeMap<String, String>,
    pub(crate) amount: Amount,
    /// How long its init may take.
    pub(crate) init_timeout: Duration,
    /// Its containers are frozen between calls.
    pub(crate) freeze: bool,
}

// === impl Runtime ===

impl std::str::FromStr for Runtime {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            runtimes::PYTHON311 => Ok(Self::Python311),
            runtimes::PROVIDED => Ok(Self::Provided),
            _ => Err(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A function to test with.
    pub(crate) fn function(runtime: Runtime) -> Function {
        Function {
            name: "accounts/acme/functions/thumbs".to_owned(),
            account: "acme".to_owned(),
            runtime,
            handler: "app.handler".to_owned(),
            environment: BTreeMap::new(),
            amount: Amount {
                cpu_millis: 250,
                memory_mib: 128,
            },
            init_timeout: Duration::from_secs(10),
            freeze: true,
        }
    }
}
