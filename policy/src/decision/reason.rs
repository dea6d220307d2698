//! Why something was decided.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use stoker_credits::Credits;

use super::Rounded;
use crate::pressure::Inflation;
use crate::scale::{Crossed, Size, Taken};
use crate::{Amount, Figures, RequestId};

/// Why something was decided, in figures.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reason {
    /// A container of an acceptable kind lay idle.
    IdleContainer {
        /// For how long.
        idle: Duration,
        /// Which of the request's kinds it is, from 0.
        choice: u32,
    },
    /// An active machine of the account had the room: the fullest such one.
    RoomInMachine {
        /// What it had free.
        free: Amount,
    },
    /// The account had no machine with room; the warming pool had one.
    WarmingMachine {
        /// For how long it had been ready.
        ready: Duration,
        /// How many of the runtime are left.
        left: u32,
    },
    /// The machine became ready while the request waited.
    NewMachine {
        /// How long the request had waited.
        waited: Duration,
    },
    /// Its container was made for it.
    MadeForIt,
    /// It has to wait: nothing idle, no room, no warming machine.
    NoPlace {
        /// How many wait on this host, it included.
        waiting: u32,
        /// How many machines boot.
        booting: u32,
    },
    /// It has to wait: its account runs as many as it may.
    Concurrency {
        /// The limit.
        limit: u32,
    },
    /// It has to wait: machines of its account that an earlier agent left have not answered yet.
    MachinesFound {
        /// How many.
        machines: u32,
    },
    /// Requests wait for machines.
    RequestsWait {
        /// How many machines they need at least.
        wanted: u32,
        /// How many of the runtime boot already.
        booting: u32,
    },
    /// The warming pool is below its target.
    BelowTarget {
        /// How many of the runtime are ready.
        warming: u32,
        /// How many boot.
        booting: u32,
        /// How many there should be.
        target: u32,
    },
    /// Nobody wanted it for long enough.
    Idle {
        /// For how long.
        idle: Duration,
    },
    /// The warming pool had more than it should.
    Surplus {
        /// How many of the runtime were ready.
        warming: u32,
        /// How many there should be.
        target: u32,
    },
    /// A request needs the room.
    Room {
        /// The request.
        request: RequestId,
        /// What it needs.
        needs: Amount,
    },
    /// Others of its account went before it for too long.
    Overtaken {
        /// How long it has waited.
        waited: Duration,
    },
    /// The limits of its account do not let it have the machine now.
    Limits {
        /// The account.
        account: Arc<str>,
    },
    /// Requests of an account with less than its share wait, and the host is full.
    Share {
        /// The account that waits.
        account: Arc<str>,
        /// Memory in MiB of its machines, for each unit of its share.
        has_mib: u64,
        /// The same of the account that gives.
        other_has_mib: u64,
    },
    /// What its containers were given changed, or what all of its account were.
    Given {
        /// What its containers have.
        amount: Amount,
        /// The weight that this is.
        weight: u32,
        /// The whole weight of the account.
        whole: u64,
    },
    /// By its balance of credits.
    Balance {
        /// The level of that, 0 to 9.
        level: u32,
        /// What it can spend, in thousandths of a credit.
        millicredits: u64,
        /// What it owes, likewise.
        owed_millicredits: u64,
        /// It serves an account.
        serves: bool,
    },
    /// By what it earns it may have reached its next level.
    NextLevel {
        /// The level that it had, 0 to 9.
        level: u32,
        /// What it could spend then, in thousandths of a credit.
        millicredits: u64,
    },
    /// A threshold of it was crossed.
    Crossed(Crossed),
    /// By the host's memory, or its guest's.
    Balloon(Inflation),
    /// Its guest has what was asked for.
    Taken {
        /// How long it took.
        took: Duration,
    },
    /// Its guest has not taken what was asked for.
    NotTaken {
        /// What was asked for.
        asked: Size,
        /// What it has.
        taken: Taken,
        /// For how long.
        after: Duration,
    },
    /// Its credits go with its vCPUs.
    Rescaled {
        /// How many it had.
        before: u32,
        /// How many it is to have.
        after: u32,
    },
    /// By what executions used.
    Use {
        /// What that was.
        figures: Figures,
    },
    /// Its function is to have another amount.
    Resized {
        /// What it had.
        from: Amount,
        /// What it is to have.
        to: Amount,
    },
    /// It can't hold what the request is to have by now.
    TooSmall {
        /// What it can.
        has: Amount,
        /// What the request is to have.
        needs: Amount,
    },
    /// Somebody asked for it.
    Asked {
        /// Who.
        by: Arc<str>,
    },
    /// It was closed, and nothing runs in it any more.
    Closed,
    /// Its function was deleted.
    FunctionDeleted,
    /// The agent is shutting down.
    Drain,
    /// The caller is told; the refusal says it.
    Refused,
}

