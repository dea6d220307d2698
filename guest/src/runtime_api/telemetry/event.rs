//! What subscribers are told, in the form of the API by which they subscribed (AWS Lambda Developer Guide, "Lambda Telemetry
//! API Event schema reference", and "Log messages" of the Logs API).

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::super::extensions::Event as Heard;
use super::subscription::Api;

/// How it was started, in Lambda's words.
const INITIALIZATION: &str = "on-demand";

/// What kind of telemetry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// What becomes of the container and its invocations.
    Platform,
    /// A line that the runtime wrote.
    Function,
    /// A line that an external extension wrote.
    Extension,
}

/// The forms in which an event may be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Schema {
    Logs,
    LogsWithRuntimeDone,
    Telemetry,
}

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    /// Lambda's: success, error, failure, timeout.
    pub(super) status: &'static str,
    pub(super) error_type: Option<String>,
}

/// A part of an invocation's time.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Span {
    pub(super) name: &'static str,
    pub(super) start: SystemTime,
    pub(super) duration: Duration,
}

/// An event.
#[derive(Clone, Debug)]
pub(super) enum Event<'a> {
    InitStart {
        function: &'a str,
        version: &'a str,
    },
    InitRuntimeDone(&'a Ending),
    InitReport {
        ending: &'a Ending,
        duration: Duration,
    },
    Extension {
        name: &'a str,
        state: &'a str,
        events: &'a [Heard],
    },
    Subscription {
        api: Api,
        name: &'a str,
        kinds: &'a [Kind],
    },
    Start {
        request: &'a str,
        version: &'a str,
        trace: &'a str,
    },
    RuntimeDone {
        request: &'a str,
        trace: &'a str,
        ending: &'a Ending,
        duration: Duration,
        produced_bytes: Option<usize>,
        spans: &'a [Span],
    },
    End {
        request: &'a str,
    },
    /// Why the container ended in an invocation.
    Fault(&'a str),
    Report {
        request: &'a str,
        trace: &'a str,
        ending: &'a Ending,
        duration: Duration,
        /// Of the first invocation.
        init: Option<Duration>,
        memory_mib: u32,
        memory_peak_bytes: u64,
    },
    LogsDropped {
        records: u64,
        bytes: u64,
    },
    Line(Kind, &'a str),
}

// === impl Kind ===

impl Kind {
    /// The type of the events that are its lines.
    fn name(self) -> &'static str {
        match self {
            Self::Platform => "platform",
            Self::Function => "function",
            Self::Extension => "extension",
        }
    }
}

// === impl Schema ===

impl Schema {
    pub(super) const ALL: [Self; 3] = [Self::Logs, Self::LogsWithRuntimeDone, Self::Telemetry];
}

// === impl Ending ===

impl Ending {
    pub(super) fn success() -> Self {
        Self {
            status: "success",
            error_type: None,
        }
    }

    pub(super) fn of_error(status: &'static str, error_type: impl Into<String>) -> Self {
        Self {
            status,
            error_type: Some(error_type.into()),
        }
    }
}

// === impl Event ===

impl Event<'_> {
    pub(super) fn kind(&self) -> Kind {
        match self {
            Self::Line(kind, _) => *kind,
            _ => Kind::Platform,
        }
    }

    /// About what it takes, in bytes.
    pub(super) fn size(&self) -> usize {
        match self {
            Self::Line(_, line) => line.len(),
            _ => 0,
        }
    }

    /// As JSON. None: those who subscribed by this form do not hear of it.
    pub(super) fn render(&self, schema: Schema, time: SystemTime) -> Option<Bytes> {
        if let Self::Line(kind, line) = self {
            // By far the most.
            return match schema {
                Schema::Telemetry => told(kind.name(), time, line),
                // With its end, as Lambda documents it for this API alone.
                Schema::Logs | Schema::LogsWithRuntimeDone => told(kind.name(), time, &format!("{line}\n")),
            };
        }
        let (name, record) = match schema {
            Schema::Telemetry => self.telemetry()?,
            Schema::Logs | Schema::LogsWithRuntimeDone => self.logs(schema)?,
        };
        told(name, time, &record)
    }

    fn telemetry(&self) -> Option<(&'static str, Value)> {
        Some(match self {
            Self::InitStart { function, version } => (
                "platform.initStart",
                json!({
                    "initializationType": INITIALIZATION,
                    "phase": "init",
                    "functionName": function,
                    "functionVersion": version,
                }),
            ),
            Self::InitRuntimeDone(ending) => (
                "platform.initRuntimeDone",
                ended(json!({ "initializationType": INITIALIZATION, "phase": "init" }), ending),
            ),
            Self::InitReport { ending, duration } => (
                "platform.initReport",
                ended(
                    json!({
                        "initializationType": INITIALIZATION,
                        "phase": "init",
                        "metrics": { "durationMs": milliseconds(*duration) },
                    }),
                    ending,
                ),
            ),
            Self::Subscription { api, name, kinds } => match api {
                Api::Telemetry => (
                    "platform.telemetrySubscription",
                    json!({ "name": name, "state": "Subscribed", "types": kinds }),
                ),
                Api::Logs => return None,
            },
            Self::Start {
                request,
                version,
                trace,
            } => (
                "platform.start",
                json!({ "requestId": request, "version": version, "tracing": tracing(trace) }),
            ),
            Self::RuntimeDone {
                request,
                trace,
                ending,
                duration,
                produced_bytes,
                spans,
            } => {
                let mut metrics = json!({ "durationMs": milliseconds(*duration) });
                insert(&mut metrics, "producedBytes", *produced_bytes);
                let spans: Vec<Value> = spans.iter().map(Span::json).collect();
                let record = json!({
                    "requestId": request,
                    "metrics": metrics,
                    "spans": spans,
                    "tracing": tracing(trace),
                });
                ("platform.runtimeDone", ended(record, ending))
            }
            Self::Report {
                request, trace, ending, ..
            } => {
                let record = json!({
                    "requestId": request,
                    "metrics": self.report_metrics(),
                    "tracing": tracing(trace),
                });
                ("platform.report", ended(record, ending))
            }
            Self::End { .. } | Self::Fault(_) | Self::Line(..) => return None,
            Self::Extension { name, state, events } => extension(name, state, events),
            Self::LogsDropped { records, bytes } => dropped(
                *records,
                *bytes,
                "Some logs were dropped because the downstream consumer is slower than the logs production rate",
            ),
        })
    }

    fn logs(&self, schema: Schema) -> Option<(&'static str, Value)> {
        Some(match self {
            Self::InitStart { .. } | Self::InitRuntimeDone(_) | Self::InitReport { .. } | Self::Line(..) => {
                return None;
            }
            Self::Subscription { api, name, kinds } => match api {
                Api::Logs => (
                    "platform.logsSubscription",
                    json!({ "name": name, "state": "Subscribed", "types": kinds }),
                ),
                Api::Telemetry => return None,
            },
            Self::Start { request, version, .. } => {
                ("platform.start", json!({ "requestId": request, "version": version }))
            }
            Self::RuntimeDone { request, ending, .. } => {
                if schema == Schema::Logs {
                    return None;
                }
                // There is no other word there for an error.
                let status = if ending.status == "error" {
                    "failure"
                } else {
                    ending.status
                };
                (
                    "platform.runtimeDone",
                    json!({ "requestId": request, "status": status }),
                )
            }
            Self::End { request } => ("platform.end", json!({ "requestId": request })),
            Self::Report { request, .. } => (
                "platform.report",
                json!({ "requestId": request, "metrics": self.report_metrics() }),
            ),
            Self::Fault(text) => ("platform.fault", (*text).into()),
            Self::Extension { name, state, events } => extension(name, state, events),
            Self::LogsDropped { records, bytes } => dropped(
                *records,
                *bytes,
                "Consumer seems to have fallen behind as it has not acknowledged receipt of logs.",
            ),
        })
    }

    fn report_metrics(&self) -> Value {
        let Self::Report {
            duration,
            init,
            memory_mib,
            memory_peak_bytes,
            ..
        } = self
        else {
            return Value::Null;
        };
        let mut metrics = json!({
            "durationMs": milliseconds(*duration),
            "billedDurationMs": duration.as_micros().div_ceil(1000) as u64,
            "memorySizeMB": memory_mib,
            "maxMemoryUsedMB": memory_peak_bytes.div_ceil(1 << 20),
        });
        insert(&mut metrics, "initDurationMs", init.map(milliseconds));
        metrics
    }
}

