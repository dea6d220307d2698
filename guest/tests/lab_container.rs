//! Containers as they are, with real functions in them, good and hostile. Needs root, cgroup v2 and the guest image.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test says by a panic what is wrong, helpers too"
)]

mod budget;
mod credits;
mod extensions;
mod layers;
mod python;
mod scratch;
mod stream;
mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use stoker_proto::guest::function_error::Kind;
use stoker_proto::guest::{
    FollowLogsRequest, FunctionError, HelloRequest, InvokeResponse, LogLines, WatchRequest, WatchResponse,
};
use stoker_proto::limits::ANSWER_BYTES;
use tonic::Code;

use support::{Function, Guest, PATIENCE, zip};

fn answer(response: &InvokeResponse) -> Value {
    assert!(response.error.is_none(), "{response:?}");
    serde_json::from_slice(&response.payload).unwrap()
}

fn log(response: &InvokeResponse) -> String {
    String::from_utf8_lossy(&response.log.as_ref().unwrap().data).into_owned()
}

fn failure(error: &Option<FunctionError>) -> (Kind, &str, &str) {
    let error = error.as_ref().expect("an error");
    (error.kind(), &error.r#type, &error.message)
}

/// The next good request is served all the same.
async fn still_serves(guest: &mut Guest) {
    let container = guest.container(&Function::probe()).await;
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 42 })).await;
    assert_eq!(answer(&response), json!(42));
    guest.stop(&container).await.unwrap();
}

/// Waits until no cgroup of a container is left.
async fn no_cgroup_left(container: &str) {
    let path = std::path::Path::new("/sys/fs/cgroup/containers").join(container);
    let begin = Instant::now();
    while path.exists() {
        assert!(begin.elapsed() < PATIENCE, "{} stays", path.display());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_python_function_runs_unmodified() {
    let mut guest = Guest::start().await;
    let hello = guest.client.hello(HelloRequest::default()).await.unwrap().into_inner();
    assert_eq!(hello.telemetry_error, "");
    assert!(hello.memory_available_bytes > 0 && hello.cpus > 0 && hello.uptime_us > 0);
    let begin = Instant::now();
    let (container, created) = guest.create(&Function::python("app.handler")).await;
    println!("python: created and initialised in {:?}", begin.elapsed());
    assert!(created.error.is_none(), "{created:?}");
    assert!(
        String::from_utf8_lossy(&created.log.unwrap().data).contains("importing"),
        "what was written at init"
    );
    for round in 0..3 {
        let begin = Instant::now();
        let response = guest
            .invoke_within(&container, json!({ "round": round }), Duration::from_secs(30))
            .await
            .unwrap();
        println!("python: invoked in {:?}", begin.elapsed());
        let answer = answer(&response);
        assert_eq!(answer["event"], json!({ "round": round }));
        assert_eq!(answer["name"], "trial");
        assert_eq!(answer["version"], "$LATEST");
        assert_eq!(answer["memory"], "128");
        assert_eq!(answer["arn"], "arn:aws:lambda:us-east-1:acme:function:trial");
        assert_eq!(answer["log_group"], "/aws/lambda/trial");
        assert_eq!(answer["cwd"], "/var/task");
        assert_eq!(answer["python"], json!([3, 11]));
        let left = answer["left_ms"].as_u64().unwrap();
        assert!((1..=30_000).contains(&left), "{left}");
        let log = log(&response);
        assert!(log.contains(&format!("called with {{\"round\": {round}}}")), "{log}");
        assert!(log.contains("to standard error"), "{log}");
        assert!(!log.contains("importing"), "{log}");
        let usage = response.usage.unwrap();
        assert!(usage.cpu_ns > 0 && usage.memory_peak_bytes > 1 << 20, "{usage:?}");
        assert!(!response.container_ended);
    }
    guest.stop(&container).await.unwrap();
    no_cgroup_left(&container).await;
}

#[tokio::test]
async fn a_python_function_that_raises_reports_it() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::python("app.fails")).await;
    let response = guest.invoke(&container, json!({ "thing": "x" })).await;
    assert_eq!(
        failure(&response.error),
        (Kind::Reported, "ValueError", "no such thing: x")
    );
    let object: Value = serde_json::from_slice(&response.payload).unwrap();
    assert_eq!(object["errorType"], "ValueError");
    assert!(object["stackTrace"][0].as_str().unwrap().contains("app.py"));
    assert!(!response.container_ended);
    // It lives on.
    let response = guest.invoke(&container, json!({ "thing": "y" })).await;
    assert_eq!(failure(&response.error).0, Kind::Reported);
}

