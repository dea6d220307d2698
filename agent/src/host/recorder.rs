//! Passes changes of state on, in their order: to the store, so that a later start knows what was there, and to the
//! controller. The loop never waits for a disk.

use std::collections::{BTreeMap, BTreeSet};

use stoker_policy::MachineId;
use stoker_proto::v1;
use stoker_proto::v1::event::Event;
use stoker_proto::v1::machine_end::Reason;
use tokio::sync::{mpsc, oneshot};

use super::listing;
use crate::machines::Record;
use crate::report::Reporter;
use crate::store::{Store, StoreError};
use crate::tasks::{Essential, Task};

/// How many changes may wait for the disk. More are lost, and that is logged and counted.
const WAITING: usize = 16 * 1024;

/// Takes changes of state.
#[derive(Clone, Debug)]
pub(super) struct Recorder {
    to: mpsc::Sender<Entry>,
    reporter: Reporter,
}

#[derive(Debug)]
enum Entry {
    Change(Box<Event>),
    /// Somebody who waits until all before it is recorded.
    Waiting(oneshot::Sender<()>),
}

/// Reports the end of machines that an earlier agent left and that were not `found` by this one, and starts the task.
pub(super) async fn start(
    store: Store,
    reporter: Reporter,
    found: &BTreeMap<MachineId, Record>,
    essential: &Essential,
) -> Result<Recorder, StoreError> {
    let found: BTreeSet<_> = found.keys().map(|id| listing::machine_name(*id)).collect();
    for mut machine in store.machines().await? {
        if found.contains(&machine.name) {
            continue;
        }
        machine.state = v1::machine::State::Ended.into();
        machine.pid = 0;
        machine.end = Some(v1::MachineEnd {
            reason: Reason::Killed.into(),
            detail: "it was gone when the agent started".into(),
            console_tail: String::new(),
        });
        // Where the disk is full, say, the agent starts all the same.
        if let Err(error) = record(&store, &reporter, Event::Machine(machine)).await {
            tracing::error!(%error, "the end of a machine is not recorded");
        }
    }
    let (to, mut changes) = mpsc::channel(WAITING);
    let recorder = Recorder {
        to,
        reporter: reporter.clone(),
    };
    essential.spawn(Task::Recorder, async move {
        while let Some(entry) = changes.recv().await {
            match entry {
                Entry::Change(event) => {
                    if let Err(error) = record(&store, &reporter, *event).await {
                        tracing::error!(%error, "a change of state is not recorded");
                    }
                }
                // Nobody need be told who waits no longer.
                Entry::Waiting(reply) => drop(reply.send(())),
            }
        }
    });
    Ok(recorder)
}

/// What is reported does not depend on what is kept of the machine.
async fn record(store: &Store, reporter: &Reporter, event: Event) -> Result<(), StoreError> {
    let kept = match &event {
        Event::Machine(machine) if machine.state() == v1::machine::State::Ended => {
            store.remove_machine(machine.name.clone()).await
        }
        Event::Machine(machine) => store.save_machine(machine).await,
        _ => Ok(()),
    };
    reporter.record(event).await.and(kept)
}

// === impl Recorder ===

impl Recorder {
    pub(super) fn machine(&self, machine: v1::Machine) {
        self.send(Event::Machine(machine));
    }

    pub(super) fn container(&self, container: v1::Container) {
        self.send(Event::Container(container));
    }

    /// Answers once all that came before is recorded; a full queue answers by closing `reply`.
    pub(super) fn answer_when_recorded(&self, reply: oneshot::Sender<()>) {
        let _ = self.to.try_send(Entry::Waiting(reply));
    }

    fn send(&self, event: Event) {
        let Err(error) = self.to.try_send(Entry::Change(Box::new(event))) else {
            return;
        };
        tracing::error!(%error, "a change of state is not recorded");
        if let Entry::Change(event) = error.into_inner() {
            self.reporter.lost(&event);
        }
    }
}
