//! The only copy of what machines, containers and requests there are.
//!
//! ```text
//!  machine                                                 container
//!
//!   BootMachine                                             CreateContainer
//!       │                                                        │
//!   Booting ── MachineEnded ──► gone                        Starting ── ContainerFailed ──► gone
//!       │ MachineReady                                           │ ContainerReady
//!   Warming ── DestroyMachine ───┐                              Idle ── StopContainer ──► Stopping ── ContainerEnded ──► gone
//!       │ AssignMachine          │                       Dispatch│ ▲ Completed
//!   Active ── DestroyMachine ────┤                              Busy ── Completed(Ended, NotBegun) ──► gone
//!       │ CloseMachine           │
//!   Closing ── DestroyMachine ── Stopping ── MachineEnded ──► gone
//!
//!  machine that an earlier agent left
//!
//!   MachineFound
//!       │
//!     Found ── MachineEnded ──► gone
//!       │ MachineAdopted
//!       ├─ of no account ──► Warming
//!       └─ of an account ──► Active, with its containers Idle or Busy
//!
//!  machine that an account launched
//!
//!   LaunchMachine
//!       │
//!   Booting ── MachineEnded ──► gone
//!       │ MachineReady
//!    Active ── DestroyMachine ── Stopping ── MachineEnded ──► gone
//! ```
//!
//! What happens changes it by [`observe`], what is decided by [`apply`] alone; both keep the indexes, and note what they
//! touched, so that policies look at that and at nothing else. Policies take the timers that are due, and mark what an event
//! says of requests and containers (their caller has left, their function was deleted).

mod account;
mod amounts;
mod apply;
mod containers;
mod counts;
mod credits;
mod found;
mod gathering;
mod host_room;
mod items;
mod launched;
mod limits;
mod line;
mod machines;
mod observe;
mod resizing;
mod rooms;
mod scratch;
mod timers;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

#[cfg(test)]
pub(crate) use account::Sum;
pub(crate) use account::{Account, Group, LOOKED_AT, TRIED};
use amounts::Amounts;
#[cfg(test)]
pub(crate) use amounts::REMEMBERED;
pub use apply::ApplyError;
pub use credits::{Balance, Cpu, PlanError};
pub(crate) use host_room::HostRoom;
pub use items::{Container, ContainerState, Machine, MachineState, Request, RequestState};
pub(crate) use items::{Rest, RestClass};
pub use launched::{Launched, MachineResize};
pub use limits::AccountUse;
pub(crate) use observe::ATTEMPTS;
pub(crate) use rooms::Rooms;
pub(crate) use timers::{Timer, Timers};
use ulid::Ulid;

use crate::pressure::Pressure;
use crate::{Code, ContainerId, IdMap, MachineId, Mono, Now, Refusal, RequestId, Rules};

/// How many accounts with requests that need a larger machine are looked at for one event: those of which one waits longest.
const LARGE_TRIED: usize = 128;

/// Loads and queues are compared per unit of share, in thousandths.
pub(crate) const SHARE_SCALE: u64 = 1000;

/// What machines, containers and requests there are, and the indexes that decisions need.
#[derive(Clone, Debug)]
pub struct World {
    pub(crate) rules: Rules,
    pub(crate) now: Now,
    pub(crate) draining: bool,
    pub(crate) timers: Timers,
    /// What the event touched that policies have not looked at.
    pub(crate) touched: VecDeque<Touch>,
    /// Runtimes whose supply of machines may have to change.
    pub(crate) unsettled: BTreeSet<Arc<str>>,
    /// Runtimes that lack machines for want of something: looked at again when a machine ends or a boot does.
    pub(crate) lacking: BTreeSet<Arc<str>>,
    pub(crate) runtimes: BTreeMap<Arc<str>, Runtime>,
    pub(crate) accounts: BTreeMap<Arc<str>, Account>,
    /// Accounts with machines, by their memory for each unit of share.
    pub(crate) loads: BTreeSet<(u64, Arc<str>)>,
    /// Accounts of which requests wait, by how many for each unit of share.
    pub(crate) lines: BTreeSet<(u64, Arc<str>)>,
    /// Machines that run nothing, in the order in which they are given up.
    pub(crate) at_rest: BTreeSet<(RestClass, Mono, MachineId)>,
    /// Active machines, the one that serves its account longest first.
    pub(crate) serving: BTreeSet<(Mono, MachineId)>,
    /// Accounts of which requests wait for a machine larger than the standard one and have none booting, by the order of the
    /// first of these.
    pub(crate) large: BTreeSet<(u64, Arc<str>)>,
    /// All machines together, and those of them that end without more being decided.
    pub(crate) used: HostRoom,
    pub(crate) ending: HostRoom,
    /// The disk that is kept for the drive of a machine which comes once others have ended, in MiB, and the account whose it is.
    pub(crate) held_disk: Option<(Arc<str>, u32)>,
    /// Accounts of which a request found the host's disk too full, by the order in which they are looked at again.
    pub(crate) short_of_disk: BTreeSet<(u64, Arc<str>)>,
    pub(crate) booting: u32,
    /// What is known of how functions use their amounts.
    pub(crate) amounts: Amounts,
    /// What is known of the host's memory.
    pub(crate) pressure: Pressure,
    machines: IdMap<MachineId, Machine>,
    containers: IdMap<ContainerId, Container>,
    requests: IdMap<RequestId, Request>,
    functions: BTreeMap<Ulid, Function>,
    waiting: u32,
    arrivals: u64,
    /// How often an account was noted that is short of disk.
    looks: u64,
}