/// `awslambdaric` sends the whole exception a second time, in a header.
#[tokio::test]
async fn errors_of_any_length_are_reported_and_the_container_lives_on() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::python("app.fails_at_length")).await;
    for (event, kind) in [
        (json!({ "characters": 14_000 }), "ValueError"),
        (json!({ "characters": 200_000 }), "ValueError"),
        (json!({ "characters": 900_000 }), "ValueError"),
        (json!({ "characters": 3_000_000 }), "ValueError"),
        (json!({ "frames": 900 }), "KeyError"),
        (json!({}), "RecursionError"),
    ] {
        let response = guest.invoke(&container, event.clone()).await;
        let (failed, name, _) = failure(&response.error);
        assert_eq!((failed, name), (Kind::Reported, kind), "{event}");
        assert!(!response.container_ended, "{event}");
    }
}

#[tokio::test]
async fn a_missing_module_or_handler_is_an_init_error() {
    let mut guest = Guest::start().await;
    for (handler, name) in [
        ("missing.handler", "Runtime.ImportModuleError"),
        ("app.missing", "Runtime.HandlerNotFound"),
        ("nonsense", "Runtime.MalformedHandlerName"),
    ] {
        let (container, created) = guest.create(&Function::python(handler)).await;
        let (kind, kind_name, message) = failure(&created.error);
        assert_eq!((kind, kind_name), (Kind::Reported, name), "{message}");
        assert!(!message.is_empty());
        no_cgroup_left(&container).await;
    }
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn a_wrapper_starts_the_runtime() {
    let mut guest = Guest::start().await;
    let wrapper: &[u8] = b"#!/bin/sh\nexport SET_BY_WRAPPER=yes\necho wrapped \"$1\"\nexec \"$@\"\n";
    let function = Function::python_with(
        "app.variable",
        &[
            ("wrapper", 0o755, wrapper),
            ("refuses", 0o755, b"#!/bin/sh\nexit 41\n"),
            ("unusable", 0o644, b"#!/bin/sh\n"),
        ],
    );
    let with = |path| function.clone().with("AWS_LAMBDA_EXEC_WRAPPER", path);
    let (container, created) = guest.create(&with("/var/task/wrapper")).await;
    let log = String::from_utf8_lossy(&created.log.unwrap().data).into_owned();
    assert!(log.contains("wrapped /"), "{log}");
    let response = guest.invoke(&container, json!({ "name": "SET_BY_WRAPPER" })).await;
    assert_eq!(answer(&response), json!("yes"));
    for (path, status) in [
        ("/var/task/refuses", 41),
        ("/var/task/none", 127),
        ("/var/task/unusable", 126),
    ] {
        let (_, created) = guest.create(&with(path)).await;
        let message = format!("Runtime exited with error: exit status {status}");
        assert_eq!(
            failure(&created.error),
            (Kind::Exited, "Runtime.ExitError", message.as_str())
        );
    }
    // One that is the function's own starts as it is.
    guest
        .container(&Function::probe().with("AWS_LAMBDA_EXEC_WRAPPER", "/none"))
        .await;
}

#[tokio::test]
async fn a_python_function_past_its_deadline_is_killed() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::python("app.sleeps")).await;
    let response = guest
        .invoke_within(&container, json!({ "seconds": 600 }), Duration::from_millis(500))
        .await
        .unwrap();
    let (kind, name, message) = failure(&response.error);
    assert_eq!((kind, name), (Kind::TimedOut, "Sandbox.Timedout"));
    assert_eq!(message, "Task timed out after 0.50 seconds");
    assert!(response.container_ended);
    no_cgroup_left(&container).await;
    let gone = guest.invoke_within(&container, json!({}), PATIENCE).await.unwrap_err();
    assert_eq!(gone.code(), Code::FailedPrecondition);
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn a_native_function_runs_unmodified() {
    let mut guest = Guest::start().await;
    let mut function = Function::probe()
        .with("TABLE", "orders")
        .with("AWS_LAMBDA_FUNCTION_NAME", "mine");
    function.amount.memory_mib = 256;
    let mut times = Vec::new();
    for _ in 0..4 {
        guest.put_code(&function.zip).await.unwrap();
        let begin = Instant::now();
        let container = guest.container(&function).await;
        times.push(begin.elapsed());
        guest.stop(&container).await.unwrap();
    }
    println!("native: created and initialised in {times:?}");
    let container = guest.container(&function).await;
    let response = guest.invoke(&container, json!({ "do": "environment" })).await;
    let environment = answer(&response);
    for (name, value) in [
        ("TABLE", "orders"),
        ("AWS_LAMBDA_FUNCTION_NAME", "trial"),
        ("AWS_LAMBDA_FUNCTION_VERSION", "$LATEST"),
        ("AWS_LAMBDA_FUNCTION_MEMORY_SIZE", "256"),
        ("AWS_LAMBDA_RUNTIME_API", "127.0.0.1:9001"),
        ("AWS_LAMBDA_INITIALIZATION_TYPE", "on-demand"),
        ("AWS_LAMBDA_LOG_GROUP_NAME", "/aws/lambda/trial"),
        ("LAMBDA_TASK_ROOT", "/var/task"),
        ("LAMBDA_RUNTIME_DIR", "/var/runtime"),
        ("_HANDLER", "none"),
        ("TZ", ":UTC"),
    ] {
        assert_eq!(environment[name], value, "{name}");
    }
    let mut times = Vec::new();
    for _ in 0..20 {
        let begin = Instant::now();
        guest.invoke(&container, json!({ "do": "echo", "with": 1 })).await;
        times.push(begin.elapsed());
    }
    times.sort();
    println!("native: invoked in {:?} (median)", times[times.len() / 2]);
    println!("stoker-init: {} KiB resident", guest.resident_kib());
}

