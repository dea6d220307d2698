//! What one agent alone may use.

use std::path::PathBuf;

use stoker_linux::Cgroup;

use super::{MachinesError, NoCgroup, cgroup, during};
use crate::config;
use crate::lock::Lock;

/// The folder and the cgroup of machines, which are this agent's alone as long as this, or what it becomes, lives.
#[derive(Debug)]
pub struct Claim {
    pub(super) run_dir: PathBuf,
    pub(super) vmm: PathBuf,
    pub(super) cgroup: Cgroup,
    pub(super) mount: PathBuf,
    pub(super) locks: [Lock; 2],
}

// === impl Claim ===

impl Claim {
    /// Finds what machines need, and locks their folder and cgroup. The files that are configured have been checked, and the VMM's
    /// is a path (`boot_files::check`). Blocks.
    ///
    /// # Errors
    /// [`MachinesError`] says what is missing and what to do.
    pub fn new(config: &config::Machines) -> Result<Self, MachinesError> {
        let run_dir = config.run_dir.clone();
        let of_run_dir = Lock::folder(&run_dir, "machines.run_dir")?;
        // The VMM is started in another folder.
        let vmm = std::path::absolute(&config.vmm).map_err(during("find", &config.vmm))?;
        let mount = Cgroup::mount()?;
        let cgroup = cgroup::open(&mount, &config.cgroup.join("machines")).map_err(NoCgroup::from)?;
        let of_cgroup = Lock::cgroup(cgroup.path(), "machines.cgroup")?;
        cgroup::require_controllers(&mount, &cgroup)?;
        let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        kvm.map_err(|source| MachinesError::NoKvm { source })?;
        Ok(Self {
            run_dir,
            vmm,
            cgroup,
            mount,
            locks: [of_run_dir, of_cgroup],
        })
    }
}
