//! What machines and containers use, as eBPF counts it: on this host for machines, in each guest for its containers,
//! which say so over their connection. Machines' accounts of credits are kept from the same count.

mod balances;
pub mod credits;
mod levels;
mod near;

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use stoker_ebpf::{
    CgroupId, Ledger, LedgerError, Limits, LoadError, Lost, Measuring, Part, PinsError, ProgramCost, Time, Usage,
};
use stoker_linux::Cgroup;
use stoker_proto::v1;

use self::credits::Accounts;
use crate::machines::ThreadCgroups;
use crate::owner::Owner;

/// Where a BPF file system is mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// Counts what the machines of this host use; clones share it.
#[derive(Clone)]
pub struct Host {
    ledger: Arc<Ledger>,
    accounts: Accounts,
}

// === impl Host ===

impl Host {
    /// Sets the eBPF programs to work, for as long as this agent lives. Blocks.
    ///
    /// # Errors
    /// Where the kernel does not let them; the message says what to do.
    fn load(store: &Path) -> Result<Self, LoadError> {
        Ok(Self::over(Ledger::load(Limits::HOST)?, store))
    }

    fn over(ledger: Ledger, store: &Path) -> Self {
        for lack in ledger.lacks() {
            tracing::info!("{lack}");
        }
        let ledger = Arc::new(ledger);
        Self {
            accounts: Accounts::new(ledger.clone(), store),
            ledger,
        }
    }

    /// What counts.
    pub(crate) fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Machines' accounts of credits.
    pub fn accounts(&self) -> &Accounts {
        &self.accounts
    }

    /// Goes on with the eBPF programs that an earlier run of this agent pinned, or sets them to work and pins them: they count
    /// on when this agent ends. Without a BPF file system they count as long as it lives. Blocks.
    ///
    /// # Errors
    /// Where the kernel does not let them, or the pins can't be used ([`LoadError::Pins`]); the message says what to do.
    pub fn open(owner: &Owner) -> Result<Self, LoadError> {
        let pins = Path::new(BPFFS).join(format!("stoker-{}", owner.host));
        let opened = match Ledger::open(Limits::HOST, &pins) {
            // As bpftool(8) does where nobody else has.
            Err(LoadError::Pins(PinsError::NoBpffs(_))) if mount_bpffs() => Ledger::open(Limits::HOST, &pins),
            opened => opened,
        };
        match opened {
            Ok(ledger) => Ok(Self::over(ledger, &owner.store)),
            Err(LoadError::Pins(error @ PinsError::NoBpffs(_))) => {
                tracing::warn!(%error, "what machines use is not counted while no agent runs");
                Self::load(&owner.store)
            }
            Err(error) => Err(error),
        }
    }

    /// Ends the count of what is not among these machines: their ends are recorded, with what they used.
    pub fn retain(&self, machines: &[Cgroup]) {
        let ids = machines.iter().filter_map(|cgroup| cgroup.id().ok());
        let ids: HashSet<_> = ids.map(CgroupId::from).collect();
        for gone in self.ledger.subjects().into_iter().filter(|id| !ids.contains(id)) {
            self.remove(gone);
        }
    }

    /// Lets the count end with this agent, unless machines are counted still.
    pub fn unpin(&self) {
        if self.ledger.subjects().is_empty()
            && let Err(error) = self.ledger.unpin()
        {
            tracing::error!(%error, "eBPF programs stay pinned");
        }
    }

    /// Counts a machine from now on; one that is counted already goes on as it is.
    pub fn add(&self, cgroup: &Cgroup) -> Option<CgroupId> {
        let known = |added| match added {
            Ok(()) | Err(LedgerError::Known(_)) => Ok(()),
            Err(error) => Err(error),
        };
        let count_parts = |id| -> Result<(), Box<dyn std::error::Error>> {
            let ThreadCgroups { vcpus, vmm } = ThreadCgroups::of(cgroup);
            for (cgroup, part) in [(vcpus, Part::Vcpus), (vmm, Part::Vmm)] {
                match cgroup.id() {
                    // An earlier version's machine, whose threads could not be parted.
                    Err(error) if error.is_not_found() => {}
                    cgroup => known(self.ledger.add_cgroup(id, cgroup?.into(), part))?,
                }
            }
            Ok(())
        };
        let added = || -> Result<CgroupId, Box<dyn std::error::Error>> {
            let id = CgroupId::from(cgroup.id()?);
            known(self.ledger.add(id))?;
            // All of its threads or none: a part would pass for the whole.
            count_parts(id).inspect_err(|_| self.remove(id))?;
            Ok(id)
        };
        match added() {
            Ok(id) => Some(id),
            Err(error) => {
                tracing::error!(%error, cgroup = %cgroup.path().display(), "a machine's use goes uncounted");
                None
            }
        }
    }

    /// Ends the count of a machine.
    pub fn remove(&self, id: CgroupId) {
        if let Err(error) = self.ledger.remove(id) {
            tracing::error!(%error, "a machine's use is still counted");
        }
    }

    /// What a machine of which nothing runs any more has used in all.
    pub fn total(&self, id: CgroupId) -> Option<v1::Usage> {
        match self.ledger.charged(id) {
            Ok(usage) => Some(proto(usage)),
            Err(error) => {
                tracing::error!(%error, "can't read what a machine has used");
                None
            }
        }
    }

    /// Lets the kernel measure what the eBPF programs of this host cost, until the result is dropped.
    ///
    /// # Errors
    /// Where the kernel does not let it.
    pub fn measure(&self) -> Result<Measuring, LedgerError> {
        self.ledger.measure()
    }

    /// What its eBPF programs have cost, as far as that was measured.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn cost(&self) -> Result<Vec<ProgramCost>, LedgerError> {
        self.ledger.cost()
    }

    /// What went uncounted, as there was no room to count it.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn lost(&self) -> Result<Lost, LedgerError> {
        self.ledger.lost()
    }

    /// What the vCPUs of one machine have used up to now. Blocks for some microseconds.
    pub fn vcpus(&self, id: CgroupId) -> Option<Time> {
        match self.ledger.read_one(id) {
            Ok(usage) => Some(usage.part(Part::Vcpus)),
            Err(error) => {
                tracing::debug!(%error, machine = %id, "can't read what a machine's vCPUs use");
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

fn mount_bpffs() -> bool {
    let mounted = nix::mount::mount(
        Some("bpf"),
        BPFFS,
        Some("bpf"),
        nix::mount::MsFlags::empty(),
        Some("mode=0700"),
    );
    match mounted {
        Ok(()) => tracing::info!("mounted a BPF file system on {BPFFS}"),
        Err(error) => tracing::debug!(%error, "can't mount a BPF file system on {BPFFS}"),
    }
    mounted.is_ok()
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