#[tokio::test]
async fn a_container_sees_and_may_do_little() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    let response = guest.invoke(&container, json!({ "do": "look around" })).await;
    let seen = answer(&response);
    println!("{seen:#}");
    let missing = "Function not implemented (os error 38)";
    for (what, is) in [
        ("vsock", json!(false)),
        ("inet", json!(true)),
        ("mount", json!(missing)),
        ("bpf", json!(missing)),
        ("unshare", json!(missing)),
        // PID 1, which is not the function, and the function.
        ("processes", json!(2)),
        ("pid", json!(2)),
        ("capabilities", json!("0000000000000000")),
        ("bounding", json!("0000000000000000")),
        ("no_new_privileges", json!("1")),
        ("seccomp", json!("2")),
        ("write_tmp", json!(null)),
        ("write_shm", json!(null)),
        ("kcore", json!(0)),
        ("code_mode", json!(0o555)),
        // Input, output, error and the folder that is being read.
        ("descriptors", json!(4)),
        ("nofile", json!(1024)),
        ("nproc", json!(1024)),
    ] {
        assert_eq!(seen[what], is, "{what}");
    }
    assert!(seen["uid"].as_u64().unwrap() >= 100_000);
    for what in ["write_code", "write_root", "write_etc", "write_setting"] {
        assert!(seen[what].is_string(), "{what}: {}", seen[what]);
    }
    let devices: Vec<&str> = seen["devices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|device| device.as_str().unwrap())
        .collect();
    for device in &devices {
        assert!(
            [
                "fd", "full", "kcore", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin", "stdout", "tty",
                "urandom", "zero"
            ]
            .contains(device),
            "{device}"
        );
    }
}

#[tokio::test]
async fn crashes_are_told_apart() {
    let mut guest = Guest::start().await;
    for (event, message) in [
        (
            json!({ "do": "exit", "n": 3 }),
            "Runtime exited with error: exit status 3",
        ),
        (
            json!({ "do": "exit", "n": 0 }),
            "Runtime exited without providing a reason",
        ),
        (
            json!({ "do": "kill", "n": libc::SIGKILL }),
            "Runtime exited with error: signal: killed",
        ),
        (
            json!({ "do": "kill", "n": libc::SIGABRT }),
            "Runtime exited with error: signal: SIGABRT",
        ),
        (
            json!({ "do": "kill", "n": libc::SIGRTMIN() }),
            "Runtime exited with error: signal: 34",
        ),
    ] {
        let container = guest.container(&Function::probe()).await;
        let response = guest.invoke(&container, event).await;
        assert_eq!(failure(&response.error), (Kind::Exited, "Runtime.ExitError", message));
        assert!(response.container_ended);
        let object: Value = serde_json::from_slice(&response.payload).unwrap();
        assert_eq!(object["errorType"], "Runtime.ExitError");
        no_cgroup_left(&container).await;
    }
    still_serves(&mut guest).await;
}

