//! Layers: zips whose content a function finds in `/opt`.

use serde_json::json;
use tonic::Code;

use crate::support::{Function, Guest, zip};
use crate::{answer, still_serves};

/// Says what there is in `/opt`, and what can be done there.
const APP: &str = "
import os, subprocess, sys
import common, first, second

def can_write(path):
    try:
        open(path, 'w').close()
        return True
    except OSError:
        return False

def handler(event, context):
    return {
        'common': common.FROM,
        'packages': [first.FROM, second.FROM],
        'program': subprocess.run(['greet'], capture_output=True, text=True).stdout,
        'data': open('/opt/data').read(),
        'executable': [os.access('/opt/' + name, os.X_OK) for name in ('bin/greet', 'data')],
        'written': [can_write('/opt/' + name) for name in ('new', 'data', 'bin/greet')],
        'lists': sorted(os.listdir('/opt')),
        'child': subprocess.run(['python3', '-c', event['child']], capture_output=True, text=True).stdout,
    }
";

fn first() -> Vec<u8> {
    zip(&[
        ("python/common.py", 0o644, b"FROM = 'first'\n"),
        ("python/first.py", 0o644, b"FROM = 'first'\n"),
        ("bin/greet", 0o755, b"#!/bin/sh\necho hello from the first\n"),
        ("data", 0o644, b"first"),
    ])
}

fn second() -> Vec<u8> {
    zip(&[
        ("python/common.py", 0o644, b"FROM = 'second'\n"),
        (
            "python/lib/python3.11/site-packages/second/__init__.py",
            0o644,
            b"FROM = 'second'\n",
        ),
        ("bin/greet", 0o755, b"#!/bin/sh\necho hello from the second\n"),
    ])
}

#[tokio::test]
async fn layers_are_found_in_opt_later_ones_over_earlier_ones() {
    let mut guest = Guest::start().await;
    let (first, second) = (first(), second());
    let function = Function::python_files(&[("app.py", APP)]);
    // One that is there twice lies where it comes last.
    for (layers, top) in [
        (vec![&first[..], &second], "second"),
        (vec![&second, &first], "first"),
        (vec![&second, &first, &second], "second"),
    ] {
        let container = guest.container(&function.clone().layered(&layers)).await;
        let event = json!({ "child": "print(open('/opt/data').read())" });
        let seen = answer(&guest.invoke(&container, event).await);
        assert_eq!(seen["common"], top);
        assert_eq!(seen["packages"], json!(["first", "second"]));
        assert_eq!(seen["program"], format!("hello from the {top}\n"));
        assert_eq!(seen["data"], "first");
        assert_eq!(seen["executable"], json!([true, false]));
        assert_eq!(seen["written"], json!([false, false, false]));
        assert_eq!(seen["lists"], json!(["bin", "data", "python"]));
        assert_eq!(seen["child"], "first\n");
        guest.stop(&container).await.unwrap();
    }
    // Another function's container has none of it.
    let app = "import os\ndef handler(event, context): return os.listdir('/opt')\n";
    let container = guest.container(&Function::python_files(&[("app.py", app)])).await;
    assert_eq!(answer(&guest.invoke(&container, json!({})).await), json!([]));
}

#[tokio::test]
async fn a_layer_may_bring_the_runtime() {
    let mut guest = Guest::start().await;
    let probe = Function::probe();
    let data = zip(&[("data", 0o644, b"data")]);
    let container = guest.container(&Function::native(data).layered(&[&probe.zip])).await;
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 42 })).await;
    assert_eq!(answer(&response), json!(42));
    guest.stop(&container).await.unwrap();
    // One in the function's own zip is started before it.
    let unusable = zip(&[("bootstrap", 0o755, b"#!/bin/sh\nexit 3\n")]);
    let container = guest.container(&probe.layered(&[&unusable])).await;
    let response = guest.invoke(&container, json!({ "do": "echo", "with": 42 })).await;
    assert_eq!(answer(&response), json!(42));
}

#[tokio::test]
async fn layers_that_are_not_there_or_too_many_are_refused() {
    let mut guest = Guest::start().await;
    let good = guest.creation(&Function::probe().layered(&[&first()])).await;
    let mut missing = good.clone();
    missing.layers_sha256.push("0".repeat(64));
    let mut many = good.clone();
    many.layers_sha256 = vec![many.code_sha256.clone(); 6];
    for (request, code) in [(missing, Code::FailedPrecondition), (many, Code::InvalidArgument)] {
        let status = guest.client.create_container(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status:?}");
    }
    let made = guest.client.create_container(good).await.unwrap().into_inner();
    assert!(made.error.is_none(), "{made:?}");
    still_serves(&mut guest).await;
}
