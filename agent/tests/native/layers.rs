//! What a function may have beside its code: layers, the size of `/tmp`, and whether it is frozen.

use bytes::Bytes;
use serde_json::Value;
use stoker_agent::config::Limits;
use stoker_proto::v1;
use stoker_proto::v1::create_function_request::Part;
use tonic::{Code, Status};

use crate::common::*;
use crate::functions::{fields, noise, still_serves};
use crate::programs::stoker;

fn layer(name: &str, content: &[u8]) -> Vec<u8> {
    zip(&[(name, 0o644, content)])
}

/// The messages that create a function with layers.
fn layered(header: v1::CreateFunctionHeader, code: &[u8], layers: &[Vec<u8>]) -> Vec<v1::CreateFunctionRequest> {
    let mut all = parts(header, code);
    for layer in layers {
        let begin = Part::Layer(v1::LayerHeader {});
        let chunks = layer
            .chunks(1 << 20)
            .map(|chunk| Part::Chunk(Bytes::copy_from_slice(chunk)));
        let layer = std::iter::once(begin).chain(chunks);
        all.extend(layer.map(|part| v1::CreateFunctionRequest { part: Some(part) }));
    }
    all
}

async fn create(agent: &Agent, id: &str, layers: &[Vec<u8>]) -> Result<v1::Function, Status> {
    agent.send(layered(header(function(id), ""), &app(), layers)).await
}

/// The names of the zips that a function needs, in order.
fn needed(function: &v1::Function) -> Vec<String> {
    let layers = function.layers.iter().map(|layer| &layer.code_sha256);
    let mut names: Vec<_> = layers
        .chain([&function.code_sha256])
        .map(|sha256| format!("{sha256}.zip"))
        .collect();
    names.sort();
    names
}

fn kept(agent: &Agent) -> Vec<String> {
    let mut names = agent.kept();
    names.sort();
    names
}

#[tokio::test]
async fn settings_live_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let plain = agent.create(function("plain"), &app()).await.unwrap();
    assert_eq!((plain.freeze, plain.ephemeral_storage_mib), (Some(true), 512));
    assert_eq!(plain.layers, []);
    let asked = v1::Function {
        freeze: Some(false),
        ephemeral_storage_mib: 2048,
        // Output only.
        layers: vec![v1::Layer::default()],
        ..function("other")
    };
    let layers = [layer("python/a.py", b"a"), layer("bin/b", b"b")];
    let made = agent.send(layered(header(asked, ""), &app(), &layers)).await.unwrap();
    assert_eq!((made.freeze, made.ephemeral_storage_mib), (Some(false), 2048));
    let sizes: Vec<_> = made.layers.iter().map(|layer| layer.code_size_bytes).collect();
    assert_eq!(sizes, layers.each_ref().map(|layer| layer.len() as u64));
    agent.stop().await;
    let agent = Agent::start(dir.path()).await;
    for function in [&plain, &made] {
        assert_eq!(agent.get(&function.name).await.unwrap(), *function);
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_zip_is_kept_as_long_as_a_function_needs_it_as_code_or_layer() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let (x, y) = (layer("lib/x", b"x"), layer("lib/y", b"y"));
    let a = create(&agent, "a", &[x.clone(), y.clone()]).await.unwrap();
    let b = create(&agent, "b", &[y.clone(), y.clone()]).await.unwrap();
    // What is a layer of one is the code of another.
    let c = create(&agent, "c", &[app()]).await.unwrap();
    assert_eq!(kept(&agent), needed(&a));
    assert_eq!(c.layers[0].code_sha256, a.code_sha256);
    agent.delete(&a.name).await.unwrap();
    assert_eq!(kept(&agent).len(), 2, "code, and y of b");
    agent.delete(&b.name).await.unwrap();
    assert_eq!(kept(&agent).len(), 1);
    agent.delete(&c.name).await.unwrap();
    assert!(kept(&agent).is_empty());
    agent.nothing_staged().await;
}

#[tokio::test]
async fn a_retry_has_the_same_layers() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let layers = [layer("lib/x", b"x"), layer("lib/y", b"y")];
    let [x, y] = layers.clone();
    let ask = async |layers: &[Vec<u8>]| {
        let header = header(function("a"), "request-1");
        agent.send(layered(header, &app(), layers)).await
    };
    let first = ask(&layers).await.unwrap();
    assert_eq!(ask(&layers).await.unwrap(), first);
    for other in [
        &[][..],
        std::slice::from_ref(&x),
        &[y.clone(), x.clone()],
        &[x.clone(), y.clone(), layer("lib/z", b"z")],
    ] {
        let status = ask(other).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
        assert_eq!(fields(&status), ["request_id"]);
    }
    assert_eq!(kept(&agent), needed(&first));
    still_serves(&agent).await;
}

