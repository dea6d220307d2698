//! A machine's threads in two cgroups below its own: what the guest uses of the host's CPUs is limited apart from what the VMM
//! itself does, and counted apart. Memory and the number of threads are bounded by the machine's own.

use std::io;

use stoker_linux::{Cgroup, CgroupError, sched};
use stoker_vmm::vcpu::THREAD_NAME;

/// The cgroups below a machine's own. They are threaded ("threads" in cgroup-v2.rst), so the process counts as being in the
/// machine's, whichever of them its threads are in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ThreadCgroups {
    /// Its vCPUs' threads, which move there before they run the guest, and with newer kernels one of KVM's own. Limits on the
    /// guest's CPU time go here alone.
    pub vcpus: Cgroup,
    /// All other threads of its VMM.
    pub vmm: Cgroup,
}

// === impl ThreadCgroups ===

impl ThreadCgroups {
    /// Those of a machine's cgroup, whether or not they are there.
    pub fn of(machine: &Cgroup) -> Self {
        let part = |name| Cgroup::at(machine.path().join(name));
        Self {
            vcpus: part("vcpus"),
            vmm: part("vmm"),
        }
    }

    /// Both.
    pub fn all(&self) -> [&Cgroup; 2] {
        [&self.vcpus, &self.vmm]
    }

    /// Makes them, where they are not there yet, with these of a machine's controllers that single threads are bounded by.
    ///
    /// # Errors
    /// Where the kernel does not let it.
    pub(in crate::machines) fn create(machine: &Cgroup, controllers: &[&str]) -> Result<Self, CgroupError> {
        let parts = Self::of(machine);
        for part in parts.all() {
            match machine.create(part.path()) {
                Err(CgroupError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
                made => drop(made?),
            }
            part.make_threaded()?;
        }
        if controllers.contains(&"cpu") {
            machine.enable("cpu")?;
        }
        Ok(parts)
    }

    /// Moves the threads of a VMM there that an earlier agent started without them. Threads that are where they should be stay.
    ///
    /// # Errors
    /// Where the kernel does not let it.
    pub(in crate::machines) fn take(&self, machine: &Cgroup, vmm: u32) -> Result<(), CgroupError> {
        if !machine.threads()?.is_empty() {
            self.vmm.take(vmm)?;
        }
        for thread in self.vmm.threads()? {
            // One that has ended meanwhile has no name.
            if sched::name(vmm, thread).is_ok_and(|name| is_vcpu(&name)) {
                self.vcpus.take_thread(thread)?;
            }
        }
        Ok(())
    }
}

/// Whether a thread of that name is a vCPU's.
fn is_vcpu(name: &str) -> bool {
    let number = name.strip_prefix(THREAD_NAME);
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use stoker_testkit::cgroup::with_cgroups;

    use super::*;

    /// A cgroup as a machine's, which goes with what runs in it when this is dropped.
    struct Machine(Cgroup);

    impl Machine {
        fn new(mount: &std::path::Path, name: &str) -> Self {
            let name = format!("stoker-test-{name}-{}", std::process::id());
            Self(Cgroup::at(mount.to_owned()).create(name).unwrap())
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = self.0.destroy();
        }
    }

    /// A process whose first thread is named so.
    fn named(name: &str) -> Child {
        let process = Command::new("sh")
            .args(["-c", "printf %s \"$0\" > /proc/$$/comm; read -r _", name])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        while sched::name(process.id(), process.id()).unwrap() != name {
            std::thread::yield_now();
        }
        process
    }

    #[test]
    fn they_are_made_once_and_go_with_the_machine() {
        with_cgroups(|mount| {
            let machine = Machine::new(mount, "parts");
            let parts = ThreadCgroups::create(&machine.0, &[]).unwrap();
            assert_eq!(parts, ThreadCgroups::create(&machine.0, &[]).unwrap());
            assert_eq!(parts, ThreadCgroups::of(&machine.0));
            let mut process = named("sh");
            parts.vmm.take(process.id()).unwrap();
            assert_eq!(machine.0.processes().unwrap(), [process.id()]);
            assert_eq!(parts.vmm.threads().unwrap(), [process.id()]);
            assert_eq!(parts.vcpus.threads().unwrap(), [0; 0]);
            machine.0.destroy().unwrap();
            assert!(!process.wait().unwrap().success() && !machine.0.path().exists());
        });
    }

    #[test]
    fn threads_of_an_older_machine_are_moved_by_their_names() {
        with_cgroups(|mount| {
            for (name, is_vcpu) in [("vcpu0", true), ("vsock", false), ("vcpus", false)] {
                let machine = Machine::new(mount, name);
                let mut process = named(name);
                machine.0.take(process.id()).unwrap();
                let parts = ThreadCgroups::create(&machine.0, &[]).unwrap();
                // The agent may have died in between.
                for _ in 0..2 {
                    parts.take(&machine.0, process.id()).unwrap();
                    let (vcpus, vmm) = (parts.vcpus.threads().unwrap(), parts.vmm.threads().unwrap());
                    let all = if is_vcpu { vcpus } else { vmm };
                    assert_eq!(all, [process.id()], "{name}");
                    assert_eq!(machine.0.threads().unwrap(), [0; 0], "{name}");
                }
                assert_eq!(machine.0.processes().unwrap(), [process.id()]);
                machine.0.destroy().unwrap();
                process.wait().unwrap();
            }
        });
    }
}
