//! Images of accounts: imported, pulled, shown and removed, through the API and on the command line.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use stoker_agent::config::{Account, Config, Limits};
use stoker_proto::v1;
use stoker_proto::v1::import_image_request::Part;
use stoker_proto::v1::pull_image_response::Part as Answer;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio_stream::StreamExt as _;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::common::*;
use crate::functions::fields;
use crate::programs::{Ran, STOKER, stoker};

/// A tar of files.
fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An image of one layer.
struct Image {
    layer: Vec<u8>,
    config: Vec<u8>,
}

impl Image {
    fn new(content: &[u8]) -> Self {
        let layer = tar(&[("app", content), ("etc/passwd", b"web:x:101:102::/srv:/bin/sh\n")]);
        let config = json!({
            "architecture": "amd64", "os": "linux",
            "config": {"Entrypoint": ["/app"], "Cmd": ["serve"], "Env": ["A=b"], "User": "web", "WorkingDir": "/srv",
                       "ExposedPorts": {"80/tcp": {}}, "StopSignal": "SIGQUIT"},
            "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        });
        let config = config.to_string().into_bytes();
        Self { layer, config }
    }

    /// As `docker save` writes it.
    fn saved(&self) -> Vec<u8> {
        let manifest = json!([{"Config": "config.json", "RepoTags": ["web:1"], "Layers": ["layer.tar"]}]).to_string();
        tar(&[
            ("manifest.json", manifest.as_bytes()),
            ("config.json", &self.config),
            ("layer.tar", &self.layer),
        ])
    }

    /// Its manifest, and what that names, by their paths at a registry.
    fn at_registry(&self) -> HashMap<String, Vec<u8>> {
        let blob = |media_type: &str, bytes: &[u8]| json!({"mediaType": media_type, "digest": digest(bytes), "size": bytes.len()});
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("application/vnd.oci.image.config.v1+json", &self.config),
            "layers": [blob("application/vnd.oci.image.layer.v1.tar", &self.layer)],
        });
        let blobs =
            [&self.config, &self.layer].map(|bytes| (format!("/v2/acme/web/blobs/{}", digest(bytes)), bytes.clone()));
        let manifest = ("/v2/acme/web/manifests/1".to_owned(), manifest.to_string().into_bytes());
        blobs.into_iter().chain([manifest]).collect()
    }
}

/// A registry on this machine that has these files; what else is asked for it does not have. Answers with its host and port.
fn registry(files: HashMap<String, Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut lines = BufReader::new(stream.try_clone().unwrap())
                .lines()
                .map_while(Result::ok);
            let request = lines.next().unwrap_or_default();
            lines.find(String::is_empty);
            let path = request.split(' ').nth(1).unwrap_or_default();
            let (status, body) = match files.get(path) {
                Some(body) => (200, &body[..]),
                None => (404, &br#"{"errors":[{"code":"MANIFEST_UNKNOWN"}]}"#[..]),
            };
            let head = format!(
                "HTTP/1.1 {status} x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                body.len()
            );
            let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        }
    });
    address
}

fn header(name: &str, reference: &str) -> Part {
    Part::Header(v1::ImportImageHeader {
        name: name.into(),
        reference: reference.into(),
    })
}

fn chunks(bytes: &[u8]) -> impl Iterator<Item = Part> {
    bytes
        .chunks(1 << 20)
        .map(|chunk| Part::Chunk(Bytes::copy_from_slice(chunk)))
}

fn requests(parts: impl IntoIterator<Item = Part>) -> Vec<v1::ImportImageRequest> {
    parts
        .into_iter()
        .map(|part| v1::ImportImageRequest { part: Some(part) })
        .collect()
}

async fn send(agent: &Agent, parts: Vec<v1::ImportImageRequest>) -> Result<v1::Image, Status> {
    let sent = agent.images().import_image(tokio_stream::iter(parts)).await;
    Ok(sent?.into_inner())
}