// === impl Reason ===

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::IdleContainer { idle, choice: 0 } => write!(f, "it had been idle for {}", Rounded(*idle)),
            Self::IdleContainer { idle, choice } => {
                write!(
                    f,
                    "it had been idle for {} and is choice {} of the request",
                    Rounded(*idle),
                    choice + 1
                )
            }
            Self::RoomInMachine { free } => write!(f, "the machine had {free} free, the least of those with room"),
            Self::WarmingMachine { ready, left } => write!(
                f,
                "no machine of the account had room; this one had been ready for {}, {left} more are",
                Rounded(*ready)
            ),
            Self::NewMachine { waited } => {
                let waited = Rounded(*waited);
                write!(f, "the machine became ready after the request had waited {waited}")
            }
            Self::MadeForIt => f.write_str("its container was made for it"),
            Self::NoPlace { waiting, booting } => {
                write!(
                    f,
                    "nothing was idle and nothing had room; {waiting} wait and {booting} machines boot"
                )
            }
            Self::Concurrency { limit } => write!(f, "its account runs {limit} requests, as many as it may"),
            Self::MachinesFound { machines } => {
                write!(
                    f,
                    "machines that an earlier agent left of its account have not answered yet: {machines}"
                )
            }
            Self::RequestsWait { wanted, booting } => {
                write!(f, "requests that wait need {wanted} machines and {booting} boot")
            }
            Self::BelowTarget {
                warming,
                booting,
                target,
            } => {
                write!(
                    f,
                    "{warming} machines are ready and {booting} boot, of {target} that there should be"
                )
            }
            Self::Idle { idle } => write!(f, "nobody wanted it for {}", Rounded(*idle)),
            Self::Surplus { warming, target } => {
                write!(f, "{warming} machines were ready, and {target} should be")
            }
            Self::Room { request, needs } => write!(f, "request {request} needs {needs}"),
            Self::Share {
                account,
                has_mib,
                other_has_mib,
            } => write!(
                f,
                "{account} waits and has {has_mib} MiB of machines for each share, the account that gives {other_has_mib} MiB"
            ),
            Self::Overtaken { waited } => {
                write!(
                    f,
                    "it has waited for {}, and others of its account went before it",
                    Rounded(*waited)
                )
            }
            Self::Limits { account } => write!(f, "the limits of {account} do not let it have this machine now"),
            Self::Given { amount, weight, whole } => {
                write!(
                    f,
                    "its containers have {amount}, {weight} of the {whole} that its account weighs"
                )
            }
            Self::Balance {
                level,
                millicredits,
                owed_millicredits,
                serves,
            } => {
                let left = Credits::from_millis(*millicredits);
                match owed_millicredits {
                    0 => write!(f, "it has {left} left")?,
                    owed => write!(f, "it has nothing left and owes {}", Credits::from_millis(*owed))?,
                }
                write!(f, ", level {level} of 9")?;
                match serves {
                    true => Ok(()),
                    false => f.write_str("; while it serves no account it comes before nobody"),
                }
            }
            Self::NextLevel { level, millicredits } => {
                let left = Credits::from_millis(*millicredits);
                write!(
                    f,
                    "it had {left} at level {level} of 9, and may have earned enough for the next"
                )
            }
            Self::Crossed(crossed) => crossed.fmt(f),
            Self::Balloon(inflation) => inflation.fmt(f),
            Self::Taken { took } => write!(f, "its guest has what was asked for, after {}", Rounded(*took)),
            Self::NotTaken { asked, taken, after } => write!(
                f,
                "after {} its guest has {} vCPUs and {} MiB of the {asked} that it was asked to have",
                Rounded(*after),
                taken.vcpus,
                taken.memory_mib
            ),
            Self::Rescaled { before, after } => {
                write!(f, "its credits go with its vCPUs: {after} instead of {before}")
            }
            Self::Use { figures } => figures.fmt(f),
            Self::Resized { from, to } => write!(f, "its function had {from}, and is to have {to}"),
            Self::TooSmall { has, needs } => {
                write!(f, "it can hold {has}, and the request is to have {needs} by now")
            }
            Self::Asked { by } => write!(f, "{by} asked for it"),
            Self::Closed => f.write_str("it was closed, and nothing runs in it any more"),
            Self::FunctionDeleted => f.write_str("its function was deleted"),
            Self::Drain => f.write_str("the agent is shutting down"),
            Self::Refused => f.write_str("it can't be served"),
        }
    }
}