#[tokio::test]
async fn bad_layers_are_refused_and_nothing_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        zip_mib: 1,
        unzipped_mib: 2,
        zip_entries: 20,
        ..Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let good = || layer("lib/x", b"x");
    let zeros = |bytes: usize| layer("lib/zeros", &vec![0; bytes]);
    let names: Vec<String> = (0..18).map(|n| format!("f{n}")).collect();
    let many: Vec<(&str, u32, &[u8])> = names.iter().map(|n| (n.as_str(), 0o644, &b""[..])).collect();
    for (what, layers, field, says) in [
        (
            "no zip",
            vec![good(), b"#!/bin/sh\n".to_vec()],
            "layers[1]",
            "not a zip",
        ),
        ("nothing", vec![Vec::new(), good()], "layers[0]", "not a zip"),
        ("an empty zip", vec![zip(&[])], "layers[0]", "empty"),
        ("six", (0..6).map(|n| layer("x", &[n])).collect(), "layers", "at most 5"),
        ("large alone", vec![zeros(2 << 20)], "layers[0]", "more than 2 MiB"),
        (
            "large together",
            vec![zeros(1 << 20), zeros(1 << 20)],
            "layers[1]",
            "more than 2 MiB",
        ),
        ("many", vec![good(), zip(&many)], "layers[1]", "20 files and folders"),
    ] {
        let status = create(&agent, "bad", &layers).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        assert_eq!(fields(&status), [field], "{what}: {status:?}");
        assert!(status.message().contains(says), "{what}: {status:?}");
        assert!(kept(&agent).is_empty(), "{what}");
        agent.nothing_staged().await;
        still_serves(&agent).await;
    }
    let large = layer("lib/noise", &noise(3 << 19));
    let status = create(&agent, "bad", &[good(), large]).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.message().contains("layer 2 is larger than 1 MiB"), "{status:?}");
    assert!(kept(&agent).is_empty());
    agent.nothing_staged().await;
    create(&agent, "five", &(0..5).map(|n| layer("x", &[n])).collect::<Vec<_>>())
        .await
        .unwrap();
}

#[tokio::test]
async fn a_call_that_fails_takes_its_layers_with_it_and_no_others() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let (x, y) = (layer("lib/x", b"x"), layer("lib/y", b"y"));
    let made = create(&agent, "a", std::slice::from_ref(&x)).await.unwrap();
    let taken = async |id: &str| {
        // Known as a request that was answered, so that its name is looked at once its zips are there.
        let header = header(function(id), "request-1");
        agent.send(layered(header, &app(), &[x.clone(), y.clone()])).await
    };
    let other = taken("b").await.unwrap();
    agent.delete(&other.name).await.unwrap();
    let status = taken("a").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert_eq!(kept(&agent), needed(&made));
}

#[tokio::test]
async fn layers_and_settings_out_of_place_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let whole = layered(header(function("x"), ""), &app(), &[layer("lib/x", b"x")]);
    let [head, code, begin, chunk] = <[_; 4]>::try_from(whole).unwrap();
    for (what, parts, field) in [
        (
            "a layer first",
            vec![begin.clone(), head.clone(), code.clone()],
            "header",
        ),
        ("a chunk first", vec![chunk.clone(), head.clone()], "header"),
        ("no code", vec![head.clone(), begin.clone(), chunk.clone()], "code"),
        (
            "a second header",
            vec![head.clone(), code.clone(), begin.clone(), head.clone()],
            "header",
        ),
    ] {
        let status = agent.send(parts).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        assert_eq!(fields(&status), [field], "{what}");
        agent.nothing_staged().await;
    }
    for ephemeral_storage_mib in [1, 511, 10_241] {
        let function = v1::Function {
            ephemeral_storage_mib,
            ..function("x")
        };
        let status = agent.create(function, &app()).await.unwrap_err();
        assert_eq!(fields(&status), ["function.ephemeral_storage_mib"], "{status:?}");
    }
    assert!(kept(&agent).is_empty());
    still_serves(&agent).await;
}

#[tokio::test]
async fn on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let at = |name: &str| dir.path().join(name).display().to_string();
    std::fs::write(at("app.py"), "def handler(event, context): return event\n").unwrap();
    std::fs::write(at("app.zip"), app()).unwrap();
    std::fs::create_dir_all(at("layer/python")).unwrap();
    std::fs::write(at("layer/python/common.py"), "").unwrap();
    std::fs::write(at("layer.zip"), layer("bin/x", b"x")).unwrap();
    let create = [
        "function",
        "create",
        "accounts/acme/functions/a",
        &at("app.zip"),
        "--runtime=python3.11",
        "--handler=app.handler",
    ];
    let with = async |more: &[&str]| stoker(dir.path(), &[&create, more].concat()).await;
    let (folder, file) = (at("layer"), at("layer.zip"));
    let refused = with(&["--ephemeral-storage=100"]).await;
    assert!(
        refused.code == 1 && refused.err.contains("512 to 10240"),
        "{}",
        refused.err
    );
    let refused = with(&["--layer", &at("none")]).await;
    assert!(refused.code == 2 && refused.err.contains("none"), "{}", refused.err);
    let made = with(&[
        "--layer",
        &folder,
        "--layer",
        &file,
        "--no-freeze",
        "--ephemeral-storage=1024",
    ])
    .await;
    assert_eq!(made.code, 0, "{}", made.err);
    for line in ["frozen   never", "/tmp     1.00 GiB", "layer "] {
        assert!(made.out.contains(line), "{line}: {}", made.out);
    }
    let shown = stoker(dir.path(), &["function", "get", create[2], "--json"]).await;
    let shown: Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(shown["freeze"], false);
    assert_eq!(shown["ephemeralStorageMib"], 1024);
    let size = layer("bin/x", b"x").len().to_string();
    assert_eq!(shown["layers"][1]["codeSizeBytes"], size.as_str());
    assert_eq!(shown["layers"].as_array().unwrap().len(), 2);
    agent.stop().await;
}
