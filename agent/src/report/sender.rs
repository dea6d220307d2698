//! The task that sends reports to the controller.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stoker_proto::v1;
use stoker_proto::v1::controller_client::ControllerClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::{Backoff, Queue};
use crate::address::Address;
use crate::error_chain;
use crate::store::StoreError;

/// The most events in one message.
const BATCH_EVENTS: usize = 256;

/// The most bytes of events in one message; well below gRPC's usual limit of 4 MiB.
const BATCH_BYTES: usize = 1 << 20;

/// How many messages wait for the connection; the rest waits on disk.
const QUEUE: usize = 2;

/// Why a stream to the controller ended.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("can't connect: {}", error_chain::innermost(.0))]
    Connect(#[from] tonic::transport::Error),
    #[error("it answered {}: {}", .0.code(), .0.message())]
    Refused(#[from] Box<tonic::Status>),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("it ended the stream")]
    Ended,
}

pub(super) async fn run(queue: Arc<Queue>, address: Address) {
    let mut backoff = Backoff::default();
    loop {
        let before = *queue.acknowledged.borrow();
        let error = match address.connect().await {
            Ok(channel) => {
                tracing::info!(controller = %address, "reporting");
                session(&queue, channel).await
            }
            Err(error) => error.into(),
        };
        if *queue.acknowledged.borrow() > before {
            backoff.succeeded();
        }
        let pause = backoff.failed(RandomState::new().build_hasher().finish());
        tracing::warn!(controller = %address, %error, ?pause, "not reporting; reports are kept and sent later");
        tokio::time::sleep(pause).await;
    }
}

/// Sends reports over one stream until it ends, and says why it did.
async fn session(queue: &Queue, channel: Channel) -> SessionError {
    let (requests, outgoing) = mpsc::channel(QUEUE);
    let sent = AtomicU64::new(0);
    let feed = feed(queue, &sent, requests);
    let listen = listen(queue, &sent, channel, ReceiverStream::new(outgoing));
    tokio::select! {
        error = feed => error,
        error = listen => error,
    }
}

async fn feed(queue: &Queue, sent: &AtomicU64, requests: mpsc::Sender<v1::ReportRequest>) -> SessionError {
    let mut newest = queue.newest.subscribe();
    loop {
        newest.mark_unchanged();
        let last = sent.load(Ordering::Relaxed);
        let events = match queue.store.reports_after(last, BATCH_EVENTS, BATCH_BYTES).await {
            Ok(events) => events,
            Err(error) => return error.into(),
        };
        let Some(last) = events.last().map(|event| event.sequence) else {
            if newest.changed().await.is_err() {
                return SessionError::Ended;
            }
            continue;
        };
        sent.store(last, Ordering::Relaxed);
        let request = v1::ReportRequest {
            host: queue.store.host().to_string(),
            events,
        };
        if requests.send(request).await.is_err() {
            return SessionError::Ended;
        }
    }
}

async fn listen(
    queue: &Queue,
    sent: &AtomicU64,
    channel: Channel,
    outgoing: ReceiverStream<v1::ReportRequest>,
) -> SessionError {
    let mut client = ControllerClient::new(channel);
    let mut answers = match client.report(outgoing).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => return Box::new(status).into(),
    };
    loop {
        match answers.message().await {
            // A controller can't acknowledge what it was not sent.
            Ok(Some(answer)) => {
                let sequence = answer.acknowledged_sequence.min(sent.load(Ordering::Relaxed));
                if let Err(error) = queue.store.acknowledge_reports(sequence).await {
                    return error.into();
                }
                queue
                    .acknowledged
                    .send_modify(|acknowledged| *acknowledged = sequence.max(*acknowledged));
            }
            Ok(None) => return SessionError::Ended,
            Err(status) => return Box::new(status).into(),
        }
    }
}
