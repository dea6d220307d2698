//! Classes of machines whose VMM is a shell: whether they are urgent, on this machine's kernel.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::sys::signal::Signal;
use stoker_linux::Cgroup;
use stoker_testkit::cgroup::with_cgroups;
use stoker_testkit::tracefs::need_tracefs;

use super::*;

/// How long the kernel and the thread may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A vCPU, and all of its time.
const ONE: Vcpus = Vcpus {
    plugged: 1,
    share_millis: 1000,
};

/// A machine in cgroups of its own, which go with it.
struct TestMachine {
    cgroup: Cgroup,
    vmm: Child,
    cpu: Cpu,
}

impl TestMachine {
    /// Whose VMM is a shell that runs this; its standard input is a pipe.
    fn new(mount: &Path, urgent: Option<&Arc<Urgent>>, script: &str) -> Self {
        let id = Ulid::generate();
        let cgroup = Cgroup::at(mount.to_owned())
            .create(format!("stoker-test-{id}"))
            .unwrap();
        let parts = ThreadCgroups::create(&cgroup, &[]).unwrap();
        let vmm = Command::new("sh").args(["-c", script]).stdin(Stdio::piped()).spawn();
        let vmm = vmm.unwrap();
        parts.vcpus.take(vmm.id()).unwrap();
        // A host's kernel may have all controllers in cgroup v1.
        let schedulers = Schedulers {
            urgent: urgent.cloned(),
            ..Schedulers::default()
        };
        let cpu = Cpu::new(schedulers, id, vmm.id(), &cgroup, ONE);
        Self { cgroup, vmm, cpu }
    }

    fn is_urgent(&self) -> bool {
        urgent::is_urgent(&self.cpu.machine)
    }

    fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(self.vmm.id().cast_signed());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn wait_until_urgent(&self, wanted: bool) {
        let start = Instant::now();
        while self.is_urgent() != wanted {
            assert!(start.elapsed() < PATIENCE, "urgent: {wanted}");
            std::thread::yield_now();
        }
    }
}

impl Drop for TestMachine {
    fn drop(&mut self) {
        let _ = self.cgroup.destroy();
        let _ = self.vmm.wait();
    }
}

/// Where this machine lets threads run in real time.
fn with_urgent(test: impl FnOnce(&Path, Arc<Urgent>) + Send) {
    with_cgroups(|mount| match Urgent::start() {
        Ok(urgent) => test(mount, Arc::new(urgent)),
        Err(error) => eprintln!("skipped: no thread can run in real time here: {error}"),
    });
}

const SLEEPS: &str = "read -r _";
const SPINS: &str = "read -r _; while :; do :; done";

#[test]
fn a_machine_is_urgent_until_it_leaves() {
    with_urgent(|mount, urgent| {
        let (one, other) = (
            TestMachine::new(mount, Some(&urgent), SLEEPS),
            TestMachine::new(mount, Some(&urgent), SLEEPS),
        );
        for _ in 0..2 {
            one.cpu.hurry(1).unwrap();
            one.cpu.hurry(1).unwrap();
            assert!(one.is_urgent() && !other.is_urgent());
            one.cpu.calm().unwrap();
            assert!(!one.is_urgent());
            one.cpu.calm().unwrap();
        }
    });
}

#[test]
fn a_thread_that_is_made_later_is_urgent_once_that_is_set_again() {
    with_urgent(|mount, urgent| {
        let script = "read -r _; sleep 1000 & read -r _";
        let machine = TestMachine::new(mount, Some(&urgent), script);
        machine.cpu.hurry(1).unwrap();
        assert!(machine.is_urgent());
        let mut vmm = machine.vmm.stdin.as_ref().unwrap();
        std::io::Write::write_all(&mut vmm, b"\n").unwrap();
        let made = || {
            let threads = machine.cpu.machine.parts.vcpus.threads().unwrap();
            threads.into_iter().find(|thread| *thread != machine.vmm.id())
        };
        let start = Instant::now();
        let made = loop {
            if let Some(made) = made() {
                break made;
            }
            assert!(start.elapsed() < PATIENCE, "it is made");
            std::thread::yield_now();
        };
        // Not by itself, so none is urgent that nobody knows of.
        assert!(matches!(Policy::of(made).unwrap(), Policy::Fair { .. }));
        machine.cpu.hurry(1).unwrap();
        assert!(machine.is_urgent());
        machine.cpu.calm().unwrap();
        assert!(!machine.is_urgent());
    });
}

