//! One invocation: its task owns its reply and speaks to the guest itself.
//!
//! ```text
//!  invoke ──Requested──► loop ──Told::Placed──► guest ──answer──► Completed ──► loop
//!                          ▲                      │                  └────────► caller
//!                          └────── NotBegun ──────┘
//! ```
//!
//! What a function streams goes to the caller before, from the guest and past the loop.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoker_policy::{Amount, Code, Completion, ContainerId, Demand, Kind, MachineId, RequestId, Resize, ResizeMode};
use stoker_proto::excerpt::Excerpt;
use stoker_proto::guest as proto;
use stoker_proto::limits::{ANSWER_BYTES, LOG_BYTES, STREAM_WINDOW_BYTES};
use stoker_proto::v1;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use tokio::sync::{mpsc, oneshot};
use ulid::Ulid;

use super::answers::{Answers, Begun, Held, NoAnswer, Outcome, Ticket};
use super::container::{self, Costs, Handle};
use super::counts::{Counts, Latency};
use super::error::InvokeError;
use super::listing;
use super::memory::Share;
use super::message::{Executed, Message};
use super::resizing;
use super::stream::Streamed;
use crate::catalog::Function;
use crate::machines::GuestError;
use crate::pacing::Undecided;

/// What an invocation is given beside its function.
#[derive(Debug)]
pub struct InvokeParams {
    /// JSON.
    pub payload: Bytes,
    /// In place of the function's own.
    pub amount: Option<v1::Amount>,
    /// Lambda's request id as the caller gave it; a UUID is made where it is empty.
    pub request_id: String,
    /// What its messages take of the host's memory; the payload is counted in it.
    pub share: Share,
    /// Dropped once it is decided whether and where it runs, or that it waits.
    pub undecided: Option<Undecided>,
    /// Where what the function streams goes as it comes, if it is to; the answer is the rest then.
    pub parts: Option<mpsc::Sender<Event>>,
}

/// What the loop tells a call.
#[derive(Debug)]
pub(super) enum Told {
    /// It has a place.
    Placed(Box<Placed>),
    /// Its container failed at init, which is its answer; and what its user is told of its amount because of that.
    InitFailed(Box<Place>, proto::FunctionError, Option<Box<v1::Notification>>),
    /// It has none and gets none.
    Refused(InvokeError),
}

/// A place to run, and who serves there.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) handle: Handle,
    pub(super) place: Place,
    /// Why it has no answer, where its machine ends before that.
    pub(super) lost: oneshot::Receiver<InvokeError>,
}

/// Where a call runs, and what its container cost.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) machine: MachineId,
    pub(super) container: ContainerId,
    /// What that was given.
    pub(super) amount: Amount,
    pub(super) source: v1::placement::Source,
    /// When it had its place: the container's making began, or it was handed over.
    pub(super) since: Instant,
    /// Nothing where the container was there already.
    pub(super) costs: Costs,
}

/// A call on its way.
#[derive(Debug)]
pub(super) struct Call {
    id: RequestId,
    function: Arc<Function>,
    params: InvokeParams,
    /// How the amount of its function is looked after.
    resize: Arc<Resize>,
    arrived: Instant,
    inbox: mpsc::Sender<Message>,
    counts: Arc<Counts>,
}

/// A call that runs in a container: where its task panics, the container is ended, for something may run in it still.
#[derive(Debug)]
pub(super) struct Unfinished {
    pub(super) handle: Handle,
    pub(super) container: ContainerId,
    pub(super) request: RequestId,
    pub(super) inbox: mpsc::Sender<Message>,
}

/// Tells the loop when all callers leave before they have their answer.
#[derive(Debug)]
struct Leaving {
    id: RequestId,
    inbox: mpsc::Sender<Message>,
    /// It was asked for, and is not answered.
    waits: AtomicBool,
}

