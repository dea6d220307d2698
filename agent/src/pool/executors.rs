//! Carries out what the policy decided, one short-lived task each, and reports back. What can be waited for is waited
//! for here, so that the owning task never waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::{mpsc, oneshot};
use ulid::Ulid;

use super::actor::{ContainerNews, MachineNews, Message};
use crate::code::{CodeError, CodeStore};
use crate::machines::{Guest, GuestError, Machines, Spec, Stop, Stopped, Stopper};
use crate::policy::Shape;
use crate::policy::placement::{ContainerId, MachineId};
use crate::telemetry;

/// The shortest time between two messages about use that are taken from one guest.
const WATCH_GAP: Duration = Duration::from_millis(50);

/// What executors work with.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) machines: Machines,
    pub(super) host: telemetry::Host,
    pub(super) code: CodeStore,
    pub(super) init_timeout: Duration,
    pub(super) watch_interval: Duration,
}

/// Why a container could not be made.
#[derive(Debug)]
pub(super) enum NotMade {
    /// Its function failed at init: an answer.
    Function(proto::FunctionError),
    /// The guest could not make it; perhaps another can.
    Setup(String),
    /// Its code can't be had.
    Code(CodeError),
}

/// A guest and what ends its machine, for calls on it.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) guest: Guest,
    pub(super) stopper: Stopper,
}

/// A machine's whole life.
pub(super) async fn live(
    shared: Arc<Shared>,
    machine: MachineId,
    id: Ulid,
    shape: Shape,
    runtime: Arc<str>,
    mut stopped: Stopped,
    inbox: mpsc::Sender<Message>,
) {
    let tell = async |news| {
        // Without an owning task nobody needs to know.
        let _ = inbox.send(Message::Machine { machine, news }).await;
    };
    let mut counted = None;
    let spawned = shared
        .machines
        .spawn(Spec { id, shape, runtime }, |cgroup| counted = shared.host.add(cgroup))
        .await;
    let end = match spawned {
        Err(error) => v1::MachineEnd {
            reason: v1::machine_end::Reason::VmmError.into(),
            detail: error.to_string(),
            console_tail: String::new(),
        },
        Ok(mut process) => {
            let (pid, cgroup) = (process.pid(), process.cgroup_below_mount());
            tell(MachineNews::Started {
                pid,
                cgroup,
                cgroup_id: counted,
            })
            .await;
            let cause = match process.until_ready(&mut stopped).await {
                Ok(ready) => {
                    let (guest, boot_duration) = (Box::new(ready.guest.clone()), ready.boot_duration);
                    tell(MachineNews::Ready { guest, boot_duration }).await;
                    process.until_ended(ready, &mut stopped).await
                }
                Err(cause) => cause,
            };
            process.clear_away(cause).await
        }
    };
    let usage = counted.and_then(|id| shared.host.remove(id));
    tell(MachineNews::Ended { end, usage }).await;
}

/// Passes on what a guest says about its containers until its machine ends.
pub(super) async fn watch(shared: Arc<Shared>, machine: MachineId, handle: Handle, inbox: mpsc::Sender<Message>) {
    let watched = async {
        let mut stream = handle.guest.watch(shared.watch_interval).await?;
        loop {
            let said = stream.message().await?;
            let (taken, heard) = oneshot::channel();
            if inbox.send(Message::Said { machine, said, taken }).await.is_err() {
                return Ok(());
            }
            // No guest has more than one message in the inbox, however fast it talks.
            if heard.await.is_err() {
                return Ok(());
            }
            // A guest that talks without end is slowed down by flow control.
            tokio::time::sleep(WATCH_GAP).await;
        }
    };
    if let Err(error) = watched.await {
        handle.broken(&error);
    }
}

/// Brings the code into the machine and makes a container for it. Where the guest has dropped the code since it was
/// brought, that is done once more.
pub(super) async fn create(
    shared: Arc<Shared>,
    handle: Handle,
    container: ContainerId,
    request: proto::CreateContainerRequest,
    inbox: mpsc::Sender<Message>,
) {
    let began = Instant::now();
    let mut code = Duration::ZERO;
    let mut again = true;
    let made = loop {
        let putting = Instant::now();
        let put = handle.guest.put_code(&shared.code, &request.code_sha256).await;
        code += putting.elapsed();
        if let Err(error) = put {
            break Err(error);
        }
        let made = handle
            .guest
            .create_container(request.clone(), shared.init_timeout)
            .await;
        match made {
            Err(error) if again && error.is_precondition() => {
                again = false;
                handle.guest.forget_code(&request.code_sha256);
            }
            made => break made,
        }
    };
    let init = began.elapsed().saturating_sub(code);
    let (made, log) = match made {
        Ok(proto::CreateContainerResponse { error: None, log }) => (Ok(()), log),
        Ok(proto::CreateContainerResponse {
            error: Some(error),
            log,
        }) => {
            let made = match error.kind() {
                proto::function_error::Kind::Setup => NotMade::Setup(error.message),
                _ => NotMade::Function(error),
            };
            (Err(made), log)
        }
        Err(error @ GuestError::Broken { .. }) => return handle.broken(&error),
        Err(error @ GuestError::Refused { .. }) => (Err(NotMade::Setup(error.to_string())), None),
        Err(GuestError::Code(error)) => (Err(NotMade::Code(error)), None),
    };
    let news = ContainerNews::Made { made, log, code, init };
    let _ = inbox.send(Message::Container { container, news }).await;
}

/// Runs a request in a container.
pub(super) async fn invoke(
    handle: Handle,
    container: ContainerId,
    request: proto::InvokeRequest,
    timeout: Duration,
    inbox: mpsc::Sender<Message>,
) {
    let answer = match handle.guest.invoke(request, timeout).await {
        Ok(answer) => Ok(answer),
        Err(error @ GuestError::Broken { .. }) => return handle.broken(&error),
        Err(error) => Err(error.to_string()),
    };
    let news = ContainerNews::Answered {
        answer,
        at: Instant::now(),
    };
    let _ = inbox.send(Message::Container { container, news }).await;
}

/// Ends a container.
pub(super) async fn stop(handle: Handle, container: ContainerId, id: Ulid, inbox: mpsc::Sender<Message>) {
    match handle.guest.stop_container(id.to_string()).await {
        Ok(()) => {
            let _ = inbox
                .send(Message::Container {
                    container,
                    news: ContainerNews::Ended(None),
                })
                .await;
        }
        Err(error) => handle.broken(&error),
    }
}

// === impl Handle ===

impl Handle {
    /// A guest that can't be relied on takes its machine with it; whoever waits for it hears of that end.
    fn broken(&self, error: &GuestError) {
        self.stopper.stop(Stop::Broken(error.to_string()));
    }
}
