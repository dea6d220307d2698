//! What may be subscribed to, and how it is to be delivered (AWS Lambda Developer Guide, "Lambda Telemetry API reference" and
//! "Using the Lambda Logs API").

use std::ops::RangeInclusive;
use std::time::Duration;

use hyper::Uri;
use serde::Deserialize;

use super::event::{Kind, Schema};

/// Lambda's names of the only place that is delivered to: the container itself.
const HOSTS: [&str; 2] = ["sandbox.localdomain", "sandbox"];
/// The Runtime API's own port.
const RESERVED_PORT: u16 = 9001;
/// The longest path and query of a destination, in bytes.
const PATH_BYTES: usize = 2048;

const MAX_ITEMS: RangeInclusive<u64> = 1_000..=10_000;
const MAX_BYTES: RangeInclusive<u64> = 262_144..=1_048_576;
const TIMEOUT_MS: RangeInclusive<u64> = 25..=30_000;
const DEFAULT_MAX_ITEMS: u64 = 10_000;
const DEFAULT_MAX_BYTES: u64 = 262_144;
const DEFAULT_TIMEOUT_MS: u64 = 1_000;

/// By which of Lambda's two APIs one subscribes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::runtime_api) enum Api {
    Logs,
    Telemetry,
}

/// A subscription that is in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) schema: Schema,
    pub(super) kinds: Vec<Kind>,
    pub(super) buffering: Buffering,
    pub(super) destination: Destination,
}

/// How much is kept for how long before it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Buffering {
    pub(super) items: usize,
    pub(super) bytes: usize,
    pub(super) timeout: Duration,
}

/// Where it is sent, in the container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Destination {
    pub(super) port: u16,
    pub(super) protocol: Protocol,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    Http { method: Method, host: String, path: String },
    Tcp,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub(super) enum Method {
    #[default]
    Post,
    Put,
}

/// What is wrong with a subscription.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Wrong {
    /// It is no JSON of the right form.
    Form(String),
    /// Its values are not those that are allowed.
    Values(String),
    /// It is to be delivered to where nothing is.
    Place(&'static str),
}

/// As it is sent.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sent {
    schema_version: Option<String>,
    types: Vec<Kind>,
    destination: SentDestination,
    #[serde(default)]
    buffering: SentBuffering,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct SentBuffering {
    max_items: Option<u64>,
    max_bytes: Option<u64>,
    timeout_ms: Option<u64>,
}

#[derive(Deserialize)]
struct SentDestination {
    protocol: SentProtocol,
    #[serde(rename = "URI")]
    uri: Option<String>,
    port: Option<u16>,
    #[serde(default)]
    method: Method,
    encoding: Option<Encoding>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
enum SentProtocol {
    Http,
    Tcp,
}

#[derive(Clone, Copy, Deserialize)]
enum Encoding {
    #[serde(rename = "JSON")]
    Json,
}

// === impl Api ===

impl Api {
    /// What Lambda's error types begin with.
    pub(in crate::runtime_api) fn name(self) -> &'static str {
        match self {
            Self::Logs => "Logs",
            Self::Telemetry => "Telemetry",
        }
    }

    /// The form of what is told by this version. Those of the Telemetry API are the same here: since 2022-12-13 lines are JSON
    /// objects where the function's log format is JSON, which there is none of, and 2025-01-29 is for AWS's managed instances,
    /// else "backward compatible".
    fn schema(self, version: Option<&str>) -> Result<Schema, &'static str> {
        match (self, version) {
            (Self::Logs, None | Some("2020-08-15")) => Ok(Schema::Logs),
            (Self::Logs, Some("2021-03-18")) => Ok(Schema::LogsWithRuntimeDone),
            (Self::Logs, _) => Err("schemaVersion should be 2020-08-15 or 2021-03-18"),
            (Self::Telemetry, Some("2022-07-01" | "2022-12-13" | "2025-01-29")) => Ok(Schema::Telemetry),
            (Self::Telemetry, _) => Err("schemaVersion should be 2022-07-01, 2022-12-13 or 2025-01-29"),
        }
    }
}

// === impl Request ===

