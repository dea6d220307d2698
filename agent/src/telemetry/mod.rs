//! What machines and containers use, as eBPF counts it: on this host for machines, in each guest for its containers,
//! which say so over their connection.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits, LoadError, PinsError, Usage};
use stoker_linux::Cgroup;
use stoker_proto::v1;

/// Counts what the machines of this host use; clones share it.
#[derive(Clone)]
pub struct Host {
    ledger: Arc<Ledger>,
}

// === impl Host ===

impl Host {
    /// Sets the eBPF programs to work, for as long as this agent lives. Blocks.
    ///
    /// # Errors
    /// Where the kernel does not let them; the message says what to do.
    pub fn load() -> Result<Self, LoadError> {
        Ok(Self {
            ledger: Arc::new(Ledger::load(Limits::HOST)?),
        })
    }

    /// Goes on with the eBPF programs that are pinned in a folder of a BPF file system, or sets them to work and pins them there:
    /// they count on when this agent ends. Blocks.
    ///
    /// # Errors
    /// Where the kernel does not let them, or the folder can't be used ([`LoadError::Pins`]); the message says what to do.
    pub fn open(pins: &Path) -> Result<Self, LoadError> {
        Ok(Self {
            ledger: Arc::new(Ledger::open(Limits::HOST, pins)?),
        })
    }

    /// Removes the pins, so that the count ends with this agent.
    ///
    /// # Errors
    /// Where the kernel does not let it remove them.
    pub fn unpin(&self) -> Result<(), PinsError> {
        self.ledger.unpin()
    }

    /// All machines that are counted, those of an agent before this one among them.
    pub fn subjects(&self) -> Vec<CgroupId> {
        self.ledger.subjects()
    }

    /// Counts a machine from now on; one that is counted already goes on as it is.
    pub fn add(&self, cgroup: &Cgroup) -> Option<CgroupId> {
        let added = || -> Result<CgroupId, Box<dyn std::error::Error>> {
            let id = CgroupId::from(cgroup.id()?);
            match self.ledger.add(id) {
                Ok(()) | Err(LedgerError::Known(_)) => Ok(id),
                Err(error) => Err(error.into()),
            }
        };
        match added() {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::error!(%error, cgroup = %cgroup.path().display(), "a machine's use goes uncounted");
                None
            }
        }
    }

    /// Ends the count of a machine and says what it used in all.
    pub fn remove(&self, id: CgroupId) -> Option<v1::Usage> {
        match self.ledger.remove(id) {
            Ok(usage) => Some(proto(usage)),
            Err(error) => {
                tracing::error!(%error, "a machine's use is still counted");
                None
            }
        }
    }

    /// What every machine has used up to now. Blocks for some microseconds a machine.
    pub fn read(&self) -> HashMap<CgroupId, v1::Usage> {
        match self.ledger.read() {
            Ok(all) => all.into_iter().map(|(id, usage)| (id, proto(usage))).collect(),
            Err(error) => {
                tracing::error!(%error, "can't read what machines use");
                HashMap::new()
            }
        }
    }
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").finish_non_exhaustive()
    }
}

fn proto(usage: Usage) -> v1::Usage {
    v1::Usage {
        cpu_ns: usage.cpu_ns,
        wait_ns: usage.wait_ns,
        memory_bytes: usage.memory_bytes,
        memory_peak_bytes: usage.memory_peak_bytes,
        measure_time: Some(SystemTime::now().into()),
    }
}
