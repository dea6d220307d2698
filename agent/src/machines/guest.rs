//! The connection to a guest: it dials the host's vsock port 1024, which is the Unix socket `{vsock}_1024` here, and
//! serves `stoker.guest.v1.Guest` over that stream. The guest is hostile: every call has a time limit, every message
//! a size limit, and one stream is all that is ever accepted.

mod image;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use hyper_util::rt::TokioIo;
use stoker_proto::guest as proto;
use stoker_proto::guest::guest_client::GuestClient;
use stoker_proto::limits::{self, GUEST_PORT, ROOM_WAIT};
use stoker_proto::v1;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{OnceCell, mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};

use super::calls::{Calls, Unanswered};
use super::cut;
use super::parts::{Incoming, Parts};
use crate::code::{CodeError, CodeStore};
use crate::error_chain;
use crate::files;

/// The largest message about use taken from a guest: the 800 smallest containers that fit 8 vCPUs take 61 KB of it.
pub(super) const MAX_WATCH_MESSAGE: usize = 64 << 10;

/// The largest question about credits taken from a guest, in bytes: it is a number.
const MAX_QUESTION: usize = 1 << 10;

/// What a guest is asked to do all along.
const WATCH: &str = "say what its containers use";

/// The same.
const FOLLOW_CREDITS: &str = "ask for its credits";

/// The same.
const FOLLOW_LOGS: &str = "say what its containers write";

/// How much longer than its own time limit a call may take before the guest counts as hung.
const GRACE: Duration = Duration::from_secs(15);

/// How long a guest may wait for room on its drive in one call: for a larger drive, for a zip, and for what that unpacks to.
const FOR_ROOM: Duration = ROOM_WAIT.saturating_mul(3);

/// Of a SHA-256 in hex, in bytes.
const SHA256_HEX: usize = 64;

/// How long a guest may take for what should be done at once.
const PROMPT: Duration = Duration::from_secs(15);

/// A guest that answered; clones share its connection.
#[derive(Clone, Debug)]
pub struct Guest(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    requests: GuestClient<Channel>,
    watches: GuestClient<Channel>,
    logs: GuestClient<Channel>,
    credits: GuestClient<Channel>,
    /// For what goes on as long as its caller wants.
    programs: GuestClient<Channel>,
    calls: Calls,
    /// The code that is there or on its way, by SHA-256.
    code: Mutex<HashMap<String, Arc<OnceCell<()>>>>,
}