async fn import(agent: &Agent, name: &str, archive: &[u8]) -> Result<v1::Image, Status> {
    send(
        agent,
        requests(std::iter::once(header(name, "")).chain(chunks(archive))),
    )
    .await
}

async fn get(agent: &Agent, name: &str) -> Result<v1::Image, Status> {
    let request = v1::GetImageRequest { name: name.into() };
    Ok(agent.images().get_image(request).await?.into_inner())
}

async fn delete(agent: &Agent, name: &str) -> Result<(), Status> {
    let request = v1::DeleteImageRequest { name: name.into() };
    agent.images().delete_image(request).await.map(|_| ())
}

async fn list(agent: &Agent, parent: &str, page_size: i32, page_token: &str) -> Result<v1::ListImagesResponse, Status> {
    let request = v1::ListImagesRequest {
        parent: parent.into(),
        page_size,
        page_token: page_token.into(),
    };
    Ok(agent.images().list_images(request).await?.into_inner())
}

/// All of a pull: how far it was each time that it was told, and what came of it.
async fn pull(agent: &Agent, name: &str, reference: &str) -> Result<(Vec<v1::PullProgress>, v1::Image), Status> {
    let request = v1::PullImageRequest {
        name: name.into(),
        reference: reference.into(),
        ..Default::default()
    };
    let mut answers = agent.images().pull_image(request).await?.into_inner();
    let mut progress = Vec::new();
    loop {
        match answers.message().await?.unwrap().part.unwrap() {
            Answer::Progress(more) => progress.push(more),
            Answer::Image(image) => {
                assert!(answers.message().await?.is_none());
                return Ok((progress, image));
            }
        }
    }
}

/// Waits until no account has an image, and nothing of one is left. What another test's program has open for a moment, as it is
/// started, goes with the next sweep.
async fn nothing_left(agent: &Agent) {
    let folder = agent.folder.join("state/images");
    eventually("nothing of images to be left", || {
        !folder.exists() || names(&folder).is_empty()
    })
    .await;
}

#[tokio::test]
async fn an_image_is_imported_shown_listed_and_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let image = Image::new(b"one");
    let made = import(&agent, "accounts/acme/images/web", &image.saved())
        .await
        .unwrap();
    let expected = v1::ImageConfig {
        entrypoint: vec!["/app".into()],
        command: vec!["serve".into()],
        environment: vec!["A=b".into()],
        working_dir: "/srv".into(),
        user: Some(v1::ImageUser {
            uid: 101,
            gid: 102,
            groups: vec![],
            home: "/srv".into(),
        }),
        exposed_ports: vec!["80/tcp".into()],
        stop_signal: 3,
    };
    assert_eq!(made.config, Some(expected));
    assert_eq!(
        (made.digest.as_str(), made.name.as_str()),
        (&*digest(&image.config), "accounts/acme/images/web")
    );
    assert!(made.size_bytes > 0 && made.create_time.is_some());
    assert_eq!(get(&agent, &made.name).await.unwrap(), made);
    // By its tag in the archive, under another name, and by a tag that is not there.
    let named = |reference| {
        requests(std::iter::once(header("accounts/acme/images/db", reference)).chain(chunks(&image.saved())))
    };
    assert_eq!(send(&agent, named("web:1")).await.unwrap().digest, made.digest);
    let missing = send(&agent, named("web:2")).await.unwrap_err();
    assert_eq!(
        (missing.code(), fields(&missing)),
        (Code::InvalidArgument, vec!["reference".into()]),
        "{missing:?}"
    );
    import(&agent, "accounts/other/images/web", &image.saved())
        .await
        .unwrap();

    let all = list(&agent, "accounts/-", 0, "").await.unwrap();
    let found: Vec<_> = all.images.iter().map(|image| image.name.as_str()).collect();
    let expected = [
        "accounts/acme/images/db",
        "accounts/acme/images/web",
        "accounts/other/images/web",
    ];
    assert_eq!((found, all.next_page_token.as_str()), (expected.to_vec(), ""));
    assert_eq!(
        all.images[1],
        v1::Image {
            config: None,
            ..made.clone()
        }
    );
    let first = list(&agent, "accounts/acme", 1, "").await.unwrap();
    assert_eq!((first.images.len(), first.next_page_token.as_str()), (1, expected[0]));
    let second = list(&agent, "accounts/acme", 1, &first.next_page_token).await.unwrap();
    assert_eq!(
        (second.images[0].name.as_str(), second.next_page_token.as_str()),
        (expected[1], "")
    );
    for (parent, token) in [("accounts/A", ""), ("accounts/acme", expected[2]), ("accounts/-", "x")] {
        let status = list(&agent, parent, 0, token).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{parent} {token}");
    }

    for name in expected {
        delete(&agent, name).await.unwrap();
        for gone in [get(&agent, name).await.map(drop), delete(&agent, name).await] {
            let gone = gone.unwrap_err();
            let details = gone.get_error_details();
            assert_eq!(gone.code(), Code::NotFound, "{gone:?}");
            assert_eq!(details.resource_info().unwrap().resource_name, name);
        }
    }
    nothing_left(&agent).await;
    agent.stop().await;
}

