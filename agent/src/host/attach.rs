//! Invocations that an earlier agent began: their callers have gone with it, but may ask again.

use stoker_policy::{Completion, ContainerId, MachineId, RequestId};
use stoker_proto::guest as proto;
use stoker_proto::limits::TIMEOUT;
use stoker_proto::v1;
use tokio::sync::mpsc;

use super::answers::{NoAnswer, Ticket};
use super::call::{ended, new_id, response, uuid};
use super::container::Handle;
use super::listing;
use super::message::Message;
use crate::machines::GuestError;

/// Waits for one that runs in a container, and keeps its answer where its caller gave its id.
pub(super) async fn running(
    handle: Handle,
    machine: MachineId,
    container: ContainerId,
    request: RequestId,
    name: String,
    ticket: Option<Ticket>,
    inbox: mpsc::Sender<Message>,
) {
    let answer = handle.guest.invoke(asked(name, request), TIMEOUT).await;
    let over = match &answer {
        Ok(answer) => Some(ended(answer)),
        // It was over before it was asked for.
        Err(GuestError::NotBegun { .. }) => Some((Completion::Answered, None)),
        Err(error) => {
            handle.broken(error);
            None
        }
    };
    // First: who has the answer finds the container idle.
    if let Some((completion, detail)) = over {
        let message = Message::Completed {
            container,
            request,
            completion,
            detail,
            again: None,
            // How long it has run nobody here knows.
            executed: None,
        };
        // Without a loop nobody needs to know.
        let _ = inbox.send(message).await;
    }
    if let Some(ticket) = ticket {
        let place = listing::container_name(machine, container);
        settle(ticket, machine, place, answer).await;
    }
}

/// Asks for the answer of one that was to run in a machine, and may be over or never have reached it.
pub(super) async fn kept(handle: Handle, machine: MachineId, ticket: Ticket) {
    let name = ticket.name().to_owned();
    let answer = handle.guest.invoke(asked(name, new_id()), TIMEOUT).await;
    if let Err(error) = &answer
        && !matches!(error, GuestError::NotBegun { .. })
    {
        handle.broken(error);
    }
    settle(ticket, machine, String::new(), answer).await;
}

fn asked(name: String, request: RequestId) -> proto::InvokeRequest {
    proto::InvokeRequest {
        request_id: uuid(request),
        timeout: TIMEOUT.try_into().ok(),
        name,
        attach: true,
        ..Default::default()
    }
}

async fn settle(
    ticket: Ticket,
    machine: MachineId,
    container: String,
    answer: Result<proto::InvokeResponse, GuestError>,
) {
    match answer {
        Ok(answer) if answer.partial => ticket.over(Err(NoAnswer::Streamed)).await,
        Ok(answer) => {
            let request_id = ticket.name().rsplit_once('/').map_or("", |(_, id)| id).to_owned();
            let answer = response(request_id, answer, proto::Log::default());
            let placement = v1::Placement {
                machine: listing::machine_name(machine),
                container,
                ..Default::default()
            };
            let placement = Some(placement);
            ticket.over(Ok(v1::InvokeResponse { placement, ..answer })).await;
        }
        Err(GuestError::NotBegun { .. }) => ticket.not_begun().await,
        Err(error) => ticket.over(Err(error.to_string().into())).await,
    }
}
