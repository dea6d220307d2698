//! Subscribers over the loopback: good, slow, mute and hostile.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::super::testing::{ID, NEXT, get, invocation, post, raw, served};
use super::super::{Init, RuntimeApi};
use super::state::ROOM_BYTES;
use super::*;

const OK: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nOK";

/// One who takes batches and answers each.
struct Subscriber {
    port: u16,
    batches: mpsc::UnboundedReceiver<Value>,
}

impl Subscriber {
    /// `answers`: what it says to one request after another; nothing more after the last.
    async fn listen(answers: Vec<&'static [u8]>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, batches) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut answers = answers.into_iter();
            while let Ok((mut stream, _)) = listener.accept().await {
                while let Some(batch) = read_batch(&mut stream).await {
                    sender.send(batch).unwrap();
                    let Some(answer) = answers.next() else {
                        std::future::pending().await
                    };
                    if stream.write_all(answer).await.is_err() {
                        break;
                    }
                }
            }
        });
        Self { port, batches }
    }

    async fn batch(&mut self) -> Vec<Value> {
        let batch = tokio::time::timeout(Duration::from_secs(60), self.batches.recv());
        let batch = batch.await.expect("a batch").unwrap();
        batch.as_array().unwrap().clone()
    }

    /// Events until one of this type has come.
    async fn until(&mut self, kind: &str) -> Vec<Value> {
        let mut events: Vec<Value> = Vec::new();
        while !events.iter().any(|event| event["type"] == kind) {
            events.extend(self.batch().await);
        }
        events
    }
}

/// The body of one request, none at the end of the connection.
async fn read_batch(stream: &mut TcpStream) -> Option<Value> {
    let mut read = Vec::new();
    loop {
        if let Some(head_end) = read.windows(4).position(|part| part == b"\r\n\r\n") {
            let head = String::from_utf8(read[..head_end].to_vec()).unwrap().to_lowercase();
            assert!(head.starts_with("post /here http/1.1\r\n"), "{head}");
            assert!(head.contains("content-type: application/json"), "{head}");
            assert!(head.contains("host: sandbox.localdomain:"), "{head}");
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let end = head_end + 4 + length.unwrap().parse::<usize>().unwrap();
            if read.len() >= end {
                return Some(serde_json::from_slice(&read[head_end + 4..end]).unwrap());
            }
        }
        if stream.read_buf(&mut read).await.ok()? == 0 {
            return None;
        }
    }
}

/// An API with one extension that has registered, and its id.
async fn with_extension() -> (RuntimeApi, SocketAddr, String) {
    let (api, address) = served().await;
    let header = "Lambda-Extension-Name: watcher\r\n";
    let response = post(
        address,
        "/2020-01-01/extension/register",
        header,
        br#"{"events":["INVOKE"]}"#,
    )
    .await;
    let id = response
        .lines()
        .find_map(|line| line.strip_prefix("Lambda-Extension-Identifier: "));
    (api, address, id.unwrap().to_owned())
}