#[tokio::test]
async fn nobody_has_anothers_image_by_knowing_what_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let image = Image::new(b"secret");
    let name = "accounts/acme/images/web";
    import(&agent, name, &image.saved()).await.unwrap();
    // Who has its configuration names all of its content, and has none of it.
    let manifest = json!([{"Config": "config.json", "Layers": ["layer.tar"]}]).to_string();
    let without = tar(&[("manifest.json", manifest.as_bytes()), ("config.json", &image.config)]);
    import(&agent, name, &without).await.unwrap();
    let refused = import(&agent, "accounts/other/images/web", &without).await.unwrap_err();
    assert_eq!(
        (refused.code(), fields(&refused)),
        (Code::InvalidArgument, vec!["image".into()]),
        "{refused:?}"
    );
    let mut files = image.at_registry();
    files.retain(|_, bytes| *bytes != image.layer);
    let reference = format!("{}/acme/web:1", registry(files));
    pull(&agent, name, &reference).await.unwrap();
    let refused = pull(&agent, "accounts/other/images/web", &reference).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound, "{refused:?}");
    let other = get(&agent, "accounts/other/images/web").await.unwrap_err();
    assert_eq!(other.code(), Code::NotFound);
    assert_eq!(list(&agent, "accounts/other", 0, "").await.unwrap().images, []);
    agent.stop().await;
}

