//! External extensions, as layers bring them: in `/opt/extensions` of an image on which containers are made.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stoker_proto::guest::function_error::Kind;

use crate::support::{Function, Guest, PATIENCE, cache, zip};
use crate::{answer, failure, log, no_cgroup_left};

const AGENT: &[u8] = include_bytes!("agent.py");

async fn with_agent() -> Guest {
    Guest::start_with(&[("opt/extensions/agent", 0o755, AGENT)]).await
}

fn function(extension: &'static str) -> Function {
    Function::probe().with("EXTENSION", extension).with("TABLE", "orders")
}

#[tokio::test]
async fn an_external_extension_lives_beside_its_function() {
    let mut guest = with_agent().await;
    let (container, created) = guest.create(&function("")).await;
    assert!(created.error.is_none(), "{created:?}");
    let written = String::from_utf8_lossy(&created.log.unwrap().data).into_owned();
    // It has registered before the runtime is started, and has none of the runtime's own variables.
    let starts = written.find("agent starts in / ['TABLE']");
    assert!(starts.is_some() && starts < written.find("ready"), "{written}");
    for round in 0..2 {
        let response = guest.invoke(&container, json!({ "do": "echo", "with": round })).await;
        assert_eq!(answer(&response), json!(round));
    }
    // PID 1, the function and the extension, as one user.
    let seen = answer(&guest.invoke(&container, json!({ "do": "look around" })).await);
    assert_eq!(seen["processes"], json!(3));
    // A function that runs out of time is asked to end, then the extension is told.
    let event = json!({ "do": "sleep", "n": 600_000 });
    let response = guest
        .invoke_within(&container, event, Duration::from_millis(500))
        .await
        .unwrap();
    assert_eq!(failure(&response.error).1, "Sandbox.Timedout");
    let log = log(&response);
    assert!(log.contains("terminated"), "{log}");
    assert!(log.contains(r#""eventType": "INVOKE""#), "{log}");
    assert!(log.contains(r#""shutdownReason": "TIMEOUT""#), "{log}");
    no_cgroup_left(&container).await;
}

#[tokio::test]
async fn a_runtime_that_exits_takes_its_extensions_with_it() {
    let mut guest = with_agent().await;
    let container = guest.container(&function("")).await;
    let response = guest.invoke(&container, json!({ "do": "exit", "n": 3 })).await;
    assert_eq!(
        failure(&response.error),
        (
            Kind::Exited,
            "Runtime.ExitError",
            "Runtime exited with error: exit status 3"
        )
    );
    assert!(response.container_ended);
    let log = log(&response);
    assert!(log.contains(r#""shutdownReason": "FAILURE""#), "{log}");
    no_cgroup_left(&container).await;
}

#[tokio::test]
async fn an_extension_that_stays_is_killed_when_its_time_is_over() {
    let mut guest = with_agent().await;
    let container = guest.container(&function("stays")).await;
    let begin = Instant::now();
    guest.stop(&container).await.unwrap();
    assert!(begin.elapsed() >= Duration::from_secs(2), "{:?}", begin.elapsed());
    no_cgroup_left(&container).await;
}

#[tokio::test]
async fn a_container_ends_with_its_extension() {
    let mut guest = with_agent().await;
    let (container, created) = guest.create(&function("exits at init")).await;
    assert_eq!(
        failure(&created.error),
        (
            Kind::Reported,
            "Extension.Crash",
            "The extension agent exited with error: exit status 4"
        )
    );
    no_cgroup_left(&container).await;

    let container = guest.container(&function("exits when invoked")).await;
    let event = json!({ "do": "sleep", "n": 600_000 });
    let response = guest.invoke(&container, event).await;
    assert_eq!(failure(&response.error).1, "Extension.Crash");
    assert!(response.container_ended);
    no_cgroup_left(&container).await;

    let mut function = function("never registers");
    function.init_timeout = Duration::from_secs(1);
    let (container, created) = guest.create(&function).await;
    assert_eq!(failure(&created.error).2, "Init timed out after 1.00 seconds");
    let written = String::from_utf8_lossy(&created.log.unwrap().data).into_owned();
    assert!(!written.contains("ready"), "the runtime is not started: {written}");
    no_cgroup_left(&container).await;
}

#[tokio::test]
async fn an_extension_that_cannot_be_run_is_told() {
    let mut guest = Guest::start_with(&[("opt/extensions/locked", 0o644, AGENT)]).await;
    let (container, created) = guest.create(&function("")).await;
    let (kind, name, message) = failure(&created.error);
    assert_eq!((kind, name), (Kind::Reported, "Extension.LaunchError"));
    assert!(
        message.contains("locked") && message.contains("Permission denied"),
        "{message}"
    );
    no_cgroup_left(&container).await;
    // A runtime that can't be run, beside one that can.
    let mut guest = with_agent().await;
    let native = Function::native(zip(&[("other", 0o755, b"x")]));
    let (container, created) = guest.create(&native).await;
    assert_eq!(failure(&created.error).1, "Runtime.InvalidEntrypoint");
    no_cgroup_left(&container).await;
}

/// Reads what the extension was sent.
const READS: &str = "
def handler(event, context):
    print('said by the function')
    with open('/tmp/telemetry') as file:
        return [line for line in file]
";

fn events(answer: &Value) -> Vec<Value> {
    let lines = answer.as_array().unwrap().iter();
    let batches = lines.map(|line| serde_json::from_str::<Vec<Value>>(line.as_str().unwrap()).unwrap());
    batches.flatten().collect()
}

#[tokio::test]
async fn telemetry_is_delivered_into_the_container() {
    let mut guest = with_agent().await;
    let function = Function::python_files(&[("app.py", READS)]).with("EXTENSION", "subscribes");
    let (container, created) = guest.create(&function).await;
    assert!(created.error.is_none(), "{created:?}");
    let written = String::from_utf8_lossy(&created.log.unwrap().data).into_owned();
    assert!(written.contains("agent subscribed 200 OK"), "{written}");
    guest.invoke(&container, json!({})).await;
    // What was told of the first call has come before the container is frozen.
    let cgroup = std::path::Path::new("/sys/fs/cgroup/containers").join(&container);
    let begin = Instant::now();
    while !std::fs::read_to_string(cgroup.join("cgroup.events"))
        .unwrap()
        .contains("frozen 1")
    {
        assert!(begin.elapsed() < PATIENCE, "not frozen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let told = events(&answer(&guest.invoke(&container, json!({})).await));
    let place = |kind: &str| {
        let place = told.iter().position(|event| event["type"] == kind);
        place.unwrap_or_else(|| panic!("no {kind} in {told:#?}"))
    };
    let order = [
        "platform.initStart",
        "platform.telemetrySubscription",
        "platform.initRuntimeDone",
        "platform.extension",
        "platform.initReport",
        "platform.start",
        "function",
        "platform.runtimeDone",
        "platform.report",
    ]
    .map(place);
    assert!(order.is_sorted(), "{told:#?}");
    let line = &told[place("function")];
    assert_eq!(line["record"], "said by the function");
    assert!(
        told[place("extension")]["record"]
            .as_str()
            .unwrap()
            .starts_with("agent "),
        "{told:#?}"
    );
    let report = &told[place("platform.report")]["record"];
    assert_eq!(report["status"], "success");
    assert!(report["metrics"]["maxMemoryUsedMB"].as_u64().unwrap() > 10, "{report}");
    guest.stop(&container).await.unwrap();
    no_cgroup_left(&container).await;
}

/// As their authors write them: the programs of `tests/crates`.
#[tokio::test]
async fn what_is_made_with_the_public_crates_runs() {
    let program = |name: &str| std::fs::read(cache("crates").join(name)).expect("`cargo xtask test` builds it");
    let (external, logs, bootstrap) = (program("external"), program("logs"), program("bootstrap"));
    let mut guest = Guest::start_with(&[
        ("opt/extensions/external", 0o755, &external),
        ("opt/extensions/logs", 0o755, &logs),
    ])
    .await;
    let function = Function::native(zip(&[("bootstrap", 0o755, &bootstrap)]));
    let (container, created) = guest.create(&function).await;
    assert!(created.error.is_none(), "{created:?}");
    // Each is told of the first invocation, in the form that it can read.
    let mut written = String::new();
    let begin = Instant::now();
    let told = [
        "external PlatformReport",
        "logs PlatformReport",
        "internal PlatformReport",
    ];
    while !told.iter().all(|told| written.contains(told)) {
        assert!(begin.elapsed() < PATIENCE, "{written}");
        let response = guest.invoke(&container, json!("x")).await;
        assert_eq!(answer(&response), json!("x"));
        written += &log(&response);
    }
    for told in [
        r#"external Function("called")"#,
        r#"logs Function("called\n")"#,
        "external InvokeEvent",
    ] {
        assert!(written.contains(told), "{told}: {written}");
    }
    let response = guest
        .invoke_within(&container, json!("sleep"), Duration::from_millis(500))
        .await
        .unwrap();
    assert_eq!(failure(&response.error).1, "Sandbox.Timedout");
    let log = log(&response);
    for told in ["the hook has run", "external ShutdownEvent"] {
        assert!(log.contains(told), "{told}: {log}");
    }
    no_cgroup_left(&container).await;
}
