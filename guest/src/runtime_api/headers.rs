//! The headers of the Runtime and Extensions API.

use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, TRAILER};

/// Lambda's type of an error that a runtime reports; also a trailer.
pub(super) const ERROR_TYPE: HeaderName = HeaderName::from_static("lambda-runtime-function-error-type");
/// A trailer: the error object of an answer that fails while it is streamed, in Base64.
pub(super) const ERROR_BODY: HeaderName = HeaderName::from_static("lambda-runtime-function-error-body");
/// How an answer is sent: `streaming`, or absent.
pub(super) const RESPONSE_MODE: HeaderName = HeaderName::from_static("lambda-runtime-function-response-mode");
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("lambda-runtime-aws-request-id");
pub(super) const DEADLINE: HeaderName = HeaderName::from_static("lambda-runtime-deadline-ms");
pub(super) const FUNCTION_ARN: HeaderName = HeaderName::from_static("lambda-runtime-invoked-function-arn");
pub(super) const TRACE_ID: HeaderName = HeaderName::from_static("lambda-runtime-trace-id");
pub(super) const EXTENSION_NAME: HeaderName = HeaderName::from_static("lambda-extension-name");
pub(super) const EXTENSION_ID: HeaderName = HeaderName::from_static("lambda-extension-identifier");
pub(super) const EXTENSION_EVENT: HeaderName = HeaderName::from_static("lambda-extension-event-identifier");
pub(super) const EXTENSION_ERROR_TYPE: HeaderName = HeaderName::from_static("lambda-extension-function-error-type");
/// What more an extension wants to know when it registers: `accountId`.
pub(super) const EXTENSION_FEATURES: HeaderName = HeaderName::from_static("lambda-extension-accept-feature");

/// Those of requests that something here reads.
const READ: [HeaderName; 8] = [
    CONTENT_TYPE,
    TRAILER,
    ERROR_TYPE,
    RESPONSE_MODE,
    EXTENSION_NAME,
    EXTENSION_ID,
    EXTENSION_ERROR_TYPE,
    EXTENSION_FEATURES,
];
/// The most of one of those, in bytes.
const LIMIT: usize = 256;

/// Copies what is read: the rest of a head of up to 1 MiB can be let go.
pub(super) fn needed(headers: &HeaderMap) -> HeaderMap {
    let value = |name: &HeaderName| headers.get(name).filter(|value| value.len() <= LIMIT);
    let copies = READ.into_iter().filter_map(|name| {
        // A clone would keep the whole head.
        let copy = HeaderValue::from_bytes(value(&name)?.as_bytes()).ok()?;
        Some((name, copy))
    });
    copies.collect()
}

/// A header as text, empty where it is absent or is none.
pub(super) fn text(headers: &HeaderMap, name: HeaderName) -> &str {
    headers
        .get(name)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default()
}