/// Runs a function once; the task of the call goes on where the caller leaves. Who gives the id of a request that was asked
/// for before has that one's answer.
pub(super) async fn invoke(
    inbox: &mpsc::Sender<Message>,
    answers: &Answers,
    counts: &Arc<Counts>,
    function: Arc<Function>,
    mut params: InvokeParams,
) -> Result<v1::InvokeResponse, InvokeError> {
    // Of one that begins its own task counts.
    let refused = |error: InvokeError| {
        counts.failed(None, &error);
        error
    };
    let arrived = Instant::now();
    let account: Arc<str> = function.name.account().into();
    // Before it is passed on: the inbox would hold it too.
    params.share.assign(&account)?;
    if params.parts.is_some() {
        params.share.add(STREAM_WINDOW_BYTES)?;
    }
    if params.request_id.is_empty() {
        let leaving = Leaving::new(inbox);
        params.request_id = uuid(leaving.id);
        let call = Call::new(&leaving, counts, function, params, arrived);
        return call.begin(&leaving, None).await;
    }
    let (name, asked) = (name_in_guest(&function, &params.request_id), asked(&params));
    loop {
        let leaving = Arc::new(Leaving::new(inbox));
        let held: Held = leaving.clone();
        let begun = answers.begin(account.clone(), name.clone(), asked, &held).await;
        let begun = begun.map_err(|error| {
            refused(InvokeError::NotKept {
                detail: error.to_string(),
            })
        })?;
        let (mut outcome, held) = match begun {
            Begun::First(ticket) => {
                let call = Call::new(&leaving, counts, function, params, arrived);
                return call.begin(&leaving, Some(ticket)).await;
            }
            Begun::Over(outcome) => return again(*outcome, &params.share),
            Begun::Reused => return Err(refused(InvokeError::RequestReused)),
            Begun::Again(outcome, held) => (outcome, held),
        };
        params.undecided = None;
        let over = outcome
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|outcome| outcome.clone());
        drop(held);
        if let Some(outcome) = over {
            return again(outcome, &params.share);
        }
    }
}

/// The answer of a request that was asked for before.
fn again(outcome: Outcome, share: &Share) -> Result<v1::InvokeResponse, InvokeError> {
    let answer = outcome.map_err(|no_answer| match no_answer {
        NoAnswer::Lost(detail) => InvokeError::MachineLost { detail },
        NoAnswer::Streamed => InvokeError::Streamed,
    })?;
    let bytes = answer.payload.len().saturating_add(answer.log.len());
    // Nothing bounds how many ask for it, and they can ask once more.
    share.add(bytes)?;
    share.replace(bytes);
    Ok(answer)
}

/// Tells requests of one id apart that ask for different things.
fn asked(params: &InvokeParams) -> u64 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&params.payload);
    let amount = params.amount.map(|amount| (amount.cpu_millis, amount.memory_mib));
    crc.update(format!("{amount:?}").as_bytes());
    let bytes = u64::try_from(params.payload.len()).unwrap_or(u64::MAX);
    bytes << 32 | u64::from(crc.finalize())
}