async fn put(address: SocketAddr, path: &str, id: &str, body: &Value) -> String {
    let body = body.to_string();
    let request = format!(
        "PUT {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nLambda-Extension-Identifier: {id}\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    raw(address, request.as_bytes()).await
}

fn subscription(port: u16, types: &[&str]) -> Value {
    json!({
        "schemaVersion": "2022-12-13",
        "types": types,
        "buffering": { "maxItems": 1000, "maxBytes": 262_144, "timeoutMs": 25 },
        "destination": { "protocol": "HTTP", "URI": format!("http://sandbox.localdomain:{port}/here") },
    })
}

async fn subscribe(address: SocketAddr, id: &str, port: u16, types: &[&str]) {
    let told = put(address, "/2022-07-01/telemetry", id, &subscription(port, types)).await;
    assert!(
        told.starts_with("HTTP/1.1 200") && told.ends_with("\r\n\r\n\"OK\""),
        "{told}"
    );
}

/// The extension asks for its next event, and does nothing with it.
fn ask(address: SocketAddr, id: &str) -> tokio::task::JoinHandle<String> {
    let request = format!(
        "GET /2020-01-01/extension/event/next HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         Lambda-Extension-Identifier: {id}\r\n\r\n"
    );
    tokio::spawn(async move { raw(address, request.as_bytes()).await })
}

fn types(events: &[Value]) -> Vec<&str> {
    events.iter().map(|event| event["type"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn init_and_an_invocation_are_told() {
    let (api, address, id) = with_extension().await;
    let mut subscriber = Subscriber::listen(vec![OK; 100]).await;
    subscribe(address, &id, subscriber.port, &["platform", "function"]).await;
    let same = subscription(subscriber.port, &["platform", "function"]);
    let again = put(address, "/2022-07-01/telemetry", &id, &same).await;
    assert!(again.ends_with("\"AlreadySubscribed\""));
    api.telemetry().write(Kind::Function, b"importing\nhalf a ");
    let told = ask(address, &id);
    let work = tokio::spawn(async move { get(address, NEXT).await });
    assert_eq!(api.initialised().await, Init::Done);
    let events = subscriber.until("platform.initReport").await;
    assert_eq!(
        types(&events),
        [
            "platform.initStart",
            "platform.telemetrySubscription",
            "function",
            "platform.initRuntimeDone",
            "platform.extension",
            "platform.initReport",
        ]
    );
    assert_eq!(events[0]["record"]["functionName"], "f");
    assert_eq!(
        events[1]["record"],
        json!({ "name": "watcher", "state": "Subscribed", "types": ["platform", "function"] })
    );
    assert_eq!(events[2]["record"], "importing");
    assert_eq!(events[3]["record"]["status"], "success");
    assert_eq!(
        events[4]["record"],
        json!({ "name": "watcher", "state": "Ready", "events": ["INVOKE"] })
    );
    assert!(events[5]["record"]["metrics"]["durationMs"].as_f64().unwrap() >= 0.0);

    drop(api.invoke(invocation(ID), None).unwrap());
    assert!(work.await.unwrap().contains(ID) && told.await.unwrap().contains(ID));
    api.telemetry().write(Kind::Function, b"line\nno end");
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    post(address, &path, "", b"123").await;
    let (_told, _work) = (ask(address, &id), tokio::spawn(async move { get(address, NEXT).await }));
    let events = subscriber.until("platform.report").await;
    assert_eq!(
        types(&events),
        [
            "platform.start",
            "function",
            "function",
            "platform.runtimeDone",
            "platform.report"
        ]
    );
    assert_eq!(
        (&events[0]["record"]["requestId"], &events[0]["record"]["version"]),
        (&json!(ID), &json!("1"))
    );
    assert_eq!(events[1]["record"], "half a line");
    assert_eq!(events[2]["record"], "no end");
    let done = &events[3]["record"];
    assert_eq!(
        (&done["status"], &done["metrics"]["producedBytes"]),
        (&json!("success"), &json!(3))
    );
    assert_eq!(done["spans"].as_array().unwrap().len(), 3);
    let metrics = &events[4]["record"]["metrics"];
    assert_eq!(
        (&metrics["memorySizeMB"], &metrics["maxMemoryUsedMB"]),
        (&json!(128), &json!(3))
    );
    assert!(metrics["initDurationMs"].is_number());
    api.telemetry().sent().await;
}

#[tokio::test]
async fn what_was_before_is_told_to_external_extensions() {
    let (api, address) = served().await;
    api.expect_extensions(vec!["watcher".to_owned()]);
    api.telemetry().write(Kind::Extension, b"starting\n");
    let header = "Lambda-Extension-Name: watcher\r\n";
    let response = post(address, "/2020-01-01/extension/register", header, b"{}").await;
    let id = response
        .lines()
        .find_map(|line| line.strip_prefix("Lambda-Extension-Identifier: "))
        .unwrap();
    let mut subscriber = Subscriber::listen(vec![OK; 100]).await;
    subscribe(address, id, subscriber.port, &["platform", "extension"]).await;
    let events = subscriber.until("platform.telemetrySubscription").await;
    assert_eq!(
        types(&events),
        ["platform.initStart", "extension", "platform.telemetrySubscription"]
    );
    assert_eq!(events[1]["record"], "starting");
    // And how it ended, where it does.
    api.telemetry().write(Kind::Extension, b"last words");
    api.ending(true, "Sandbox.Timedout").await;
    let events = subscriber.until("platform.initReport").await;
    assert_eq!(
        types(&events),
        [
            "extension",
            "platform.initRuntimeDone",
            "platform.extension",
            "platform.initReport"
        ]
    );
    assert_eq!(events[1]["record"]["status"], "timeout");
    assert_eq!(events[1]["record"]["errorType"], "Sandbox.Timedout");
}

#[tokio::test]
async fn subscriptions_are_refused_in_lambdas_words() {
    let (api, address, id) = with_extension().await;
    let telemetry = "/2022-07-01/telemetry";
    let unknown = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";
    let fine = subscription(4243, &["platform"]);
    for (path, id, body, status, kind) in [
        (
            telemetry,
            unknown,
            fine.clone(),
            403,
            "Extension.UnknownExtensionIdentifier",
        ),
        (
            telemetry,
            "7",
            fine.clone(),
            403,
            "Extension.InvalidExtensionIdentifier",
        ),
        (telemetry, &id, json!([]), 400, "Telemetry.DeserializationError"),
        (
            telemetry,
            &id,
            subscription(4243, &[]),
            400,
            "Telemetry.ValidationError",
        ),
        (
            telemetry,
            &id,
            subscription(9001, &["platform"]),
            400,
            "Telemetry.ValidationError",
        ),
        ("/2020-08-15/logs", &id, fine.clone(), 400, "Logs.ValidationError"),
        (
            telemetry,
            &id,
            json!({
                "schemaVersion": "2022-12-13",
                "types": ["platform"],
                "destination": { "protocol": "HTTP", "URI": "http://10.0.0.1:80" },
            }),
            403,
            "Telemetry.AccessDenied",
        ),
    ] {
        let told = put(address, path, id, &body).await;
        assert!(told.starts_with(&format!("HTTP/1.1 {status}")), "{body}: {told}");
        assert!(told.contains(&format!(r#""errorType":"{kind}""#)), "{body}: {told}");
    }
    // So many and no more, by one of both APIs.
    for port in 5000..5010 {
        subscribe(address, &id, port, &["function"]).await;
    }
    let told = put(address, telemetry, &id, &fine).await;
    assert!(
        told.starts_with("HTTP/1.1 400") && told.contains("10 subscriptions"),
        "{told}"
    );
    let logs = json!({ "types": ["function"], "destination": { "protocol": "HTTP", "URI": "http://sandbox:5000" } });
    let told = put(address, "/2020-08-15/logs", &id, &logs).await;
    assert!(
        told.starts_with("HTTP/1.1 400") && told.contains("Logs.AccessDenied"),
        "{told}"
    );
    // And none once init is over.
    let (_told, _work) = (ask(address, &id), tokio::spawn(async move { get(address, NEXT).await }));
    api.initialised().await;
    let told = put(address, telemetry, &id, &fine).await;
    assert!(
        told.starts_with("HTTP/1.1 403") && told.contains("Telemetry.SubscriptionClosed"),
        "{told}"
    );
}

#[tokio::test]
async fn a_batch_is_sent_again_until_it_is_taken() {
    let (api, address, id) = with_extension().await;
    let no: &[u8] = b"HTTP/1.1 500 No\r\ncontent-length: 0\r\n\r\n";
    let closes: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
    let mut subscriber = Subscriber::listen(vec![no, no, closes, OK]).await;
    subscribe(address, &id, subscriber.port, &["function"]).await;
    api.telemetry().write(Kind::Function, b"a\n");
    for _ in 0..3 {
        assert_eq!(subscriber.batch().await[0]["record"], "a");
    }
    api.telemetry().write(Kind::Function, b"b\n");
    assert_eq!(subscriber.batch().await[0]["record"], "b");
}

#[tokio::test]
async fn newline_delimited_json_goes_by_tcp() {
    let (api, address, id) = with_extension().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let body = json!({
        "schemaVersion": "2021-03-18",
        "types": ["function"],
        "destination": { "protocol": "TCP", "port": port },
    });
    let told = put(address, "/2020-08-15/logs", &id, &body).await;
    assert!(told.starts_with("HTTP/1.1 200"), "{told}");
    api.telemetry().write(Kind::Function, b"a\nb\n");
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut read = Vec::new();
    while read.iter().filter(|byte| **byte == b'\n').count() < 2 {
        stream.read_buf(&mut read).await.unwrap();
    }
    let lines: Vec<Value> = read
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    assert_eq!(
        (&lines[0]["record"], &lines[1]["record"]),
        (&json!("a\n"), &json!("b\n"))
    );
}

/// One who takes a batch and never answers holds up nothing, takes bounded memory, and is told what it missed.
#[tokio::test]
async fn one_who_does_not_answer_loses_what_there_is_no_room_for() {
    let (api, address, id) = with_extension().await;
    // Five times nothing that is an answer, then good ones.
    let mut answers: Vec<&[u8]> = vec![b"nonsense\r\n\r\n"; 5];
    answers[0] = b"HTTP/1.1 200 OK\r\nx: ";
    answers.resize(100, OK);
    let mut subscriber = Subscriber::listen(answers).await;
    subscribe(address, &id, subscriber.port, &["function"]).await;
    let line = [b"x".repeat(999).as_slice(), b"\n"].concat();
    for _ in 0..10_000 {
        api.telemetry().write(Kind::Function, &line);
    }
    let state = || {
        let state = api.telemetry().state();
        (state.bytes, state.subscriptions[0].buffer.is_full())
    };
    let (bytes, _) = state();
    assert!(bytes <= 2 * 262_144 && bytes > 262_144, "{bytes}");
    // An invocation goes its way meanwhile.
    let (told, work) = (ask(address, &id), tokio::spawn(async move { get(address, NEXT).await }));
    api.initialised().await;
    drop(api.invoke(invocation(ID), None).unwrap());
    assert!(work.await.unwrap().contains(ID) && told.await.unwrap().contains(ID));
    // The batch is tried five times and given up; it says how much was lost before it, and the next how much with it.
    let dropped = |batch: &[Value]| {
        let told = batch.iter().find(|event| event["type"] == "platform.logsDropped");
        let count = |name: &str| told.unwrap()["record"][name].as_u64().unwrap();
        (count("droppedRecords"), count("droppedBytes"))
    };
    let mut batch = Vec::new();
    for _ in 0..5 {
        batch = subscriber.batch().await;
        let (records, bytes) = dropped(&batch);
        assert!(records > 9_000 && bytes > 9_000_000, "{records} {bytes}");
    }
    api.telemetry().write(Kind::Function, b"more\n");
    let next = subscriber.batch().await;
    assert_eq!(next[0]["record"], "more");
    assert_eq!(dropped(&next).0, batch.len() as u64);
    api.telemetry().sent().await;
    assert_eq!(state().0, 0);
}

#[tokio::test]
async fn an_answer_without_end_is_not_read_to_its_end() {
    let (api, address, id) = with_extension().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    subscribe(address, &id, port, &["function"]).await;
    for line in [b"a\n", b"b\n"] {
        api.telemetry().write(Kind::Function, line);
        // Each by a connection of its own, for the one before said too much.
        let (mut stream, _) = listener.accept().await.unwrap();
        assert_eq!(
            read_batch(&mut stream).await.unwrap()[0]["record"],
            json!(String::from_utf8_lossy(&line[..1]))
        );
        stream
            .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            .await
            .unwrap();
        let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat();
        while stream.write_all(&chunk).await.is_ok() {}
    }
}

#[tokio::test]
async fn nothing_is_sent_while_the_container_is_frozen() {
    let (api, address, id) = with_extension().await;
    let mut subscriber = Subscriber::listen(vec![OK; 100]).await;
    subscribe(address, &id, subscriber.port, &["function"]).await;
    api.telemetry().pause(true);
    api.telemetry().write(Kind::Function, b"a\n");
    let none = tokio::time::timeout(Duration::from_millis(200), subscriber.batches.recv());
    assert!(none.await.is_err());
    api.telemetry().pause(false);
    assert_eq!(subscriber.batch().await[0]["record"], "a");
}

#[test]
fn all_subscribers_together_have_so_much_room() {
    let mut state = State::default();
    let identity = Identity::default();
    for port in 1..=SUBSCRIPTIONS {
        let body = json!({
            "types": ["function"],
            "buffering": { "maxBytes": 1_048_576 },
            "destination": { "protocol": "TCP", "port": port },
        });
        let request = Request::parse(Api::Logs, body.to_string().as_bytes()).unwrap();
        state.subscriptions.push(Subscription {
            api: Api::Logs,
            name: port.to_string(),
            buffer: Buffer::new(request.buffering),
            request,
            network: Network::of(std::io::stdin()).unwrap(),
            sending: 0,
            wake: Arc::default(),
        });
        state.replay(&identity);
    }
    for _ in 0..3_000 {
        state.push_line(Kind::Function, &[b'x'; 1_000]);
    }
    assert!(
        state.bytes <= ROOM_BYTES && state.bytes > ROOM_BYTES - 2_000,
        "{}",
        state.bytes
    );
    let taken: usize = (0..SUBSCRIPTIONS).map(|index| state.take(index).unwrap().bytes).sum();
    assert_eq!(taken, state.bytes, "until it has been sent");
}