#[tokio::test]
async fn a_hostile_archive_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    // More than are sent: what is left of one that is refused in the middle is gone a moment later.
    let limits = Limits {
        concurrent_imports: 64,
        ..Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let image = Image::new(b"one");
    let saved = image.saved();
    let with_layer = |layer: Vec<u8>| {
        let config = String::from_utf8(image.config.clone()).unwrap();
        let config = config.replace(&digest(&image.layer), &digest(&layer)).into_bytes();
        Image { layer, config }.saved()
    };
    let special = |path: &[u8], kind: tar::EntryType, target: &[u8]| {
        let mut header = tar::Header::new_ustar();
        let old = header.as_old_mut();
        old.name[..path.len()].copy_from_slice(path);
        old.linkname[..target.len()].copy_from_slice(target);
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_cksum();
        let mut tar = header.as_bytes().to_vec();
        tar.resize(512 + 1024, 0);
        tar
    };
    let damaged = patched(saved.clone(), b"one", b"two");
    let arm = patched(saved.clone(), b"amd64", b"arm64");
    // More than fits into the headers of an answer.
    let config = String::from_utf8(image.config.clone()).unwrap();
    let config = config.replace("amd64", &"\u{e4}".repeat(50_000)).into_bytes();
    let layer = image.layer.clone();
    let endless = Image { layer, config }.saved();
    for (archive, says) in [
        (Vec::new(), "it is not a tar"),
        (vec![0; 1024], "there is nothing in it"),
        (b"#!/bin/sh\n".repeat(200), "it is not a tar"),
        (saved[..saved.len() - 2000].to_vec(), "cut short"),
        (damaged, "digest should be sha256:"),
        (arm, "this host runs linux/amd64"),
        (endless, "this host runs linux/amd64"),
        (
            with_layer(special(b"../../etc/cron.d/x", tar::EntryType::Regular, b"")),
            "has `..` in its path",
        ),
        (with_layer(special(b"sda", tar::EntryType::Block, b"")), "is a device"),
        (
            with_layer(special(b"x", tar::EntryType::Link, b"../../etc/shadow")),
            "leads out of the image",
        ),
        (
            special(b"x", tar::EntryType::Link, b"/etc/shadow"),
            "not a file of the image",
        ),
        ([&[0x1f, 0x8b][..], &[7; 100]].concat(), "can't be decompressed"),
    ] {
        let status = import(&agent, "accounts/acme/images/web", &archive).await.unwrap_err();
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec!["image".into()]),
            "{says}: {status:?}"
        );
        assert!(status.message().contains(says), "{says}: {status:?}");
        nothing_left(&agent).await;
    }

    let named = |number: u32| header(&format!("accounts/a{number}/images/web"), "");
    let large = Part::Chunk(Bytes::from(vec![0; (1 << 20) + 1]));
    let nothing = v1::ImportImageRequest::default();
    for (parts, field) in [
        (requests([]), "header"),
        (requests(chunks(b"x")), "header"),
        (requests([header("accounts/acme/functions/web", "")]), "header.name"),
        (requests([header("accounts/acme/images/../web", "")]), "header.name"),
        (
            requests([header("accounts/acme/images/web", &"r".repeat(1000))]),
            "header.reference",
        ),
        (
            requests([header("accounts/acme/images/web", "a\nb")]),
            "header.reference",
        ),
        (requests([named(1), named(1)]), "header"),
        (requests([named(2), large]), "chunk"),
        ([requests([named(3)]), vec![nothing]].concat(), "part"),
    ] {
        let status = send(&agent, parts).await.unwrap_err();
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec![field.into()]),
            "{status:?}"
        );
    }
    nothing_left(&agent).await;
    import(&agent, "accounts/acme/images/web", &saved).await.unwrap();
    agent.stop().await;
}

#[tokio::test]
async fn what_is_too_large_for_account_or_host_is_refused_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config {
        limits: Limits {
            images_mib: Some(60),
            ..Limits::default()
        },
        account: Account {
            images_mib: Some(4),
            images: Some(1),
            ..Account::default()
        },
        ..Config::default()
    };
    let agent = Agent::with_config(dir.path(), config).await;
    let of = |mib: usize| Image::new(&vec![7; mib << 20]).saved();
    // Of 100 MiB, and some 100 KB.
    let zeros = dir.path().join("zeros");
    std::fs::write(&zeros, tar(&[("x", &vec![0; 100 << 20])])).unwrap();
    let bomb = Command::new("gzip")
        .arg("-c")
        .arg(&zeros)
        .output()
        .await
        .unwrap()
        .stdout;
    assert!(bomb.len() < 200 << 10);
    for (archive, subject) in [(of(5), "accounts/acme"), (bomb, "host")] {
        let status = import(&agent, "accounts/acme/images/web", &archive).await.unwrap_err();
        let details = status.get_error_details();
        assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
        assert_eq!(
            details.quota_failure().unwrap().violations[0].subject,
            subject,
            "{status:?}"
        );
        assert!(details.retry_info().is_none());
        nothing_left(&agent).await;
    }
    import(&agent, "accounts/acme/images/web", &of(1)).await.unwrap();
    let names = import(&agent, "accounts/acme/images/db", &of(1)).await.unwrap_err();
    assert!(
        names.code() == Code::ResourceExhausted && names.message().contains("account.images"),
        "{names:?}"
    );
    agent.stop().await;
}