/// Whether an invocation took its container with it, and why.
pub(super) fn ended(answer: &proto::InvokeResponse) -> (Completion, Option<String>) {
    if !answer.container_ended {
        return (Completion::Answered, None);
    }
    let detail = match &answer.error {
        Some(error) => format!("{}: {}", error.r#type, error.message),
        None => "its function ended it".to_owned(),
    };
    (Completion::Ended, Some(detail))
}

/// What an invocation is called in a guest.
fn name_in_guest(function: &Function, request_id: &str) -> String {
    format!("{}/{request_id}", function.uid)
}

/// The container that serves a function with this amount.
pub(super) fn kind(function: &Function, amount: Amount) -> Kind {
    Kind {
        code: Code {
            uid: function.uid,
            version: function.version,
        },
        amount,
    }
}

/// The id of a new request: a ULID with the six bits by which it is a UUID of version 7 too (RFC 9562).
pub(super) fn new_id() -> RequestId {
    let bits = Ulid::generate().0;
    let bits = bits & !(0xf << 76) | (0x7 << 76);
    RequestId(Ulid(bits & !(0x3 << 62) | (0x2 << 62)))
}

/// A request's id as callers know it: a UUID.
pub(super) fn uuid(id: RequestId) -> String {
    let hex = format!("{:032x}", id.0.0);
    let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default();
    let parts = [part(0, 8), part(8, 12), part(12, 16), part(16, 20), part(20, 32)];
    parts.join("-")
}

/// The bits of a UUID.
pub(super) fn parse_uuid(text: &str) -> Option<Ulid> {
    let lengths = [8, 4, 4, 4, 12];
    let mut parts = text.split('-');
    let mut hex = String::with_capacity(32);
    for length in lengths {
        let part = parts.next().filter(|part| part.len() == length)?;
        part.bytes()
            .all(|b| b.is_ascii_hexdigit())
            .then(|| hex.push_str(part))?;
    }
    parts.next().is_none().then_some(())?;
    u128::from_str_radix(&hex, 16).ok().map(Ulid)
}

/// Where the loop ends without a word, it may have run.
fn given_up() -> InvokeError {
    InvokeError::MachineLost {
        detail: "the agent gave it up".into(),
    }
}

// === impl Call ===

impl Call {
    fn new(
        leaving: &Leaving,
        counts: &Arc<Counts>,
        function: Arc<Function>,
        params: InvokeParams,
        arrived: Instant,
    ) -> Self {
        Self {
            id: leaving.id,
            resize: function.resize(),
            function,
            params,
            arrived,
            inbox: leaving.inbox.clone(),
            counts: counts.clone(),
        }
    }

    /// Asks for a place, and runs to its end in a task of its own.
    async fn begin(mut self, leaving: &Leaving, ticket: Option<Ticket>) -> Result<v1::InvokeResponse, InvokeError> {
        let (tell, told) = oneshot::channel();
        let amount = self.params.amount.unwrap_or(self.function.amount);
        let amount = listing::amount(amount, self.function.scratch_mib());
        let requested = Message::Requested {
            request: self.id,
            demand: Demand {
                account: self.function.name.account().into(),
                runtime: self.function.runtime.as_str().into(),
                kinds: vec![kind(&self.function, amount)],
                resize: Some(self.resize.clone()),
                own_amount: self.params.amount.is_some(),
            },
            function: self.function.clone(),
            given: ticket.is_some().then(|| self.params.request_id.clone()),
            undecided: self.params.undecided.take(),
            tell,
        };
        if leaving.inbox.send(requested).await.is_err() {
            self.counts.failed(None, &InvokeError::Draining);
            return Err(InvokeError::Draining);
        }
        leaving.waits.store(true, Ordering::Relaxed);
        let answer = match ticket {
            None => tokio::spawn(self.run(told, None)).await,
            Some(ticket) => tokio::spawn(self.run_named(told, ticket)).await,
        };
        leaving.waits.store(false, Ordering::Relaxed);
        answer.unwrap_or_else(|error| {
            tracing::error!(%error, "the task of a call panicked");
            Err(given_up())
        })
    }

    /// Keeps what it came to.
    async fn run_named(
        self,
        told: oneshot::Receiver<Told>,
        mut ticket: Ticket,
    ) -> Result<v1::InvokeResponse, InvokeError> {
        let streams = self.params.parts.is_some();
        let answer = self.run(told, Some(&mut ticket)).await;
        match &answer {
            Ok(_) if streams => ticket.over(Err(NoAnswer::Streamed)).await,
            Ok(answer) => ticket.over(Ok(answer.clone())).await,
            Err(InvokeError::Streamed) => ticket.over(Err(NoAnswer::Streamed)).await,
            Err(InvokeError::MachineLost { detail }) => ticket.over(Err(detail.clone().into())).await,
            Err(_) => ticket.not_begun().await,
        }
        answer
    }

    /// Counts what it came to.
    async fn run(
        self,
        told: oneshot::Receiver<Told>,
        ticket: Option<&mut Ticket>,
    ) -> Result<v1::InvokeResponse, InvokeError> {
        let (counts, mut source) = (self.counts.clone(), None);
        let answer = self.run_placed(told, ticket, &mut source).await;
        if let Err(error) = &answer {
            counts.failed(source, error);
        }
        answer
    }

    /// `source` is where the container came from that it was begun in, if it was.
    async fn run_placed(
        self,
        mut told: oneshot::Receiver<Told>,
        mut ticket: Option<&mut Ticket>,
        source: &mut Option<v1::placement::Source>,
    ) -> Result<v1::InvokeResponse, InvokeError> {
        // Of the last place that it had.
        let mut lost: Option<oneshot::Receiver<InvokeError>> = None;
        loop {
            let placed = match told.await {
                Ok(Told::Placed(placed)) => *placed,
                Ok(Told::InitFailed(place, error, notification)) => {
                    let answer = proto::InvokeResponse {
                        error: Some(error),
                        ..Default::default()
                    };
                    let answer = self.answered(*place, answer, Instant::now());
                    let notification = notification.map(|notification| *notification);
                    return Ok(v1::InvokeResponse { notification, ..answer });
                }
                Ok(Told::Refused(error)) => return Err(error),
                // It was over before it asked for another place.
                Err(_) => return Err(lost.and_then(|mut lost| lost.try_recv().ok()).unwrap_or_else(given_up)),
            };
            let Placed {
                handle,
                place,
                lost: mut losing,
            } = placed;
            if let Some(ticket) = &mut ticket
                && let Err(error) = ticket.placed(place.machine).await
            {
                let detail = error.to_string();
                self.completed(place.container, Completion::Answered, None, None, None)
                    .await;
                return Err(InvokeError::NotKept { detail });
            }
            let timeout = self.function.timeout;
            let caller = self.params.parts.clone();
            let streamed = caller.map(|to| Streamed::new(&handle.guest, to, self.params.request_id.clone()));
            let incoming = streamed.as_ref().map(Streamed::incoming);
            let asked = proto::InvokeRequest {
                container: place.container.to_string(),
                request_id: self.params.request_id.clone(),
                payload: self.params.payload.clone(),
                timeout: timeout.try_into().ok(),
                // Numbered as it is sent.
                call: 0,
                name: name_in_guest(&self.function, &self.params.request_id),
                keep: ticket.is_some(),
                attach: false,
                stream: streamed.is_some(),
                ..Default::default()
            };
            let unfinished = Unfinished {
                handle: handle.clone(),
                container: place.container,
                request: self.id,
                inbox: self.inbox.clone(),
            };
            *source = Some(place.source);
            let mut passing = streamed.is_some();
            let mut passed_on = pin!(async {
                if let Some(streamed) = streamed {
                    streamed.pass_on().await;
                }
            });
            let mut invoking = pin!(handle.guest.invoke_streamed(asked, timeout, incoming));
            let answer = loop {
                tokio::select! {
                    biased;
                    answer = &mut invoking => break answer,
                    error = &mut losing => return Err(error.unwrap_or_else(|_| given_up())),
                    () = &mut passed_on, if passing => passing = false,
                }
            };
            match answer {
                Ok(answer) => {
                    let at = Instant::now();
                    let (completion, detail) = ended(&answer);
                    let (executed, notified) = self.executed(&place, &answer);
                    self.completed(place.container, completion, detail, None, executed)
                        .await;
                    drop(unfinished);
                    // The container has done with it, whenever its caller reads the rest.
                    if passing {
                        passed_on.await;
                    }
                    if answer.partial {
                        return Err(InvokeError::Streamed);
                    }
                    // Nobody tells where nothing was looked at.
                    let notification = notified.await.ok().flatten();
                    let answer = self.answered(place, answer, at);
                    return Ok(v1::InvokeResponse { notification, ..answer });
                }
                Err(error @ GuestError::NotBegun { .. }) => {
                    *source = None;
                    let (tell, next) = oneshot::channel();
                    let detail = Some(error.to_string());
                    self.completed(place.container, Completion::NotBegun, detail, Some(tell), None)
                        .await;
                    (told, lost) = (next, Some(losing));
                }
                Err(error) => {
                    handle.broken(&error);
                    return Err(losing.await.unwrap_or_else(|_| given_up()));
                }
            }
        }
    }

    /// What it used, for the loop, and where that tells what it led to.
    fn executed(
        &self,
        place: &Place,
        answer: &proto::InvokeResponse,
    ) -> (Option<Executed>, oneshot::Receiver<Option<v1::Notification>>) {
        let (notified, hears) = oneshot::channel();
        let sample = match self.resize.mode {
            ResizeMode::Off => None,
            ResizeMode::Advise | ResizeMode::Auto => {
                resizing::sample(answer.execution, answer.error.as_ref(), place.amount)
            }
        };
        (sample.map(|sample| Executed { sample, notified }), hears)
    }

    async fn completed(
        &self,
        container: ContainerId,
        completion: Completion,
        detail: Option<String>,
        again: Option<oneshot::Sender<Told>>,
        executed: Option<Executed>,
    ) {
        let message = Message::Completed {
            container,
            request: self.id,
            completion,
            detail,
            again,
            executed,
        };
        // Without a loop nobody needs to know.
        let _ = self.inbox.send(message).await;
    }

    /// The guest has answered for it.
    fn answered(self, place: Place, answer: proto::InvokeResponse, at: Instant) -> v1::InvokeResponse {
        let latency = self.latency(&place, at);
        let Self { params, counts, .. } = self;
        let InvokeParams {
            payload: asked,
            request_id,
            share,
            ..
        } = params;
        drop(asked);
        let answer = response(request_id, answer, place.costs.log);
        share.replace(answer.payload.len().saturating_add(answer.log.len()));
        counts.answered(place.source, !answer.function_error.is_empty(), &latency);
        v1::InvokeResponse {
            placement: Some(v1::Placement {
                machine: listing::machine_name(place.machine),
                container: listing::container_name(place.machine, place.container),
                source: place.source.into(),
                amount: Some(listing::proto_amount(place.amount)),
            }),
            latency: Some(latency.into()),
            ..answer
        }
    }

    /// The parts add up to the total: what lies between them counts for the run.
    fn latency(&self, place: &Place, end: Instant) -> Latency {
        let total = end.duration_since(self.arrived);
        let wait = place.since.duration_since(self.arrived);
        let (code, init) = (place.costs.code, place.costs.init);
        Latency {
            total,
            wait,
            code,
            init,
            run: total.saturating_sub(wait + code + init),
        }
    }
}

// === impl Latency ===

impl From<Latency> for v1::Latency {
    fn from(latency: Latency) -> Self {
        let proto = |duration: Duration| prost_types::Duration::try_from(duration).ok();
        Self {
            total: proto(latency.total),
            machine: proto(latency.wait),
            code: proto(latency.code),
            init: proto(latency.init),
            run: proto(latency.run),
        }
    }
}

// === impl Leaving ===

impl Leaving {
    fn new(inbox: &mpsc::Sender<Message>) -> Self {
        Self {
            id: new_id(),
            inbox: inbox.clone(),
            waits: AtomicBool::new(false),
        }
    }
}

impl Drop for Leaving {
    fn drop(&mut self) {
        if !*self.waits.get_mut() {
            return;
        }
        let message = Message::CallerLeft { request: self.id };
        if let Err(mpsc::error::TrySendError::Full(message)) = self.inbox.try_send(message)
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let inbox = self.inbox.clone();
            runtime.spawn(async move { inbox.send(message).await });
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let (handle, container) = (self.handle.clone(), self.container);
        let completed = Message::Completed {
            container,
            request: self.request,
            completion: Completion::Ended,
            detail: Some("the agent's task for its call panicked".into()),
            again: None,
            executed: None,
        };
        let inbox = self.inbox.clone();
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                container::stop_unknown(handle, container).await;
                // Without a loop nobody needs to know.
                let _ = inbox.send(completed).await;
            });
        }
    }
}