/// As Lambda has it: a runtime may exit between two calls, and none of them fails by that.
#[tokio::test]
async fn a_call_that_its_runtime_did_not_take_is_told_apart() {
    let mut guest = Guest::start().await;
    let mut watch = guest
        .client
        .watch(WatchRequest {
            interval: Some(Duration::from_secs(60).try_into().unwrap()),
        })
        .await
        .unwrap()
        .into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert!(first.containers.is_empty(), "{first:?}");
    for (how, message) in [
        ("answer and exit", "Runtime exited with error: exit status 5"),
        ("exit with work unread", "Runtime exited with error: exit status 5"),
    ] {
        // The next call comes before the exit, in the middle of it, or after it.
        for _ in 0..3 {
            let container = guest.container(&Function::probe()).await;
            let response = guest.invoke(&container, json!({ "do": how, "n": 5 })).await;
            assert_eq!(answer(&response), json!(1));
            let next = json!({ "do": "echo", "with": 1 });
            let status = guest.invoke_within(&container, next, PATIENCE).await.unwrap_err();
            assert_eq!(status.code(), Code::FailedPrecondition, "{how}: {status}");
            // Its end is told all the same.
            let ended = loop {
                let told = tokio::time::timeout(PATIENCE, watch.message()).await.unwrap();
                if let Some(ended) = told.unwrap().unwrap().ended.into_iter().next() {
                    break ended;
                }
            };
            assert_eq!(ended.id, container);
            assert_eq!(failure(&ended.error), (Kind::Exited, "Runtime.ExitError", message));
        }
    }
    // One that is stopped with a call that it has not taken yet has not begun it either; one that has it may have.
    let container = guest.container(&Function::probe()).await;
    let mut client = guest.client.clone();
    let request = support::request(&container, json!({ "do": "sleep", "n": 600_000 }), PATIENCE);
    let call = tokio::spawn(async move { support::invoke(&mut client, request).await });
    guest.stop(&container).await.unwrap();
    match call.await.unwrap() {
        Ok(response) => {
            assert_eq!(failure(&response.error).1, "Sandbox.Stopped");
            assert!(response.container_ended);
        }
        Err(status) => assert_eq!(status.code(), Code::FailedPrecondition),
    }
    let next = json!({ "do": "echo", "with": 1 });
    let gone = guest.invoke_within(&container, next, PATIENCE).await.unwrap_err();
    assert_eq!(gone.code(), Code::FailedPrecondition);
    still_serves(&mut guest).await;
}

/// A function need not reap what falls to PID 1: more of them than there may be processes.
#[tokio::test]
async fn orphans_are_reaped() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    let event = json!({ "do": "orphans", "n": 1100 });
    let response = guest.invoke_within(&container, event, PATIENCE).await.unwrap();
    assert_eq!(answer(&response), json!("left"));
}