/// An import whose caller sends all of an archive but what marks its end, and then nothing more.
async fn stalled(agent: &Agent, account: &str) -> Result<(), Status> {
    let mut saved = Image::new(b"one").saved();
    saved.truncate(saved.len() - 1024);
    let parts = [header(&format!("accounts/{account}/images/web"), "")];
    let sent = requests(parts.into_iter().chain(chunks(&saved)));
    let sent = tokio_stream::iter(sent).chain(tokio_stream::pending());
    agent.images().import_image(sent).await.map(|_| ())
}

#[tokio::test]
async fn so_many_images_come_in_at_a_time_and_of_an_account_one() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let saved = Image::new(b"one").saved();
    let is_taken = |account: &str| dir.path().join("state/images").join(account).join("partial").is_dir();
    let checks = async {
        eventually("the first to be taken in", || is_taken("a")).await;
        let same = import(&agent, "accounts/a/images/db", &saved).await.unwrap_err();
        (same, stalled_too(&agent, &saved, is_taken).await)
    };
    let (same, third) = tokio::select! {
        ended = stalled(&agent, "a") => panic!("{ended:?}"),
        checked = checks => checked,
    };
    for (busy, subject) in [(same, "accounts/a"), (third, "images")] {
        let details = busy.get_error_details();
        assert_eq!(busy.code(), Code::ResourceExhausted, "{busy:?}");
        assert_eq!(details.quota_failure().unwrap().violations[0].subject, subject);
        assert!(details.retry_info().is_some(), "{busy:?}");
    }
    // Those who brought them have left.
    nothing_left(&agent).await;
    eventually_imports(&agent, "accounts/c/images/web", &saved).await;
    agent.stop().await;
}

/// What a third is told while a second stands still too.
async fn stalled_too(agent: &Agent, saved: &[u8], is_taken: impl Fn(&str) -> bool) -> Status {
    let third = async {
        eventually("the second to be taken in", || is_taken("b")).await;
        import(agent, "accounts/c/images/web", saved).await.unwrap_err()
    };
    tokio::select! {
        ended = stalled(agent, "b") => panic!("{ended:?}"),
        third = third => third,
    }
}

/// Imports what is refused as long as the agent has not seen that others have left.
async fn eventually_imports(agent: &Agent, name: &str, archive: &[u8]) {
    let importing = async {
        while let Err(status) = import(agent, name, archive).await {
            assert!(status.get_error_details().retry_info().is_some(), "{status:?}");
        }
    };
    tokio::time::timeout(PATIENCE, importing).await.unwrap();
}

