//! The `Functions` service over a real Unix socket.

use std::time::Duration;

use bytes::Bytes;
use stoker_agent::api::health::Health;
use stoker_agent::config::{Account, Config, Limits};
use stoker_agent::store::{Created, FunctionRecord, NewFunction, Store};
use stoker_proto::v1;
use stoker_proto::v1::create_function_request::Part;
use stoker_testkit::zip::options;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::common::*;

/// Every test of something bad ends with this.
pub(crate) async fn still_serves(agent: &Agent) {
    let good = agent.create(function("good"), &app()).await.unwrap();
    assert_eq!(agent.get(&good.name).await.unwrap(), good);
    agent.delete(&good.name).await.unwrap();
}

pub(crate) fn fields(status: &Status) -> Vec<String> {
    let details = status.get_error_details();
    let violations = details.bad_request().map(|bad| bad.field_violations.clone());
    violations
        .unwrap_or_default()
        .into_iter()
        .map(|violation| violation.field)
        .collect()
}

#[tokio::test]
async fn a_function_lives_over_a_restart_until_it_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let asked = v1::Function {
        environment: [("KEY".to_owned(), "value".to_owned())].into(),
        timeout: Some(prost_types::Duration { seconds: 7, nanos: 0 }),
        uid: "ignored".into(),
        version: 99,
        ..function("resize")
    };
    let zip = app();
    let made = agent.create(asked.clone(), &zip).await.unwrap();
    assert_eq!(made.name, asked.name);
    assert_eq!(made.environment, [("KEY".to_owned(), String::new())].into());
    assert_eq!(made.version, 1);
    assert_eq!(made.uid.len(), 26);
    assert_eq!(made.code_size_bytes, zip.len() as u64);
    assert_eq!(
        made.amount,
        Some(v1::Amount {
            cpu_millis: 250,
            memory_mib: 128
        })
    );
    assert_eq!(agent.get(&made.name).await.unwrap(), made);
    let request = v1::GetFunctionRequest {
        name: made.name.clone(),
        view: v1::FunctionView::Full.into(),
    };
    let full = agent.functions().get_function(request).await.unwrap().into_inner();
    assert_eq!(full.environment, asked.environment);
    for (view, environment) in [
        (v1::FunctionView::Unspecified, &made.environment),
        (v1::FunctionView::Full, &asked.environment),
    ] {
        let request = v1::ListFunctionsRequest {
            parent: "accounts/-".into(),
            view: view.into(),
            ..Default::default()
        };
        let listed = agent.functions().list_functions(request).await.unwrap().into_inner();
        assert_eq!(listed.functions[0].environment, *environment, "{view:?}");
    }
    assert_eq!(agent.kept(), [format!("{}.zip", made.code_sha256)]);
    agent.nothing_staged().await;
    agent.stop().await;

    let agent = Agent::start(dir.path()).await;
    assert_eq!(agent.get(&made.name).await.unwrap(), made);
    agent.delete(&made.name).await.unwrap();
    assert_eq!(*agent.deleted.lock().unwrap(), std::slice::from_ref(&made.uid));
    assert_eq!(agent.get(&made.name).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(agent.delete(&made.name).await.unwrap_err().code(), Code::NotFound);
    assert!(agent.kept().is_empty(), "its code goes with it");
    agent.stop().await;
}

#[tokio::test]
async fn code_is_kept_once_and_as_long_as_one_function_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let zip = app();
    let (a, b) = tokio::join!(agent.create(function("a"), &zip), agent.create(function("b"), &zip));
    let (a, b) = (a.unwrap(), b.unwrap());
    assert_eq!(a.code_sha256, b.code_sha256);
    assert_eq!(agent.kept().len(), 1);
    agent.delete(&a.name).await.unwrap();
    assert_eq!(agent.kept().len(), 1);
    agent.delete(&b.name).await.unwrap();
    assert!(agent.kept().is_empty());
}