/// What a caller is told of a guest's answer, without where and how long it ran.
pub(super) fn response(request_id: String, mut answer: proto::InvokeResponse, init: proto::Log) -> v1::InvokeResponse {
    if answer.error.is_none() && answer.payload.len() > ANSWER_BYTES {
        answer.error = Some(proto::FunctionError {
            kind: proto::function_error::Kind::ResponseTooLarge.into(),
            r#type: "Function.ResponseSizeTooLarge".into(),
            message: format!(
                "the answer has {} bytes, more than {ANSWER_BYTES}",
                answer.payload.len()
            ),
        });
        answer.payload = Bytes::new();
    }
    let payload = match &answer.error {
        Some(error) if answer.payload.is_empty() => error_object(error, &request_id),
        _ => answer.payload,
    };
    let (log, log_truncated) = joined(init, answer.log.unwrap_or_default());
    v1::InvokeResponse {
        request_id,
        payload,
        function_error: answer.error.map(|_| "Unhandled".to_owned()).unwrap_or_default(),
        log,
        log_truncated,
        placement: None,
        latency: None,
        usage: answer.usage,
        notification: None,
    }
}

/// Lambda's error object, where the function did not report one itself.
fn error_object(error: &proto::FunctionError, request_id: &str) -> Bytes {
    let object = serde_json::json!({
        "errorType": error.r#type,
        "errorMessage": format!("RequestId: {request_id} Error: {}", error.message),
    });
    object.to_string().into()
}