/// What went wrong with a call.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// The guest can't be relied on any more: it hangs, hung up, or broke the protocol.
    #[error("the guest failed to {operation}: {}", .status.message())]
    Broken {
        /// What it was asked to do.
        operation: &'static str,
        /// What came instead.
        status: Status,
    },
    /// The guest refused; the rest of it is fine.
    #[error("the guest refused to {operation}: {}", .status.message())]
    Refused {
        /// What it was asked to do.
        operation: &'static str,
        /// What the guest answered.
        status: Status,
    },
    /// The guest has surely not begun the request that it was to run: it said so, or never got it.
    #[error("the guest did not begin a request: {}", .status.message())]
    NotBegun {
        /// What the guest said, or how the connection ended.
        status: Status,
    },
    /// Nothing can be listened on for the guest.
    #[error("can't listen for the guest: {0}")]
    Listen(#[source] io::Error),
    /// The code could not be read on the host.
    #[error(transparent)]
    Code(#[from] CodeError),
}

/// A guest that has answered, what it told of itself, and what completes when the connection is over or its guest answered what
/// it was not asked, with which it was.
pub(crate) type Connected = (Guest, proto::HelloResponse, oneshot::Receiver<Status>);

/// What a guest says of its containers, message by message.
#[derive(Debug)]
pub struct Watch(Streaming<proto::WatchResponse>);

/// What a guest says that its containers write, message by message.
#[derive(Debug)]
pub struct LogBatches(Streaming<proto::FollowLogsResponse>);

/// What a guest asks of its machine's credits, question by question.
#[derive(Debug)]
pub struct CreditsQuestions(Streaming<proto::AskCredits>);

/// Makes the socket that a guest will dial, in place of an earlier agent's. Before a new machine is started, so that it
/// finds it.
///
/// # Errors
/// Where the socket can't be made.
pub(super) fn listen(vsock: &Path) -> io::Result<UnixListener> {
    let path = files::with_suffix(vsock, &format!("_{GUEST_PORT}"));
    files::remove(&path)?;
    UnixListener::bind(path)
}

/// Waits until the guest has dialled, loaded the runtime and answered.
///
/// # Errors
/// Where nothing can be accepted or the guest does not answer as it should.
pub(super) async fn connect(listener: UnixListener, runtime: &str) -> Result<Connected, GuestError> {
    let accepted = listener.accept().await;
    let (stream, _) = accepted.map_err(|error| broken("connect")(Status::unavailable(error.to_string())))?;
    // Nobody is let in after it.
    drop(listener);
    Guest::over(stream, runtime).await
}

// === impl Guest ===

impl Guest {
    /// A guest at the other end of a stream, once it has loaded the runtime and answered.
    ///
    /// # Errors
    /// Where it does not answer as it should.
    pub(crate) async fn over(stream: UnixStream, runtime: &str) -> Result<Connected, GuestError> {
        let mut once = Some(stream);
        // What nobody reads of one call is to keep no other waiting: where an image runs, programs and connections without number may
        // be such calls.
        let (of_stream, of_connection) = match runtime {
            // More than all programs and connections that a guest has at a time.
            "" => (128 << 10, 24 << 20),
            _ => (1 << 20, 4 << 20),
        };
        let channel = Endpoint::from_static("http://guest")
            .initial_stream_window_size(of_stream)
            .initial_connection_window_size(of_connection)
            .http2_keep_alive_interval(Duration::from_secs(20))
            .keep_alive_timeout(Duration::from_secs(20))
            .keep_alive_while_idle(true)
            .connect_with_connector_lazy(tower::service_fn(move |_: Uri| {
                let taken = once.take();
                async move { taken.map(TokioIo::new).ok_or("the guest has hung up") }
            }));
        let mut requests = GuestClient::new(channel.clone()).max_decoding_message_size(limits::GUEST_ANSWER_BYTES);
        // No limit of its own: the boot's limit holds.
        let hello = requests
            .hello(proto::HelloRequest {
                runtime: runtime.to_owned(),
            })
            .await
            .map_err(wrong("answer"))?;
        let mut hello = hello.into_inner();
        for text in [
            &mut hello.kernel,
            &mut hello.init_version,
            &mut hello.telemetry_error,
            &mut hello.runtime_error,
            &mut hello.scratch_error,
            &mut hello.image_container,
        ] {
            cut(text);
        }
        if hello.containers.len() > limits::CONTAINERS {
            return Err(broken("answer")(Status::aborted("it told of too many containers")));
        }
        // Of others it is brought once more.
        hello.code_sha256.truncate(limits::CONTAINERS);
        let code = hello.code_sha256.drain(..).filter(|name| name.len() == SHA256_HEX);
        let code = code.map(|name| (name, Arc::new(OnceCell::new_with(Some(())))));
        let runs = |name: &str, container: &str| !container.is_empty() && name.len() <= limits::INVOCATION_NAME_BYTES;
        hello
            .invocations
            .retain(|invocation| runs(&invocation.name, &invocation.container));
        hello.invocations.truncate(limits::CONTAINERS);
        let (calls, over) = Calls::open(requests.clone());
        let guest = Inner {
            requests,
            logs: GuestClient::new(channel.clone()).max_decoding_message_size(limits::LOG_BATCH_BYTES),
            credits: GuestClient::new(channel.clone()).max_decoding_message_size(MAX_QUESTION),
            programs: GuestClient::new(channel.clone()).max_decoding_message_size(image::MAX_BYTES_MESSAGE),
            watches: GuestClient::new(channel).max_decoding_message_size(MAX_WATCH_MESSAGE),
            calls,
            code: Mutex::new(code.collect()),
        };
        Ok((Self(Arc::new(guest)), hello, over))
    }

    /// Brings code into the guest, whose drive has `drive_mib`; what is there, or being brought by another call, is not brought
    /// again.
    ///
    /// # Errors
    /// [`GuestError`]; the next call tries again.
    pub async fn put_code(&self, store: &CodeStore, sha256: &str, drive_mib: u32) -> Result<(), GuestError> {
        let cell = {
            let mut all = self.0.code.lock().unwrap_or_else(PoisonError::into_inner);
            all.entry(sha256.to_owned()).or_default().clone()
        };
        cell.get_or_try_init(|| self.send_code(store, sha256, drive_mib))
            .await?;
        Ok(())
    }

    /// Forgets that code is there: a guest that needs room drops what no container uses.
    pub fn forget_code(&self, sha256: &str) {
        let mut all = self.0.code.lock().unwrap_or_else(PoisonError::into_inner);
        all.remove(sha256);
    }

    async fn send_code(&self, store: &CodeStore, sha256: &str, drive_mib: u32) -> Result<(), GuestError> {
        let mut code = store.get(sha256).await?;
        let size_bytes = code.size();
        let limit = GRACE + FOR_ROOM + Duration::from_secs(size_bytes >> 20);
        let (to, pieces) = mpsc::channel(2);
        let feed = async move {
            let header = proto::PutCodeHeader {
                sha256: sha256.to_owned(),
                size_bytes,
                drive_mib,
            };
            let mut part = proto::put_code_request::Part::Header(header);
            // A guest that has it already, or fails, stops listening: the call tells which.
            while to.send(proto::PutCodeRequest { part: Some(part) }).await.is_ok() {
                match code.chunk().await? {
                    Some(chunk) => part = proto::put_code_request::Part::Chunk(chunk),
                    None => break,
                }
            }
            Ok::<_, CodeError>(())
        };
        let mut requests = self.0.requests.clone();
        let call = within(limit, requests.put_code(ReceiverStream::new(pieces)));
        let (fed, called) = tokio::join!(feed, call);
        fed?;
        called.map_err(wrong("take code in")).map(|_| ())
    }

    /// Makes a container and initialises its function.
    ///
    /// # Errors
    /// [`GuestError`]; an init that fails is an answer.
    pub async fn create_container(
        &self,
        request: proto::CreateContainerRequest,
        init_timeout: Duration,
    ) -> Result<proto::CreateContainerResponse, GuestError> {
        let mut requests = self.0.requests.clone();
        let answer = within(init_timeout + GRACE + FOR_ROOM, requests.create_container(request)).await;
        let mut answer = answer.map_err(wrong("make a container"))?;
        cut_error(&mut answer.error);
        Ok(answer)
    }

    /// Runs one request in an idle container.
    ///
    /// # Errors
    /// [`GuestError::NotBegun`] where the guest did not begin it, [`GuestError::Broken`] where it may have; an error of the
    /// function is an answer.
    pub async fn invoke(
        &self,
        request: proto::InvokeRequest,
        timeout: Duration,
    ) -> Result<proto::InvokeResponse, GuestError> {
        self.invoke_streamed(request, timeout, None).await
    }

    /// Where what a request streams can be read.
    pub(crate) fn parts(&self) -> Parts {
        self.0.calls.parts()
    }

    /// The same, and what the function streams goes to `parts` before, if there is such; they are over with it. The answer is the
    /// rest then.
    ///
    /// # Errors
    /// As [`invoke`](Self::invoke).
    pub(crate) async fn invoke_streamed(
        &self,
        request: proto::InvokeRequest,
        timeout: Duration,
        parts: Option<Incoming>,
    ) -> Result<proto::InvokeResponse, GuestError> {
        let limit = timeout + GRACE;
        let answer = tokio::time::timeout(limit, self.0.calls.run(request, parts)).await;
        let mut answer = answer
            .unwrap_or_else(|_| Err(Unanswered::Lost(late(limit))))
            .map_err(|unanswered| match unanswered {
                Unanswered::NotBegun(status) => GuestError::NotBegun {
                    status: cut_status(&status),
                },
                Unanswered::Lost(status) => broken("run a request")(status),
            })?;
        cut_error(&mut answer.error);
        measured_now(&mut answer.usage);
        Ok(answer)
    }

    /// Ends a container; one that is not there has ended already.
    ///
    /// # Errors
    /// [`GuestError::Broken`].
    pub async fn stop_container(&self, id: String) -> Result<(), GuestError> {
        let mut requests = self.0.requests.clone();
        let answer = within(PROMPT, requests.stop_container(proto::StopContainerRequest { id })).await;
        match answer.map_err(wrong("stop a container")) {
            Ok(_) => Ok(()),
            Err(GuestError::Refused { status, .. }) if status.code() == Code::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Streams use at each interval, and containers that ended.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn watch(&self, interval: Duration) -> Result<Watch, GuestError> {
        let interval = prost_types::Duration::try_from(interval).ok();
        let mut watches = self.0.watches.clone();
        let answer = within(PROMPT, watches.watch(proto::WatchRequest { interval })).await;
        answer.map(Watch).map_err(wrong(WATCH))
    }

    /// Streams what containers write. None from a guest of an earlier version, which does not know the call.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn follow_logs(&self) -> Result<Option<LogBatches>, GuestError> {
        let mut logs = self.0.logs.clone();
        match within(PROMPT, logs.follow_logs(proto::FollowLogsRequest {})).await {
            Ok(batches) => Ok(Some(LogBatches(batches))),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(wrong(FOLLOW_LOGS)(status)),
        }
    }

    /// Tells the guest of its machine's credits, and hears what it asks of them. None from a guest of an earlier version, which does
    /// not know the call.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn follow_credits(
        &self,
        told: mpsc::Receiver<proto::Credits>,
    ) -> Result<Option<CreditsQuestions>, GuestError> {
        let mut credits = self.0.credits.clone();
        match within(PROMPT, credits.follow_credits(ReceiverStream::new(told))).await {
            Ok(questions) => Ok(Some(CreditsQuestions(questions))),
            Err(status) if status.code() == Code::Unimplemented => Ok(None),
            Err(status) => Err(wrong(FOLLOW_CREDITS)(status)),
        }
    }

    /// Asks the guest to power itself off.
    ///
    /// # Errors
    /// [`GuestError`].
    pub async fn power_off(&self) -> Result<(), GuestError> {
        let mut requests = self.0.requests.clone();
        let answer = within(PROMPT, requests.power_off(proto::PowerOffRequest {})).await;
        answer.map_err(wrong("power off")).map(|_| ())
    }
}

// === impl Watch ===

impl Watch {
    /// The next message; a guest never ends the stream of itself.
    ///
    /// # Errors
    /// [`GuestError::Broken`] too where a message tells of more containers than a machine can have.
    pub async fn message(&mut self) -> Result<proto::WatchResponse, GuestError> {
        let said = self.0.message().await.map_err(broken(WATCH))?;
        let mut said = said.ok_or_else(|| broken(WATCH)(Status::aborted("it ended the stream")))?;
        // Empty entries take two bytes each, and work for every one.
        if said.containers.len() > limits::CONTAINERS || said.ended.len() > limits::CONTAINERS {
            return Err(broken(WATCH)(Status::aborted("it told of too many containers at once")));
        }
        for used in &mut said.containers {
            measured_now(&mut used.usage);
        }
        for ended in &mut said.ended {
            cut_error(&mut ended.error);
        }
        Ok(said)
    }
}

// === impl CreditsQuestions ===

impl CreditsQuestions {
    /// The next question; a guest never ends the stream of itself.
    ///
    /// # Errors
    /// [`GuestError::Broken`].
    pub async fn next(&mut self) -> Result<u64, GuestError> {
        let asked = self.0.message().await.map_err(broken(FOLLOW_CREDITS))?;
        let asked = asked.ok_or_else(|| broken(FOLLOW_CREDITS)(Status::aborted("it ended the stream")))?;
        Ok(asked.question)
    }
}

// === impl LogBatches ===

impl LogBatches {
    /// The next message; a guest never ends the stream of itself.
    ///
    /// # Errors
    /// [`GuestError::Broken`] too where a message has more lines than it may.
    pub async fn message(&mut self) -> Result<proto::FollowLogsResponse, GuestError> {
        let said = self.0.message().await.map_err(broken(FOLLOW_LOGS))?;
        let said = said.ok_or_else(|| broken(FOLLOW_LOGS)(Status::aborted("it ended the stream")))?;
        // Empty lines take a byte each, and work for every one.
        if said.lines.iter().flat_map(proto::LogLines::lines).count() > limits::LOG_BATCH_LINES {
            return Err(broken(FOLLOW_LOGS)(Status::aborted(
                "it told of too many lines at once",
            )));
        }
        Ok(said)
    }
}

/// A guest's clock is not believed.
fn measured_now(usage: &mut Option<v1::Usage>) {
    if let Some(usage) = usage {
        usage.measure_time = Some(SystemTime::now().into());
    }
}

async fn within<T>(
    limit: Duration,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(late(limit)),
    }
}