#[tokio::test]
async fn a_name_is_taken_once_however_many_ask() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let zips: Vec<Vec<u8>> = (0..8u8).map(|n| zip(&[("app.py", 0o644, &[b'#', n + 65])])).collect();
    let asking: Vec<_> = zips
        .iter()
        .map(|zip| {
            let (client, parts) = (agent.functions(), parts(header(function("one"), ""), zip));
            tokio::spawn(async move { client.clone().create_function(tokio_stream::iter(parts)).await })
        })
        .collect();
    let mut made = Vec::new();
    for asked in asking {
        match asked.await.unwrap() {
            Ok(function) => made.push(function.into_inner()),
            Err(status) => assert_eq!(status.code(), Code::AlreadyExists, "{status:?}"),
        }
    }
    assert_eq!(made.len(), 1);
    assert_eq!(agent.get(&made[0].name).await.unwrap(), made[0]);
    let needed = format!("{}.zip", made[0].code_sha256);
    // A call that lost the race removes what it kept when it answers, or just after.
    eventually("the others' code to go", || agent.kept() == [needed.clone()]).await;
    let again = agent.create(function("one"), &app()).await.unwrap_err();
    assert_eq!(again.code(), Code::AlreadyExists);
    still_serves(&agent).await;
}

#[tokio::test]
async fn a_retry_is_answered_as_the_first_was() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let ask = |id: &str| header(function(id), "request-1");
    let first = agent.create_with(ask("a"), &app()).await.unwrap();
    assert_eq!(agent.create_with(ask("a"), &app()).await.unwrap(), first);
    // Other content under the same id.
    let other = zip(&[("app.py", 0o644, b"other")]);
    for (header, code) in [(ask("a"), &other), (ask("b"), &app())] {
        let status = agent.create_with(header, code).await.unwrap_err();
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec!["request_id".into()])
        );
    }
    let status = agent
        .create_with(header(function("a"), "request-2"), &app())
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists);
    assert_eq!(agent.kept().len(), 1);
    agent.delete(&first.name).await.unwrap();
    let late = agent.create_with(ask("a"), &app()).await.unwrap_err();
    assert_eq!(late.code(), Code::FailedPrecondition, "{late:?}");
    assert_eq!(agent.get(&first.name).await.unwrap_err().code(), Code::NotFound);
    assert!(agent.kept().is_empty());
    agent
        .create_with(header(function("a"), "request-3"), &app())
        .await
        .unwrap();
    let long = agent
        .create_with(header(function("c"), &"x".repeat(65)), &app())
        .await
        .unwrap_err();
    assert_eq!(fields(&long), ["request_id"]);
}

#[tokio::test]
async fn everything_wrong_with_a_header_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let wrong = v1::Function {
        name: "accounts/acme/functions/../../etc".into(),
        runtime: "cobol".into(),
        environment: [("AWS_LAMBDA_RUNTIME_API".to_owned(), "x".to_owned())].into(),
        timeout: Some(prost_types::Duration { seconds: 0, nanos: 1 }),
        amount: Some(v1::Amount {
            cpu_millis: 250,
            memory_mib: 1 << 20,
        }),
        ..function("x")
    };
    let status = agent.create(wrong, &app()).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(
        fields(&status),
        [
            "function.name",
            "function.runtime",
            "function.environment[\"AWS_LAMBDA_RUNTIME_API\"]",
            "function.timeout",
            "function.amount.memory_mib",
        ]
    );
    assert!(
        status.message().contains("more than a machine of this host can hold"),
        "{status:?}"
    );
    still_serves(&agent).await;
}

#[tokio::test]
async fn who_asks_for_more_scratch_disk_than_a_machine_has_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let with = |ephemeral_storage_mib| v1::Function {
        ephemeral_storage_mib,
        ..function("resize")
    };
    // Too much by itself, and with its code.
    for (mib, says) in [(4033, "pool.scratch_gib"), (4032, "its code as a zip and unpacked")] {
        let status = agent.create(with(mib), &app()).await.unwrap_err();
        assert_eq!(fields(&status), ["function.ephemeral_storage_mib"]);
        assert!(status.message().contains(says), "{status:?}");
    }
    assert!(agent.kept().is_empty());
    agent.create(with(4030), &app()).await.unwrap();
}

