//! Passes changes of state on, in their order: to the store, so that a later start knows what was there, and to the
//! controller. The loop never waits for a disk.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::{Duration, SystemTime};

use stoker_policy::MachineId;
use stoker_proto::v1;
use stoker_proto::v1::event::Event;
use stoker_proto::v1::machine_end::Reason;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::credits;
use super::listing;
use super::machine::{Launcher, Leftovers};
use crate::machines::Record;
use crate::report::Reporter;
use crate::store::{Store, StoreError};
use crate::tasks::{Essential, Task};

/// How many changes may wait for the disk. More are lost, and that is logged and counted.
const WAITING: usize = 16 * 1024;

/// How long to wait before ends of machines that could not be recorded are tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// Takes changes of state.
#[derive(Clone, Debug)]
pub(super) struct Recorder {
    to: mpsc::Sender<Entry>,
    reporter: Reporter,
}

#[derive(Debug)]
enum Entry {
    Change(Box<Event>),
    End(Box<End>),
    /// Somebody who waits until all before it is recorded.
    Waiting(oneshot::Sender<()>),
}

/// A machine's end, and what is removed once it is recorded.
#[derive(Debug)]
struct End {
    machine: v1::Machine,
    leftovers: Option<Leftovers>,
}

/// Writes changes of state down, and reports them.
#[derive(Debug)]
struct Writer {
    store: Store,
    reporter: Reporter,
    /// Ends that could not be recorded: what they left stays until they are.
    unrecorded: VecDeque<End>,
    /// When they are tried again.
    again: Instant,
}

/// Reports the end of machines that an earlier agent left and that were not `found` by this one, starts the task, and answers
/// with them too, and with all that was kept of them.
pub(super) async fn start(
    store: Store,
    reporter: Reporter,
    found: &BTreeMap<MachineId, Record>,
    launcher: &dyn Launcher,
    essential: &Essential,
) -> Result<(Recorder, Vec<v1::Machine>), StoreError> {
    let found: BTreeSet<_> = found.keys().map(|id| listing::machine_name(*id)).collect();
    let writer = Writer {
        store,
        reporter: reporter.clone(),
        unrecorded: VecDeque::new(),
        again: Instant::now(),
    };
    let mut gone = Vec::new();
    let booted = host_boot_time();
    for mut machine in writer.store.machines().await? {
        if found.contains(&machine.name) {
            continue;
        }
        machine.state = v1::machine::State::Ended.into();
        machine.pid = 0;
        let id = listing::machine_id(&machine.name);
        if let Some(id) = id
            && let Some(standing) = launcher.account_of_gone(id)
        {
            machine.credits = Some(credits::of_ended(id, &machine.account, &standing));
        }
        machine.end = Some(v1::MachineEnd {
            reason: Reason::Lost.into(),
            detail: lost_because(machine.create_time, booted),
            console_tail: String::new(),
            end_time: Some(SystemTime::now().into()),
            exit_status: None,
        });
        // Where the disk is full, say, the agent starts all the same, and the next start tells it.
        if let Err(error) = writer.record_end(&machine).await {
            tracing::error!(%error, "the end of a machine is not recorded");
        }
        gone.push(machine);
    }
    let (to, changes) = mpsc::channel(WAITING);
    essential.spawn(Task::Recorder, writer.run(changes));
    Ok((Recorder { to, reporter }, gone))
}

/// Why a machine that was begun at this time, in s since 1970, is not there any more.
fn lost_because(created: Option<prost_types::Timestamp>, host_booted: Option<i64>) -> String {
    let restarted = created.zip(host_booted).is_some_and(|(at, booted)| at.seconds < booted);
    match restarted {
        true => "it was gone when the agent started, for the host has been restarted since".to_owned(),
        false => "it was gone when the agent started, with its folder in machines.run_dir or its cgroup: somebody else removed \
                  them, or the configuration names others"
            .to_owned(),
    }
}

/// When the host was started, in s since 1970 (`btime`, proc_stat(5)).
fn host_boot_time() -> Option<i64> {
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    stat.lines()
        .find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok())
}

// === impl Writer ===

impl Writer {
    async fn run(mut self, mut changes: mpsc::Receiver<Entry>) {
        loop {
            let (waits, again) = (!self.unrecorded.is_empty(), self.again);
            tokio::select! {
                entry = changes.recv() => match entry {
                    Some(Entry::Change(event)) => {
                        if let Err(error) = self.record(*event).await {
                            tracing::error!(%error, "a change of state is not recorded");
                        }
                    }
                    Some(Entry::End(end)) => {
                        self.unrecorded.push_back(*end);
                        // With others before it, it waits with them.
                        if !waits {
                            self.record_ends().await;
                        }
                    }
                    // Nobody need be told who waits no longer.
                    Some(Entry::Waiting(reply)) => drop(reply.send(())),
                    None => return,
                },
                () = tokio::time::sleep_until(again), if waits => self.record_ends().await,
            }
        }
    }

    /// What is reported does not depend on what is kept of the machine.
    async fn record(&self, mut event: Event) -> Result<(), StoreError> {
        let kept = match &mut event {
            Event::Machine(machine) => {
                let kept = self.store.save_machine(machine).await;
                listing::withhold(machine);
                kept
            }
            _ => Ok(()),
        };
        self.reporter.record(event).await.and(kept)
    }

    /// Records the ends that are not yet, as far as the database takes them.
    async fn record_ends(&mut self) {
        while let Some(End { machine, leftovers }) = self.unrecorded.pop_front() {
            if let Err(error) = self.record_end(&machine).await {
                tracing::error!(%error, machine = machine.name, "the end of a machine is not recorded yet");
                self.unrecorded.push_front(End { machine, leftovers });
                self.again = Instant::now() + AGAIN;
                return;
            }
            if let Some(leftovers) = leftovers {
                leftovers.remove().await;
            }
        }
    }

