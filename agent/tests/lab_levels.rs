//! Changes of machines' levels of credits are seen when they happen, on a kernel that charges threads at its ticks alone, and a machine
//! whose level falls is held at once.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is a test, its helpers too"
)]

use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use stoker_agent::owner::Owner;
use stoker_agent::telemetry::Host;
use stoker_agent::telemetry::credits::Change;
use stoker_credits::{Class, Credits, Level, Mode, Plan};
use stoker_linux::Cgroup;
use ulid::Ulid;

/// How late a change may be seen, in ns of the machine's CPU time, on a host on which a thread that is woken runs at once. It is more by
/// as much as some wake-ups take beside what else the host does; the medians of both are compared.
const LATE_NS: u128 = 2_000_000;

/// How many wake-ups there are from the kernel's word to who holds the machine, at most.
const WAKE_UPS: u128 = 4;

/// How often it is tried.
const TIMES: usize = 15;

/// What the machine is given each time, in ps: 0.4 s of CPU time.
const GRANT_PS: u64 = 400_000_000_000;

struct Machine {
    cgroup: Cgroup,
    vmm: Child,
}

impl Machine {
    /// That computes without pause.
    fn new() -> Self {
        let cgroup = Cgroup::at(Cgroup::mount().unwrap()).create(format!("stoker-test-{}", Ulid::generate()));
        let cgroup = cgroup.unwrap();
        let vmm = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap();
        cgroup.take(vmm.id()).unwrap();
        Self { cgroup, vmm }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
        let _ = self.cgroup.destroy();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_level_that_falls_is_seen_within_two_ms() {
    let folder = tempfile::tempdir().unwrap();
    let owner = Owner {
        host: Ulid::generate(),
        store: folder.path().to_owned(),
    };
    let host = Host::open(&owner).unwrap();
    let machine = Machine::new();
    let counted = host.add(&machine.cgroup).unwrap();
    // It earns next to nothing.
    let plan = Plan {
        cap: Some(Credits::from_millis(100)),
        high_enter: Some(Credits::from_millis(50)),
        high_leave: Some(Credits::from_millis(40)),
        low: Some(Credits::from_millis(30)),
        recover: Some(Credits::from_millis(5)),
        ..Plan::new(1, 1, Mode::Standard)
    };
    let terms = plan.terms().unwrap();
    let id = Ulid::generate();
    let accounts = host.accounts();
    accounts.open(id, &machine.cgroup, counted, &terms).unwrap();
    let holds = Arc::new(Mutex::new(Vec::new()));
    let held = holds.clone();
    let hold = move |class, allowed_millis| {
        held.lock().unwrap().push((class, allowed_millis));
        true
    };
    accounts.hold_by(id, Arc::new(hold));
    let (mut late, mut delays, mut wake_ups) = (Vec::new(), Vec::new(), Vec::new());
    while late.len() < TIMES {
        let begin = Instant::now();
        tokio::task::spawn_blocking(|| {}).await.unwrap();
        wake_ups.push(begin.elapsed().as_nanos());
        let owed = accounts.change(id, Change::Settle).unwrap().owed_ps();
        let rich = accounts.change(id, Change::Grant(owed + GRANT_PS)).unwrap();
        assert!(rich.level() > Level::EXHAUSTED, "{rich:?}");
        let poor = async {
            loop {
                for crossing in accounts.crossed().await {
                    let account = crossing.account;
                    assert_eq!(crossing.machine, id);
                    if account.level() == Level::EXHAUSTED && account.crossings() > rich.crossings() {
                        return crossing;
                    }
                }
            }
        };
        let poor = tokio::time::timeout(Duration::from_secs(60), poor).await.unwrap();
        // It may use its baseline.
        assert_eq!(holds.lock().unwrap().last(), Some(&(Class::Exhausted, 1)));
        delays.push(poor.held.unwrap().as_nanos());
        // What it had used and did not have when the change was seen.
        late.push((poor.account.totals().borrowed.get() - rich.totals().borrowed.get()) / 1000);
    }
    wake_ups.sort_unstable();
    let most = LATE_NS + WAKE_UPS * wake_ups[TIMES / 2];
    println!("at most {most} ns, of wake-ups after {wake_ups:?} ns");
    for (what, times) in [("seen", &mut late), ("held after that", &mut delays)] {
        times.sort_unstable();
        println!("{what} after {times:?} ns");
        assert!(times[TIMES / 2] <= most, "{what} after {times:?}, not {most}");
    }
    accounts.close(id).unwrap();
    host.remove(counted);
    host.unpin();
}