#[tokio::test]
async fn a_container_is_frozen_between_calls() {
    let mut guest = Guest::start().await;
    let mut function = Function::probe();
    let container = guest.container(&function).await;
    guest.invoke(&container, json!({ "do": "background" })).await;
    let cgroup = std::path::Path::new("/sys/fs/cgroup/containers").join(&container);
    let read = |file: &str| std::fs::read_to_string(cgroup.join(file)).unwrap();
    for _ in 0..3 {
        let begin = Instant::now();
        while !read("cgroup.events").contains("frozen 1") {
            assert!(begin.elapsed() < PATIENCE, "not frozen");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // It uses nothing, and goes on with the next call.
        let used = || read("cpu.stat").lines().next().map(str::to_owned);
        let before = used();
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(before, used());
        let mut ticks = Vec::new();
        while ticks.len() < 2 {
            let now = answer(&guest.invoke(&container, json!({ "do": "ticks" })).await);
            if ticks.last() != Some(&now) {
                ticks.push(now);
            }
        }
    }
    // A frozen one can be ended.
    guest.stop(&container).await.unwrap();
    no_cgroup_left(&container).await;

    function.freeze = false;
    let container = guest.container(&function).await;
    guest.invoke(&container, json!({ "do": "background" })).await;
    let before = answer(&guest.invoke(&container, json!({ "do": "ticks" })).await);
    // Longer than until others are frozen.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let after = answer(&guest.invoke(&container, json!({ "do": "ticks" })).await);
    let ticks = after.as_u64().unwrap() - before.as_u64().unwrap();
    assert!(ticks > 700, "{ticks}");
}

/// Only with an extension: without, as on Lambda, a function is killed at once.
#[tokio::test]
async fn a_function_with_an_extension_is_asked_to_end_before_it_is_killed() {
    let mut guest = Guest::start().await;
    for extension in [true, false] {
        let mut function = Function::probe();
        if extension {
            function = function.with("PROBE_INIT", "extension");
        }
        let container = guest.container(&function).await;
        for round in 0..2 {
            let response = guest.invoke(&container, json!({ "do": "echo", "with": round })).await;
            assert_eq!(answer(&response), json!(round));
        }
        let event = json!({ "do": "sleep", "n": 600_000 });
        let response = guest
            .invoke_within(&container, event, Duration::from_millis(500))
            .await
            .unwrap();
        assert_eq!(failure(&response.error).1, "Sandbox.Timedout");
        let log = log(&response);
        assert_eq!(log.contains("terminated"), extension, "{log}");
        assert_eq!(log.contains(r#""eventType":"INVOKE""#), extension, "{log}");
        no_cgroup_left(&container).await;
    }
    // Where nobody hears its last words, too.
    let container = guest
        .container(&Function::probe().with("PROBE_INIT", "extension"))
        .await;
    guest.stop(&container).await.unwrap();
    no_cgroup_left(&container).await;
    let (container, created) = guest
        .create(&Function::probe().with("PROBE_INIT", "extension that fails"))
        .await;
    let (kind, name, message) = failure(&created.error);
    assert_eq!((kind, name), (Kind::Reported, "Extension.InitError"));
    assert!(message.contains("Probe.NoKey"), "{message}");
    no_cgroup_left(&container).await;
}

#[tokio::test]
async fn inits_that_fail_are_answers() {
    let mut guest = Guest::start().await;
    let (_, exited) = guest.create(&Function::probe().with("PROBE_INIT", "exit")).await;
    assert_eq!(
        failure(&exited.error),
        (
            Kind::Exited,
            "Runtime.ExitError",
            "Runtime exited with error: exit status 7"
        )
    );
    assert_eq!(&exited.log.unwrap().data[..], b"giving up at init\n");

    let (_, told) = guest.create(&Function::probe().with("PROBE_INIT", "error")).await;
    assert_eq!(
        failure(&told.error),
        (Kind::Reported, "Probe.NoConfig", "there is no configuration")
    );

    let mut hanging = Function::probe().with("PROBE_INIT", "hang");
    hanging.init_timeout = Duration::from_millis(700);
    let (container, hung) = guest.create(&hanging).await;
    assert_eq!(
        failure(&hung.error),
        (Kind::TimedOut, "Sandbox.Timedout", "Init timed out after 0.70 seconds")
    );
    no_cgroup_left(&container).await;

    let (_, missing) = guest.create(&Function::native(zip(&[("other", 0o755, b"x")]))).await;
    let (kind, name, message) = failure(&missing.error);
    assert_eq!((kind, name), (Kind::Exited, "Runtime.InvalidEntrypoint"));
    assert!(
        message.contains("/var/task/bootstrap") && message.contains("No such file"),
        "{message}"
    );
    let (_, rubbish) = guest
        .create(&Function::native(zip(&[("bootstrap", 0o755, b"\x7fELF?")])))
        .await;
    assert_eq!(failure(&rubbish.error).1, "Runtime.InvalidEntrypoint");
    let (_, locked) = guest
        .create(&Function::native(zip(&[("bootstrap", 0o644, b"#!/bin/sh\n")])))
        .await;
    assert!(failure(&locked.error).2.contains("Permission denied"));
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn a_fork_bomb_is_contained() {
    let mut guest = Guest::start().await;
    let beside = guest.container(&Function::probe()).await;
    let container = guest.container(&Function::probe()).await;
    let bomb = {
        let mut client = guest.client.clone();
        let request = support::request(&container, json!({ "do": "fork" }), Duration::from_secs(4));
        tokio::spawn(async move { support::invoke(&mut client, request).await })
    };
    // Others are served while it goes on.
    while !bomb.is_finished() {
        let response = guest.invoke(&beside, json!({ "do": "echo", "with": 1 })).await;
        assert_eq!(answer(&response), json!(1));
    }
    let response = bomb.await.unwrap().unwrap();
    let kind = failure(&response.error).0;
    assert!(matches!(kind, Kind::TimedOut | Kind::OutOfMemory), "{kind:?}");
    assert!(response.container_ended);
    no_cgroup_left(&container).await;
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn eating_all_memory_ends_the_container_only() {
    let mut guest = Guest::start().await;
    let beside = guest.container(&Function::probe()).await;
    let container = guest.container(&Function::probe()).await;
    let response = guest.invoke(&container, json!({ "do": "memory" })).await;
    assert_eq!(
        failure(&response.error),
        (
            Kind::OutOfMemory,
            "Runtime.OutOfMemory",
            "Runtime ran out of memory and was killed"
        )
    );
    assert!(response.container_ended);
    let peak = response.usage.unwrap().memory_peak_bytes;
    assert!(peak > 96 << 20 && peak < 160 << 20, "{peak}");
    no_cgroup_left(&container).await;
    let response = guest.invoke(&beside, json!({ "do": "echo", "with": 1 })).await;
    assert_eq!(answer(&response), json!(1));
}

#[tokio::test]
async fn a_log_without_end_is_cut() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    let before = guest.resident_kib();
    let response = guest
        .invoke_within(&container, json!({ "do": "log" }), Duration::from_secs(3))
        .await
        .unwrap();
    assert_eq!(failure(&response.error).0, Kind::TimedOut);
    let log = response.log.unwrap();
    assert!(log.truncated);
    assert!((255 << 10..=256 << 10).contains(&log.data.len()), "{}", log.data.len());
    let text = String::from_utf8_lossy(&log.data);
    assert!(text.contains(&format!("[{} bytes are missing here]", log.missing_bytes)));
    let after = guest.resident_kib();
    assert!(after < before + 4096, "{before} KiB grew to {after}");
    // One that ends is whole, and told of as it is.
    let container = guest.container(&Function::probe()).await;
    let response = guest
        .invoke(&container, json!({ "do": "log some", "n": 200_000 }))
        .await;
    let log = response.log.unwrap();
    assert!(!log.truncated);
    assert_eq!(log.data.len(), 200_000);
}

/// Its thread writes long after the answer.
const WRITES_LATER: &str = r#"
import threading
print("importing")

def handler(event, context):
    print("handling")
    threading.Timer(2, print, ["between"]).start()
"#;

#[tokio::test]
async fn lines_are_told_as_they_are_written_and_of_which_call() {
    let mut guest = Guest::start().await;
    let function = Function {
        freeze: false,
        ..Function::python_files(&[("app.py", WRITES_LATER)])
    };
    let mut batches = guest
        .client
        .follow_logs(FollowLogsRequest {})
        .await
        .unwrap()
        .into_inner();
    let container = guest.container(&function).await;
    let request = support::request(&container, json!(null), PATIENCE);
    let id = request.request_id.clone();
    support::invoke(&mut guest.client, request).await.unwrap();
    let mut lines = Vec::new();
    while !lines.iter().any(|lines: &LogLines| lines.text == "between") {
        let batch = tokio::time::timeout(PATIENCE, batches.message()).await.expect("a line");
        lines.extend(batch.unwrap().expect("the stream goes on").lines);
    }
    assert!(
        lines
            .iter()
            .all(|line| line.container == container && line.lost_bytes == 0)
    );
    assert!(lines.is_sorted_by_key(|line| line.time_ns));
    let told: Vec<_> = lines
        .iter()
        .flat_map(|lines| lines.lines().map(|line| (lines.request_id.as_str(), line)))
        .collect();
    let [start, end] = [
        format!("START RequestId: {id} Version: $LATEST"),
        format!("END RequestId: {id}"),
    ];
    assert_eq!(told[0], ("", "INIT_START Runtime Version: python:3.11"));
    assert_eq!(told[1], ("", "importing"));
    assert_eq!(
        told[2..5],
        [(id.as_str(), start.as_str()), (&id, "handling"), (&id, &end)]
    );
    assert!(
        told[5].1.starts_with(&format!("REPORT RequestId: {id}\tDuration: ")),
        "{told:?}"
    );
    assert_eq!(told[6..], [("", "between")]);
}

#[tokio::test]
async fn writing_to_disk_without_end_fills_the_disk() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    for _ in 0..2 {
        let response = guest.invoke(&container, json!({ "do": "disk" })).await;
        let answer = answer(&response);
        assert_eq!(answer["error"], "No space left on device (os error 28)");
        let written = answer["written"].as_u64().unwrap();
        assert!((60 << 20..=64 << 20).contains(&written), "{written}");
    }
}

#[tokio::test]
async fn answers_over_6_mib_and_100_bytes_are_refused() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    // The largest answer with the largest log.
    let event = json!({ "do": "big", "n": ANSWER_BYTES, "log": 256 << 10 });
    let response = guest.invoke(&container, event).await;
    assert_eq!(response.payload.len(), ANSWER_BYTES);
    assert!(response.error.is_none());
    assert_eq!(response.log.unwrap().data.len(), 256 << 10);
    let response = guest
        .invoke(&container, json!({ "do": "big", "n": ANSWER_BYTES + 1 }))
        .await;
    let (kind, name, _) = failure(&response.error);
    assert_eq!((kind, name), (Kind::ResponseTooLarge, "Function.ResponseSizeTooLarge"));
    assert!(!response.container_ended);
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 1 })).await;
    assert_eq!(answer(&response), json!(1));
    let response = guest.invoke(&container, json!({ "do": "error" })).await;
    assert_eq!(failure(&response.error), (Kind::Reported, "Probe.Told", "as told"));
}