impl Request {
    /// What is asked for by the body of a request; or all that is wrong with it.
    pub(super) fn parse(api: Api, body: &[u8]) -> Result<Self, Wrong> {
        let sent: Sent = serde_json::from_slice(body).map_err(|error| Wrong::Form(error.to_string()))?;
        let mut problems: Vec<String> = Vec::new();
        let schema = api.schema(sent.schema_version.as_deref());
        if let Err(problem) = schema {
            problems.push(problem.to_owned());
        }
        if sent.types.is_empty() {
            problems.push("types should not be empty".to_owned());
        }
        let mut seen = sent.types.iter().enumerate();
        if seen.any(|(index, kind)| sent.types.iter().take(index).any(|before| before == kind)) {
            problems.push("types should be unique".to_owned());
        }
        let mut within = |name: &str, value: Option<u64>, range: RangeInclusive<u64>, default| {
            let value = value.unwrap_or(default);
            if !range.contains(&value) {
                let (least, most) = range.into_inner();
                problems.push(format!("{name} should be between {least} and {most}"));
            }
            value
        };
        let buffering = Buffering {
            items: within("maxItems", sent.buffering.max_items, MAX_ITEMS, DEFAULT_MAX_ITEMS) as usize,
            bytes: within("maxBytes", sent.buffering.max_bytes, MAX_BYTES, DEFAULT_MAX_BYTES) as usize,
            timeout: Duration::from_millis(within(
                "timeoutMs",
                sent.buffering.timeout_ms,
                TIMEOUT_MS,
                DEFAULT_TIMEOUT_MS,
            )),
        };
        let destination = match sent.destination.checked() {
            Ok(destination) => Some(destination),
            Err(Wrong::Place(why)) => return Err(Wrong::Place(why)),
            Err(Wrong::Form(problem) | Wrong::Values(problem)) => {
                problems.push(problem);
                None
            }
        };
        match (schema, destination) {
            (Ok(schema), Some(destination)) if problems.is_empty() => Ok(Self {
                schema,
                kinds: sent.types,
                buffering,
                destination,
            }),
            _ => Err(Wrong::Values(problems.join("; "))),
        }
    }
}

// === impl SentDestination ===

