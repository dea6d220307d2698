//! The `Logs` service.

use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use stoker_policy::MachineId;
use stoker_proto::v1;
use stoker_proto::v1::logs_server;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use ulid::Ulid;

use super::errors::{Violations, busy, internal, invalid, not_found};
use super::invocations::is_request_id;
use crate::catalog::{Catalog, Function};
use crate::function_logs::{Filter, Logs as Kept, Reader};
use crate::host::HostHandle;
use crate::names::{FunctionName, NameError};

/// How many may read at a time, each of which holds some blocks of lines.
const READERS: usize = 64;

/// When a caller may try again that was refused because enough read.
const RETRY: Duration = Duration::from_secs(1);

/// The most of the last lines that may be asked for.
const MAX_LAST_LINES: u32 = 100_000;

/// How long the last lines of a machine may take to be kept once it has ended.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Shows what functions and the programs of launched machines write.
pub struct Logs {
    catalog: Catalog,
    host: HostHandle,
    kept: Kept,
    readers: Arc<Semaphore>,
    stop: CancellationToken,
}

// === impl Logs ===

impl Logs {
    /// A service over what is kept of these functions and machines; its streams end when `stop` is cancelled.
    pub fn new(catalog: Catalog, host: HostHandle, kept: Kept, stop: CancellationToken) -> Self {
        Self {
            catalog,
            host,
            kept,
            readers: Arc::new(Semaphore::new(READERS)),
            stop,
        }
    }

    /// Whose lines are wanted.
    async fn find(&self, request: &v1::ReadLogsRequest) -> Result<Whose, Status> {
        if let Some(id) = machine_id(&request.name) {
            let known = self.host.resizes(MachineId(id)).await;
            return known
                .map(|_| Whose::Machine(id))
                .ok_or_else(|| not_found("machine that was launched", &request.name));
        }
        let name = request
            .name
            .parse::<FunctionName>()
            .map_err(|error: NameError| invalid("name", format!("{error}, nor `machines/{{machine}}`")))?;
        let function = self.catalog.get(&name);
        function
            .map(Whose::Function)
            .ok_or_else(|| not_found("function", &request.name))
    }

    /// Resolves once no more lines come but the last ones.
    fn end(&self, whose: &Whose) -> End {
        match *whose {
            Whose::Function(_) => Box::pin(std::future::pending()),
            Whose::Machine(id) => {
                let host = self.host.clone();
                Box::pin(async move { drop(host.end_of(MachineId(id)).await) })
            }
        }
    }

    fn filter(request: &v1::ReadLogsRequest) -> Result<Filter, Status> {
        let mut violations = Violations::default();
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
        Ok(Filter {
            since,
            request_id: Some(id.to_owned()).filter(|id| !id.is_empty()),
            last: usize::try_from(request.last_lines).ok().filter(|lines| *lines > 0),
        })
    }
}

/// Whose lines are read.
enum Whose {
    Function(Arc<Function>),
    /// A machine that was launched, by its id.
    Machine(Ulid),
}

/// Resolves once no more lines come but the last ones.
type End = Pin<Box<dyn Future<Output = ()> + Send>>;

fn machine_id(name: &str) -> Option<Ulid> {
    Ulid::from_string(name.strip_prefix("machines/")?).ok()
}

#[tonic::async_trait]
impl logs_server::Logs for Logs {
    type ReadLogsStream = ReceiverStream<Result<v1::ReadLogsResponse, Status>>;

    async fn read_logs(&self, request: Request<v1::ReadLogsRequest>) -> Result<Response<Self::ReadLogsStream>, Status> {
        let request = request.into_inner();
        let filter = Self::filter(&request)?;
        let whose = self.find(&request).await?;
        let place = self.readers.clone().try_acquire_owned().map_err(|_| {
            let message =
                format!("{READERS} callers read logs of functions already; try again when one of them is done");
            busy("host", message, RETRY)
        })?;
        let reader = match &whose {
            Whose::Function(function) => self.kept.reader(function, filter).await,
            Whose::Machine(id) => self.kept.machine_reader(*id, filter).await,
        };
        let reader = reader.ok_or_else(|| not_found("function", &request.name))?;
        let end = self.end(&whose);
        // One block may wait: a caller that reads slowly keeps no more in memory.
        let (lines, stream) = mpsc::channel(1);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = send(reader, request, end, &lines) => {}
                () = lines.closed() => {}
                () = stop.cancelled() => {}
            }
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Sends what is there and, where the caller follows, what comes up to the end.
async fn send(
    mut reader: Reader,
    request: v1::ReadLogsRequest,
    mut end: End,
    to: &mpsc::Sender<Result<v1::ReadLogsResponse, Status>>,
) {
    let mut has_ended = false;
    loop {
        let Ok(place) = to.reserve().await else { return };
        match reader.next().await {
            Ok(lines) if !lines.is_empty() => place.send(Ok(v1::ReadLogsResponse { lines })),
            Ok(_) if !request.follow => return,
            Ok(_) => {
                drop(place);
                let more = tokio::select! {
                    more = reader.more() => more,
                    () = &mut end, if !has_ended => {
                        has_ended = true;
                        continue;
                    }
                    () = tokio::time::sleep(LAST_LINES), if has_ended => return,
                };
                if !more {
                    let _ = to.send(Err(not_found("function", &request.name))).await;
                    return;
                }
            }
            Err(error) => return place.send(Err(internal("read what a function has written", &error))),
        }
    }
}
