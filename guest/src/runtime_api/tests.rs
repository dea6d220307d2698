use std::net::SocketAddr;
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use stoker_proto::limits::ANSWER_BYTES;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::super::testing::{ID, NEXT, get, invocation, invoked, post, raw, read_until, served};
use super::super::{Init, NotBegun, Outcome};
use super::*;

#[tokio::test]
async fn an_invocation_goes_round() {
    let (api, address) = served().await;
    let (outcome, asked) = invoked(&api, address).await;
    assert!(asked.starts_with("HTTP/1.1 200"), "{asked}");
    // Letter by letter as Lambda writes them.
    for header in [
        &format!("\r\nLambda-Runtime-Aws-Request-Id: {ID}\r\n"),
        "\r\nLambda-Runtime-Deadline-Ms: 1700000000123\r\n",
        "\r\nLambda-Runtime-Invoked-Function-Arn: arn:aws:lambda:us-east-1:acme:function:f\r\n",
        "\r\nLambda-Runtime-Trace-Id: Root=1-6553f100-8476a536e9f411e897392dfe;Parent=8476a536e9f411e8;Sampled=0\r\n",
        "\r\nContent-Type: application/json\r\n",
        "\r\nContent-Length: 7\r\n",
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
    for kind in ["response", "error"] {
        let path = format!("/2018-06-01/runtime/invocation/{ID}/{kind}");
        let twice = post(address, &path, "", b"42").await;
        assert!(
            twice.starts_with("HTTP/1.1 403") && twice.contains(r#""errorType":"InvalidStateTransition""#),
            "{twice}"
        );
    }
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
async fn an_answer_of_6_mib_and_100_bytes_passes_and_one_byte_more_does_not() {
    for (extra, status) in [(0, "HTTP/1.1 202"), (1, "HTTP/1.1 413")] {
        let (api, address) = served().await;
        let (outcome, _) = invoked(&api, address).await;
        let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
        let body = vec![b'x'; 6_291_556 + extra];
        let answer = post(address, &path, "", &body).await;
        assert!(answer.starts_with(status), "{answer}");
        if extra > 0 {
            let told = r#"{"errorMessage":"Exceeded maximum allowed payload size (6291556 bytes).","errorType":"RequestEntityTooLarge"}"#;
            assert!(answer.ends_with(told), "{answer}");
        }
        match outcome.await.unwrap() {
            Outcome::Answer(answer) => assert_eq!((extra, answer.len()), (0, ANSWER_BYTES)),
            outcome => assert_eq!((extra, outcome), (1, Outcome::TooLarge { limit: ANSWER_BYTES })),
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
    assert_eq!(outcome.await.unwrap(), Outcome::TooLarge { limit: ANSWER_BYTES });
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
        api.state().session.unclaim_init();
        tokio::task::yield_now().await;
    }
    assert!(raw(address, HALF.as_bytes()).await.starts_with("HTTP/1.1 403"));
    drop(stream);
    // Given back: another may report, until the runtime has asked for work.
    loop {
        let claimed = api.state().session.claim_init();
        if claimed.is_ok() {
            api.state().session.unclaim_init();
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
async fn an_answer_that_breaks_off_ends_the_invocation_at_once() {
    for framing in [
        "content-length: 9\r\n\r\nhalf",
        "transfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        for kind in ["response", "error"] {
            for half_closed in [false, true] {
                let (api, address) = served().await;
                let (outcome, _) = invoked(&api, address).await;
                let path = format!("/2018-06-01/runtime/invocation/{ID}/{kind}");
                let mut stream = TcpStream::connect(address).await.unwrap();
                let request = format!("POST {path} HTTP/1.1\r\nhost: x\r\n{framing}");
                stream.write_all(request.as_bytes()).await.unwrap();
                if half_closed {
                    stream.shutdown().await.unwrap();
                    let mut answer = String::new();
                    stream.read_to_string(&mut answer).await.unwrap();
                    assert!(
                        answer.starts_with("HTTP/1.1 400") && answer.contains("TruncatedHTTPRequest"),
                        "{answer}"
                    );
                } else {
                    drop(stream);
                }
                assert_eq!(outcome.await.unwrap(), Outcome::BrokenOff);
                let again = post(address, &path, "", b"1").await;
                assert!(again.starts_with("HTTP/1.1 403"), "{again}");
                // And it can be given work again.
                let asked = tokio::spawn(async move { get(address, NEXT).await });
                while api.invoke(invocation("other"), None).is_err() {
                    tokio::task::yield_now().await;
                }
                assert!(asked.await.unwrap().contains("other"));
            }
        }
    }
}

#[tokio::test]
async fn a_stream_may_fail_at_its_end() {
    let told = BASE64_STANDARD.encode(r#"{"errorType":"T","errorMessage":"m"}"#);
    for (trailers, expected) in [
        (String::new(), Outcome::Answer(Bytes::from_static(b"half"))),
        (
            format!("Lambda-Runtime-Function-Error-Type: Function.T\r\nLambda-Runtime-Function-Error-Body: {told}\r\n"),
            Outcome::Error {
                kind: "Function.T".to_owned(),
                object: Bytes::from_static(br#"{"errorType":"T","errorMessage":"m"}"#),
            },
        ),
    ] {
        let (api, address) = served().await;
        let (outcome, _) = invoked(&api, address).await;
        let request = format!(
            "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             Lambda-Runtime-Function-Response-Mode: streaming\r\ntransfer-encoding: chunked\r\n\
             trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n\r\n\
             4\r\nhalf\r\n0\r\n{trailers}\r\n"
        );
        let answer = raw(address, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
        assert_eq!(outcome.await.unwrap(), expected);
    }
}

#[tokio::test]
async fn an_answer_in_an_unknown_mode_fails_the_invocation() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    let header = "Lambda-Runtime-Function-Response-Mode: sung\r\n";
    let answer = post(address, &path, header, b"1").await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains("InvalidFunctionResponseMode"),
        "{answer}"
    );
    let outcome = outcome.await.unwrap();
    assert!(matches!(outcome, Outcome::Error { kind, .. } if kind == "Runtime.InvalidResponseModeHeader"));
}

/// As `awslambdaric` repeats an exception.
fn cause(bytes: usize) -> String {
    format!("lambda-runtime-function-xray-error-cause: {}\r\n", "x".repeat(bytes))
}

#[tokio::test]
async fn an_error_is_taken_with_a_header_of_up_to_1_mib() {
    for bytes in [16 << 10, 300 << 10, (1 << 20) - 1] {
        let (api, address) = served().await;
        let (outcome, _) = invoked(&api, address).await;
        let path = format!("/2018-06-01/runtime/invocation/{ID}/error");
        let header = "Lambda-Runtime-Function-Error-Type: ValueError\r\n".to_owned() + &cause(bytes);
        let answer = post(address, &path, &header, b"{}").await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{bytes}: {answer}");
        assert!(matches!(outcome.await.unwrap(), Outcome::Error { kind, .. } if kind == "ValueError"));
    }
}

#[tokio::test]
async fn few_heads_are_large_at_a_time() {
    let (api, address) = served().await;
    let mut held = Vec::new();
    for _ in 0..LARGE_HEADS {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream
            .write_all(b"GET /first HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        read_until(&mut stream, b"\r\n\r\n").await;
        // Without its end.
        let head = "GET / HTTP/1.1\r\n".to_owned() + &cause(100 << 10);
        stream.write_all(head.as_bytes()).await.unwrap();
        held.push(stream);
    }
    let large = "GET / HTTP/1.1\r\nconnection: close\r\n".to_owned() + &cause(100 << 10) + "\r\n";
    // Once those are read no other is.
    while !raw(address, large.as_bytes()).await.is_empty() {}
    assert!(get(address, "/").await.starts_with("HTTP/1.1 404"), "small ones are");
    held.pop();
    while !raw(address, large.as_bytes()).await.starts_with("HTTP/1.1 404") {}
    // One that was read, and waits for its answer, is not large any more.
    let asks = format!("GET {NEXT} HTTP/1.1\r\n") + &cause(100 << 10) + "\r\n";
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(asks.as_bytes()).await.unwrap();
    api.initialised().await;
    assert!(raw(address, large.as_bytes()).await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let (api, address) = served().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let next = format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n");
    stream.write_all(next.as_bytes()).await.unwrap();
    for round in 0..3 {
        let id = format!("round-{round}");
        while api.invoke(invocation(&id), None).is_err() {
            tokio::task::yield_now().await;
        }
        let work = read_until(&mut stream, br#"{"a":1}"#).await;
        assert!(work.contains(&id), "{work}");
        // The answer, and with it the next request.
        let request = format!(
            "POST /2018-06-01/runtime/invocation/{id}/response HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n1{next}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let answer = read_until(&mut stream, br#"{"status":"OK"}"#).await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    }
}

#[tokio::test]
async fn who_sends_no_more_is_answered_all_the_same() {
    let (api, address) = served().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    stream.shutdown().await.unwrap();
    api.initialised().await;
    let outcome = api.invoke(invocation(ID), None).unwrap();
    let mut work = String::new();
    stream.read_to_string(&mut work).await.unwrap();
    assert!(work.contains(ID), "{work}");
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request =
        format!("POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\n\r\n1");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert_eq!(outcome.await.unwrap(), Outcome::Answer(Bytes::from_static(b"1")));
}

#[tokio::test]
async fn a_body_is_waved_through_that_was_asked_about() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let ask = |id: &str| {
        format!(
            "POST /2018-06-01/runtime/invocation/{id}/response HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n\
             content-length: 3\r\n\r\n"
        )
    };
    let mut refused = TcpStream::connect(address).await.unwrap();
    refused.write_all(ask("other").as_bytes()).await.unwrap();
    let answer = read_until(&mut refused, b"\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(ask(ID).as_bytes()).await.unwrap();
    let answer = read_until(&mut stream, b"\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 100"), "{answer}");
    stream.write_all(b"123").await.unwrap();
    let answer = read_until(&mut stream, br#"{"status":"OK"}"#).await;
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert_eq!(outcome.await.unwrap(), Outcome::Answer(Bytes::from_static(b"123")));
}

/// A connection that has asked for work and was given some, of which nothing is read yet.
async fn given(api: &RuntimeApi, address: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream
        .write_all(format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    assert_eq!(api.initialised().await, Init::Done);
    // Its outcome never comes.
    drop(api.invoke(invocation(ID), None).unwrap());
    stream.readable().await.unwrap();
    stream
}

/// Reads one response that has the body of [`invocation`].
async fn read_work(stream: &mut TcpStream) {
    read_until(stream, br#"{"a":1}"#).await;
}

/// Tells the API that the container has ended. Whether there was work that it had not begun.
fn ended_before(api: &RuntimeApi) -> bool {
    api.end();
    api.has_not_begun()
}

#[tokio::test]
async fn work_that_nobody_asked_for_was_not_begun() {
    let (api, address) = served().await;
    let (outcome, _) = invoked(&api, address).await;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    post(address, &path, "", b"1").await;
    outcome.await.unwrap();
    drop(api.invoke(invocation("next"), None).unwrap());
    assert!(ended_before(&api));
    assert_eq!(api.invoke(invocation("more"), None).unwrap_err(), NotBegun::Ended);
    assert!(get(address, NEXT).await.starts_with("HTTP/1.1 403"));
}

#[tokio::test]
async fn work_that_was_left_unread_was_not_begun() {
    let (api, address) = served().await;
    drop(given(&api, address).await);
    assert!(ended_before(&api));
    // Also where the server is gone by then, and where it has seen the end of the connection before.
    let (api, address) = served().await;
    drop(given(&api, address).await);
    get(address, "/").await;
    assert!(ended_before(&api));
    // And where the runtime wanted the connection to be closed after the answer.
    let (api, address) = served().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    assert_eq!(api.initialised().await, Init::Done);
    drop(api.invoke(invocation(ID), None).unwrap());
    stream.readable().await.unwrap();
    drop(stream);
    assert!(ended_before(&api));
}

#[tokio::test]
async fn work_that_was_read_may_have_begun() {
    let (api, address) = served().await;
    let mut stream = given(&api, address).await;
    read_work(&mut stream).await;
    drop(stream);
    assert!(!ended_before(&api));
    // What is unread later is not the work.
    let (api, address) = served().await;
    let mut stream = given(&api, address).await;
    read_work(&mut stream).await;
    stream.write_all(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    stream.readable().await.unwrap();
    drop(stream);
    assert!(!ended_before(&api));
    // Nor where an answer was begun by another connection.
    let (api, address) = served().await;
    let stream = given(&api, address).await;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    assert!(post(address, &path, "", b"1").await.starts_with("HTTP/1.1 202"));
    drop(stream);
    assert!(!ended_before(&api));
}

/// Asks for work, and leaves.
async fn ask_and_leave(api: &RuntimeApi, address: SocketAddr) {
    let mut gone = TcpStream::connect(address).await.unwrap();
    gone.write_all(format!("GET {NEXT} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes())
        .await
        .unwrap();
    api.initialised().await;
}

#[tokio::test]
async fn work_that_went_to_one_who_is_gone_is_given_again() {
    let (api, address) = served().await;
    ask_and_leave(&api, address).await;
    let outcome = api.invoke(invocation(ID), None).unwrap();
    assert!(get(address, NEXT).await.contains(ID));
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    post(address, &path, "", b"1").await;
    outcome.await.unwrap();
}

#[tokio::test]
async fn nonsense_is_answered_or_cut_off() {
    let (api, address) = served().await;
    let long = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1_100_000));
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

#[tokio::test]
async fn what_is_left_of_its_credits_can_be_read_beside_everything_else() {
    let (_, address) = served().await;
    let answer = get(address, "/credits").await;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"throttle":null}"#),
        "{answer}"
    );
    assert!(answer.contains("Content-Type: application/json"), "{answer}");
    // One that waits for the agent keeps nobody waiting.
    let waits = tokio::spawn(async move { get(address, "/credits").await });
    let unknown = get(address, "/2018-06-01/other").await;
    assert!(unknown.starts_with("HTTP/1.1 404") && !waits.is_finished(), "{unknown}");
    // Nothing is known any more.
    assert!(get(address, "/credits").await.starts_with("HTTP/1.1 503"));
    assert!(waits.await.unwrap().starts_with("HTTP/1.1 503"));
    assert!(post(address, "/credits", "", b"").await.starts_with("HTTP/1.1 405"));
}
