//! Reports to a real controller over a Unix socket: kept until acknowledged, over the absence of either side.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::*;
use stoker_agent::address::Address;
use stoker_agent::api::listen;
use stoker_agent::config;
use stoker_agent::controller::{Batch, Controller};
use stoker_agent::report::Reporter;
use stoker_agent::store::Store;
use stoker_agent::tasks::Essential;
use stoker_proto::v1::controller_server::ControllerServer;
use stoker_proto::v1::{self, event::Event};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

/// A controller that remembers what it took; where `deaf`, it takes nothing and so acknowledges nothing.
struct Hears {
    taken: Arc<Mutex<Vec<(String, v1::Event)>>>,
    offered: Arc<Mutex<usize>>,
    serving: JoinHandle<()>,
    taking: JoinHandle<()>,
}

impl Hears {
    async fn start(socket: &Path, deaf: bool) -> Self {
        let (batches, mut queue) = mpsc::channel::<Batch>(4);
        let (taken, offered) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(0)));
        let (heard, count) = (taken.clone(), offered.clone());
        let taking = tokio::spawn(async move {
            let mut held = Vec::new();
            while let Some(batch) = queue.recv().await {
                *count.lock().unwrap() += batch.events.len();
                if deaf {
                    held.push(batch);
                    continue;
                }
                for event in batch.events {
                    heard.lock().unwrap().push((batch.host.clone(), event));
                }
                let _ = batch.taken.send(());
            }
        });
        let (listener, file) = listen::unix(socket).await.unwrap();
        let serving = tokio::spawn(async move {
            let _file = file;
            tonic::transport::Server::builder()
                .add_service(ControllerServer::new(Controller::new(batches)))
                .serve_with_incoming(UnixListenerStream::new(listener))
                .await
                .unwrap();
        });
        Self {
            taken,
            offered,
            serving,
            taking,
        }
    }

    fn sequences(&self) -> Vec<u64> {
        self.taken.lock().unwrap().iter().map(|(_, e)| e.sequence).collect()
    }

    async fn stop(self) {
        self.serving.abort();
        self.taking.abort();
        let _ = (self.serving.await, self.taking.await);
    }
}

struct Setup {
    dir: tempfile::TempDir,
}

impl Setup {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("controller.sock")
    }

    /// An agent's store and reporter; it stops reporting when the guard is dropped.
    fn agent(&self) -> (Store, Reporter, tokio_util::sync::DropGuard) {
        let store = Store::open(&self.dir.path().join("state")).unwrap();
        let stop = CancellationToken::new();
        let reporter = Reporter::start(
            store.clone(),
            Some(Address::Unix(self.socket())),
            &config::Controller::default(),
            &Essential::default(),
            stop.clone(),
        );
        (store, reporter, stop.drop_guard())
    }
}

fn machine(name: &str) -> Event {
    Event::Machine(v1::Machine {
        name: name.into(),
        ..Default::default()
    })
}

#[tokio::test]
async fn events_wait_for_the_controller_and_come_in_order() {
    let setup = Setup::new();
    let (store, reporter, _stop) = setup.agent();
    for n in 0..600 {
        reporter.record(machine(&format!("machines/{n}"))).await.unwrap();
    }
    assert_eq!(store.reports_waiting().await.unwrap().0, 600);
    let controller = Hears::start(&setup.socket(), false).await;
    assert!(reporter.flush(PATIENCE).await);
    assert_eq!(controller.sequences(), (1..=600).collect::<Vec<_>>());
    assert_eq!(store.reports_waiting().await.unwrap(), (0, 0));
    let hosts: Vec<String> = controller
        .taken
        .lock()
        .unwrap()
        .iter()
        .map(|(h, _)| h.clone())
        .collect();
    assert!(hosts.iter().all(|host| *host == store.host().to_string()));
    // Later ones come at once.
    reporter.record(Event::Use(v1::UseSamples::default())).await.unwrap();
    assert!(reporter.flush(PATIENCE).await);
    assert_eq!(controller.sequences().last(), Some(&601));
    controller.stop().await;
}

#[tokio::test]
async fn what_is_not_acknowledged_is_sent_again() {
    let setup = Setup::new();
    let (store, reporter, _stop) = setup.agent();
    let deaf = Hears::start(&setup.socket(), true).await;
    for n in 0..10 {
        reporter.record(machine(&n.to_string())).await.unwrap();
    }
    let offered = deaf.offered.clone();
    eventually("the events to be sent", || *offered.lock().unwrap() > 0).await;
    assert!(!reporter.flush(Duration::from_millis(50)).await);
    assert_eq!(store.reports_waiting().await.unwrap().0, 10);
    deaf.stop().await;
    let controller = Hears::start(&setup.socket(), false).await;
    assert!(reporter.flush(PATIENCE).await);
    assert_eq!(controller.sequences(), (1..=10).collect::<Vec<_>>());
    // And once more over a restart of the controller.
    controller.stop().await;
    reporter.record(machine("while away")).await.unwrap();
    let controller = Hears::start(&setup.socket(), false).await;
    assert!(reporter.flush(PATIENCE).await);
    assert_eq!(controller.sequences(), [11]);
    controller.stop().await;
}

#[tokio::test]
async fn nothing_is_lost_over_a_restart_of_the_agent() {
    let setup = Setup::new();
    {
        let (_store, reporter, _stop) = setup.agent();
        reporter.record(machine("a")).await.unwrap();
        reporter.record(machine("b")).await.unwrap();
    }
    let controller = Hears::start(&setup.socket(), false).await;
    let (store, reporter, _stop) = setup.agent();
    reporter.record(machine("c")).await.unwrap();
    assert!(reporter.flush(PATIENCE).await);
    assert_eq!(controller.sequences(), [1, 2, 3]);
    assert_eq!(store.reports_waiting().await.unwrap().0, 0);
    controller.stop().await;
}

/// A stream that is broken while events flow loses none and, beyond what a controller must bear, repeats none.
#[tokio::test]
async fn a_controller_that_comes_and_goes_hears_everything() {
    let setup = Setup::new();
    let (_store, reporter, _stop) = setup.agent();
    let mut heard = Vec::new();
    for round in 0..4u64 {
        let controller = Hears::start(&setup.socket(), false).await;
        for n in 0..100 {
            reporter.record(machine(&format!("{round}/{n}"))).await.unwrap();
        }
        eventually("some of this round to arrive", || {
            controller.sequences().last().is_some_and(|last| *last > round * 100)
        })
        .await;
        if round == 3 {
            assert!(reporter.flush(PATIENCE).await);
        }
        heard.extend(controller.sequences());
        controller.stop().await;
    }
    heard.sort_unstable();
    heard.dedup();
    assert_eq!(heard, (1..=400).collect::<Vec<_>>());
}

#[tokio::test]
async fn without_a_controller_nothing_is_kept() {
    let setup = Setup::new();
    let store = Store::open(setup.dir.path()).unwrap();
    let reporter = Reporter::start(
        store.clone(),
        None,
        &config::Controller::default(),
        &Essential::default(),
        CancellationToken::new(),
    );
    reporter.record(machine("a")).await.unwrap();
    assert!(reporter.flush(Duration::ZERO).await);
    assert_eq!(store.reports_waiting().await.unwrap().0, 0);
}