#[tokio::test]
async fn containers_run_beside_each_other_and_one_does_one_thing_at_a_time() {
    let mut guest = Guest::start().await;
    let mut containers = Vec::new();
    for _ in 0..4 {
        containers.push(guest.container(&Function::probe()).await);
    }
    let calls = containers.iter().enumerate().map(|(index, container)| {
        let mut client = guest.client.clone();
        let request = support::request(container, json!({ "do": "echo", "with": index }), PATIENCE);
        tokio::spawn(async move { support::invoke(&mut client, request).await.unwrap() })
    });
    for (index, call) in calls.collect::<Vec<_>>().into_iter().enumerate() {
        assert_eq!(answer(&call.await.unwrap()), json!(index));
    }
    let slow = {
        let mut client = guest.client.clone();
        let request = support::request(&containers[0], json!({ "do": "sleep", "n": 3000 }), PATIENCE);
        tokio::spawn(async move {
            loop {
                match support::invoke(&mut client, request.clone()).await {
                    Ok(response) => return response,
                    // One of those below was first.
                    Err(status) => assert_eq!(status.code(), Code::FailedPrecondition),
                }
            }
        })
    };
    let refused = loop {
        match guest
            .invoke_within(&containers[0], json!({ "do": "echo", "with": 1 }), PATIENCE)
            .await
        {
            Ok(_) => tokio::task::yield_now().await,
            Err(status) => break status,
        }
    };
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert_eq!(answer(&slow.await.unwrap()), json!("slept"));
}

