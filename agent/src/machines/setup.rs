//! What all machines of this host share, and what each is made with: its cgroup, and what bounds it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use stoker_linux::{Cgroup, CgroupError, memory};
use ulid::Ulid;

use super::bounds::Bounds;
use super::ceiling::Ceilings;
use super::cpu::{Schedulers, Vcpus};
use super::size::Limits;
use super::vmm::Folder;
use super::{Ceiling, Cpu, MachinesError, Record, RecordFile, Resizer, Size, Spec, ThreadCgroups, cgroup, during};
use crate::lock::Lock;
use crate::owner::Owner;

/// What every machine of this host is started and kept with.
#[derive(Debug)]
pub(super) struct Setup {
    pub(super) vmm: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) image: PathBuf,
    pub(super) boot_timeout: Duration,
    pub(super) ceilings: Ceilings,
    pub(super) run_dir: PathBuf,
    /// Where the drives of machines lie, in files without names.
    pub(super) scratch_dir: PathBuf,
    /// The cgroup of all machines, and where cgroup v2 is mounted.
    pub(super) cgroup: Cgroup,
    pub(super) mount: PathBuf,
    /// What machines are bounded by.
    pub(super) controllers: &'static [&'static str],
    /// What they are scheduled by.
    pub(super) schedulers: Schedulers,
    pub(super) next_cid: AtomicU32,
    /// Written beside each machine.
    pub(super) owner: Owner,
    /// On `run_dir` and the cgroup; held as long as there are machines.
    pub(super) _locks: [Lock; 2],
}

// === impl Setup ===

impl Setup {
    /// A context id that no machine has had lately. Hosts, guests and the hypervisor have those below 3 (vsock(7)).
    pub(super) fn cid(&self) -> u32 {
        3 + self.next_cid.fetch_add(1, Ordering::Relaxed) % (u32::MAX - 16)
    }

    /// Makes a machine's cgroup, which bounds it, once its folder says whose it is.
    pub(super) fn make_cgroup(&self, folder: &Folder, spec: &Spec) -> Result<(Cgroup, RecordFile), MachinesError> {
        let id = spec.id.to_string();
        let launched = spec.launched.as_ref();
        let record = Record {
            owner: self.owner.clone(),
            cgroup: self.below_mount(&self.cgroup).join(&id),
            runtime: spec.runtime.clone(),
            shape: spec.shape,
            ceiling: Some(self.ceiling(spec)),
            size: launched.map(|launched| launched.record.launch.size),
            created: spec.created,
            boot_duration: None,
            mode: launched.and_then(|launched| launched.record.launch.mode),
            account: launched.map(|launched| launched.account.clone()),
            containers: BTreeMap::new(),
            launched: launched.map(|launched| Box::new(launched.record.clone())),
        };
        let record = RecordFile::create(folder.path(), record).map_err(during("write into", folder.path()))?;
        let cgroup = cgroup::child(&self.cgroup, id.as_ref())?;
        let bounded = self
            .limit(&cgroup, spec)
            .and_then(|()| ThreadCgroups::create(&cgroup, self.controllers));
        if let Err(source) = bounded {
            if let Err(error) = cgroup.destroy() {
                tracing::error!(%error, "a machine's cgroup is left over");
            }
            return Err(MachinesError::Unbounded { source });
        }
        Ok((cgroup, record))
    }

    /// The most that a machine may ever have.
    pub(super) fn ceiling(&self, spec: &Spec) -> Ceiling {
        spec.ceiling.unwrap_or_else(|| self.ceilings.of(spec.shape))
    }

    /// Bounds and weighs what a VMM could take from the host.
    fn limit(&self, cgroup: &Cgroup, spec: &Spec) -> Result<(), CgroupError> {
        Bounds::of(spec.shape).set(cgroup, self.controllers, self.ceiling(spec))?;
        let others = [
            ("memory", "memory.oom.group", "1".to_owned()),
            ("cpu", "cpu.weight", spec.cpu_weight.to_string()),
        ];
        for (controller, file, value) in others {
            if self.controllers.contains(&controller) {
                cgroup.write(file, &value)?;
            }
        }
        Ok(())
    }

    /// What says how soon and how much a machine's threads run, and what changes its size.
    pub(super) fn sized(
        &self,
        id: Ulid,
        folder: &Folder,
        cgroup: &Cgroup,
        vmm: u32,
        record: &RecordFile,
    ) -> (Cpu, Resizer) {
        let Record {
            shape, ceiling, size, ..
        } = record.get();
        let size = size.unwrap_or(Size::whole(shape.vcpus, shape.memory_mib));
        let cpu = Cpu::new(self.schedulers.clone(), id, vmm, cgroup, Vcpus::of(size));
        let limits = Limits {
            cgroup: cgroup.clone(),
            controllers: self.controllers,
            cpu: cpu.clone(),
            ceiling: ceiling.unwrap_or(Ceiling::fixed(shape)),
        };
        (cpu, Resizer::of_vmm(folder.control(), limits, record.clone()))
    }

    pub(super) fn below_mount<'a>(&self, cgroup: &'a Cgroup) -> &'a Path {
        let path = cgroup.path();
        path.strip_prefix(&self.mount).unwrap_or(path)
    }
}

/// What this host has for one machine; nothing that is not known.
pub(super) fn host_size() -> Ceiling {
    Ceiling {
        vcpus: std::thread::available_parallelism().map_or(0, |cpus| cpus.get().try_into().unwrap_or(u32::MAX)),
        memory_mib: memory::total().map_or(0, |bytes| (bytes >> 20).try_into().unwrap_or(u32::MAX)),
    }
}
