//! One invocation on its way.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use stoker_proto::guest as proto;
use stoker_proto::v1;
use tokio::sync::oneshot;

use super::payloads::Held;
use super::{InvokeError, InvokeParams};
use crate::catalog::Function;
use crate::policy::Amount;
use crate::policy::placement::{Code, Demand, Source};

/// The most that is kept of the output of an init or an invocation, in bytes.
const LOG_LIMIT: usize = 256 << 10;

/// The largest answer of a function, in bytes.
const ANSWER_LIMIT: usize = 6 << 20;

/// What an invocation asks for.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) function: Arc<Function>,
    pub(super) payload: Bytes,
    pub(super) amount: Amount,
    pub(super) request_id: String,
    /// Its share of what may be held, until the pool lets the payload go.
    _held: Held,
}

/// An invocation and what came of it so far.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) call: Call,
    pub(super) reply: oneshot::Sender<Result<v1::InvokeResponse, InvokeError>>,
    pub(super) placement: v1::Placement,
    pub(super) arrived: Instant,
    /// When it was placed; the last time that it was.
    began: Instant,
    code: Duration,
    init: Duration,
    log: proto::Log,
    /// Its answer, before the policy lets it go.
    pub(super) settled: Option<Result<v1::InvokeResponse, InvokeError>>,
    /// What went wrong the last time that it was placed.
    pub(super) trouble: Option<InvokeError>,
}

// === impl Call ===

impl Call {
    pub(super) fn new(function: Arc<Function>, params: InvokeParams, held: Held) -> Self {
        let amount = params.amount.unwrap_or(function.amount).into();
        Self {
            function,
            payload: params.payload,
            amount,
            request_id: params.request_id,
            _held: held,
        }
    }

    pub(super) fn demand(&self) -> Demand {
        Demand {
            account: self.function.name.account().into(),
            runtime: self.function.runtime.as_str().into(),
            code: Code {
                function: self.function.name.to_string().into(),
                uid: self.function.uid.to_string().into(),
                version: self.function.version,
            },
            amount: self.amount,
        }
    }
}

// === impl Request ===

impl Request {
    pub(super) fn new(call: Call, reply: oneshot::Sender<Result<v1::InvokeResponse, InvokeError>>) -> Self {
        let now = Instant::now();
        Self {
            call,
            reply,
            placement: v1::Placement::default(),
            arrived: now,
            began: now,
            code: Duration::ZERO,
            init: Duration::ZERO,
            log: proto::Log::default(),
            settled: None,
            trouble: None,
        }
    }

    /// It has a place from now on.
    pub(super) fn place(&mut self, machine: String, container: String, source: Source) {
        let source = match source {
            Source::IdleContainer => v1::placement::Source::IdleContainer,
            Source::ActiveMachine => v1::placement::Source::ActiveMachine,
            Source::WarmingMachine => v1::placement::Source::WarmingMachine,
            Source::NewMachine => v1::placement::Source::NewMachine,
        };
        self.began = Instant::now();
        (self.code, self.init, self.log) = Default::default();
        self.placement = v1::Placement {
            machine,
            container,
            source: source.into(),
            amount: Some(self.call.amount.into()),
        };
    }

    /// Its container was made, or could not be initialised.
    pub(super) fn made(&mut self, code: Duration, init: Duration, log: Option<proto::Log>) {
        (self.code, self.init) = (code, init);
        self.log = log.unwrap_or_default();
    }

    /// Its container could not be initialised.
    pub(super) fn failed(&mut self, error: proto::FunctionError) {
        let answer = proto::InvokeResponse {
            error: Some(error),
            ..Default::default()
        };
        self.answered(answer, Instant::now());
    }