#[tokio::test]
async fn an_import_that_stands_still_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        upload_idle_timeout: Duration::from_millis(100),
        ..Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let mut client = agent.images();
    let silent = client.import_image(tokio_stream::pending());
    let silent = tokio::time::timeout(PATIENCE, silent).await.unwrap().map(|_| ());
    let stalled = tokio::time::timeout(PATIENCE, stalled(&agent, "a")).await.unwrap();
    for status in [silent, stalled].map(Result::unwrap_err) {
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
        assert!(status.message().contains("limits.upload_idle_timeout"), "{status:?}");
    }
    eventually_imports(&agent, "accounts/a/images/web", &Image::new(b"one").saved()).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_image_is_pulled_and_it_is_told_how_far_that_is() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let image = Image::new(&[7; 100_000]);
    let address = registry(image.at_registry());
    let name = "accounts/acme/images/web";
    let (progress, made) = pull(&agent, name, &format!("{address}/acme/web:1")).await.unwrap();
    assert_eq!((made.name.as_str(), made.digest), (name, digest(&image.config)));
    assert!(
        progress
            .iter()
            .all(|progress| progress.pulled_bytes <= progress.total_bytes)
    );
    assert!(
        progress
            .iter()
            .all(|progress| [0, image.layer.len() as u64].contains(&progress.total_bytes))
    );
    delete(&agent, name).await.unwrap();

    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap()
    };
    let mut damaged = image.at_registry();
    damaged
        .values_mut()
        .filter(|bytes| **bytes == image.layer)
        .for_each(|bytes| bytes[600] ^= 1);
    for (reference, code) in [
        (format!("{address}/acme/web:2"), Code::NotFound),
        (format!("{nobody}/acme/web:1"), Code::Unavailable),
        (format!("{}/acme/web:1", registry(damaged)), Code::InvalidArgument),
        (format!("{address}/Acme/web:1"), Code::InvalidArgument),
        (String::new(), Code::InvalidArgument),
    ] {
        let status = pull(&agent, name, &reference).await.unwrap_err();
        assert_eq!(status.code(), code, "{reference}: {status:?}");
        assert!(!status.details().is_empty(), "{status:?}");
        nothing_left(&agent).await;
    }
    agent.stop().await;
}

#[tokio::test]
async fn a_pull_ends_with_who_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let request = v1::PullImageRequest {
        name: "accounts/acme/images/web".into(),
        reference: format!("{}/web:1", listener.local_addr().unwrap()),
        ..Default::default()
    };
    let answers = agent.images().pull_image(request).await.unwrap();
    // The registry was asked, and says nothing.
    let (mut asked, _) = tokio::time::timeout(PATIENCE, listener.accept())
        .await
        .unwrap()
        .unwrap();
    drop(answers);
    let mut sink = tokio::io::sink();
    let ended = tokio::io::copy(&mut asked, &mut sink);
    tokio::time::timeout(PATIENCE, ended).await.unwrap().unwrap();
    nothing_left(&agent).await;
    agent.stop().await;
}

