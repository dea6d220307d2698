use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::NotBegun;
use super::*;

/// A served API and where to reach it.
async fn served() -> (RuntimeApi, std::net::SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let api = RuntimeApi::new("arn:aws:lambda:us-east-1:acme:function:f:1".to_owned());
    tokio::spawn(api.clone().serve(listener));
    (api, address)
}

/// Sends bytes as they are and reads until the server closes.
async fn raw(address: std::net::SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // The server may answer and close before it has read everything.
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

async fn get(address: std::net::SocketAddr, path: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    raw(address, request.as_bytes()).await
}

async fn post(address: std::net::SocketAddr, path: &str, headers: &str, body: &[u8]) -> String {
    let mut request = format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    raw(address, &request).await
}

fn invocation(id: &str) -> Invocation {
    Invocation {
        id: id.to_owned(),
        payload: Bytes::from_static(br#"{"a":1}"#),
        deadline_ms: 1_700_000_000_123,
    }
}

const NEXT: &str = "/2018-06-01/runtime/invocation/next";
const ID: &str = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";

/// Invokes, and takes the work as the runtime would.
async fn invoked(api: &RuntimeApi, address: std::net::SocketAddr) -> (tokio::sync::oneshot::Receiver<Outcome>, String) {
    let asked = tokio::spawn(async move { get(address, NEXT).await });
    assert_eq!(api.initialised().await, Init::Done);
    let outcome = api.invoke(invocation(ID)).unwrap();
    (outcome, asked.await.unwrap())
}

#[tokio::test]
async fn an_invocation_goes_round() {
    let (api, address) = served().await;
    let (outcome, asked) = invoked(&api, address).await;
    let asked = asked.to_ascii_lowercase();
    assert!(asked.starts_with("http/1.1 200"), "{asked}");
    for header in [
        &format!("lambda-runtime-aws-request-id: {ID}"),
        "lambda-runtime-deadline-ms: 1700000000123",
        "lambda-runtime-invoked-function-arn: arn:aws:lambda:us-east-1:acme:function:f:1",
        "lambda-runtime-trace-id: root=1-6553f100-8476a536e9f411e897392dfe;parent=8476a536e9f411e8;sampled=0",
        "content-type: application/json",
    ] {
        assert!(asked.contains(header), "{header} in {asked}");
    }
    assert!(asked.ends_with(r#"{"a":1}"#));

    let unknown = post(address, "/2018-06-01/runtime/invocation/other/response", "", b"1").await;
    assert!(unknown.starts_with("HTTP/1.1 400") && unknown.contains("InvalidRequestID"));
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    let answer = post(address, &path, "", b"42").await;
    assert!(answer.starts_with("HTTP/1.1 202") && answer.ends_with(r#"{"status":"OK"}"#));
    assert_eq!(outcome.await.unwrap(), Outcome::Answer(Bytes::from_static(b"42")));
    let twice = post(address, &path, "", b"42").await;
    assert!(twice.starts_with("HTTP/1.1 400"), "{twice}");
}

#[tokio::test]
async fn errors_are_passed_on() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let object = br#"{"errorMessage":"no","errorType":"ValueError","stackTrace":[]}"#;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/error");
    let header = "Lambda-Runtime-Function-Error-Type: ValueError\r\n";
    let answer = post(address, &path, header, object).await;
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert_eq!(
        outcome.await.unwrap(),
        Outcome::Error {
            kind: "ValueError".to_owned(),
            object: Bytes::from_static(object)
        }
    );
}

#[tokio::test]
async fn an_answer_of_6_mib_passes_and_one_byte_more_does_not() {
    for (extra, status) in [(0, "HTTP/1.1 202"), (1, "HTTP/1.1 413")] {
        let (api, address) = served().await;
        let (outcome, _) = invoked(&api, address).await;
        let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
        let body = vec![b'x'; PAYLOAD_BYTES + extra];
        let answer = post(address, &path, "", &body).await;
        assert!(answer.starts_with(status), "{answer}");
        match outcome.await.unwrap() {
            Outcome::Answer(answer) => assert_eq!((extra, answer.len()), (0, PAYLOAD_BYTES)),
            outcome => assert_eq!((extra, outcome), (1, Outcome::TooLarge)),
        }
    }
}

#[tokio::test]
async fn a_chunked_answer_is_bounded_too() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let mut request = format!(
        "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         transfer-encoding: chunked\r\n\r\n"
    )
    .into_bytes();
    for _ in 0..7 {
        request.extend_from_slice(b"100000\r\n");
        request.extend(std::iter::repeat_n(b'x', 1 << 20));
        request.extend_from_slice(b"\r\n");
    }
    request.extend_from_slice(b"0\r\n\r\n");
    let answer = raw(address, &request).await;
    assert!(answer.starts_with("HTTP/1.1 413"), "{answer}");
    assert_eq!(outcome.await.unwrap(), Outcome::TooLarge);
}

#[tokio::test]
async fn init_errors_are_told_once() {
    let (api, address) = served().await;
    let path = "/2018-06-01/runtime/init/error";
    let header = "Lambda-Runtime-Function-Error-Type: Runtime.ImportModuleError\r\n";
    let answer = post(address, path, header, br#"{"errorMessage":"no module"}"#).await;
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert!(
        matches!(api.initialised().await, Init::Failed(Outcome::Error { kind, .. })
        if kind == "Runtime.ImportModuleError")
    );
    let again = post(address, path, header, b"{}").await;
    assert!(again.starts_with("HTTP/1.1 403") && again.contains("InvalidStateTransition"));
    assert!(get(address, NEXT).await.starts_with("HTTP/1.1 403"));
}

#[tokio::test]
async fn one_init_error_is_read_at_a_time_and_none_once_initialised() {
    const HALF: &str = "POST /2018-06-01/runtime/init/error HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                        content-length: 9\r\n\r\nhalf";
    let (api, address) = served().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(HALF.as_bytes()).await.unwrap();
    // The first of them has the claim; the other is refused without its body.
    while api.state().session.claim_init().is_ok() {
        api.state().session.unclaim();
        tokio::task::yield_now().await;
    }
    assert!(raw(address, HALF.as_bytes()).await.starts_with("HTTP/1.1 403"));
    drop(stream);
    // Given back: another may report, until the runtime has asked for work.
    loop {
        let claimed = api.state().session.claim_init();
        if claimed.is_ok() {
            api.state().session.unclaim();
            break;
        }
        tokio::task::yield_now().await;
    }
    let asked = tokio::spawn(async move { get(address, NEXT).await });
    assert_eq!(api.initialised().await, Init::Done);
    assert!(raw(address, HALF.as_bytes()).await.starts_with("HTTP/1.1 403"));
    asked.abort();
}

#[tokio::test]
async fn a_body_that_does_not_come_is_given_up() {
    struct Silent;
    impl Body for Silent {
        type Data = Bytes;
        type Error = Infallible;
        fn poll_frame(
            self: std::pin::Pin<&mut Self>,
            _: &mut std::task::Context<'_>,
        ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, Infallible>>> {
            std::task::Poll::Pending
        }
    }
    assert!(read(Silent, ERROR_LIMIT, Duration::from_millis(5)).await.is_none());
    let whole = read(Full::new(Bytes::from_static(b"x")), ERROR_LIMIT, ERROR_TIMEOUT).await;
    assert!(matches!(whole, Some(Read::Whole { bytes, .. }) if bytes == "x"));
}

#[tokio::test]
async fn a_connection_that_breaks_in_the_middle_of_an_answer_leaves_room_for_another() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(
            format!(
                "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nhalf"
            )
            .as_bytes(),
        )
        .await
        .unwrap();
    drop(stream);
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    // Until the server has seen that the first one is gone it says that there is an answer on its way.
    loop {
        let answer = post(address, &path, "", b"1").await;
        if answer.starts_with("HTTP/1.1 202") {
            break;
        }
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    }
    assert_eq!(outcome.await.unwrap(), Outcome::Answer(Bytes::from_static(b"1")));
}

/// A connection that has asked for work and was given some, of which nothing is read yet.
async fn given(api: &RuntimeApi, address: std::net::SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    assert_eq!(api.initialised().await, Init::Done);
    // Its outcome never comes.
    drop(api.invoke(invocation(ID)).unwrap());
    stream.readable().await.unwrap();
    stream
}

/// Reads one response that has the body of [`invocation`].
async fn read_work(stream: &mut TcpStream) {
    let mut read = Vec::new();
    while !read.ends_with(br#"{"a":1}"#) {
        assert_ne!(stream.read_buf(&mut read).await.unwrap(), 0);
    }
}

#[tokio::test]
async fn work_that_nobody_asked_for_was_not_begun() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    post(address, &path, "", b"1").await;
    outcome.await.unwrap();
    drop(api.invoke(invocation("next")).unwrap());
    assert!(api.end());
    assert_eq!(api.invoke(invocation("more")).unwrap_err(), NotBegun::Ended);
    assert!(get(address, NEXT).await.starts_with("HTTP/1.1 403"));
}

#[tokio::test]
async fn work_that_was_left_unread_was_not_begun() {
    let (api, address) = served().await;
    drop(given(&api, address).await);
    assert!(api.end());
    // Also where the server is gone by then, and where it has seen the end of the connection before.
    let (api, address) = served().await;
    drop(given(&api, address).await);
    get(address, "/").await;
    assert!(api.end());
    // And where the runtime wanted the connection to be closed after the answer.
    let (api, address) = served().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(api.initialised().await, Init::Done);
    drop(api.invoke(invocation(ID)).unwrap());
    stream.readable().await.unwrap();
    drop(stream);
    assert!(api.end());
}

#[tokio::test]
async fn work_that_was_read_may_have_begun() {
    let (api, address) = served().await;
    let mut stream = given(&api, address).await;
    read_work(&mut stream).await;
    drop(stream);
    assert!(!api.end());
    // What is unread later is not the work.
    let (api, address) = served().await;
    let mut stream = given(&api, address).await;
    read_work(&mut stream).await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stream.readable().await.unwrap();
    drop(stream);
    assert!(!api.end());
    // Nor where an answer was begun by another connection.
    let (api, address) = served().await;
    let stream = given(&api, address).await;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    assert!(post(address, &path, "", b"1").await.starts_with("HTTP/1.1 202"));
    drop(stream);
    assert!(!api.end());
}

#[tokio::test]
async fn work_waits_for_one_who_is_still_there() {
    let (api, address) = served().await;
    let mut gone = TcpStream::connect(address).await.unwrap();
    gone.write_all(format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    api.initialised().await;
    drop(gone);
    // The server sees the end of that connection before it answers a call on a later one.
    get(address, "/").await;
    let outcome = api.invoke(invocation(ID)).unwrap();
    assert!(get(address, NEXT).await.contains(ID));
    post(
        address,
        &format!("/2018-06-01/runtime/invocation/{ID}/response"),
        "",
        b"1",
    )
    .await;
    outcome.await.unwrap();
}

#[tokio::test]
async fn nonsense_is_answered_or_cut_off() {
    let (api, address) = served().await;
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(100_000));
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(1_000));
    for (request, status) in [
        (long.as_bytes(), "HTTP/1.1 431"),
        (many.as_bytes(), "HTTP/1.1 431"),
        (b"\x00\xff\x16\x03 nothing\r\n\r\n".as_slice(), "HTTP/1.1 400"),
        (b"GET /2018-06-01/nothing HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", "HTTP/1.1 404"),
        (
            b"POST /2018-06-01/runtime/invocation/next HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            "HTTP/1.1 405",
        ),
        (
            b"POST /2018-06-01/runtime/invocation/a/b/response HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
            "HTTP/1.1 404",
        ),
    ] {
        let answer = raw(address, request).await;
        assert!(answer.starts_with(status) || answer.is_empty(), "{answer}");
    }
    let (_outcome, asked) = invoked(&api, address).await;
    assert!(asked.starts_with("HTTP/1.1 200"), "{asked}");
}

#[tokio::test]
async fn more_connections_than_allowed_wait_their_turn() {
    let (_api, address) = served().await;
    let mut held = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET /slow").await.unwrap();
        held.push(stream);
    }
    let mut asked = tokio::spawn(async move { get(address, "/").await });
    assert!(
        tokio::time::timeout(Duration::from_millis(50), &mut asked)
            .await
            .is_err()
    );
    held.pop();
    assert!(asked.await.unwrap().starts_with("HTTP/1.1 404"));
}