impl SentDestination {
    fn checked(self) -> Result<Destination, Wrong> {
        let wrong = |problem: &str| Wrong::Values(problem.to_owned());
        // There is no other.
        let (None | Some(Encoding::Json)) = self.encoding;
        let uri = self.uri.map(|uri| uri.parse::<Uri>());
        let uri = uri
            .transpose()
            .map_err(|error| wrong(&format!("URI is not valid: {error}")))?;
        if let Some(uri) = &uri {
            let scheme = if self.protocol == SentProtocol::Http {
                "http"
            } else {
                "tcp"
            };
            if uri.scheme_str() != Some(scheme) {
                return Err(Wrong::Place(
                    "Only the scheme of the protocol is supported, without TLS.",
                ));
            }
            if !uri.host().is_some_and(|host| HOSTS.contains(&host)) {
                return Err(Wrong::Place("Only the host name sandbox.localdomain is supported."));
            }
            if uri
                .authority()
                .is_some_and(|authority| authority.as_str().contains('@'))
            {
                return Err(wrong("URI should name no user"));
            }
        }
        let port = uri.as_ref().and_then(Uri::port_u16).or(self.port);
        let protocol = match (self.protocol, uri) {
            (SentProtocol::Tcp, _) => Protocol::Tcp,
            (SentProtocol::Http, None) => return Err(wrong("URI is not provided")),
            (SentProtocol::Http, Some(uri)) => {
                let path = uri.path_and_query().map_or("/", |path| path.as_str());
                if path.len() > PATH_BYTES {
                    return Err(wrong(&format!(
                        "the path of URI should have at most {PATH_BYTES} bytes"
                    )));
                }
                Protocol::Http {
                    method: self.method,
                    host: uri.authority().map_or_else(String::new, ToString::to_string),
                    path: path.to_owned(),
                }
            }
        };
        match port {
            None => Err(wrong("URI port is not provided")),
            Some(0) => Err(wrong("port should be between 1 and 65535")),
            Some(RESERVED_PORT) => Err(wrong("port 9001 is reserved")),
            Some(port) => Ok(Destination { port, protocol }),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn sent(change: impl FnOnce(&mut Value)) -> Vec<u8> {
        let mut sent = json!({
            "schemaVersion": "2022-12-13",
            "types": ["platform", "function", "extension"],
            "buffering": { "maxItems": 1000, "maxBytes": 262_144, "timeoutMs": 25 },
            "destination": { "protocol": "HTTP", "URI": "http://sandbox.localdomain:8080/a?b" },
        });
        change(&mut sent);
        serde_json::to_vec(&sent).unwrap()
    }

    #[test]
    fn takes_what_is_documented() {
        let request = Request::parse(Api::Telemetry, &sent(|_| {})).unwrap();
        assert_eq!(
            request,
            Request {
                schema: Schema::Telemetry,
                kinds: vec![Kind::Platform, Kind::Function, Kind::Extension],
                buffering: Buffering {
                    items: 1000,
                    bytes: 262_144,
                    timeout: Duration::from_millis(25),
                },
                destination: Destination {
                    port: 8080,
                    protocol: Protocol::Http {
                        method: Method::Post,
                        host: "sandbox.localdomain:8080".to_owned(),
                        path: "/a?b".to_owned(),
                    },
                },
            }
        );
        for version in ["2022-07-01", "2025-01-29"] {
            let sent = sent(|sent| sent["schemaVersion"] = version.into());
            assert_eq!(Request::parse(Api::Telemetry, &sent).unwrap(), request);
        }
        let least = br#"{"types":["platform"],"destination":{"protocol":"HTTP","URI":"http://sandbox:1"}}"#;
        let request = Request::parse(Api::Logs, least).unwrap();
        assert_eq!(request.schema, Schema::Logs);
        assert_eq!(
            request.buffering,
            Buffering {
                items: 10_000,
                bytes: 262_144,
                timeout: Duration::from_secs(1),
            }
        );
        let logs = sent(|sent| {
            sent["schemaVersion"] = "2021-03-18".into();
            sent["destination"] = json!({ "protocol": "TCP", "port": 7 });
        });
        let request = Request::parse(Api::Logs, &logs).unwrap();
        assert_eq!(request.schema, Schema::LogsWithRuntimeDone);
        let tcp = Destination {
            port: 7,
            protocol: Protocol::Tcp,
        };
        assert_eq!(request.destination, tcp);
    }

    #[test]
    fn says_all_that_is_wrong() {
        let wrong = |change: fn(&mut Value)| match Request::parse(Api::Telemetry, &sent(change)) {
            Err(Wrong::Values(problems)) => problems,
            other => panic!("{other:?}"),
        };
        for (change, problems) in [
            (
                (|sent| sent["types"] = json!([])) as fn(&mut Value),
                "types should not be empty",
            ),
            (
                |sent| sent["types"] = json!(["platform", "platform"]),
                "types should be unique",
            ),
            (
                |sent| sent["schemaVersion"] = "2020-08-15".into(),
                "schemaVersion should be 2022-07-01, 2022-12-13 or 2025-01-29",
            ),
            (
                |sent| sent["buffering"] = json!({ "maxItems": 999, "maxBytes": 1_048_577, "timeoutMs": 24 }),
                "maxItems should be between 1000 and 10000; maxBytes should be between 262144 and 1048576; \
                 timeoutMs should be between 25 and 30000",
            ),
            (
                |sent| sent["destination"]["URI"] = "http://sandbox.localdomain".into(),
                "URI port is not provided",
            ),
            (
                |sent| sent["destination"]["URI"] = "http://sandbox.localdomain:9001".into(),
                "port 9001 is reserved",
            ),
            (
                |sent| sent["destination"]["URI"] = "http://a:b@sandbox.localdomain:80".into(),
                "URI should name no user",
            ),
            (|sent| sent["destination"]["URI"] = Value::Null, "URI is not provided"),
        ] {
            assert_eq!(wrong(change), problems);
        }
    }

    #[test]
    fn delivers_to_nowhere_else() {
        for uri in [
            "http://10.0.0.1:80",
            "http://localhost:80",
            "https://sandbox.localdomain:80",
            "http://sandbox.localdomain.example:80",
        ] {
            let sent = sent(|sent| sent["destination"]["URI"] = uri.into());
            let refused = Request::parse(Api::Telemetry, &sent);
            assert!(matches!(refused, Err(Wrong::Place(_))), "{uri}: {refused:?}");
        }
        for body in ["", "[]", "{}", r#"{"types":["all"]}"#] {
            let refused = Request::parse(Api::Logs, body.as_bytes());
            assert!(matches!(refused, Err(Wrong::Form(_))), "{body}: {refused:?}");
        }
    }
}
