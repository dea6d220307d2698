//! Whose lines those of a machine's containers are: known on this host, whatever a guest says.

use std::collections::{BTreeMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stoker_policy::ContainerId;
use ulid::Ulid;

use crate::names::FunctionName;

/// Of how many containers that have ended lines are still taken: their last ones come after that.
const ENDED: usize = 64;

/// The containers of one machine; clones are the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sources(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    all: BTreeMap<ContainerId, Source>,
    /// The oldest end first.
    ended: VecDeque<ContainerId>,
}

/// Where lines come from.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    /// Whose they are.
    pub(crate) whose: Whose,
    /// The unique id of that: of a function, or the machine's id.
    pub(crate) uid: Ulid,
    /// When the container was made, since 1970.
    pub(crate) created: Duration,
}

/// Whose lines there are.
#[derive(Clone, Debug)]
pub(crate) enum Whose {
    /// Those of a function.
    Function(FunctionName),
    /// Those of the program of a machine that this account launched.
    Machine(Arc<str>),
}

/// What the folders of machines are called, before their ids. No function is called so.
const MACHINE: &str = "@machine";

// === impl Source ===

impl Source {
    /// The folder that they are kept in, below that of all.
    pub(super) fn folder(&self) -> PathBuf {
        let (account, name) = match &self.whose {
            Whose::Function(name) => (name.account(), name.function()),
            Whose::Machine(account) => (&**account, MACHINE),
        };
        PathBuf::from(account).join(format!("{name}.{}", self.uid))
    }
}

/// Whose lines a folder of that name holds: the unique id, and whether that is a machine's.
pub(super) fn of_folder(name: &str) -> Option<(Ulid, bool)> {
    let (name, uid) = name.rsplit_once('.')?;
    Some((Ulid::from_string(uid).ok()?, name == MACHINE))
}

// === impl Sources ===

impl Sources {
    /// There is a container. Whether it is the first of all.
    pub(crate) fn add(&self, container: ContainerId, source: Source) -> bool {
        let mut state = self.lock();
        let first = state.all.is_empty();
        state.all.insert(container, source);
        first
    }

    /// A container is no more.
    pub(crate) fn ended(&self, container: ContainerId) {
        let mut state = self.lock();
        state.ended.push_back(container);
        if state.ended.len() > ENDED
            && let Some(oldest) = state.ended.pop_front()
        {
            state.all.remove(&oldest);
        }
    }

    /// Whose the lines of a container are; nobody's where it is not one of this machine.
    pub(super) fn of(&self, container: ContainerId) -> Option<Source> {
        self.lock().all.get(&container).cloned()
    }

    /// Every change leaves it whole, so a panic elsewhere does no harm.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