#[test]
fn a_machine_that_uses_much_is_not_urgent_until_it_uses_little() {
    with_urgent(|mount, urgent| {
        let machines = [(); 2].map(|()| TestMachine::new(mount, Some(&urgent), SPINS));
        for machine in &machines {
            machine.cpu.hurry(1).unwrap();
            assert!(machine.is_urgent(), "it sleeps still");
        }
        // They compute from now on.
        for machine in &machines {
            let mut vmm = machine.vmm.stdin.as_ref().unwrap();
            std::io::Write::write_all(&mut vmm, b"\n").unwrap();
        }
        machines.iter().for_each(|machine| machine.wait_until_urgent(false));
        let [rests, _] = &machines;
        rests.signal(Signal::SIGSTOP);
        rests.wait_until_urgent(true);
        rests.signal(Signal::SIGCONT);
        rests.wait_until_urgent(false);
    });
}

#[test]
fn nobody_is_urgent_without_somebody_who_holds_it_back() {
    with_urgent(|mount, urgent| {
        let machine = TestMachine::new(mount, None, SLEEPS);
        let cpu = Cpu {
            schedulers: Schedulers {
                urgent: Some(urgent),
                ..Schedulers::default()
            },
            ..machine.cpu.clone()
        };
        cpu.hurry(1).unwrap();
        assert!(machine.is_urgent());
        // As when the agent is told to end.
        drop(cpu);
        assert!(!machine.is_urgent());
    });
}

#[test]
fn a_machine_that_vanishes_is_forgotten() {
    with_urgent(|mount, urgent| {
        let mut machine = TestMachine::new(mount, Some(&urgent), SLEEPS);
        machine.cpu.hurry(1).unwrap();
        machine.vmm.kill().unwrap();
        machine.vmm.wait().unwrap();
        machine.cgroup.destroy().unwrap();
        machine.cpu.calm().unwrap();
        // And one that is gone before.
        assert!(machine.cpu.hurry(1).is_err());
        let limited = machine.cpu.set(Class::Exhausted, 100);
        assert!(matches!(limited, Err(CpuError::Limit(_))), "{limited:?}");
    });
}

#[test]
fn a_kernel_without_sched_ext_is_an_error_only_where_it_is_asked_for() {
    if stoker_ebpf::scheduler::is_there() {
        return eprintln!("skipped: this kernel has it");
    }
    if !nix::unistd::geteuid().is_root() {
        return eprintln!("skipped: only root may load eBPF programs");
    }
    need_tracefs().unwrap();
    let ledger = Arc::new(Ledger::load(stoker_ebpf::Limits::HOST).unwrap());
    let start = |wanted| Schedulers::start(wanted, &ledger);
    let error = start(Scheduler::SchedExt).unwrap_err().to_string();
    assert!(error.contains("CONFIG_SCHED_CLASS_EXT"), "{error}");
    assert!(start(Scheduler::Auto).unwrap().sched_ext.is_none());
    assert!(start(Scheduler::RealTime).unwrap().sched_ext.is_none());
}

#[test]
fn without_real_time_it_asks_for_short_slices() {
    with_cgroups(|mount| {
        let machine = TestMachine::new(mount, None, SLEEPS);
        machine.cpu.hurry(1).unwrap();
        let is = Policy::of(machine.vmm.id()).unwrap();
        let expected = match stoker_linux::sched::takes_slices().unwrap() {
            true => SOON,
            false => Policy::DEFAULT,
        };
        assert_eq!(is, expected);
        machine.cpu.calm().unwrap();
        assert_ne!(Policy::of(machine.vmm.id()).unwrap(), SOON);
    });
}
