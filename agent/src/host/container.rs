//! Makes and ends containers, one short-lived task each, and listens to what guests say of them. What can be waited for is
//! waited for here, so that the loop never waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_policy::{ContainerId, MachineId};
use stoker_proto::guest as proto;
use tokio::sync::{mpsc, oneshot};

use super::message::Message;
use crate::code::{CodeError, CodeStore};
use crate::function_logs::{self, Logs, Sources};
use crate::machines::{Guest, GuestError, RecordFile, ScratchDrive, Stop, Stopper};

/// The shortest time between two messages about use that are taken from one guest.
pub(super) const WATCH_GAP: Duration = Duration::from_millis(50);

/// What tasks of machines and containers work with.
pub(super) struct Shared {
    pub(super) launcher: Arc<dyn super::Launcher>,
    pub(super) code: CodeStore,
    pub(super) logs: Logs,
    pub(super) find: super::Find,
    pub(super) init_timeout: Duration,
    pub(super) watch_interval: Duration,
}

/// A guest and what ends its machine, for calls on it.
#[derive(Clone, Debug)]
pub(super) struct Handle {
    pub(super) guest: Guest,
    pub(super) stopper: Stopper,
}

/// What came of making a container.
#[derive(Debug)]
pub(super) struct Made {
    pub(super) result: Result<(), NotMade>,
    pub(super) costs: Costs,
    /// What its init used, where its guest says so.
    pub(super) execution: Option<proto::Execution>,
}

impl Made {
    /// It was not even begun.
    pub(super) fn not(why: String) -> Self {
        Self {
            result: Err(NotMade::Setup(why)),
            costs: Costs::default(),
            execution: None,
        }
    }
}

/// What making a container took.
#[derive(Debug, Default)]
pub(super) struct Costs {
    /// Bringing the code into the machine.
    pub(super) code: Duration,
    /// Making the container and initialising its function.
    pub(super) init: Duration,
    /// What the function printed meanwhile.
    pub(super) log: proto::Log,
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

/// Brings code and layers into the machine and makes a container of them, once the machine's record has it and its account, and
/// the machine's drive holds what the request says. Where the guest has dropped one of them since it was brought, as it may for another, that is done again, once for each.
/// Nothing where the guest can't be relied on.
pub(super) async fn create(
    shared: &Shared,
    record: &RecordFile,
    drive: &ScratchDrive,
    handle: Handle,
    request: proto::CreateContainerRequest,
) -> Option<Made> {
    if let Err(error) = record.save().await {
        let why = format!("its machine's record can't be written: {error}");
        return Some(Made::not(why));
    }
    let began = Instant::now();
    if let Err(error) = drive.hold(request.drive_mib).await {
        return Some(Made::not(error.to_string()));
    }
    let mut bringing = Duration::ZERO;
    let codes = || std::iter::once(&request.code_sha256).chain(&request.layers_sha256);
    let mut again = codes().count();
    let made = loop {
        let putting = Instant::now();
        let put = bring(shared, &handle.guest, codes(), request.drive_mib).await;
        bringing += putting.elapsed();
        if let Err(error) = put {
            break Err(error);
        }
        let made = handle
            .guest
            .create_container(request.clone(), shared.init_timeout)
            .await;
        match made {
            Err(error) if again > 0 && error.is_precondition() => {
                again -= 1;
                codes().for_each(|sha256| handle.guest.forget_code(sha256));
            }
            made => break made,
        }
    };
    let init = began.elapsed().saturating_sub(bringing);
    let mut execution = None;
    let (result, log) = match made {
        Ok(response) => {
            execution = response.execution;
            let result = match response.error {
                None => Ok(()),
                Some(error) => Err(match error.kind() {
                    proto::function_error::Kind::Setup => NotMade::Setup(error.message),
                    _ => NotMade::Function(error),
                }),
            };
            (result, response.log)
        }
        Err(GuestError::Code(error)) => (Err(NotMade::Code(error)), None),
        Err(error @ GuestError::Refused { .. }) => (Err(NotMade::Setup(error.to_string())), None),
        Err(error) => {
            handle.broken(&error);
            return None;
        }
    };
    let costs = Costs {
        code: bringing,
        init,
        log: log.unwrap_or_default(),
    };
    Some(Made {
        result,
        costs,
        execution,
    })
}

/// Brings each of these zips into a guest whose drive has so much.
async fn bring(
    shared: &Shared,
    guest: &Guest,
    codes: impl Iterator<Item = &String>,
    drive_mib: u32,
) -> Result<(), GuestError> {
    for sha256 in codes {
        guest.put_code(&shared.code, sha256, drive_mib).await?;
    }
    Ok(())
}

/// Ends a container.
pub(super) async fn stop(handle: Handle, container: ContainerId, inbox: mpsc::Sender<Message>) {
    match handle.guest.stop_container(container.to_string()).await {
        Ok(()) => drop(inbox.send(Message::ContainerStopped { container }).await),
        Err(error) => handle.broken(&error),
    }
}

/// Ends what a guest has that nobody asked it for.
pub(super) async fn stop_unknown(handle: Handle, id: ContainerId) {
    if let Err(error) = handle.guest.stop_container(id.to_string()).await {
        handle.broken(&error);
    }
}

/// Passes on what a guest says about its containers until its machine ends.
pub(super) async fn watch(handle: Handle, machine: MachineId, interval: Duration, inbox: mpsc::Sender<Message>) {
    let watched = async {
        let mut stream = handle.guest.watch(interval).await?;
        loop {
            let said = stream.message().await?;
            let (taken, heard) = oneshot::channel();
            let message = Message::Said {
                machine,
                said,
                counted: None,
                taken,
            };
            if inbox.send(message).await.is_err() {
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

/// Keeps what the containers of a machine write until it ends.
pub(super) async fn follow_logs(handle: Handle, sources: Sources, shared: Arc<Shared>) {
    if let Err(error) = function_logs::follow(&handle.guest, &sources, &shared.logs).await {
        handle.broken(&error);
    }
}

// === impl Handle ===

impl Handle {
    /// A guest that can't be relied on takes its machine with it; whoever waits for it hears of that end.
    pub(super) fn broken(&self, error: &GuestError) {
        self.stopper.stop(Stop::Broken(error.to_string()));
    }
}