    /// It is reported before anything of the machine is forgotten. Where the agent ends in between, the next one tells it again,
    /// under the same id.
    async fn record_end(&self, machine: &v1::Machine) -> Result<(), StoreError> {
        let mut reported = machine.clone();
        listing::withhold(&mut reported);
        self.reporter.try_record(Event::Machine(reported)).await?;
        self.store.remove_machine(machine.name.clone()).await
    }
}

// === impl Recorder ===

impl Recorder {
    pub(super) fn machine(&self, machine: v1::Machine) {
        self.send(Entry::Change(Box::new(Event::Machine(machine))));
    }

    /// A machine has ended. Once that is recorded, what it left is removed.
    pub(super) fn machine_ended(&self, machine: v1::Machine, leftovers: Option<Leftovers>) {
        self.send(Entry::End(Box::new(End { machine, leftovers })));
    }

    pub(super) fn container(&self, container: v1::Container) {
        self.send(Entry::Change(Box::new(Event::Container(container))));
    }

    /// Answers once all that came before is recorded; a full queue answers by closing `reply`.
    pub(super) fn answer_when_recorded(&self, reply: oneshot::Sender<()>) {
        let _ = self.to.try_send(Entry::Waiting(reply));
    }

    fn send(&self, entry: Entry) {
        let Err(error) = self.to.try_send(entry) else {
            return;
        };
        tracing::error!(%error, "a change of state is not recorded");
        match error.into_inner() {
            Entry::Change(event) => self.reporter.lost(&event),
            // What it left stays, and so the next start tells it.
            Entry::End(_) | Entry::Waiting(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tokio_util::sync::CancellationToken;
    use ulid::Ulid;

    use super::*;
    use crate::address::Address;
    use crate::config;

    #[test]
    fn a_machine_that_is_gone_was_lost_with_its_host_or_removed() {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        assert!(lost_because(at(99), Some(100)).contains("the host has been restarted"));
        for (created, booted) in [(at(101), Some(100)), (None, Some(100)), (at(1), None)] {
            assert!(lost_because(created, booted).contains("somebody else removed"));
        }
        let booted = host_boot_time().unwrap();
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs() as i64;
        assert!((1..=now).contains(&booted), "{booted}");
    }

    /// A database, and who reports from it to a controller that is not there.
    fn reporting(dir: &Path) -> (Store, Reporter, Essential) {
        let store = Store::open(dir).unwrap();
        let nobody = Some(Address::Unix(dir.join("controller.sock")));
        let essential = Essential::default();
        let (config, stop) = (config::Controller::default(), CancellationToken::new());
        let reporter = Reporter::start(store.clone(), nobody, &config, &essential, stop);
        (store, reporter, essential)
    }

    #[tokio::test]
    async fn an_end_that_can_not_be_recorded_is_tried_again() {
        let dir = tempfile::tempdir().unwrap();
        let (store, reporter, essential) = reporting(dir.path());
        let id = Ulid::generate();
        let mut machine = v1::Machine {
            name: listing::machine_name(MachineId(id)),
            ..Default::default()
        };
        let nobody = super::super::tests::InProcess::default();
        let (recorder, gone) = start(store.clone(), reporter, &BTreeMap::new(), &nobody, &essential)
            .await
            .unwrap();
        assert!(gone.is_empty());
        store.save_machine(&machine).await.unwrap();
        let other = rusqlite::Connection::open(dir.path().join("state.db")).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        machine.set_state(v1::machine::State::Ended);
        recorder.machine_ended(machine.clone(), None);
        let (reply, tried) = oneshot::channel();
        recorder.answer_when_recorded(reply);
        tried.await.unwrap();
        assert_eq!(
            store.machines().await.unwrap().len(),
            1,
            "nothing of it is forgotten yet"
        );
        other.execute_batch("ROLLBACK").unwrap();
        while !store.machines().await.unwrap().is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let reports = store.reports_after(0, 10, 1 << 20).await.unwrap();
        let told: Vec<_> = reports.iter().map(|report| report.id.clone()).collect();
        assert_eq!(told, [id.to_string()], "once, and nothing was dropped");
    }

    #[tokio::test]
    async fn what_is_kept_for_the_next_agent_is_not_reported() {
        let dir = tempfile::tempdir().unwrap();
        let (store, reporter, essential) = reporting(dir.path());
        let machine = v1::Machine {
            name: listing::machine_name(MachineId(Ulid::generate())),
            launched: Some(v1::Launched {
                request_sha256: "77".into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let launcher = super::super::tests::InProcess::default();
        let found = BTreeMap::new();
        let started = async || {
            let starting = start(store.clone(), reporter.clone(), &found, &launcher, &essential);
            starting.await.unwrap()
        };
        let (recorder, _) = started().await;
        recorder.machine(machine.clone());
        let (reply, recorded) = oneshot::channel();
        recorder.answer_when_recorded(reply);
        recorded.await.unwrap();
        assert_eq!(store.machines().await.unwrap(), [machine]);
        // The next one does not find it.
        let (_, gone) = started().await;
        assert_eq!(gone[0].launched.as_ref().unwrap().request_sha256, "77");
        let reports = store.reports_after(0, 10, 1 << 20).await.unwrap();
        assert_eq!(reports.len(), 2);
        for report in reports {
            let Some(Event::Machine(machine)) = report.event else {
                panic!("{report:?}");
            };
            assert_eq!(machine.launched.unwrap().request_sha256, "");
        }
    }
}
