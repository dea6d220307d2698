//! What a host that is short of memory takes back of machines, and what the next agent finds of that.

use stoker_policy::pressure::HostMemory;

use super::*;
use crate::host::pressure::once;

/// Something waited for memory, and nothing is available.
const SHORT: HostMemory = HostMemory {
    stalled: SECOND,
    passed: SECOND,
    available_mib: 0,
};

const WELL: HostMemory = HostMemory {
    stalled: Duration::ZERO,
    passed: SECOND,
    available_mib: 1 << 20,
};

/// A host that is to keep memory for itself.
fn reserving(all: &mut Config) {
    config(all);
    all.pool.reserve_mib = Some(4000);
}

/// Looks twice, for balloons are looked at once the host is known to be pressed, and then until it is as the host wants it.
async fn pressed(fixture: &Fixture, machine: &v1::Machine) -> u32 {
    let vmm = fixture.images().vmm(&machine.name);
    vmm.lock().unwrap().used_mib = Some(100);
    assert_eq!(once(&fixture.host.inbox, SHORT, false).await, Some(true));
    assert_eq!(once(&fixture.host.inbox, SHORT, true).await, Some(true));
    eventually("its balloon to be filled", async || vmm.lock().unwrap().balloon_mib > 0).await;
    once(&fixture.host.inbox, SHORT, true).await;
    vmm.lock().unwrap().balloon_mib
}

#[tokio::test]
async fn a_host_that_is_short_takes_memory_back_and_a_guest_that_is_short_has_it_again() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(dir.path(), reserving).await;
    let machine = fixture.launched().await;
    // All but what it uses, a tenth of that, 64 and 32 MiB, in whole steps.
    assert_eq!(pressed(&fixture, &machine).await, 304);
    let shown = fixture.machine(&machine.name).await.launched.unwrap();
    assert_eq!((shown.balloon_mib, shown.taken), (304, size(1, 512)));
    let decisions = fixture
        .host
        .decisions(Some(id(&machine.name).to_owned()), 0, 1000)
        .await;
    let decisions = decisions.unwrap();
    let set = decisions
        .iter()
        .find(|decision| decision.command == "set balloon")
        .unwrap();
    assert_eq!((&*set.reason, &*set.figures["mib"]), ("Balloon", "304"));
    assert_eq!(set.figures["cause.Pressed.missing_mib"], "4000");

    let vmm = fixture.images().vmm(&machine.name);
    vmm.lock().unwrap().used_mib = Some(500);
    eventually("it to have all again", async || {
        once(&fixture.host.inbox, SHORT, true).await;
        vmm.lock().unwrap().balloon_mib == 0
    })
    .await;
    // Once that is seen there is nothing to look at any more.
    assert_eq!(once(&fixture.host.inbox, WELL, true).await, Some(false));
    assert_eq!(fixture.machine(&machine.name).await.launched.unwrap().balloon_mib, 0);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_machine_that_is_to_end_has_all_of_its_memory_for_that() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(dir.path(), reserving).await;
    let machine = fixture.launched().await;
    assert!(pressed(&fixture, &machine).await > 0);
    let vmm = fixture.images().vmm(&machine.name);
    let (host, machine) = (fixture.host.clone(), machine_id(&machine));
    tokio::spawn(async move { host.stop(machine, PATIENCE, "me".into()).await });
    eventually("its balloon to be emptied", async || {
        vmm.lock().unwrap().balloon_mib == 0
    })
    .await;
    fixture.host.drain(PATIENCE).await;
}

#[test]
fn the_next_agent_finds_what_balloons_have() {
    let first = async |fixture: Fixture| {
        let machine = fixture.launched().await;
        let balloon_mib = pressed(&fixture, &machine).await;
        (machine.name, balloon_mib)
    };
    killed(first, async |fixture, (name, balloon_mib)| {
        assert!(balloon_mib > 0);
        eventually("it to look", async || {
            let found = fixture.machine(&name).await.launched.unwrap();
            found.balloon_mib == balloon_mib
        })
        .await;
        fixture.host.drain(PATIENCE).await;
    });
}