/// The log of an init and of an invocation, cut to what is kept.
fn joined(init: proto::Log, run: proto::Log) -> (Bytes, bool) {
    let truncated = init.truncated || run.truncated;
    if init.data.is_empty() && run.data.len() <= LOG_BYTES {
        return (run.data, truncated);
    }
    let mut log = Excerpt::default();
    for part in [init, run] {
        log.append_excerpt(&part.data, part.missing_bytes);
    }
    let truncated = truncated || log.missing() > 0;
    (log.into_bytes().into(), truncated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::memory::{Bounds, Memory};
    use crate::host::tests::function;

    fn call() -> Call {
        let function = Function::from(function());
        let memory = Memory::new(
            Bounds {
                all: 1 << 20,
                account: 1 << 20,
                accounts: Default::default(),
            },
            Default::default(),
        );
        Call {
            id: new_id(),
            resize: function.resize(),
            function: Arc::new(function),
            params: InvokeParams {
                payload: Bytes::new(),
                amount: None,
                request_id: "id".into(),
                share: memory.share(),
                undecided: None,
                parts: None,
            },
            arrived: Instant::now(),
            inbox: mpsc::channel(1).0,
            counts: Arc::default(),
        }
    }

    fn place(costs: Costs) -> Place {
        Place {
            machine: MachineId(Ulid::generate()),
            container: ContainerId(Ulid::generate()),
            amount: Amount::default(),
            source: v1::placement::Source::NewMachine,
            since: Instant::now(),
            costs,
        }
    }

    fn log(text: &str) -> proto::Log {
        proto::Log {
            data: text.to_owned().into(),
            ..Default::default()
        }
    }

    #[test]
    fn request_ids_are_uuids_and_come_back() {
        let id = new_id();
        let text = uuid(id);
        let parts: Vec<_> = text.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12], "{text}");
        let bytes = text.as_bytes();
        assert!(bytes[14] == b'7' && b"89ab".contains(&bytes[19]), "{text}");
        assert_eq!(parse_uuid(&text), Some(id.0));
        assert_ne!(text, uuid(new_id()));
        for wrong in ["", "x", &text[1..], &format!("{text}-0"), &text.replace('-', "+")] {
            assert_eq!(parse_uuid(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn the_parts_of_the_latency_add_up() {
        let call = call();
        let costs = Costs {
            code: Duration::from_millis(3),
            init: Duration::from_millis(4),
            log: log("init\n"),
        };
        let answer = proto::InvokeResponse {
            log: Some(log("run\n")),
            payload: "1".into(),
            ..Default::default()
        };
        let end = call.arrived + Duration::from_millis(100);
        let response = call.answered(place(costs), answer, end);
        let part = |d: Option<prost_types::Duration>| Duration::try_from(d.unwrap()).unwrap();
        let latency = response.latency.unwrap();
        let parts = [latency.machine, latency.code, latency.init, latency.run];
        assert_eq!(parts.into_iter().map(part).sum::<Duration>(), part(latency.total));
        assert_eq!(part(latency.total), Duration::from_millis(100));
        assert_eq!(
            (&response.log[..], response.log_truncated),
            (&b"init\nrun\n"[..], false)
        );
        assert_eq!(response.function_error, "");
    }

    #[test]
    fn an_error_without_an_object_gets_one() {
        let answer = proto::InvokeResponse {
            error: Some(proto::FunctionError {
                kind: proto::function_error::Kind::Exited.into(),
                r#type: "Runtime.ExitError".into(),
                message: "Runtime exited with error: exit status 1".into(),
            }),
            ..Default::default()
        };
        let response = call().answered(place(Costs::default()), answer, Instant::now());
        assert_eq!(response.function_error, "Unhandled");
        let object: serde_json::Value = serde_json::from_slice(&response.payload).unwrap();
        assert_eq!(object["errorType"], "Runtime.ExitError");
        assert!(object["errorMessage"].as_str().unwrap().contains("exit status 1"));
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        let costs = Costs {
            log: log(&"x".repeat(LOG_BYTES)),
            ..Default::default()
        };
        let answer = proto::InvokeResponse {
            payload: vec![b'1'; ANSWER_BYTES + 1].into(),
            log: Some(log("y")),
            ..Default::default()
        };
        let response = call().answered(place(costs), answer, Instant::now());
        assert!(response.log_truncated && response.log.len() <= LOG_BYTES);
        assert!(response.log.starts_with(b"x") && response.log.ends_with(b"xy"));
        assert!(response.payload.len() < 1000 && response.function_error == "Unhandled");
    }
}