#[tokio::test]
async fn watching_shows_use_and_ends() {
    let mut guest = Guest::start().await;
    let busy = guest.container(&Function::probe()).await;
    let dying = guest.container(&Function::probe()).await;
    let mut watch = guest
        .client
        .watch(WatchRequest {
            interval: Some(Duration::from_millis(200).try_into().unwrap()),
        })
        .await
        .unwrap()
        .into_inner();
    let first = watch.message().await.unwrap().unwrap();
    assert_eq!(first.containers.len(), 2);
    let response = guest.invoke(&busy, json!({ "do": "spin", "n": 500 })).await;
    let spun = response.usage.unwrap().cpu_ns;
    assert!(spun > 300_000_000, "{spun}");
    guest.invoke(&dying, json!({ "do": "exit", "n": 9 })).await;
    let mut ended = None;
    let mut used = 0;
    while ended.is_none() || used < spun {
        let WatchResponse {
            containers,
            ended: ends,
            ..
        } = tokio::time::timeout(PATIENCE, watch.message())
            .await
            .unwrap()
            .unwrap()
            .unwrap();
        for container in containers.iter().filter(|container| container.id == busy) {
            used = container.usage.unwrap().cpu_ns;
        }
        ended = ended.or(ends.into_iter().next());
    }
    let ended = ended.unwrap();
    assert_eq!(ended.id, dying);
    assert_eq!(failure(&ended.error).2, "Runtime exited with error: exit status 9");
}

#[tokio::test]
async fn containers_outlive_the_agents_connection() {
    let mut guest = Guest::start().await;
    let container = guest.container(&Function::probe()).await;
    guest.reconnect().await;
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 5 })).await;
    assert_eq!(answer(&response), json!(5));
}

#[tokio::test]
async fn an_agent_that_was_restarted_is_told_what_is_there_and_nothing_runs_twice() {
    let mut guest = Guest::start().await;
    let function = Function::probe();
    let idle = guest.container(&function).await;
    let busy = guest.container(&function).await;
    let named = |container: &str, event: Value| stoker_proto::guest::InvokeRequest {
        name: "trial#1".to_owned(),
        keep: true,
        ..support::request(container, event, PATIENCE)
    };
    let told = async |guest: &mut Guest| {
        let hello = guest.client.hello(HelloRequest::default()).await.unwrap().into_inner();
        let mut containers = hello.containers;
        containers.sort();
        let invocations = hello.invocations.into_iter();
        let invocations: Vec<_> = invocations.map(|state| (state.name, state.container)).collect();
        (containers, hello.code_sha256, invocations)
    };
    let call = {
        let (mut client, slow) = (guest.client.clone(), named(&busy, json!({ "do": "sleep", "n": 3000 })));
        tokio::spawn(async move { support::invoke(&mut client, slow).await })
    };
    let runs = vec![("trial#1".to_owned(), busy.clone())];
    while told(&mut guest).await.2 != runs {
        tokio::task::yield_now().await;
    }
    // The agent ends: its call with it.
    call.abort();
    assert!(call.await.unwrap_err().is_cancelled());
    guest.reconnect().await;
    let mut containers = vec![busy.clone(), idle.clone()];
    containers.sort();
    assert_eq!(
        told(&mut guest).await,
        (containers, vec![support::digest(&function.zip)], runs)
    );
    // What comes under the same name is answered as the first, by whichever container.
    let again = named(&idle, json!({ "do": "echo", "with": "ran again" }));
    let attached = stoker_proto::guest::InvokeRequest {
        attach: true,
        ..again.clone()
    };
    for again in [again, attached.clone()] {
        let response = support::invoke(&mut guest.client, again).await.unwrap();
        assert_eq!(answer(&response), json!("slept"));
        assert_eq!(told(&mut guest).await.2, [("trial#1".to_owned(), String::new())]);
    }
    // Nothing is begun where one only asks for what runs, and nothing is kept that nobody asked for.
    let other = stoker_proto::guest::InvokeRequest {
        name: "trial#2".to_owned(),
        ..attached
    };
    let status = support::invoke(&mut guest.client, other).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    let response = guest.invoke(&idle, json!({ "do": "echo", "with": 5 })).await;
    assert_eq!(answer(&response), json!(5));
    assert_eq!(told(&mut guest).await.2.len(), 1);
}

