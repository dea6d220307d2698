//! Starts the program of a machine's image.

use std::time::Duration;

use stoker_policy::MachineId;
use stoker_proto::guest as proto;
use tokio::sync::{mpsc, oneshot};

use super::Order;
use crate::host::container::Handle;
use crate::host::message::Message;
use crate::machines::{GuestError, Program, Stop};

/// How long a program waits for the memory that its machine is launched with. What sizes itself by what it finds at its start is to find
/// all of it; a guest that does not take it starts with what it has.
const FOR_MEMORY: Duration = Duration::from_secs(10);

/// Starts it once `sized` says that the guest has what it was launched with. The machine ends where it can't be started.
pub(in crate::host) async fn run(
    handle: Handle,
    machine: MachineId,
    program: Program,
    sized: oneshot::Receiver<()>,
    inbox: mpsc::Sender<Message>,
) {
    if tokio::time::timeout(FOR_MEMORY, sized).await.is_err() {
        tracing::warn!(%machine, "a guest has not taken the memory that it was launched with; its program is started all the same");
    }
    let failed = |why| handle.stopper.stop(Stop::ProgramFailed(why));
    match handle.guest.run_image(request(machine, program)).await {
        Ok(proto::RunImageResponse { error: Some(error) }) => failed(words(&error)),
        Ok(proto::RunImageResponse { error: None }) => runs(machine, &inbox).await,
        // An earlier agent did, and died before it heard so.
        Err(error) if error.is_done_already() => runs(machine, &inbox).await,
        Err(error @ GuestError::Refused { .. }) => failed(error.to_string()),
        Err(error) => handle.broken(&error),
    }
}

async fn runs(machine: MachineId, inbox: &mpsc::Sender<Message>) {
    // Without a loop nobody needs to know.
    let _ = inbox.send(Message::Launched(Order::Runs { machine })).await;
}

fn request(machine: MachineId, program: Program) -> proto::RunImageRequest {
    let Program {
        command,
        environment,
        working_dir,
        user,
        stop_signal: _,
    } = program;
    proto::RunImageRequest {
        // A machine has one such container.
        id: machine.to_string(),
        command,
        environment,
        working_dir,
        uid: user.uid,
        gid: user.gid,
        groups: user.groups,
        home: user.home,
        hostname: machine.to_string().to_lowercase(),
    }
}

/// What went wrong with a program, as its guest says it.
pub(in crate::host) fn words(error: &proto::FunctionError) -> String {
    match (error.r#type.as_str(), error.message.as_str()) {
        (kind, "") => kind.to_owned(),
        ("", message) => message.to_owned(),
        (kind, message) => format!("{kind}: {message}"),
    }
}
