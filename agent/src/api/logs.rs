//! The `Logs` service.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_proto::v1;
use stoker_proto::v1::logs_server;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::errors::{Violations, busy, internal, invalid, not_found};
use super::invocations::is_request_id;
use crate::catalog::{Catalog, Function};
use crate::function_logs::{Filter, Logs as Kept, Reader};
use crate::names::{FunctionName, NameError};

/// How many may read at a time, each of which holds some blocks of lines.
const READERS: usize = 64;

/// When a caller may try again that was refused because enough read.
const RETRY: Duration = Duration::from_secs(1);

/// The most of the last lines that may be asked for.
const MAX_LAST_LINES: u32 = 100_000;

/// Shows what functions write.
pub struct Logs {
    catalog: Catalog,
    kept: Kept,
    readers: Arc<Semaphore>,
    stop: CancellationToken,
}

// === impl Logs ===

impl Logs {
    /// A service over what is kept of these functions; its streams end when `stop` is cancelled.
    pub fn new(catalog: Catalog, kept: Kept, stop: CancellationToken) -> Self {
        Self {
            catalog,
            kept,
            readers: Arc::new(Semaphore::new(READERS)),
            stop,
        }
    }

    fn check(&self, request: &v1::ReadLogsRequest) -> Result<(Arc<Function>, Filter), Status> {
        let mut violations = Violations::default();
        let name = request.name.parse::<FunctionName>();
        let name = name
            .map_err(|error: NameError| violations.add("name", error.to_string()))
            .ok();
        let since = request.start_time.map(SystemTime::try_from).transpose();
        let since = since.unwrap_or_else(|_| {
            violations.add("start_time", "is not a time");
            None
        });
        let id = request.request_id.as_str();
        if !is_request_id(id) {
            violations.add("request_id", "is not an invocation's id");
        }
        if request.last_lines > MAX_LAST_LINES {
            violations.add("last_lines", format!("must be at most {MAX_LAST_LINES}"));
        }
        violations.check()?;
        let name = name.ok_or_else(|| invalid("name", "is missing"))?;
        let function = self
            .catalog
            .get(&name)
            .ok_or_else(|| not_found("function", &request.name))?;
        let filter = Filter {
            since,
            request_id: Some(id.to_owned()).filter(|id| !id.is_empty()),
            last: usize::try_from(request.last_lines).ok().filter(|lines| *lines > 0),
        };
        Ok((function, filter))
    }
}

#[tonic::async_trait]
impl logs_server::Logs for Logs {
    type ReadLogsStream = ReceiverStream<Result<v1::ReadLogsResponse, Status>>;

    async fn read_logs(&self, request: Request<v1::ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let (function, filter) = self.check(&request)?;
        let place = self.readers.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("{READERS} callers read logs of functions already; try again when one of them is done");
            busy("host", message, RETRY)
        })?;
        let reader = self.kept.reader(&function, filter).await;
        let reader = reader.ok_or_else(|| not_found("function", &request.name))?;
        // One block may wait: a caller that reads slowly keeps no more in memory.
        let (lines, stream) = mpsc::channel(1);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = send(reader, request, &lines) => {}
                () = lines.closed() => {}
                () = stop.cancelled() => {}
            }
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Sends what is there and, where the caller follows, what comes.
async fn send(
    mut reader: Reader,
    request: v1::ReadLogsRequest,
    to: &mpsc::Sender<Result<v1::ReadLogsResponse, Status>>,
) {
    loop {
        let Ok(place) = to.reserve().await else { return };
        match reader.next().await {
            Ok(lines) if !lines.is_empty() => place.send(Ok(v1::ReadLogsResponse { lines })),
            Ok(_) if !request.follow => return,
            Ok(_) => {
                drop(place);
                if !reader.more().await {
                    let _ = to.send(Err(not_found("function", &request.name))).await;
                    return;
                }
            }
            Err(error) => return place.send(Err(internal("read what a function has written", &error))),
        }
    }
}
