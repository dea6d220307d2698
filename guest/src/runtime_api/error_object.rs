//! What a runtime reports of a function that failed.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderMap};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use stoker_proto::limits::ANSWER_BYTES;

use super::body::Read;
use super::headers::{ERROR_BODY, ERROR_TYPE, text};
use super::session::Outcome;
use super::written_trailers;

/// Lambda's error type where the runtime gives none.
const UNKNOWN: &str = "Runtime.Unknown";
/// The longest error type that is taken, in bytes.
const TYPE_BYTES: usize = 256;
/// The largest body that has a cause, in bytes: it is parsed while all others wait.
const WITH_CAUSE_BYTES: usize = 1 << 20;
/// Of a body that has the cause of the error, for X-Ray, beside the error object.
const WITH_CAUSE: &str = "application/vnd.aws.lambda.error.cause+json";

/// An error object as callers know it.
#[derive(Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase", default)]
struct ErrorObject {
    error_message: String,
    error_type: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    stack_trace: Vec<String>,
}

/// What a runtime has posted to `/error`. None where it broke off.
pub(super) fn reported(headers: &HeaderMap, read: Read) -> Option<Outcome> {
    let object = match read {
        Read::BrokenOff => return None,
        Read::Whole { bytes, .. } if text(headers, CONTENT_TYPE) == WITH_CAUSE => without_cause(&bytes),
        Read::Whole { bytes, .. } => bytes,
        Read::TooLarge => {
            let message = format!("the error object that the function reported was over {ANSWER_BYTES} bytes");
            into_bytes(&json!({ "errorMessage": message }))
        }
    };
    Some(Outcome::Error {
        kind: kind(headers),
        object,
    })
}

/// What the trailers of an answer say, if they say that the function failed while it streamed; and how many bytes of the body
/// come before them.
pub(super) fn streamed(headers: &HeaderMap, trailers: &HeaderMap, body: &[u8]) -> Option<(Outcome, usize)> {
    if trailers.contains_key(ERROR_TYPE) {
        return Some((failed(trailers), body.len()));
    }
    if !written_trailers::are_announced(headers) {
        return None;
    }
    let (trailers, before) = written_trailers::at_end(body)?;
    Some((failed(&trailers), before))
}

fn failed(trailers: &HeaderMap) -> Outcome {
    let kind = kind(trailers);
    let told = BASE64_STANDARD.decode(text(trailers, ERROR_BODY)).unwrap_or_default();
    let object = match serde_json::from_slice(&told) {
        Ok(Value::Object(_)) => told.into(),
        _ => {
            let message = match String::from_utf8_lossy(&told) {
                text if text.is_empty() => "the function failed while it streamed its answer".into(),
                text => text,
            };
            into_bytes(&json!({ "errorType": kind, "errorMessage": message }))
        }
    };
    Outcome::Error { kind, object }
}