#[tokio::test]
async fn a_container_that_has_not_initialised_when_its_agent_leaves_is_ended() {
    let mut guest = Guest::start().await;
    let mut hanging = Function::probe().with("PROBE_INIT", "hang");
    hanging.init_timeout = 10 * PATIENCE;
    let request = guest.creation(&hanging).await;
    let cgroup = std::path::Path::new("/sys/fs/cgroup/containers").join(&request.id);
    let making = {
        let mut client = guest.client.clone();
        tokio::spawn(async move { client.create_container(request).await })
    };
    while !std::fs::read_to_string(cgroup.join("cgroup.procs")).is_ok_and(|pids| !pids.is_empty()) {
        tokio::task::yield_now().await;
    }
    making.abort();
    guest.reconnect().await;
    while cgroup.exists() {
        tokio::task::yield_now().await;
    }
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn bad_code_is_refused_and_good_code_kept_once() {
    let mut guest = Guest::start().await;
    let good = Function::probe().zip;
    let sha256 = guest.put_code(&good).await.unwrap();
    assert!(guest.put_code_as(&sha256, &good).await.unwrap());
    for (bad, code) in [
        (b"no zip at all".to_vec(), Code::InvalidArgument),
        (zip(&[("../out", 0o644, b"x")]), Code::InvalidArgument),
        (zip(&[("/abs", 0o644, b"x")]), Code::InvalidArgument),
        (good[..good.len() / 2].to_vec(), Code::InvalidArgument),
    ] {
        let status = guest.put_code(&bad).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    let status = guest.put_code_as(&support::digest(b"other"), &good).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let mut unknown = Function::probe();
    unknown.zip = zip(&[("never", 0o644, b"brought")]);
    let request = stoker_proto::guest::CreateContainerRequest {
        id: support::new_id(),
        function_name: "x".to_owned(),
        runtime: "provided".to_owned(),
        amount: Some(unknown.amount),
        account: "acme".to_owned(),
        init_timeout: Some(PATIENCE.try_into().unwrap()),
        code_sha256: support::digest(&unknown.zip),
        ..Default::default()
    };
    let status = guest.client.create_container(request).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition);
    still_serves(&mut guest).await;
}

#[tokio::test]
async fn unreasonable_requests_are_refused() {
    let mut guest = Guest::start().await;
    let code_sha256 = guest.put_code(&Function::probe().zip).await.unwrap();
    let good = stoker_proto::guest::CreateContainerRequest {
        id: support::new_id(),
        function_name: "x".to_owned(),
        runtime: "provided".to_owned(),
        amount: Some(Function::probe().amount),
        account: "acme".to_owned(),
        init_timeout: Some(PATIENCE.try_into().unwrap()),
        code_sha256,
        ..Default::default()
    };
    let spoilt: [fn(&mut stoker_proto::guest::CreateContainerRequest); 6] = [
        |request| request.id = "../../etc".to_owned(),
        |request| request.runtime = "cobol".to_owned(),
        |request| request.amount = None,
        |request| request.init_timeout = None,
        |request| request.account = "a/b".to_owned(),
        |request| {
            request.environment.insert("A=B".to_owned(), "c".to_owned());
        },
    ];
    for spoil in spoilt {
        let mut request = good.clone();
        spoil(&mut request);
        let status = guest.client.create_container(request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }
    guest.client.create_container(good.clone()).await.unwrap();
    let twice = guest.client.create_container(good).await.unwrap_err();
    assert_eq!(twice.code(), Code::AlreadyExists);
    assert_eq!(guest.stop("nobody").await.unwrap_err().code(), Code::NotFound);
}
