//! A small controller: takes the reports of agents, hands them on, and acknowledges what was taken.

mod lines;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use stoker_proto::v1;
use stoker_proto::v1::controller_server;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

pub use lines::line;

/// How many acknowledgements wait for a connection.
const ANSWERS: usize = 4;

/// Reports that came in one message, without those that were taken before.
#[derive(Debug)]
pub struct Batch {
    /// The agent's host id.
    pub host: String,
    /// In the order of their sequence.
    pub events: Vec<v1::Event>,
    /// To be called once they are safe: they are acknowledged then.
    pub taken: oneshot::Sender<()>,
}

/// Serves `stoker.v1.Controller`; batches go to a queue.
#[derive(Debug, Clone)]
pub struct Controller {
    batches: mpsc::Sender<Batch>,
    /// By host, the newest sequence that was taken: an agent sends again what it did not hear an answer to.
    newest: Arc<Mutex<HashMap<String, u64>>>,
}

// === impl Controller ===

impl Controller {
    /// A controller whose batches come out of `batches`' other end.
    pub fn new(batches: mpsc::Sender<Batch>) -> Self {
        Self {
            batches,
            newest: Arc::default(),
        }
    }

    /// Hands on what is new in a message and answers with the sequence that is safe then.
    async fn take(&self, request: v1::ReportRequest) -> Result<u64, Status> {
        let v1::ReportRequest { host, mut events } = request;
        let last = events.last().map_or(0, |event| event.sequence);
        let known = self.newest().get(&host).copied().unwrap_or(0);
        events.retain(|event| event.sequence > known);
        if !events.is_empty() {
            let (taken, safe) = oneshot::channel();
            let batch = Batch {
                host: host.clone(),
                events,
                taken,
            };
            let gone = || Status::unavailable("the controller is shutting down");
            self.batches.send(batch).await.map_err(|_| gone())?;
            safe.await.map_err(|_| gone())?;
        }
        let mut newest = self.newest();
        let newest = newest.entry(host).or_default();
        *newest = last.max(*newest);
        Ok(*newest)
    }

    fn newest(&self) -> std::sync::MutexGuard<'_, HashMap<String, u64>> {
        // Every write leaves the map whole.
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[tonic::async_trait]
impl controller_server::Controller for Controller {
    type ReportStream = ReceiverStream<Result<v1::ReportResponse, Status>>;

    async fn report(
        &self,
        request: Request<Streaming<v1::ReportRequest>>,
    ) -> Result<Response<Self::ReportStream>, Status> {
        let mut reports = request.into_inner();
        let (answers, stream) = mpsc::channel(ANSWERS);
        let controller = self.clone();
        tokio::spawn(async move {
            loop {
                let answer = match reports.message().await {
                    Ok(Some(report)) => controller.take(report).await,
                    // The agent left.
                    Ok(None) | Err(_) => return,
                };
                let answer = answer.map(|acknowledged_sequence| v1::ReportResponse { acknowledged_sequence });
                let last = answer.is_err();
                if answers.send(answer).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}
