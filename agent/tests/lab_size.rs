//! A machine with a real guest that is made larger and smaller while it runs, and what the host lets it have meanwhile.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is a test, its helpers too"
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_agent::config;
use stoker_agent::machines::{Cause, Ceiling, Claim, Machines, Process, Size, Spec, Stop, Stopper, ThreadCgroups};
use stoker_agent::owner::Owner;
use stoker_credits::Class;
use stoker_ebpf::{Ledger, Limits};
use stoker_linux::Cgroup;
use stoker_linux::sched::Policy;
use stoker_policy::Shape;
use stoker_testkit::{BIN_DIR, CACHE};
use ulid::Ulid;

/// How long a lab that others use may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// How often something is looked at that is waited for.
const TICK: Duration = Duration::from_millis(2);

const CEILING: Ceiling = Ceiling {
    vcpus: 4,
    memory_mib: 1024,
};

/// The configuration of a host in that folder; none where there can be no machines.
fn config(folder: &Path) -> Option<config::Machines> {
    let (Some(cache), Some(programs)) = (std::env::var_os(CACHE), std::env::var_os(BIN_DIR)) else {
        eprintln!("skipped: {CACHE} is not set; `cargo xtask test` sets it and finds a host that can boot kernels");
        return None;
    };
    let (cache, programs) = (PathBuf::from(cache), PathBuf::from(programs));
    Some(config::Machines {
        vmm: programs.join("stoker-vmm"),
        kernel: cache.join("kernel/tuned/vmlinux"),
        initramfs: cache.join("image/initramfs-tuned.cpio"),
        image: cache.join("image/root.erofs"),
        boot_timeout: PATIENCE,
        run_dir: folder.join("run"),
        scratch_dir: folder.to_owned(),
        cgroup: format!("stoker-test-{}", Ulid::generate()).into(),
        ..config::Machines::default()
    })
}

fn spec() -> Spec {
    Spec {
        id: Ulid::generate(),
        shape: Shape {
            vcpus: 2,
            memory_mib: 256,
            drive_mib: 0,
            baseline_millis: 100,
        },
        ceiling: Some(CEILING),
        runtime: "provided".into(),
        cpu_weight: 100,
        terms: None,
        created: Duration::ZERO,
        launched: None,
    }
}

/// Asks for a size, waits until the guest has it, and says how long that took.
async fn resize(process: &Process, asked: Size) -> Duration {
    let start = Instant::now();
    let resizer = process.resizer();
    resizer.resize(asked).await.unwrap();
    let taken = resizer.until_taken(|amounts| println!("  {amounts:?}"));
    let taken = tokio::time::timeout(PATIENCE, taken).await.unwrap().unwrap();
    assert_eq!((taken.asked, taken.are_taken()), (asked, true));
    start.elapsed()
}

/// What the host lets the machine have is what such a size takes.
fn is_bounded_by(process: &Process, size: Size) {
    let cgroup = process.cgroup();
    let memory = stoker_vmm::memory::most_charged(size.memory_mib, CEILING.memory_mib, CEILING.vcpus);
    // In whole pages.
    assert_eq!(cgroup.number("memory.max"), Some(memory / 4096 * 4096));
    assert_eq!(cgroup.number("pids.max"), Some(u64::from(size.vcpus) + 32));
    let cpu_max = std::fs::read_to_string(cgroup.path().join("cpu.max")).unwrap();
    assert_eq!(cpu_max.trim(), format!("{} 100000", (size.vcpus + 1) * 100_000));
}

fn limit_of_vcpus(process: &Process) -> String {
    let vcpus = ThreadCgroups::of(process.cgroup()).vcpus;
    let limit = std::fs::read_to_string(vcpus.path().join("cpu.max")).unwrap();
    limit.trim().to_owned()
}

/// The threads of its vCPUs.
fn threads(process: &Process) -> Vec<u32> {
    ThreadCgroups::of(process.cgroup()).vcpus.threads().unwrap()
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        tokio::time::sleep(TICK).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_made_larger_and_smaller_while_it_runs() {
    let folder = tempfile::tempdir().unwrap();
    let Some(config) = config(folder.path()) else { return };
    let owner = Owner {
        host: Ulid::generate(),
        store: folder.path().to_owned(),
    };
    let ledger = Arc::new(Ledger::load(Limits::HOST).unwrap());
    let claim = Claim::new(&config).unwrap();
    let (machines, found) = Machines::open(claim, &config, owner.clone(), &ledger).unwrap();
    assert!(found.is_empty());
    let mut process = machines.spawn(spec(), |_| {}).await.unwrap();
    let (_stopper, mut stopped) = Stopper::new();
    let ready = process.until_ready(&mut stopped).await.unwrap();
    println!("  ready after {:.2?}", ready.boot_duration);
    let started = Size::whole(2, 256);
    assert!(process.resizer().amounts().await.unwrap().are_taken());
    is_bounded_by(&process, started);
    process.cpu().set(Class::High, 4000).unwrap();

    let large = Size::whole(4, 768);
    println!("{large} after {:.2?}", resize(&process, large).await);
    is_bounded_by(&process, large);
    assert!(limit_of_vcpus(&process).starts_with("max "));
    assert!(threads(&process).len() >= 4);
    until("all its vCPUs run in real time once it rests", || {
        let policies = threads(&process).into_iter().map(Policy::of);
        policies
            .flatten()
            .all(|policy| matches!(policy, Policy::RoundRobin { .. }))
    })
    .await;

    // Its vCPUs are held to that at once, whatever the guest does.
    let small = Size::whole(1, 256);
    process.cpu().set(Class::Normal, 4000).unwrap();
    process.resizer().resize(small).await.unwrap();
    assert!(["50000 50000", "max 50000"].contains(&&*limit_of_vcpus(&process)));
    println!("{small} after {:.2?}", resize(&process, small).await);
    is_bounded_by(&process, small);
    until("the threads of those that it gave back end", || {
        threads(&process).len() <= 2
    })
    .await;
    let most = Size::whole(CEILING.vcpus + 1, 256);
    process.resizer().resize(most).await.unwrap_err();
    let half = Size {
        cpu_millis: 500,
        ..Size::whole(3, 300)
    };
    println!("{half} after {:.2?}", resize(&process, half).await);
    assert_eq!(limit_of_vcpus(&process), "25000 50000");

    // The next agent goes on with it.
    let cgroup = process.cgroup().path().to_owned();
    drop((ready, process, machines));
    let claim = Claim::new(&config).unwrap();
    let (machines, mut found) = Machines::open(claim, &config, owner, &ledger).unwrap();
    let mut process = found.pop().unwrap();
    process.take_threads().await;
    let amounts = process.resizer().amounts().await.unwrap();
    assert_eq!((amounts.asked, amounts.are_taken()), (half, true));
    assert_eq!(limit_of_vcpus(&process), "25000 50000");
    let ready = process.until_ready(&mut stopped).await.unwrap();
    println!("{started} after {:.2?}", resize(&process, started).await);
    is_bounded_by(&process, started);
    drop(ready);
    let (_, remains) = process.end(Cause::Stopped(Stop::Now("enough".into()))).await;
    remains.remove().await;
    drop(machines);
    let above = cgroup.ancestors().nth(2).unwrap();
    Cgroup::at(above.to_owned()).destroy().unwrap();
}