/// Runs the command line with something on its standard input.
async fn stoker_reading(folder: &Path, args: &[&str], input: &[u8]) -> Ran {
    let mut running = Command::new(STOKER)
        .arg("--socket")
        .arg(socket(folder))
        .args(args)
        .env("XDG_CONFIG_HOME", "/nonexistent")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    // It may not want all of it.
    let mut to = running.stdin.take().unwrap();
    let _ = to.write_all(input).await;
    drop(to);
    let output = tokio::time::timeout(PATIENCE, running.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

#[tokio::test]
async fn images_on_the_command_line() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let image = Image::new(b"one");
    let saved = dir.path().join("web.tar");
    std::fs::write(&saved, image.saved()).unwrap();
    let saved = saved.to_str().unwrap();
    let account = ["--account", "acme"];
    let command = async |args: &[&str]| stoker(dir.path(), &[&["image"], args, &account].concat()).await;

    let none = command(&["list"]).await;
    assert!(
        none.code == 0 && none.out.contains("--all"),
        "{} {}",
        none.out,
        none.err
    );
    let made = command(&["import", "web", saved]).await;
    assert_eq!((made.code, made.err.as_str()), (0, ""), "{}", made.out);
    for line in [
        "accounts/acme/images/web",
        "  entrypoint \"/app\"",
        "  user       101:102, with home \"/srv\"",
        "  ports      80/tcp",
        "  env        \"A=b\"",
    ] {
        assert!(made.out.lines().any(|said| said == line), "{line}: {}", made.out);
    }
    let shown = command(&["show", "web", "--json"]).await;
    let shown: Value = serde_json::from_str(&shown.out).unwrap();
    assert_eq!(
        (&shown["digest"], &shown["config"]["stopSignal"]),
        (&json!(digest(&image.config)), &json!(3))
    );

    let read = [&["image", "import", "read", "-", "--json"], &account[..]].concat();
    let read = stoker_reading(dir.path(), &read, &image.saved()).await;
    let read: Value = serde_json::from_str(&read.out).unwrap_or_else(|_| panic!("{}", read.err));
    assert_eq!(read["name"], "accounts/acme/images/read");
    // An image layout, as it lies in a folder.
    let layout = dir.path().join("layout");
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    std::fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let files = image.at_registry();
    for bytes in files.values() {
        std::fs::write(layout.join("blobs").join(digest(bytes).replace(':', "/")), bytes).unwrap();
    }
    let manifest = &files["/v2/acme/web/manifests/1"];
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest(manifest), "size": manifest.len()}]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    let from_folder = command(&["import", "folder", layout.to_str().unwrap()]).await;
    assert!(
        from_folder.out.contains(&digest(&image.config)),
        "{} {}",
        from_folder.out,
        from_folder.err
    );
    let pulled = command(&["pull", "pulled", &format!("{}/acme/web:1", registry(files))]).await;
    assert!(
        pulled.out.contains(&digest(&image.config)),
        "{} {}",
        pulled.out,
        pulled.err
    );

    let listed = command(&["list"]).await;
    assert_eq!(listed.out.lines().count(), 5, "{}", listed.out);
    let listed = command(&["list", "--json"]).await;
    let listed: Value = serde_json::from_str(&listed.out).unwrap();
    assert_eq!(listed["images"].as_array().unwrap().len(), 4);
    for name in ["web", "read", "folder", "pulled"] {
        let removed = command(&["remove", name]).await;
        assert_eq!(
            removed.out.trim(),
            format!("removed accounts/acme/images/{name}"),
            "{}",
            removed.err
        );
    }
    let gone = command(&["show", "web"]).await;
    assert!(
        gone.code == 1 && gone.err.contains("hint: `stoker image list`"),
        "{}",
        gone.err
    );

    std::fs::write(saved, &image.saved()[..3000]).unwrap();
    let missing = dir.path().join("missing").display().to_string();
    let folder = dir.path().display().to_string();
    for (args, code, says) in [
        (&["import", "web", saved][..], 1, "image: "),
        (&["import", "Web", saved], 1, "header.name: "),
        (&["import", "web", &missing], 2, "No such file"),
        (&["import", "web", &folder], 2, "oci-layout"),
        (
            &["pull", "web", "127.0.0.1:1/web:1"],
            1,
            "hint: see that this host reaches the registry",
        ),
        (&["pull", "web", "x/y:1", "--username", "me"], 2, "--password-stdin"),
    ] {
        let wrong = command(args).await;
        assert!(
            wrong.code == code && wrong.err.contains(says),
            "{args:?}: {} {}",
            wrong.code,
            wrong.err
        );
    }
    nothing_left(&agent).await;
    agent.stop().await;
}

#[tokio::test]
async fn an_image_that_finds_no_place_is_sent_again() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        concurrent_imports: 1,
        upload_idle_timeout: Duration::from_secs(2),
        ..Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let mut client = agent.images();
    let first = requests([header("accounts/other/images/web", "")]);
    let silent = tokio_stream::iter(first).chain(tokio_stream::pending());
    let silent = tokio::spawn(async move { client.import_image(silent).await });
    eventually("the only place to be taken", || {
        dir.path().join("state/images/other").is_dir()
    })
    .await;
    let saved = dir.path().join("web.tar");
    std::fs::write(&saved, Image::new(b"one").saved()).unwrap();
    let made = stoker(
        dir.path(),
        &["image", "import", "accounts/acme/images/web", saved.to_str().unwrap()],
    )
    .await;
    assert_eq!(made.code, 0, "{}", made.err);
    assert_eq!(silent.await.unwrap().unwrap_err().code(), Code::DeadlineExceeded);
    agent.stop().await;
}