#[tokio::test]
async fn bad_zips_are_refused_and_nothing_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let good = app();
    let named = |name: &str| {
        let holder = "q".repeat(name.len());
        let zip = zip(&[("app.py", 0o644, b""), (&holder, 0o644, b"")]);
        patched(zip, holder.as_bytes(), name.as_bytes())
    };
    let link = |target: &str| {
        let mut zip = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        zip.start_file("app.py", options()).unwrap();
        zip.add_symlink("data", target, options()).unwrap();
        zip.finish().unwrap().into_inner()
    };
    let mut encrypted = good.clone();
    encrypted[6] |= 1;
    let central = encrypted.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
    encrypted[central + 8] |= 1;
    for (what, zip, field) in [
        ("empty", Vec::new(), "code"),
        ("no zip", b"#!/bin/sh\n".to_vec(), "code"),
        ("cut short", good[..good.len() / 2].to_vec(), "code"),
        ("without files", zip(&[]), "code"),
        ("../", named("../../etc/cron.d/x"), "code"),
        ("absolute", named("/etc/cron.d/x"), "code"),
        ("drive", named("C:/x"), "code"),
        ("backslash", named("..\\..\\x"), "code"),
        ("link to nothing", link(""), "code"),
        (
            "twice",
            patched(
                zip(&[("app.py", 0o644, b""), ("apq.py", 0o644, b"")]),
                b"apq.py",
                b"app.py",
            ),
            "code",
        ),
        ("encrypted", encrypted, "code"),
        ("no handler module", zip(&[("main.py", 0o644, b"")]), "function.handler"),
    ] {
        let status = agent.create(function("bad"), &zip).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        assert_eq!(fields(&status), [field], "{what}: {status:?}");
        assert!(agent.kept().is_empty(), "{what}");
        agent.nothing_staged().await;
        assert_eq!(
            agent.get("accounts/acme/functions/bad").await.unwrap_err().code(),
            Code::NotFound
        );
        still_serves(&agent).await;
    }
    let native = v1::Function {
        runtime: "provided".into(),
        handler: String::new(),
        ..function("bad")
    };
    for zip in [app(), zip(&[("bootstrap", 0o644, b"")])] {
        let status = agent.create(native.clone(), &zip).await.unwrap_err();
        assert_eq!(fields(&status), ["function.handler"]);
        assert!(status.message().contains("bootstrap"), "{status:?}");
    }
    still_serves(&agent).await;
}

/// So many bytes that do not compress.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let numbers = std::iter::successors(Some(7u32), |last| {
        Some(last.wrapping_mul(1_664_525).wrapping_add(1_013_904_223))
    });
    numbers.skip(1).take(bytes).map(|number| (number >> 24) as u8).collect()
}

#[tokio::test]
async fn what_is_too_large_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits {
        zip_mib: 2,
        unzipped_mib: 4,
        zip_entries: 10,
        functions: 2,
        ..Limits::default()
    };
    let agent = Agent::with_limits(dir.path(), limits).await;
    let noise = noise(3 << 20);
    let names: Vec<String> = (0..11).map(|n| format!("f{n}.py")).collect();
    let many: Vec<(&str, u32, &[u8])> = names.iter().map(|n| (n.as_str(), 0o644, &b""[..])).collect();
    for (what, zip, says) in [
        ("large", zip(&[("app.py", 0o644, &noise)]), "larger than 2 MiB"),
        (
            "bomb",
            zip(&[("app.py", 0o644, &vec![0; 5 << 20])]),
            "unpacks to more than 4 MiB",
        ),
        ("many", zip(&many), "more than 10 files"),
    ] {
        let status = agent.create(function("bad"), &zip).await.expect_err(what);
        assert_eq!(status.code(), Code::ResourceExhausted, "{what}: {status:?}");
        assert!(status.message().contains(says), "{what}: {status:?}");
        assert!(agent.kept().is_empty());
        agent.nothing_staged().await;
        still_serves(&agent).await;
    }
    agent.create(function("a"), &app()).await.unwrap();
    agent.create(function("b"), &app()).await.unwrap();
    let full = agent.create(function("c"), &app()).await.unwrap_err();
    assert_eq!(full.code(), Code::ResourceExhausted);
    agent.delete("accounts/acme/functions/b").await.unwrap();
    still_serves(&agent).await;
}

