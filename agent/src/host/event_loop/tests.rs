//! What is decided about a machine that can't be reached any more is answered for, so that the world does not wait for ever.

use std::path::Path;

use stoker_policy::{ContainerState, MachineState};

use super::*;
use crate::host::call::Unfinished;
use crate::host::tests::{Fixture, PATIENCE};

/// A loop that hears only what the test lets it hear.
struct Stepped {
    fixture: Fixture,
    event_loop: EventLoop,
    inbox: mpsc::Receiver<Message>,
}

impl Stepped {
    /// With a machine that is ready.
    async fn start(dir: &Path) -> (Self, MachineId) {
        let (fixture, mut event_loop, inbox) = Fixture::assemble(dir).await;
        event_loop.step(Event::Tick);
        let mut stepped = Self {
            fixture,
            event_loop,
            inbox,
        };
        let ready = |event_loop: &EventLoop| {
            let mut machines = event_loop.host.world().machines();
            let ready = machines.find(|machine| machine.state == MachineState::Warming);
            ready.map(|machine| machine.id)
        };
        let machine = stepped.until(ready).await;
        (stepped, machine)
    }

    /// Hears until there is such a thing.
    async fn until<T>(&mut self, find: impl Fn(&EventLoop) -> Option<T>) -> T {
        loop {
            if let Some(found) = find(&self.event_loop) {
                return found;
            }
            let heard = tokio::time::timeout(PATIENCE, self.inbox.recv()).await;
            let message = heard.expect("it waits for what never comes").unwrap();
            self.event_loop.hear(message);
            self.event_loop.passed();
        }
    }

    /// Makes a call; says in which machine it ran.
    async fn call(&mut self) -> String {
        let calling = self.fixture.calling();
        self.until(|event_loop| (!event_loop.calls.is_empty()).then_some(()))
            .await;
        self.until(|event_loop| event_loop.calls.is_empty().then_some(())).await;
        calling.await.unwrap().unwrap().placement.unwrap().machine
    }

    fn cut_off(&mut self, machine: MachineId) {
        self.event_loop.machines.get_mut(&machine).unwrap().guest = None;
    }
}

#[tokio::test]
async fn a_container_for_a_machine_that_is_out_of_reach_is_made_in_another() {
    let dir = tempfile::tempdir().unwrap();
    let (mut stepped, machine) = Stepped::start(dir.path()).await;
    stepped.cut_off(machine);
    let ran_in = stepped.call().await;
    assert_ne!(ran_in, listing::machine_name(machine));
    let world = stepped.event_loop.host.world();
    assert!(world.containers().all(|container| container.machine != machine));
}

#[tokio::test]
async fn a_request_for_a_machine_that_is_out_of_reach_runs_in_another() {
    let dir = tempfile::tempdir().unwrap();
    let (mut stepped, machine) = Stepped::start(dir.path()).await;
    assert_eq!(stepped.call().await, listing::machine_name(machine));
    stepped.cut_off(machine);
    assert_ne!(stepped.call().await, listing::machine_name(machine));
}

#[tokio::test]
async fn a_container_of_a_machine_that_is_out_of_reach_is_gone_once_it_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let (mut stepped, machine) = Stepped::start(dir.path()).await;
    stepped.call().await;
    let idle = stepped.event_loop.host.world().containers().next().unwrap();
    assert_eq!(idle.state, ContainerState::Idle);
    stepped.cut_off(machine);
    let uid = stepped.fixture.function.uid;
    stepped.event_loop.hear(Message::FunctionDeleted { uid });
    let gone = |event_loop: &EventLoop| event_loop.host.world().containers().next().is_none().then_some(());
    stepped.until(gone).await;
}

#[tokio::test]
async fn a_machine_is_ended_where_a_task_that_works_on_it_panics() {
    let dir = tempfile::tempdir().unwrap();
    let (mut stepped, machine) = Stepped::start(dir.path()).await;
    let handle = stepped.event_loop.handle(machine).unwrap();
    stepped
        .event_loop
        .spawn_on(handle, |_, _, _| async { panic!("as the test wants it") });
    let ended = stepped.until(|event_loop| event_loop.ended.front().cloned()).await;
    assert_eq!(ended.name, listing::machine_name(machine));
    assert_eq!(ended.end.unwrap().detail, PANICKED);
}

#[tokio::test]
async fn a_call_that_panics_ends_its_container_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut stepped, machine) = Stepped::start(dir.path()).await;
    stepped.call().await;
    stepped.fixture.hold(true);
    let calling = stepped.fixture.calling();
    let busy = |event_loop: &EventLoop| {
        let mut containers = event_loop.host.world().containers();
        containers.find_map(|container| match container.state {
            ContainerState::Busy(request) => Some((container.id, request)),
            _ => None,
        })
    };
    let (container, request) = stepped.until(busy).await;
    while stepped.fixture.begun() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let unfinished = Unfinished {
        handle: stepped.event_loop.handle(machine).unwrap(),
        container,
        request,
        inbox: stepped.event_loop.inbox.upgrade().unwrap(),
    };
    tokio::spawn(async move {
        let _unfinished = unfinished;
        panic!("as the test wants it");
    });
    let gone = |event_loop: &EventLoop| event_loop.host.world().container(container).is_none().then_some(());
    stepped.until(gone).await;
    assert_eq!(stepped.fixture.stopped(), [container.to_string()]);
    assert!(stepped.event_loop.host.world().machine(machine).is_some());
    // It was said to be over, so whoever waits for it waits no longer.
    let error = calling.await.unwrap().unwrap_err();
    assert!(matches!(error, InvokeError::MachineLost { .. }), "{error}");
}
