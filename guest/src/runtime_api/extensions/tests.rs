use std::net::SocketAddr;

use serde_json::Value;
use tokio::task::JoinHandle;

use super::super::Init;
use super::super::testing::{ID, NEXT, get, invocation, post, raw, served};
use super::*;

const REGISTER: &str = "/2020-01-01/extension/register";
const EVENT: &str = "/2020-01-01/extension/event/next";

/// Head and JSON body of a response.
fn parts(response: &str) -> (&str, Value) {
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head, serde_json::from_str(body).unwrap())
}

/// The error type of a response that has to be 403.
fn refused(response: &str) -> String {
    let (head, body) = parts(response);
    assert!(head.starts_with("HTTP/1.1 403"), "{response}");
    assert!(!body["errorMessage"].as_str().unwrap().is_empty());
    body["errorType"].as_str().unwrap().to_owned()
}

/// Registers. The extension's id.
async fn registered(address: SocketAddr, name: &str, events: &str) -> String {
    let header = format!("Lambda-Extension-Name: {name}\r\n");
    let response = post(address, REGISTER, &header, events.as_bytes()).await;
    let (head, body) = parts(&response);
    assert!(head.starts_with("HTTP/1.1 200"), "{response}");
    assert_eq!(
        body,
        json!({ "functionName": "f", "functionVersion": "$LATEST", "handler": "app.handler" })
    );
    let id = head
        .lines()
        .find_map(|line| line.strip_prefix("Lambda-Extension-Identifier: "));
    id.unwrap().to_owned()
}

/// Asks for an event and waits for it.
async fn event(address: SocketAddr, id: &str) -> String {
    let request =
        format!("GET {EVENT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\nLambda-Extension-Identifier: {id}\r\n\r\n");
    raw(address, request.as_bytes()).await
}

fn asking(address: SocketAddr, id: &str) -> JoinHandle<String> {
    let id = id.to_owned();
    tokio::spawn(async move { event(address, &id).await })
}

async fn answer(address: SocketAddr) {
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    assert!(post(address, &path, "", b"1").await.starts_with("HTTP/1.1 202"));
}