#[tokio::test]
async fn streams_out_of_order_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let part = |part| v1::CreateFunctionRequest { part };
    let head = || part(Some(Part::Header(header(function("x"), ""))));
    let chunk = |bytes: usize| part(Some(Part::Chunk(Bytes::from(vec![0; bytes]))));
    for (what, parts) in [
        ("nothing", vec![]),
        ("no part", vec![part(None)]),
        ("no header", vec![chunk(1)]),
        (
            "no function",
            vec![part(Some(Part::Header(v1::CreateFunctionHeader::default())))],
        ),
        ("two headers", vec![head(), head()]),
        ("a large chunk", vec![head(), chunk((1 << 20) + 1)]),
        ("no part within", vec![head(), part(None)]),
    ] {
        let status = agent.send(parts).await.expect_err(what);
        assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}");
        agent.nothing_staged().await;
    }
    still_serves(&agent).await;
}

/// A caller that leaves in the middle leaves nothing.
#[tokio::test]
async fn a_caller_that_leaves_is_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let (send, parts) = tokio::sync::mpsc::channel(4);
    let mut client = agent.functions();
    let asking = tokio::spawn(async move {
        client
            .create_function(tokio_stream::wrappers::ReceiverStream::new(parts))
            .await
    });
    for part in parts_of_half() {
        send.send(part).await.unwrap();
    }
    let staging = agent.folder.join("code/staging");
    eventually("the zip to come in", || !names(&staging).is_empty()).await;
    asking.abort();
    agent.nothing_staged().await;
    assert!(agent.kept().is_empty());
    still_serves(&agent).await;
}

fn parts_of_half() -> Vec<v1::CreateFunctionRequest> {
    let zip = app();
    parts(header(function("half"), ""), &zip[..zip.len() / 2])
}

#[tokio::test]
async fn lists_come_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    for n in 0..5 {
        agent.create(function(&format!("f{n}")), &app()).await.unwrap();
    }
    let other = v1::Function {
        name: "accounts/other/functions/f".into(),
        ..function("f")
    };
    agent.create(other, &app()).await.unwrap();
    let list = async |parent: &str, page_size, page_token: &str| {
        let request = v1::ListFunctionsRequest {
            parent: parent.into(),
            page_size,
            page_token: page_token.into(),
            ..Default::default()
        };
        Ok::<_, Status>(agent.functions().list_functions(request).await?.into_inner())
    };
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = list("accounts/acme", 2, &token).await.unwrap();
        assert!(page.functions.len() <= 2);
        seen.extend(
            page.functions
                .into_iter()
                .map(|f| f.name.rsplit('/').next().unwrap().to_owned()),
        );
        token = page.next_page_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(seen, ["f0", "f1", "f2", "f3", "f4"]);
    assert_eq!(list("accounts/-", 0, "").await.unwrap().functions.len(), 6);
    for (parent, size, token, field) in [
        ("acme", 0, "", "parent"),
        ("accounts/acme", -1, "", "page_size"),
        ("accounts/acme", 0, "rubbish", "page_token"),
        ("accounts/acme", 0, "accounts/other/functions/f", "page_token"),
    ] {
        let status = list(parent, size, token).await.unwrap_err();
        assert_eq!(
            (status.code(), fields(&status)),
            (Code::InvalidArgument, vec![field.to_owned()])
        );
    }
}