    /// The guest has answered for it.
    pub(super) fn answered(&mut self, mut answer: proto::InvokeResponse, at: Instant) {
        if answer.error.is_none() && answer.payload.len() > ANSWER_LIMIT {
            answer.error = Some(proto::FunctionError {
                kind: proto::function_error::Kind::ResponseTooLarge.into(),
                r#type: "Function.ResponseSizeTooLarge".into(),
                message: format!(
                    "the answer has {} bytes, more than {ANSWER_LIMIT}",
                    answer.payload.len()
                ),
            });
            answer.payload = Bytes::new();
        }
        let payload = match &answer.error {
            Some(error) if answer.payload.is_empty() => error_object(error, &self.call.request_id),
            _ => answer.payload,
        };
        let (log, log_truncated) = joined(std::mem::take(&mut self.log), answer.log.unwrap_or_default());
        self.settled = Some(Ok(v1::InvokeResponse {
            request_id: self.call.request_id.clone(),
            payload,
            function_error: answer.error.map(|_| "Unhandled".to_owned()).unwrap_or_default(),
            log,
            log_truncated,
            placement: Some(self.placement.clone()),
            latency: Some(self.latency(at)),
            usage: answer.usage,
        }));
    }

    /// The parts add up to the total: what lies between them counts for the run.
    fn latency(&self, end: Instant) -> v1::Latency {
        let total = end.duration_since(self.arrived);
        let machine = self.began.duration_since(self.arrived);
        let run = total.saturating_sub(machine + self.code + self.init);
        let proto = |duration: Duration| prost_types::Duration::try_from(duration).ok();
        v1::Latency {
            total: proto(total),
            machine: proto(machine),
            code: proto(self.code),
            init: proto(self.init),
            run: proto(run),
        }
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
    let truncated = init.truncated || run.truncated || init.data.len() + run.data.len() > LOG_LIMIT;
    let mut log = if init.data.is_empty() {
        run.data
    } else {
        [init.data, run.data].concat().into()
    };
    log.truncate(LOG_LIMIT);
    (log, truncated)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::store::FunctionRecord;

    fn request() -> Request {
        let function = FunctionRecord {
            name: "accounts/a/functions/f".parse().unwrap(),
            uid: ulid::Ulid::generate(),
            runtime: "provided".into(),
            handler: String::new(),
            environment: Default::default(),
            timeout: Duration::from_secs(3),
            amount: v1::Amount {
                cpu_millis: 250,
                memory_mib: 128,
            },
            version: 1,
            code_sha256: "00".into(),
            code_size: 1,
            create_time: SystemTime::now(),
        };
        let params = InvokeParams {
            request_id: "id".into(),
            ..Default::default()
        };
        let held = crate::pool::payloads::Payloads::new(1 << 20).hold(0).unwrap();
        let function = Arc::new(Function::from(function));
        Request::new(Call::new(function, params, held), oneshot::channel().0)
    }

    fn log(text: &str) -> proto::Log {
        proto::Log {
            data: text.to_owned().into(),
            truncated: false,
        }
    }

    #[test]
    fn the_parts_of_the_latency_add_up() {
        let mut request = request();
        request.place(
            "machines/m".into(),
            "machines/m/containers/c".into(),
            Source::NewMachine,
        );
        request.made(Duration::from_millis(3), Duration::from_millis(4), Some(log("init\n")));
        let answer = proto::InvokeResponse {
            log: Some(log("run\n")),
            payload: "1".into(),
            ..Default::default()
        };
        request.answered(answer, request.arrived + Duration::from_millis(100));
        let response = request.settled.unwrap().unwrap();
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
        let mut request = request();
        request.failed(proto::FunctionError {
            kind: proto::function_error::Kind::Exited.into(),
            r#type: "Runtime.ExitError".into(),
            message: "Runtime exited with error: exit status 1".into(),
        });
        let response = request.settled.unwrap().unwrap();
        assert_eq!(response.function_error, "Unhandled");
        let object: serde_json::Value = serde_json::from_slice(&response.payload).unwrap();
        assert_eq!(object["errorType"], "Runtime.ExitError");
        assert!(object["errorMessage"].as_str().unwrap().contains("exit status 1"));
    }

    #[test]
    fn what_a_guest_says_is_bounded() {
        let mut request = request();
        request.made(Duration::ZERO, Duration::ZERO, Some(log(&"x".repeat(LOG_LIMIT))));
        let payload = vec![b'1'; ANSWER_LIMIT + 1].into();
        let answer = proto::InvokeResponse {
            payload,
            log: Some(log("y")),
            ..Default::default()
        };
        request.answered(answer, Instant::now());
        let response = request.settled.unwrap().unwrap();
        assert!(response.log_truncated && response.log.len() == LOG_LIMIT);
        assert!(response.payload.len() < 1000 && response.function_error == "Unhandled");
    }
}