#[tokio::test]
async fn an_extension_is_told_of_invocations_and_waited_for() {
    let (api, address) = served().await;
    assert!(!api.has_internal_extensions());
    let id = registered(address, "watcher", r#"{"events":["INVOKE"]}"#).await;
    assert!(api.has_internal_extensions() && !api.has_external_extensions());
    let work = tokio::spawn(async move { get(address, NEXT).await });
    while !api.state().asked {
        tokio::task::yield_now().await;
    }
    assert!(!api.is_initialised(), "the extension has not asked for an event yet");
    let told = asking(address, &id);
    assert_eq!(api.initialised().await, Init::Done);
    api.idle(true).await;
    drop(api.invoke(invocation(ID), None).unwrap());
    assert!(!api.is_idle());
    assert!(work.await.unwrap().contains(ID));
    let told = told.await.unwrap();
    let (head, body) = parts(&told);
    assert!(
        head.starts_with("HTTP/1.1 200") && head.contains("\r\nLambda-Extension-Event-Identifier: "),
        "{told}"
    );
    assert_eq!(
        body,
        json!({
            "eventType": "INVOKE",
            "deadlineMs": 1_700_000_000_123_u64,
            "requestId": ID,
            "invokedFunctionArn": "arn:aws:lambda:us-east-1:acme:function:f",
            "tracing": {
                "type": "X-Amzn-Trace-Id",
                "value": "Root=1-6553f100-8476a536e9f411e897392dfe;Parent=8476a536e9f411e8;Sampled=0",
            },
        })
    );
    answer(address).await;
    // It is at work for that invocation until it asks again.
    assert!(!api.state().extensions.are_ready());
    let next = asking(address, &id);
    api.extensions_ready().await;
    next.abort();
}

/// As `spawn_graceful_shutdown_handler` of the crate `lambda_runtime` does.
#[tokio::test]
async fn an_extension_may_want_no_events() {
    let (api, address) = served().await;
    let id = registered(address, "_helper", r#"{"events":[]}"#).await;
    let told = asking(address, &id);
    let work = tokio::spawn(async move { get(address, NEXT).await });
    assert_eq!(api.initialised().await, Init::Done);
    drop(api.invoke(invocation(ID), None).unwrap());
    assert!(work.await.unwrap().contains(ID));
    answer(address).await;
    api.extensions_ready().await;
    assert!(!told.is_finished());
    told.abort();
}

#[tokio::test]
async fn an_account_is_told_to_who_asks() {
    let (_api, address) = served().await;
    let headers = "Lambda-Extension-Name: x\r\nLambda-Extension-Accept-Feature: more, accountId\r\n";
    let response = post(address, REGISTER, headers, b"{}").await;
    assert_eq!(parts(&response).1["accountId"], "acme", "{response}");
}

#[tokio::test]
async fn what_is_wrong_is_refused_in_lambdas_words() {
    let (api, address) = served().await;
    let name = "Lambda-Extension-Name: x\r\n";
    for (headers, body, kind) in [
        ("", "{}", "Extension.InvalidExtensionName"),
        (name, "{", "InvalidRequestFormat"),
        (name, r#"{"events":["NONE"]}"#, "InvalidRequestFormat"),
        (
            name,
            r#"{"events":["INVOKE","SHUTDOWN"]}"#,
            "Extension.InvalidEventType",
        ),
    ] {
        let response = post(address, REGISTER, headers, body.as_bytes()).await;
        assert_eq!(refused(&response), kind, "{body}");
    }
    let unknown = "8476a536-e9f4-11e8-9739-2dfe598c3fcd";
    assert_eq!(
        refused(&get(address, EVENT).await),
        "Extension.MissingExtensionIdentifier"
    );
    assert_eq!(
        refused(&event(address, "7").await),
        "Extension.InvalidExtensionIdentifier"
    );
    assert_eq!(
        refused(&event(address, unknown).await),
        "Extension.UnknownExtensionIdentifier"
    );
    // Once the runtime has asked it is too late.
    let work = tokio::spawn(async move { get(address, NEXT).await });
    api.initialised().await;
    let response = post(address, REGISTER, name, b"{}").await;
    assert_eq!(refused(&response), "Extension.RegistrationClosed");
    work.abort();
}

#[tokio::test]
async fn the_end_of_an_extension_is_told() {
    for (path, kind) in [("init", "Extension.InitError"), ("exit", "Extension.ExitError")] {
        let (api, address) = served().await;
        let id = registered(address, "watcher", r#"{"events":["INVOKE"]}"#).await;
        let path = format!("/2020-01-01/extension/{path}/error");
        let header = format!("Lambda-Extension-Identifier: {id}\r\n");
        let body = br#"{"errorMessage":"no key","errorType":"T"}"#;
        assert_eq!(
            refused(&post(address, &path, &header, body).await),
            "Extension.MissingHeader"
        );
        let header = header + "Lambda-Extension-Function-Error-Type: Extension.NoKey\r\n";
        for _ in 0..2 {
            let response = post(address, &path, &header, body).await;
            assert!(
                response.starts_with("HTTP/1.1 202") && response.ends_with(r#"{"status":"OK"}"#),
                "{response}"
            );
        }
        let failure = api.extension_failed().await;
        assert_eq!(failure.kind, kind);
        assert_eq!(failure.message, "The extension watcher failed: Extension.NoKey no key");
        assert_eq!(refused(&event(address, &id).await), "Extension.InvalidExtensionState");
    }
}

#[tokio::test]
async fn an_external_extension_is_waited_for_and_told_of_the_end() {
    let (api, address) = served().await;
    api.expect_extensions(vec!["agent".to_owned(), "quiet".to_owned()]);
    let waiting = {
        let api = api.clone();
        tokio::spawn(async move { api.extensions_registered().await })
    };
    let id = registered(address, "agent", r#"{"events":["INVOKE","SHUTDOWN"]}"#).await;
    assert!(!waiting.is_finished());
    let quiet = registered(address, "quiet", r#"{"events":[]}"#).await;
    waiting.await.unwrap();
    // Once.
    let header = "Lambda-Extension-Name: agent\r\n";
    let again = post(address, REGISTER, header, br#"{"events":[]}"#).await;
    assert_eq!(refused(&again), "Extension.InvalidExtensionState");

    let told = asking(address, &id);
    let work = tokio::spawn(async move { get(address, NEXT).await });
    while !api.state().asked {
        tokio::task::yield_now().await;
    }
    assert!(!api.is_initialised(), "one has not asked for an event yet");
    let untold = asking(address, &quiet);
    assert_eq!(api.initialised().await, Init::Done);
    drop(api.invoke(invocation(ID), None).unwrap());
    assert!(work.await.unwrap().contains(ID));
    assert_eq!(parts(&told.await.unwrap()).1["eventType"], "INVOKE");
    answer(address).await;
    // It hears of the end when it asks next, the other does not.
    assert_eq!(api.shut_down("SPINDOWN", 42), [1]);
    let told = event(address, &id).await;
    assert_eq!(
        parts(&told).1,
        json!({ "eventType": "SHUTDOWN", "shutdownReason": "SPINDOWN", "deadlineMs": 42 })
    );
    assert!(!untold.is_finished());
    untold.abort();
}