/// A list is cut to what a client takes that was told of no limit.
#[tokio::test]
async fn pages_of_large_functions_fit_into_a_message() {
    const FUNCTIONS: usize = 1000;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("state")).unwrap();
    for n in 0..FUNCTIONS {
        let name = format!("accounts/acme/functions/f{n}");
        let record = FunctionRecord {
            name: name.parse().unwrap(),
            uid: ulid::Ulid::generate(),
            runtime: "python3.11".into(),
            handler: "app.handler".into(),
            environment: [("A".repeat(4000), String::new())].into(),
            timeout: Duration::from_secs(3),
            amount: v1::Amount::default(),
            version: 1,
            code_sha256: "a".repeat(64),
            code_size: 1,
            layers: Vec::new(),
            unpacked_bytes: None,
            freeze: true,
            ephemeral_storage_mib: 512,
            create_time: std::time::SystemTime::UNIX_EPOCH,
            resizing: None,
            kept: None,
        };
        let new = NewFunction {
            record,
            request_id: None,
            limit: 10_000,
            may_create: Ok(()),
        };
        assert_eq!(store.create_function(new).await.unwrap(), Created::New);
    }
    drop(store);
    let agent = Agent::start(dir.path()).await;
    let (mut seen, mut pages, mut page_token) = (Vec::new(), 0, String::new());
    loop {
        let request = v1::ListFunctionsRequest {
            parent: "accounts/-".into(),
            page_size: 1000,
            page_token,
            ..Default::default()
        };
        let page = agent.functions().list_functions(request).await.unwrap().into_inner();
        seen.extend(page.functions.into_iter().map(|function| function.name));
        pages += 1;
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert!(pages > 1 && seen.is_sorted(), "{pages} {seen:?}");
    assert_eq!(seen.len(), FUNCTIONS);
}

/// gRPC health and reflection answer beside the services.
#[tokio::test]
async fn health_and_reflection() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    use tonic_reflection::pb::v1::ServerReflectionRequest;
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let serves = async |service: &str, status| {
        let service = service.to_owned();
        let mut client = HealthClient::new(agent.channel.clone());
        let watched = client.watch(HealthCheckRequest { service }).await.unwrap();
        let mut said = watched.into_inner();
        while said.message().await.unwrap().unwrap().status() != status {}
    };
    for service in ["", "stoker.v1.Functions", "stoker.v1.Code"] {
        serves(service, ServingStatus::Serving).await;
    }
    agent.health.send_replace(Health {
        writable: false,
        ..Health::GOOD
    });
    for service in ["", "stoker.v1.Functions"] {
        serves(service, ServingStatus::NotServing).await;
    }
    serves("stoker.v1.Code", ServingStatus::Serving).await;
    agent.health.send_replace(Health::GOOD);
    serves("", ServingStatus::Serving).await;
    let ask = |message| {
        tokio_stream::iter([ServerReflectionRequest {
            host: String::new(),
            message_request: Some(message),
        }])
    };
    let mut client = ServerReflectionClient::new(agent.channel.clone());
    let answer = async |client: &mut ServerReflectionClient<_>, message| {
        let mut answers = client.server_reflection_info(ask(message)).await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap().message_response.unwrap()
    };
    let MessageResponse::ListServicesResponse(list) =
        answer(&mut client, MessageRequest::ListServices(String::new())).await
    else {
        panic!("no list");
    };
    let services: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    assert!(services.contains(&"stoker.v1.Functions".to_owned()), "{services:?}");
    let symbol = MessageRequest::FileContainingSymbol("stoker.v1.Function".into());
    assert!(matches!(
        answer(&mut client, symbol).await,
        MessageResponse::FileDescriptorResponse(_)
    ));
}

#[tokio::test]
async fn an_account_has_as_many_functions_as_is_configured() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config::default();
    config.account.functions = Some(2);
    config.accounts.insert(
        "acme".into(),
        Account {
            functions: Some(1),
            ..Account::default()
        },
    );
    let agent = Agent::with_config(dir.path(), config.clone()).await;
    let made = agent.create(function("a"), &app()).await.unwrap();
    let refused = agent.create(function("b"), &app()).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    let details = refused.get_error_details();
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "accounts/acme");
    agent.nothing_staged().await;
    let others = |id: &str| v1::Function {
        name: format!("accounts/other/functions/{id}"),
        ..function(id)
    };
    for id in ["a", "b"] {
        agent.create(others(id), &app()).await.unwrap();
    }
    agent.stop().await;
    // They are counted again as the agent starts.
    let agent = Agent::with_config(dir.path(), config).await;
    for function in [function("b"), others("c")] {
        let refused = agent.create(function, &app()).await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted);
    }
    agent.delete(&made.name).await.unwrap();
    agent.create(function("b"), &app()).await.unwrap();
    agent.stop().await;
}
