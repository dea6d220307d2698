//! What a function streams, on its way from its guest to its caller.

use stoker_proto::v1;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use tokio::sync::mpsc;

use crate::machines::{Guest, Incoming, Parts};

/// What one call streams.
#[derive(Debug)]
pub(super) struct Streamed {
    parts: Parts,
    caller: mpsc::Sender<Event>,
    request_id: String,
}

// === impl Streamed ===

impl Streamed {
    /// Of a call of a guest.
    pub(super) fn new(guest: &Guest, caller: mpsc::Sender<Event>, request_id: String) -> Self {
        Self {
            parts: guest.parts(),
            caller,
            request_id,
        }
    }

    /// Where it comes in.
    pub(super) fn incoming(&self) -> Incoming {
        self.parts.incoming()
    }

    /// Passes it on, behind a head, until the call is over; what its caller does not take any more is thrown away.
    pub(super) async fn pass_on(self) {
        let Self {
            mut parts,
            caller,
            request_id,
        } = self;
        let mut head = Some(v1::InvokeHead { request_id });
        while let Some(bytes) = parts.next().await {
            if let Some(head) = head.take() {
                let _ = caller.send(Event::Head(head)).await;
            }
            let _ = caller.send(Event::Chunk(bytes)).await;
        }
    }
}
