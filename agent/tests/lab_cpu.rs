//! What a class of credits does to a machine's threads on a kernel whose cgroup v2 has a CPU controller. The VMM is a shell that
//! computes, in the cgroup of vCPUs: what counts is how the kernel schedules it.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is a test, its helpers too"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_agent::config;
use stoker_agent::machines::{Cause, Claim, Machines, Process, Spec, Stop, ThreadCgroups};
use stoker_agent::owner::Owner;
use stoker_credits::Class;
use stoker_ebpf::{Ledger, Limits};
use stoker_linux::sched::{self, Policy};
use stoker_linux::{Cgroup, CgroupError};
use stoker_policy::Shape;
use ulid::Ulid;

/// How long a lab that others use may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often something is looked at that is waited for.
const TICK: Duration = Duration::from_millis(2);

/// A baseline, in thousandths of a CPU.
const BASELINE: u32 = 100;

struct Host {
    folder: tempfile::TempDir,
    machines: Machines,
}

impl Host {
    /// Whose machines compute without pause, with a thread for each CPU that there is; none where there can be no machines.
    fn new() -> Option<Self> {
        if !Path::new("/dev/kvm").exists() {
            eprintln!("skipped: there is no /dev/kvm");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let vmm = folder.path().join("vmm");
        fs::write(&vmm, "#!/bin/sh\nwhile :; do :; done\n").unwrap();
        fs::set_permissions(&vmm, fs::Permissions::from_mode(0o755)).unwrap();
        let config = config::Machines {
            vmm,
            run_dir: folder.path().join("run"),
            scratch_dir: folder.path().to_owned(),
            cgroup: format!("stoker-test-{}", Ulid::generate()).into(),
            ..config::Machines::default()
        };
        let owner = Owner {
            host: Ulid::generate(),
            store: folder.path().to_owned(),
        };
        let ledger = Arc::new(Ledger::load(Limits::HOST).unwrap());
        let claim = Claim::new(&config).unwrap();
        let (machines, found) = Machines::open(claim, &config, owner, &ledger).unwrap();
        assert!(found.is_empty());
        Some(Self { folder, machines })
    }

    /// A machine that computes.
    async fn machine(&self) -> Process {
        let spec = Spec {
            id: Ulid::generate(),
            shape: Shape {
                vcpus: 1,
                memory_mib: 128,
                drive_mib: 0,
                baseline_millis: 100,
            },
            ceiling: None,
            runtime: "python3.11".into(),
            cpu_weight: 100,
            terms: None,
            created: Duration::ZERO,
            launched: None,
        };
        let process = self.machines.spawn(spec, |_| {}).await.unwrap();
        // The shell stands for a vCPU.
        let parts = ThreadCgroups::of(process.cgroup());
        parts.vcpus.take(process.pid()).unwrap();
        process
    }

    /// Removes all, once its machines have ended.
    fn remove(self, cgroup: &Path) {
        drop(self.machines);
        Cgroup::at(cgroup.parent().unwrap().parent().unwrap().to_owned())
            .destroy()
            .unwrap();
        self.folder.close().unwrap();
    }
}

async fn end(process: Process) {
    let (_, remains) = process.end(Cause::Stopped(Stop::Now("enough".into()))).await;
    remains.remove().await;
}

fn used(process: &Process) -> Duration {
    let us = ThreadCgroups::of(process.cgroup())
        .vcpus
        .keyed_number("cpu.stat", "usage_usec");
    Duration::from_micros(us.unwrap())
}

/// How long a machine takes to use so much CPU time.
async fn until_used(process: &Process, cpu: Duration) -> Duration {
    let (start, before) = (Instant::now(), used(process));
    while used(process) - before < cpu {
        assert!(start.elapsed() < PATIENCE, "{:?} of {cpu:?}", used(process) - before);
        tokio::time::sleep(TICK).await;
    }
    start.elapsed()
}

async fn until(what: &str, mut is: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(TICK).await;
    }
    start.elapsed()
}

fn is_urgent(process: &Process) -> bool {
    let policy = Policy::of(process.pid()).unwrap();
    matches!(policy, Policy::RoundRobin { .. })
}

/// As its guest does that halts, or goes on.
fn signal(process: &Process, signal: nix::sys::signal::Signal) {
    let pid = nix::unistd::Pid::from_raw(process.pid().cast_signed());
    nix::sys::signal::kill(pid, signal).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exhausted_machine_gets_its_baseline_beside_others_that_compute() {
    let Some(host) = Host::new() else { return };
    let exhausted = host.machine().await;
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(host.machine().await);
    }
    exhausted.cpu().set(Class::Exhausted, BASELINE).unwrap();
    // What was due before it was limited.
    until_used(&exhausted, Duration::from_millis(50)).await;
    let took = until_used(&exhausted, Duration::from_secs(1)).await;
    let share = 1.0 / took.as_secs_f64() / (f64::from(BASELINE) / 1000.0);
    assert!((0.98..=1.02).contains(&share), "{share} of its baseline");
    // Beside one that may be urgent and computes without pause, it has the same.
    others[0].cpu().set(Class::High, 1000).unwrap();
    let took = until_used(&exhausted, Duration::from_secs(1)).await;
    let share = 1.0 / took.as_secs_f64() / (f64::from(BASELINE) / 1000.0);
    assert!((0.98..=1.02).contains(&share), "{share} of its baseline");
    let cgroup = exhausted.cgroup().path().to_owned();
    // It ends as soon as any other: what is killed is not limited.
    let start = Instant::now();
    end(exhausted).await;
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    for other in others {
        end(other).await;
    }
    host.remove(&cgroup);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_with_credits_runs_in_real_time_while_it_uses_little() {
    let Some(host) = Host::new() else { return };
    let machine = host.machine().await;
    let cgroup = machine.cgroup().path().to_owned();
    let cpu = machine.cpu().clone();
    cpu.set(Class::High, 1000).unwrap();
    until("it is held back once it computes", || !is_urgent(&machine)).await;
    signal(&machine, nix::sys::signal::Signal::SIGSTOP);
    let again = until("it is urgent once it rests", || is_urgent(&machine)).await;
    assert!(again < Duration::from_secs(30), "{again:?}");
    let limits = || fs::read_to_string(ThreadCgroups::of(machine.cgroup()).vcpus.path().join("cpu.max")).unwrap();
    assert!(limits().starts_with("max "));
    cpu.set(Class::Exhausted, BASELINE).unwrap();
    assert!(!is_urgent(&machine));
    assert_eq!(limits().trim(), "5000 50000");
    cpu.set(Class::Normal, 1000).unwrap();
    assert!(!is_urgent(&machine) && limits().starts_with("max "));
    cpu.set(Class::High, 1000).unwrap();
    assert!(is_urgent(&machine), "it rests still");
    let vmm = ThreadCgroups::of(machine.cgroup()).vmm;
    let threads = sched::threads(machine.pid()).unwrap();
    assert_eq!(
        threads.len(),
        ThreadCgroups::of(machine.cgroup()).vcpus.threads().unwrap().len()
    );
    assert!(vmm.threads().unwrap().is_empty());
    signal(&machine, nix::sys::signal::Signal::SIGCONT);
    end(machine).await;
    assert!(matches!(
        cpu.set(Class::Exhausted, BASELINE),
        Err(stoker_agent::machines::CpuError::Limit(CgroupError::Io { .. }))
    ));
    host.remove(&cgroup);
}