// === impl Span ===

impl Span {
    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "start": timestamp(self.start),
            "durationMs": milliseconds(self.duration),
        })
    }
}

fn extension(name: &str, state: &str, events: &[Heard]) -> (&'static str, Value) {
    let record = json!({ "name": name, "state": state, "events": events });
    ("platform.extension", record)
}

fn dropped(records: u64, bytes: u64, reason: &str) -> (&'static str, Value) {
    let record = json!({ "droppedRecords": records, "droppedBytes": bytes, "reason": reason });
    ("platform.logsDropped", record)
}

fn tracing(trace: &str) -> Value {
    json!({ "type": "X-Amzn-Trace-Id", "value": trace })
}

fn ended(mut record: Value, ending: &Ending) -> Value {
    insert(&mut record, "status", Some(ending.status));
    insert(&mut record, "errorType", ending.error_type.as_deref());
    record
}

fn insert(object: &mut Value, name: &str, value: Option<impl Into<Value>>) {
    if let (Some(object), Some(value)) = (object.as_object_mut(), value) {
        object.insert(name.to_owned(), value.into());
    }
}

/// To the microsecond.
fn milliseconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}

/// ISO 8601, in UTC and to the millisecond.
fn told(name: &str, time: SystemTime, record: &(impl Serialize + ?Sized)) -> Option<Bytes> {
    #[derive(Serialize)]
    struct Told<'a, R: ?Sized> {
        time: String,
        r#type: &'a str,
        record: &'a R,
    }
    let event = Told {
        time: timestamp(time),
        r#type: name,
        record,
    };
    // What is made here is JSON.
    serde_json::to_vec(&event).ok().map(Bytes::from)
}

fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = prost_types::Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(0),
        nanos: 0,
    };
    let seconds = seconds.to_string();
    format!("{}.{:03}Z", seconds.trim_end_matches('Z'), since.subsec_millis())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(event: &Event<'_>, schema: Schema) -> Option<Value> {
        let time = UNIX_EPOCH + Duration::from_millis(1_700_000_000_007);
        let rendered = event.render(schema, time)?;
        let value: Value = serde_json::from_slice(&rendered).unwrap();
        assert_eq!(value["time"], "2023-11-14T22:13:20.007Z");
        Some(value)
    }

    #[test]
    fn a_line_is_told_as_each_api_has_it() {
        let line = Event::Line(Kind::Function, "a \"b\"");
        for (schema, record) in [(Schema::Telemetry, "a \"b\""), (Schema::Logs, "a \"b\"\n")] {
            let told = told(&line, schema).unwrap();
            assert_eq!((&told["type"], &told["record"]), (&json!("function"), &json!(record)));
        }
    }

    #[test]
    fn who_has_the_older_api_hears_of_what_it_knows() {
        let ending = Ending::of_error("error", "T");
        let done = Event::RuntimeDone {
            request: "r",
            trace: "t",
            ending: &ending,
            duration: Duration::from_micros(1_500),
            produced_bytes: Some(3),
            spans: &[],
        };
        assert_eq!(told(&done, Schema::Logs), None);
        let older = told(&done, Schema::LogsWithRuntimeDone).unwrap();
        assert_eq!(older["record"], json!({ "requestId": "r", "status": "failure" }));
        let newer = told(&done, Schema::Telemetry).unwrap();
        assert_eq!(
            newer["record"],
            json!({
                "requestId": "r",
                "status": "error",
                "errorType": "T",
                "metrics": { "durationMs": 1.5, "producedBytes": 3 },
                "spans": [],
                "tracing": { "type": "X-Amzn-Trace-Id", "value": "t" },
            })
        );
        let end = Event::End { request: "r" };
        assert!(told(&end, Schema::Logs).is_some() && told(&end, Schema::Telemetry).is_none());
        let start = Event::InitStart {
            function: "f",
            version: "1",
        };
        assert!(told(&start, Schema::Logs).is_none() && told(&start, Schema::Telemetry).is_some());
    }

    #[test]
    fn each_api_has_its_own_words() {
        let fault = Event::Fault("RequestId: r Error: e\nT");
        for schema in [Schema::Logs, Schema::LogsWithRuntimeDone] {
            let told = told(&fault, schema).unwrap();
            assert_eq!(told["type"], "platform.fault");
            assert_eq!(told["record"], "RequestId: r Error: e\nT");
        }
        assert_eq!(told(&fault, Schema::Telemetry), None);
        let dropped = Event::LogsDropped { records: 2, bytes: 30 };
        for (schema, reason) in [(Schema::Telemetry, "Some logs"), (Schema::Logs, "Consumer seems")] {
            let record = &told(&dropped, schema).unwrap()["record"];
            assert_eq!(
                (&record["droppedRecords"], &record["droppedBytes"]),
                (&json!(2), &json!(30))
            );
            assert!(record["reason"].as_str().unwrap().starts_with(reason), "{record}");
        }
        // A version is no other form where there is nothing of what differs.
        let line = Event::Line(Kind::Function, r#"{"level":"INFO"}"#);
        assert_eq!(told(&line, Schema::Telemetry).unwrap()["record"], r#"{"level":"INFO"}"#);
    }

    #[test]
    fn a_report_rounds_what_is_billed_up() {
        let report = |init| Event::Report {
            request: "r",
            trace: "t",
            ending: &Ending {
                status: "success",
                error_type: None,
            },
            duration: Duration::from_micros(2_001),
            init,
            memory_mib: 128,
            memory_peak_bytes: (30 << 20) + 1,
        };
        let first = told(&report(Some(Duration::from_millis(7))), Schema::Logs).unwrap();
        assert_eq!(
            first["record"]["metrics"],
            json!({
                "durationMs": 2.001,
                "billedDurationMs": 3,
                "memorySizeMB": 128,
                "maxMemoryUsedMB": 31,
                "initDurationMs": 7.0,
            })
        );
        let next = told(&report(None), Schema::Telemetry).unwrap();
        assert_eq!(next["record"]["status"], "success");
        assert!(next["record"]["metrics"].get("initDurationMs").is_none());
    }
}