/// Something that a policy has to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// A request that needs a place.
    Request(RequestId),
    /// A container that can take a request.
    Idle(ContainerId),
    /// What the containers of an active machine were given changed.
    Room(MachineId),
    /// The warming pool of a runtime has a machine, or an account may take one again.
    Warming(Arc<str>),
    /// An account runs fewer requests than it did.
    Slot(Arc<str>),
    /// Nothing runs in a machine that is to go.
    Quiet(MachineId),
    /// A version of a function is to have another amount.
    Resized(Code),
    /// A machine's account of credits was settled, or whom it serves changed.
    Credits(MachineId),
    /// A machine that was launched runs, or its guest has taken more of what it was asked to.
    Launched(MachineId),
}

/// What there is of a runtime.
#[derive(Clone, Debug, Default)]
pub(crate) struct Runtime {
    /// Its machines in the warming pool by what they can hold.
    pub(crate) warming: Rooms,
    /// Its machines that boot, or were found, and are for anyone.
    pub(crate) booting: u32,
    /// All that boot, or were found and are of no account.
    pub(crate) all_booting: u32,
    /// Accounts of which requests wait for a place, the one with the least for its share first, of those the one that waits
    /// longest.
    pub(crate) claimants: BTreeSet<Claimant>,
    /// Likewise those that may have no machine more now.
    pub(crate) limited: BTreeSet<Claimant>,
    /// How many machines they want.
    pub(crate) wanted: u32,
    /// Boots that failed in a row, and when one may be tried again.
    pub(crate) failures: u32,
    pub(crate) not_before: Mono,
}

/// An account of which requests wait: what its machines are for its share, since when it waits, and its name.
pub(crate) type Claimant = (u64, Mono, Arc<str>);

/// What there is of a function.
#[derive(Clone, Debug, Default)]
struct Function {
    containers: BTreeSet<ContainerId>,
    waiting: BTreeSet<RequestId>,
}

// === impl World ===

impl World {
    pub(crate) fn new(rules: Rules) -> Self {
        let unsettled = rules.warming.keys().cloned().collect();
        Self {
            rules,
            now: Now::default(),
            draining: false,
            timers: Timers::default(),
            touched: VecDeque::new(),
            unsettled,
            lacking: BTreeSet::new(),
            runtimes: BTreeMap::new(),
            accounts: BTreeMap::new(),
            loads: BTreeSet::new(),
            lines: BTreeSet::new(),
            at_rest: BTreeSet::new(),
            serving: BTreeSet::new(),
            large: BTreeSet::new(),
            used: HostRoom::default(),
            ending: HostRoom::default(),
            held_disk: None,
            short_of_disk: BTreeSet::new(),
            booting: 0,
            amounts: Amounts::default(),
            pressure: Pressure::default(),
            machines: IdMap::default(),
            containers: IdMap::default(),
            requests: IdMap::default(),
            functions: BTreeMap::new(),
            waiting: 0,
            arrivals: 0,
            looks: 0,
        }
    }

    /// A machine, unless it is gone.
    #[must_use]
    pub fn machine(&self, id: MachineId) -> Option<&Machine> {
        self.machines.get(&id)
    }

    /// A container, unless it is gone.
    #[must_use]
    pub fn container(&self, id: ContainerId) -> Option<&Container> {
        self.containers.get(&id)
    }

    /// A request, unless it has come to its end.
    #[must_use]
    pub fn request(&self, id: RequestId) -> Option<&Request> {
        self.requests.get(&id)
    }

    /// All machines, in no particular order.
    pub fn machines(&self) -> impl Iterator<Item = &Machine> {
        self.machines.values()
    }

    /// All containers, in no particular order.
    pub fn containers(&self) -> impl Iterator<Item = &Container> {
        self.containers.values()
    }

    /// How many requests wait.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting
    }

    /// What decisions go by.
    #[must_use]
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    pub(crate) fn account(&self, name: &str) -> Option<&Account> {
        self.accounts.get(name)
    }

    pub(crate) fn group(&self, account: &str, runtime: &str) -> Option<&Group> {
        self.accounts.get(account)?.groups.get(runtime)
    }

    fn group_mut(&mut self, account: &str, runtime: &str) -> Option<&mut Group> {
        self.accounts.get_mut(account)?.groups.get_mut(runtime)
    }

    pub(crate) fn runtime(&self, name: &str) -> Option<&Runtime> {
        self.runtimes.get(name)
    }

    /// What may still be started now.
    pub(crate) fn free(&self) -> HostRoom {
        HostRoom::all(&self.rules).minus(self.used)
    }

    /// What a standard machine can hold as it is booted.
    pub(crate) fn capacity(&self) -> crate::Amount {
        self.rules.capacity(self.rules.standard)
    }

    /// Requests that wait for a function.
    pub(crate) fn waiting_for(&self, uid: Ulid) -> Vec<RequestId> {
        let waiting = self
            .functions
            .get(&uid)
            .map(|function| function.waiting.iter().copied().collect());
        waiting.unwrap_or_default()
    }

    /// A request that runs goes on, but is not placed again.
    pub(crate) fn withdraw_request(&mut self, id: RequestId, why: Refusal) {
        if let Some(request) = self.requests.get_mut(&id) {
            request.withdrawn.get_or_insert(why);
        }
    }
}

// === impl Runtime ===

impl Runtime {
    fn waiting_mut(&mut self, limited: bool) -> &mut BTreeSet<Claimant> {
        if limited {
            &mut self.limited
        } else {
            &mut self.claimants
        }
    }
}

// === impl Function ===

impl Function {
    fn is_empty(&self) -> bool {
        self.containers.is_empty() && self.waiting.is_empty()
    }
}