/// Leaves out what is not for callers.
fn without_cause(body: &[u8]) -> Bytes {
    let parsed = Some(body).filter(|body| body.len() <= WITH_CAUSE_BYTES);
    match parsed.map(serde_json::from_slice::<ErrorObject>) {
        Some(Ok(object)) => into_bytes(&object),
        Some(Err(_)) | None => Bytes::from_static(br#""Invalid error body""#),
    }
}

fn kind(headers: &HeaderMap) -> String {
    match text(headers, ERROR_TYPE) {
        kind if kind.is_empty() || kind.len() > TYPE_BYTES => UNKNOWN.to_owned(),
        kind => kind.to_owned(),
    }
}

fn into_bytes(object: &impl Serialize) -> Bytes {
    serde_json::to_vec(object).unwrap_or_default().into()
}

#[cfg(test)]
mod tests {
    use hyper::header::{HeaderName, HeaderValue, TRAILER};

    use super::*;

    fn headers(all: &[(HeaderName, &str)]) -> HeaderMap {
        let pair = |(name, value): &(_, &str)| (Clone::clone(name), HeaderValue::from_str(value).unwrap());
        all.iter().map(pair).collect()
    }

    fn whole(body: &str) -> Read {
        Read::Whole {
            bytes: body.to_owned().into(),
            trailers: HeaderMap::new(),
        }
    }

    fn object(outcome: Option<Outcome>) -> (String, Value) {
        let Some(Outcome::Error { kind, object }) = outcome else {
            panic!("no error: {outcome:?}")
        };
        (kind, serde_json::from_slice(&object).unwrap())
    }

    #[test]
    fn the_cause_is_left_out() {
        let body =
            r#"{"errorMessage":"m","errorType":"T","stackTrace":["a","b"],"errorCause":{"message":"secret"},"more":1}"#;
        let with_cause = headers(&[(CONTENT_TYPE, WITH_CAUSE), (ERROR_TYPE, "Function.T")]);
        let (kind, told) = object(reported(&with_cause, whole(body)));
        assert_eq!(kind, "Function.T");
        assert_eq!(
            told,
            json!({ "errorMessage": "m", "errorType": "T", "stackTrace": ["a", "b"] })
        );
        for wrong in ["", "{", "[1]", r#"{"errorMessage":7}"#] {
            let (_, told) = object(reported(&with_cause, whole(wrong)));
            assert_eq!(told, json!("Invalid error body"), "{wrong}");
        }
        // Of any other type the body is passed on as it is.
        let plain = headers(&[(CONTENT_TYPE, "application/json")]);
        let (kind, told) = object(reported(&plain, whole(body)));
        assert_eq!((kind.as_str(), &told["more"]), (UNKNOWN, &json!(1)));
    }

    #[test]
    fn an_error_that_breaks_off_is_none_and_one_that_is_too_large_says_so() {
        assert_eq!(reported(&HeaderMap::new(), Read::BrokenOff), None);
        let (_, told) = object(reported(&HeaderMap::new(), Read::TooLarge));
        assert!(told["errorMessage"].as_str().unwrap().contains("was over"));
    }

    /// The error object of a body with these trailers, where trailers were announced or not.
    fn of_stream(announced: bool, trailers: &HeaderMap, body: &[u8]) -> Option<(String, Value)> {
        let announced: &[_] = if announced { &[(TRAILER, "x")] } else { &[] };
        let outcome = streamed(&headers(announced), trailers, body);
        outcome.map(|(outcome, before)| {
            assert_eq!(body.get(..before), Some(&b"body"[..]));
            object(Some(outcome))
        })
    }

    #[test]
    fn trailers_tell_of_a_stream_that_failed() {
        assert_eq!(of_stream(true, &HeaderMap::new(), b"body"), None);
        let encoded = |text: &str| BASE64_STANDARD.encode(text);
        for (body, told) in [
            (
                encoded(r#"{"errorType":"T","errorMessage":"m"}"#),
                json!({ "errorType": "T", "errorMessage": "m" }),
            ),
            (
                encoded("no JSON"),
                json!({ "errorType": "Runtime.StreamError", "errorMessage": "no JSON" }),
            ),
            (
                "no Base64".to_owned(),
                json!({
                    "errorType": "Runtime.StreamError",
                    "errorMessage": "the function failed while it streamed its answer"
                }),
            ),
        ] {
            let told = Some(("Runtime.StreamError".to_owned(), told));
            let trailers = headers(&[(ERROR_TYPE, "Runtime.StreamError"), (ERROR_BODY, &body)]);
            assert_eq!(of_stream(false, &trailers, b"body"), told);
            let written = format!(
                "bodyLambda-Runtime-Function-Error-Type: Runtime.StreamError\r\nLambda-Runtime-Function-Error-Body: {body}\r\n"
            );
            assert_eq!(of_stream(true, &HeaderMap::new(), written.as_bytes()), told);
            // It is an answer like any other where no trailers were announced, or more follows.
            assert_eq!(of_stream(false, &HeaderMap::new(), written.as_bytes()), None);
            assert_eq!(of_stream(true, &HeaderMap::new(), (written + "more").as_bytes()), None);
        }
        for end in [
            "",
            "x",
            "x\r\n",
            "x\r\n\r\n",
            "x\r\nLambda-Runtime-Function-Error-Other: x\r\n",
        ] {
            let body = format!("Lambda-Runtime-Function-Error-Type: {end}");
            assert_eq!(of_stream(true, &HeaderMap::new(), body.as_bytes()), None, "{end:?}");
        }
    }
}
