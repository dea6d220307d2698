//! What is answered to runtimes and extensions, in Lambda's words.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

pub(super) type Reply = Response<Full<Bytes>>;

pub(super) fn accepted() -> Reply {
    json(StatusCode::ACCEPTED, Bytes::from_static(br#"{"status":"OK"}"#))
}

/// The body is over `limit` bytes.
pub(super) fn too_large(limit: usize) -> Reply {
    error(
        StatusCode::PAYLOAD_TOO_LARGE,
        "RequestEntityTooLarge",
        &format!("Exceeded maximum allowed payload size ({limit} bytes)."),
    )
}

/// The body ended before it should have.
pub(super) fn truncated() -> Reply {
    error(
        StatusCode::BAD_REQUEST,
        "TruncatedHTTPRequest",
        "HTTP request detected as truncated",
    )
}

/// An error that the peer may read as JSON.
pub(super) fn error(status: StatusCode, kind: &str, message: &str) -> Reply {
    let object = serde_json::json!({ "errorMessage": message, "errorType": kind });
    json(status, object.to_string().into())
}

pub(super) fn json(status: StatusCode, body: Bytes) -> Reply {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

pub(super) fn plain(status: StatusCode) -> Reply {
    let mut response = Response::new(Full::default());
    *response.status_mut() = status;
    response
}
