//! What a hostile container costs PID 1, and who bears it. Needs root, cgroup v2 and the guest image.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test says by a panic what is wrong, helpers too"
)]

mod support;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stoker_ebpf::{CgroupId, Ledger, LedgerError, Limits};
use stoker_proto::guest::InvokeResponse;
use stoker_proto::limits::CONTAINERS;

use support::{Function, Guest, PATIENCE, invoke, request};

/// How long a flood lasts, in ms.
const FLOOD_MS: u64 = 3000;

fn answer(response: &InvokeResponse) -> Value {
    assert!(response.error.is_none(), "{response:?}");
    serde_json::from_slice(&response.payload).unwrap()
}

/// CPU time of the thread that serves (proc(5), `schedstat`).
fn serving(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

/// CPU time of a container's own processes, as the kernel counts it.
fn own(container: &str) -> Duration {
    let path = Path::new("/sys/fs/cgroup/containers").join(container);
    let cgroup = stoker_linux::Cgroup::at(path);
    Duration::from_micros(cgroup.keyed_number("cpu.stat", "usage_usec").unwrap())
}

/// One floods, and another is called all the while.
async fn flood(with: &str) {
    let mut guest = Guest::start().await;
    let mut function = Function::probe();
    function.freeze = false;
    let hostile = guest.container(&function).await;
    let neighbour = guest.container(&function).await;
    // What it does first it does only once.
    for container in [&hostile, &neighbour] {
        guest.invoke(container, json!({ "do": "echo", "with": 1 })).await;
    }
    let alone = Instant::now();
    for _ in 0..20 {
        guest.invoke(&neighbour, json!({ "do": "echo", "with": 1 })).await;
    }
    let alone = alone.elapsed() / 20;

    let (before, own_before) = (serving(guest.pid()), own(&hostile));
    let begin = Instant::now();
    let event = json!({ "do": "flood", "with": with, "n": FLOOD_MS });
    let mut client = guest.client.clone();
    let asked = request(&hostile, event, PATIENCE);
    let mut flooding = tokio::spawn(async move { invoke(&mut client, asked).await });
    let mut calls = 0;
    let flooded = loop {
        tokio::select! {
            flooded = &mut flooding => break flooded.unwrap().unwrap(),
            response = guest.invoke(&neighbour, json!({ "do": "echo", "with": 42 })) => {
                assert_eq!(answer(&response), json!(42));
                calls += 1;
            }
        }
    };
    let (time, used) = (begin.elapsed(), serving(guest.pid()) - before);
    let own = own(&hostile) - own_before;
    let charged = Duration::from_nanos(flooded.usage.unwrap().cpu_ns).saturating_sub(own);
    println!(
        "{with}: {} times in {time:?}: its own {own:?}, PID 1 {used:?}, charged {charged:?}; {calls} calls of another, \
         each {:?} instead of {alone:?}",
        answer(&flooded),
        time / calls.max(1)
    );
    assert!(calls >= 10, "{calls} calls of another in {time:?}");
    assert!(
        charged <= time / 4 + Duration::from_millis(100),
        "{charged:?} in {time:?}"
    );
    assert!(charged <= used + Duration::from_millis(20), "{charged:?} of {used:?}");
    assert!(
        charged >= used / 10,
        "{charged:?} of {used:?}, the rest for {calls} calls"
    );
}

#[tokio::test]
async fn a_flood_of_requests_is_its_own_affair() {
    flood("requests").await;
}

#[tokio::test]
async fn a_flood_of_connections_is_its_own_affair() {
    flood("connections").await;
}

#[tokio::test]
async fn a_flood_of_bytes_is_its_own_affair() {
    flood("bytes").await;
}

#[tokio::test]
async fn a_flood_of_lines_is_its_own_affair() {
    flood("lines").await;
}

/// All that PID 1 does for one that floods while nobody else is there is charged to it.
#[tokio::test]
async fn what_pid_1_spends_is_in_the_use_of_whom_it_is_spent_for() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    guest.invoke(&container, json!({ "do": "echo", "with": 1 })).await;
    let (before, own_before) = (serving(guest.pid()), own(&container));
    let event = json!({ "do": "flood", "with": "requests", "n": FLOOD_MS });
    let flooded = guest.invoke(&container, event).await;
    let (used, own) = (serving(guest.pid()) - before, own(&container) - own_before);
    let charged = Duration::from_nanos(flooded.usage.unwrap().cpu_ns).saturating_sub(own);
    println!("of {used:?} that PID 1 used {charged:?} are charged");
    assert!(charged >= used * 8 / 10, "{charged:?} of {used:?}");
    assert!(
        charged <= used * 11 / 10 + Duration::from_millis(20),
        "{charged:?} of {used:?}"
    );
}

#[tokio::test]
async fn without_descriptors_pid_1_waits() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    guest.invoke(&container, json!({ "do": "echo", "with": 1 })).await;
    let limit = |descriptors: &str| {
        let pid = guest.pid().to_string();
        let limited = Command::new("prlimit")
            .args(["--pid", &pid, &format!("--nofile={descriptors}:")])
            .status();
        assert!(limited.unwrap().success());
    };
    // It has more than those, and may have no other.
    limit("3");
    let mut client = guest.client.clone();
    let asked = request(&container, json!({ "do": "echo", "with": 42 }), PATIENCE);
    let mut answered = tokio::spawn(async move { invoke(&mut client, asked).await });
    let before = serving(guest.pid());
    // The function answers by another connection.
    let early = tokio::time::timeout(Duration::from_secs(2), &mut answered).await;
    assert!(early.is_err(), "{early:?}");
    let used = serving(guest.pid()) - before;
    println!("without descriptors: {used:?} in 2 s");
    assert!(used < Duration::from_millis(200), "{used:?} in 2 s");
    limit("4096");
    let response = tokio::time::timeout(PATIENCE, answered).await.unwrap();
    assert_eq!(answer(&response.unwrap().unwrap()), json!(42));
}

/// The nice value of a process (proc(5), `stat`).
fn nice(pid: u32) -> i32 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let (_, fields) = text.rsplit_once(") ").unwrap();
    fields.split(' ').nth(16).unwrap().parse().unwrap()
}

#[tokio::test]
async fn pid_1_runs_before_what_it_starts() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    assert_eq!(nice(guest.pid()), -20);
    let processes = Path::new("/sys/fs/cgroup/containers")
        .join(&container)
        .join("cgroup.procs");
    let processes = std::fs::read_to_string(processes).unwrap();
    let nice: Vec<i32> = processes.lines().map(|pid| nice(pid.parse().unwrap())).collect();
    assert!(nice.len() >= 2 && nice.iter().all(|nice| *nice == 0), "{nice:?}");
}

#[test]
fn as_many_containers_can_be_counted_as_a_machine_may_have() {
    let _ = Command::new("mount")
        .args(["-t", "tracefs", "none", "/sys/kernel/tracing"])
        .status();
    let containers = u32::try_from(CONTAINERS).unwrap();
    let ledger = Ledger::load(Limits::guest(containers)).unwrap();
    // Of no cgroup that there is.
    let id = |number: usize| CgroupId::from(1 << 40 | number as u64);
    for number in 0..CONTAINERS {
        ledger.add(id(number)).unwrap();
    }
    assert!(matches!(ledger.add(id(CONTAINERS)), Err(LedgerError::Full { .. })));
    assert_eq!(ledger.subjects().len(), CONTAINERS);
    for number in [0, CONTAINERS - 1] {
        assert_eq!(ledger.read_one(id(number)).unwrap().cpu_ns, 0);
    }
}
