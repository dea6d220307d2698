//! Every decision of one host's agent, in one place.
//!
//! ```text
//!  API, guests, eBPF, clock ──Event──► Host::step ──Vec<Decision>──► executors (agent) or latency model (simulator)
//! ```
//!
//! [`World`] is the only copy of what machines, containers and requests there are. An [`Event`] says what happened; each
//! policy looks at what it touched and decides; a [`Decision`] is a [`Command`], which has changed the world already, and
//! its [`Reason`] in figures. There is no I/O, clock, lock or randomness in here: time is [`Now`], ids come from [`Ids`],
//! so the same events give the same decisions, in the agent, in a test, and when a recorded day is replayed.
//!
//! | file | decides |
//! |---|---|
//! | `place` | who gets what became free |
//! | `choose` | where one request runs |
//! | `requests` | whether a request is placed, waits or is refused |
//! | `gather` | what is kept for requests that wait too long |
//! | `supply` | which machines are booted |
//! | `reclaim` | what nobody wants any more |
//! | `full_host` | who gives up what, where the host is full |
//! | `own_limits` | what an account gives up for its own requests |
//! | `account_limits` | what follows where an account may have more or less |
//! | `credits` | how urgently machines run, and how much |
//! | `scale` | what becomes of machines that accounts launch |
//! | `resize` | what amounts functions turn out to need |
//! | `pressure` | what the host takes back of machines' memory while it is short |
//! | `shutdown` | what ends when, as the agent shuts down |
//!
//! Cost: an event touches what it is about. No policy looks at all machines, containers or requests.

mod account_limits;
mod amount;
mod choose;
mod credits;
mod decision;
mod event;
mod full_host;
mod gather;
mod host;
mod ids;
mod own_limits;
mod place;
pub mod pressure;
mod reclaim;
mod requests;
pub mod resize;
mod rules;
pub mod scale;
mod shutdown;
mod supply;
#[cfg(test)]
mod tests;
mod time;
mod world;

pub use amount::{Amount, Shape};
pub use decision::{Command, Decision, Purpose, Reason, Refusal};
pub use event::{Code, Completion, ContainerFailure, Demand, Event, FoundContainer, Kind, Usage};
pub use host::Host;
pub use ids::{ContainerId, IdMap, Ids, MachineId, RequestId};
pub use resize::{Figures, Kept, Notice, NoticeKind, Resize, ResizeError, ResizeMode, Sample};
pub use rules::{AccountLimits, MAX_WEIGHT, Rules, RulesError, TooManyFunctions};
pub use scale::Launch;
pub use time::{Mono, Now};
pub use world::{
    AccountUse, ApplyError, Balance, Container, ContainerState, Cpu, Launched, Machine, MachineResize, MachineState,
    PlanError, Request, RequestState, World,
};
