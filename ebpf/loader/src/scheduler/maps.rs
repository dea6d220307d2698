//! The maps of the scheduler.

use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use aya::maps::{Array, HashMap, Map, MapData, MapError, RingBuf};
use aya_obj::generated::bpf_map_type::{self, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_HASH, BPF_MAP_TYPE_RINGBUF};
use stoker_ebpf_types::AccountEntry;
use stoker_ebpf_types::scheduler::{CPUS, Host, MACHINES, Machine, Progress, Runs};

use super::link::Symbol;
use super::system::{MapShape, make_map};
use super::types::TIMER_BYTES;
use super::{SchedulerError, refused};
use crate::ledger::Ledger;

/// Room for what is told of the scheduler's end, in bytes.
const ENDED_BYTES: u32 = 4096;

/// All but one of them, by the names of their symbols.
const SHAPES: [MapShape; 5] = [
    shape("MACHINES", BPF_MAP_TYPE_HASH, size::<Machine>(), MACHINES),
    shape("HOST", BPF_MAP_TYPE_ARRAY, size::<Host>(), 1),
    shape("PROGRESS", BPF_MAP_TYPE_ARRAY, size::<Progress>(), 1),
    shape("RUNS", BPF_MAP_TYPE_ARRAY, size::<Runs>(), CPUS),
    MapShape {
        timer: true,
        ..shape("TIMER", BPF_MAP_TYPE_ARRAY, TIMER_BYTES, 1)
    },
];

/// The ledger's accounts where there is no ledger: nobody has one.
const ACCOUNTS: MapShape = shape("ACCOUNTS", BPF_MAP_TYPE_ARRAY, size::<AccountEntry>(), 1);

/// That by which the scheduler's end is told.
const ENDED: MapShape = MapShape {
    key: 0,
    ..shape("ENDED", BPF_MAP_TYPE_RINGBUF, 0, ENDED_BYTES)
};

/// Maps that were made.
pub(super) struct Maps {
    ended: OwnedFd,
    others: Vec<(&'static str, OwnedFd)>,
}

// === impl Maps ===

impl Maps {
    /// Makes all of them, but for the ledger's accounts.
    pub(super) fn new(types: BorrowedFd<'_>, ledger: Option<&Ledger>) -> Result<Self, SchedulerError> {
        let make = |shape: &MapShape| Ok((shape.name, make_map(shape, types)?));
        let others: io::Result<Vec<_>> = SHAPES.iter().map(make).collect();
        let mut others = others.map_err(refused("a map"))?;
        let accounts = match ledger {
            Some(ledger) => ledger.accounts_map(),
            None => make_map(&ACCOUNTS, types),
        };
        others.push((ACCOUNTS.name, accounts.map_err(refused("the map ACCOUNTS"))?));
        Ok(Self {
            ended: make_map(&ENDED, types).map_err(refused("the map ENDED"))?,
            others,
        })
    }

    /// The map that a symbol stands for.
    pub(super) fn resolve(&self, symbol: &str) -> Option<Symbol> {
        self.find(symbol).map(|map| Symbol::Map(map.as_raw_fd()))
    }

    /// That by which the scheduler's end is told.
    pub(super) fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    /// Those that user space reads and writes.
    #[expect(clippy::type_complexity, reason = "three maps")]
    pub(super) fn open(
        &self,
    ) -> Result<(HashMap<MapData, u32, Machine>, Array<MapData, Host>, RingBuf<MapData>), MapError> {
        let map = |name| {
            let found = self.find(name).ok_or(io::Error::from(io::ErrorKind::NotFound));
            let copy = found.and_then(|map| map.try_clone_to_owned());
            Map::from_map_data(MapData::from_fd(copy.map_err(MapError::IoError)?)?)
        };
        Ok((
            map("MACHINES")?.try_into()?,
            map("HOST")?.try_into()?,
            map("ENDED")?.try_into()?,
        ))
    }

    fn find(&self, name: &str) -> Option<BorrowedFd<'_>> {
        if name == ENDED.name {
            return Some(self.ended.as_fd());
        }
        let found = self.others.iter().find(|(known, _)| *known == name);
        found.map(|(_, map)| map.as_fd())
    }
}

const fn shape(name: &'static str, kind: bpf_map_type, value: u32, entries: u32) -> MapShape {
    MapShape {
        name,
        kind,
        key: 4,
        value,
        entries,
        timer: false,
    }
}

const fn size<T>() -> u32 {
    size_of::<T>() as u32
}