fn late(limit: Duration) -> Status {
    Status::deadline_exceeded(format!("no answer within {limit:?}"))
}

/// A guest that says what was wrong with a request goes on; any other failure means that it can't be relied on.
fn wrong(operation: &'static str) -> impl FnOnce(Status) -> GuestError {
    move |status| match status.code() {
        Code::NotFound
        | Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::AlreadyExists
        | Code::ResourceExhausted => GuestError::Refused {
            operation,
            status: cut_status(&status),
        },
        _ => broken(operation)(status),
    }
}

/// Whatever the guest says: it can't be relied on.
fn broken(operation: &'static str) -> impl FnOnce(Status) -> GuestError {
    move |status| GuestError::Broken {
        operation,
        status: cut_status(&status),
    }
}

/// A status without its details, which nobody reads, but with what it came from: that a guest did not answer the connection's
/// pings, say, which the transport only calls an error.
pub(super) fn cut_status(status: &Status) -> Status {
    let mut message = status.message().to_owned();
    let cause = std::error::Error::source(status).map(error_chain::innermost);
    if let Some(cause) = cause.filter(|cause| !message.contains(cause)) {
        message = format!("{message}: {cause}");
    }
    cut(&mut message);
    Status::new(status.code(), message)
}

fn cut_error(error: &mut Option<proto::FunctionError>) {
    if let Some(error) = error {
        cut(&mut error.r#type);
        cut(&mut error.message);
    }
}

// === impl GuestError ===

impl GuestError {
    /// The guest refused because something that it needs is not there (any more).
    pub fn is_precondition(&self) -> bool {
        matches!(self, Self::Refused { status, .. } if status.code() == Code::FailedPrecondition)
    }
}
