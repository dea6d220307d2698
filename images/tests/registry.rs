//! Pulls from registries that do harm or ask for tokens: each answer is written here.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{
    collections::HashMap,
    future::Future,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
    thread,
};

use serde_json::{Value, json};
use stoker_images::{Credentials, Digest, Exceeded, ImageError, RegistryError};
use support::{CONFIG, GZIP, INDEX, MANIFEST, Tar, TestStore, compress, config_of, pull};

mod support;

/// What was asked.
struct Request {
    path: String,
    authorization: Option<String>,
}

/// What is answered.
#[derive(Clone)]
struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Body,
}

#[derive(Clone)]
enum Body {
    Bytes(Vec<u8>),
    /// These over and over, until nobody reads them.
    Endless(Vec<u8>),
    /// These, and then nothing, with the connection left open until the other side closes it.
    Stalled(Vec<u8>),
    /// These, though more were promised.
    Short(Vec<u8>),
}

type Answer = dyn Fn(&Request) -> Reply + Send + Sync;

/// A server on this machine.
struct Server {
    port: u16,
    /// Paths that were asked for.
    asked: Arc<Mutex<Vec<String>>>,
}

impl Server {
    fn start(answer: impl Fn(u16, &Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&asked);
        let answer: Arc<Answer> = Arc::new(move |request: &Request| answer(port, request));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (answer, log) = (Arc::clone(&answer), Arc::clone(&log));
                thread::spawn(move || serve(stream, &*answer, &log));
            }
        });
        Self { port, asked }
    }

    fn reference(&self) -> String {
        format!("127.0.0.1:{}/acme/web:1", self.port)
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

fn serve(mut stream: TcpStream, answer: &Answer, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_owned();
    let mut authorization = None;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("authorization") {
            authorization = Some(value.trim().to_owned());
        }
    }
    log.lock().unwrap().push(path.clone());
    let reply = answer(&Request { path, authorization });
    let mut head = format!("HTTP/1.1 {} x\r\nConnection: close\r\n", reply.status);
    for (name, value) in &reply.headers {
        head += &format!("{name}: {value}\r\n");
    }
    let (length, bytes) = match &reply.body {
        Body::Bytes(bytes) => (Some(bytes.len()), bytes),
        Body::Short(bytes) => (Some(bytes.len() + 1), bytes),
        Body::Endless(bytes) | Body::Stalled(bytes) => (None, bytes),
    };
    head += &length
        .map(|length| format!("Content-Length: {length}\r\n"))
        .unwrap_or_default();
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(b"\r\n").ok()?;
    stream.write_all(bytes).ok()?;
    match &reply.body {
        Body::Endless(bytes) => loop {
            stream.write_all(bytes).ok()?;
        },
        Body::Stalled(_) => stream.read(&mut [0]).ok().map(drop),
        _ => Some(()),
    }
}

fn ok(body: impl Into<Vec<u8>>) -> Reply {
    Reply {
        status: 200,
        headers: Vec::new(),
        body: Body::Bytes(body.into()),
    }
}

fn status(status: u16, headers: &[(&'static str, String)]) -> Reply {
    Reply {
        status,
        headers: headers.to_vec(),
        body: Body::Bytes(Vec::new()),
    }
}

/// What a registry has, by path.
struct Content(HashMap<String, Vec<u8>>);

impl Content {
    /// `acme/web:1`, by way of an index.
    fn new() -> Self {
        let mut content = Self(HashMap::new());
        let tar = Tar::default().file("file", b"content").finish();
        let layer = content.put("blobs", GZIP, compress(GZIP, &tar));
        let config = config_of([&tar[..], &tar].into_iter(), &json!({})).to_string();
        let config = content.put("blobs", CONFIG, config.into_bytes());
        // The same twice, which is read once.
        let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer, layer]});
        let mut manifest = content.put("manifests", MANIFEST, manifest.to_string().into_bytes());
        manifest["platform"] = json!({"os": "linux", "architecture": "amd64"});
        let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [manifest]}).to_string();
        content
            .0
            .insert("/v2/acme/web/manifests/1".to_owned(), index.into_bytes());
        content
    }

    fn put(&mut self, folder: &str, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = Digest::of(&bytes).to_string();
        let value = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.0.insert(format!("/v2/acme/web/{folder}/{digest}"), bytes);
        value
    }

    fn reply(&self, path: &str) -> Reply {
        self.0.get(path).map_or(status(404, &[]), |bytes| ok(bytes.clone()))
    }
}

/// What kind of thing is asked for, in the order in which a pull asks.
fn stage(path: &str) -> usize {
    let content = Content::new();
    let bytes = &content.0[path];
    match serde_json::from_slice::<Value>(bytes) {
        Ok(value) if value.get("manifests").is_some() => 0,
        Ok(value) if value.get("layers").is_some() => 1,
        Ok(_) => 2,
        Err(_) => 3,
    }
}

/// Pulls where the registry answers something else at one stage.
async fn pull_with(at: usize, change: impl Fn(Reply) -> Reply + Send + Sync + 'static) -> ImageError {
    let content = Content::new();
    let server = Server::start(move |_, request| {
        let reply = content.reply(&request.path);
        if stage(&request.path) == at {
            change(reply)
        } else {
            reply
        }
    });
    let store = TestStore::new();
    let error = pull(&store.store, "web", &server.reference(), None).await.unwrap_err();
    store.assert_empty();
    error
}

#[tokio::test]
async fn each_part_is_read_once_and_what_is_kept_not_again() {
    let content = Content::new();
    let server = Server::start(move |_, request| content.reply(&request.path));
    let store = TestStore::new();
    let image = pull(&store.store, "web", &server.reference(), None).await.unwrap();
    assert_eq!(
        server.asked().iter().map(|path| stage(path)).collect::<Vec<_>>(),
        [0, 1, 2, 3]
    );
    let again = pull(&store.store, "again", &server.reference(), None).await.unwrap();
    assert_eq!(again.id, image.id);
    assert_eq!(
        server.asked().iter().map(|path| stage(path)).collect::<Vec<_>>(),
        [0, 1, 2, 3, 0, 1, 2]
    );
}

#[tokio::test]
async fn what_is_deleted_while_it_is_pulled_again_is_kept_all_the_same() {
    let content = Content::new();
    let server = Server::start(move |_, request| content.reply(&request.path));
    let store = TestStore::new();
    let before = pull(&store.store, "web", &server.reference(), None).await.unwrap().id;
    let fetched = store.store.fetch(&server.reference(), None, |_| {}).await.unwrap();
    assert_eq!(server.asked().iter().filter(|path| stage(path) == 3).count(), 1);
    store.store.remove("web").unwrap();
    assert_eq!(store.store.keep("again", fetched).unwrap().id, before);
    assert_eq!(store.store.get("again").unwrap().id, before);
    // What was pulled for nothing leaves nothing.
    let fetched = store.store.fetch(&server.reference(), None, |_| {}).await.unwrap();
    store.store.remove("again").unwrap();
    drop(fetched);
    drop(store.store.sweep().unwrap());
    store.assert_empty();
}

#[tokio::test]
async fn how_far_a_pull_is_shows_in_bytes_of_layers() {
    let content = Content::new();
    let server = Server::start(move |_, request| content.reply(&request.path));
    let store = TestStore::new();
    let heard = Mutex::new(Vec::new());
    let hear = |progress| heard.lock().unwrap().push(progress);
    let fetched = store.store.fetch(&server.reference(), None, hear).await.unwrap();
    store.store.keep("web", fetched).unwrap();
    let heard = heard.into_inner().unwrap();
    let (first, last) = (heard.first().unwrap(), heard.last().unwrap());
    assert_eq!((first.pulled, last.pulled), (0, last.total));
    assert!(last.total > 0 && heard.is_sorted_by_key(|progress| progress.pulled));
}

#[tokio::test]
async fn answers_without_an_end_are_not_read_to_it() {
    for (at, check) in [
        (
            0,
            (|error| matches!(error, ImageError::Limit(Exceeded::Document(_)))) as fn(&ImageError) -> bool,
        ),
        (1, |error| matches!(error, ImageError::Limit(Exceeded::Document(_)))),
        (2, |error| matches!(error, ImageError::Digest { .. })),
        (3, |error| matches!(error, ImageError::Size { .. })),
    ] {
        let error = pull_with(at, |reply| Reply {
            body: Body::Endless(vec![b' '; 4096]),
            ..reply
        })
        .await;
        assert!(check(&error), "{at}: {error}");
    }
    // Of an error no more than of what is asked for.
    let error = pull_with(0, |_| Reply {
        status: 500,
        headers: Vec::new(),
        body: Body::Endless(vec![b'x'; 4096]),
    })
    .await;
    assert!(
        matches!(error, ImageError::Registry(RegistryError::Status { status: 500, .. })),
        "{error}"
    );
}

#[tokio::test]
async fn what_is_damaged_on_the_way_is_refused() {
    for at in 0..4 {
        let error = pull_with(at, |mut reply| {
            if let Body::Bytes(bytes) = &mut reply.body {
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
            }
            reply
        })
        .await;
        let is_expected = if at == 0 {
            // Nothing says what a tag should be.
            matches!(error, ImageError::Document { .. })
        } else {
            matches!(error, ImageError::Digest { .. })
        };
        assert!(is_expected, "{at}: {error}");
        let error = pull_with(at, |reply| match reply.body {
            Body::Bytes(bytes) => Reply {
                body: Body::Short(bytes),
                ..reply
            },
            _ => reply,
        })
        .await;
        assert!(
            matches!(error, ImageError::Registry(RegistryError::Http { .. })),
            "{at}: {error}"
        );
        let error = pull_with(at, |reply| match reply.body {
            Body::Bytes(bytes) => ok(&bytes[..bytes.len() / 2]),
            _ => reply,
        })
        .await;
        let is_expected = match at {
            0 => matches!(error, ImageError::Document { .. }),
            3 => matches!(error, ImageError::Size { .. }),
            _ => matches!(error, ImageError::Digest { .. }),
        };
        assert!(is_expected, "{at}: {error}");
        let error = pull_with(at, |_| status(404, &[])).await;
        assert!(
            matches!(error, ImageError::Registry(RegistryError::Status { status: 404, .. })),
            "{at}: {error}"
        );
    }
    let error = pull_with(0, |_| Reply {
        headers: vec![(
            "Content-Type",
            "application/vnd.docker.distribution.manifest.v1+json".to_owned(),
        )],
        ..ok("{}")
    })
    .await;
    assert!(matches!(error, ImageError::MediaType { .. }), "{error}");
}

#[tokio::test]
async fn a_pull_that_nobody_waits_for_leaves_nothing() {
    for at in 0..4 {
        let content = Content::new();
        let server = Server::start(move |_, request| match stage(&request.path) {
            stage if stage == at => Reply {
                body: Body::Stalled(vec![b' ']),
                ..ok("")
            },
            _ => content.reply(&request.path),
        });
        let store = TestStore::new();
        let reference = server.reference();
        let mut pulling = Box::pin(pull(&store.store, "web", &reference, None));
        while server.asked().len() <= at {
            let waiting = pulling.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(waiting, Poll::Pending));
            tokio::task::yield_now().await;
        }
        drop(pulling);
        store.assert_empty();
    }
}

#[tokio::test]
async fn a_token_is_asked_for_where_the_registry_says() {
    let content = Content::new();
    let server = Server::start(move |port, request| {
        if request.path.starts_with("/token") {
            let scope = "scope=repository%3Aacme%2Fweb%3Apull";
            assert!(
                request.path.contains(scope) && request.path.contains("service=reg"),
                "{}",
                request.path
            );
            // `user:secret`
            assert_eq!(request.authorization.as_deref(), Some("Basic dXNlcjpzZWNyZXQ="));
            return ok(r#"{"token":"the-token","expires_in":60}"#);
        }
        if request.authorization.as_deref() == Some("Bearer the-token") {
            return content.reply(&request.path);
        }
        let challenge = format!(r#"Bearer realm="http://127.0.0.1:{port}/token",service="reg",scope="x""#);
        status(401, &[("WWW-Authenticate", challenge)])
    });
    let store = TestStore::new();
    let credentials = Credentials {
        username: "user".to_owned(),
        password: "secret".to_owned(),
    };
    pull(&store.store, "web", &server.reference(), Some(&credentials))
        .await
        .unwrap();
    assert_eq!(
        server.asked().iter().filter(|path| path.starts_with("/token")).count(),
        1
    );
}

#[tokio::test]
async fn logins_that_lead_nowhere_end() {
    let challenge = |challenge: &'static str| {
        Server::start(move |port, request| {
            if request.path.starts_with("/endless") {
                return Reply {
                    body: Body::Endless(vec![b' '; 4096]),
                    ..ok("")
                };
            }
            if request.path.starts_with("/empty") {
                return ok("{}");
            }
            if request.path.starts_with("/bad") {
                return ok(r#"{"token":"a\r\nHost: other"}"#);
            }
            if request.path.starts_with("/token") {
                return ok(r#"{"token":"t"}"#);
            }
            let challenge = challenge.replace("HERE", &format!("http://127.0.0.1:{port}"));
            status(401, &[("WWW-Authenticate", challenge)])
        })
    };
    let is_login: fn(&RegistryError) -> bool = |error| matches!(error, RegistryError::Login { .. });
    for (text, check) in [
        (
            r#"Bearer realm="HERE/endless""#,
            (|error| matches!(error, RegistryError::TooLong { .. })) as fn(&RegistryError) -> bool,
        ),
        (r#"Bearer realm="HERE/empty""#, is_login),
        (r#"Bearer realm="HERE/bad""#, is_login),
        (r#"Bearer realm="not a URL""#, is_login),
        (r#"Bearer service="x""#, is_login),
        // A password would go over the network as it is.
        (r#"Bearer realm="http://registry.invalid/token""#, is_login),
        (r#"Digest realm="x", nonce="y""#, is_login),
        ("", is_login),
        // It takes no token for an answer.
        (r#"Bearer realm="HERE/token""#, |error| {
            matches!(error, RegistryError::Status { status: 401, .. })
        }),
    ] {
        let server = challenge(text);
        let store = TestStore::new();
        let error = pull(&store.store, "web", &server.reference(), None).await.unwrap_err();
        assert!(
            matches!(&error, ImageError::Registry(error) if check(error)),
            "{text}: {error}"
        );
        store.assert_empty();
    }
}

#[tokio::test]
async fn blobs_may_lie_elsewhere_and_no_login_goes_there() {
    let content = Arc::new(Content::new());
    let blobs = Arc::clone(&content);
    let elsewhere = Server::start(move |_, request| {
        assert_eq!(request.authorization, None, "a login went to another host");
        blobs.reply(&request.path)
    });
    let other = elsewhere.port;
    let server = Server::start(move |_, request| {
        if request.authorization.is_none() {
            return status(401, &[("WWW-Authenticate", r#"Basic realm="x""#.to_owned())]);
        }
        if request.path.contains("/blobs/") {
            return status(
                307,
                &[("Location", format!("http://localhost:{other}{}", request.path))],
            );
        }
        content.reply(&request.path)
    });
    let store = TestStore::new();
    let credentials = Credentials {
        username: "user".to_owned(),
        password: "secret".to_owned(),
    };
    pull(&store.store, "web", &server.reference(), Some(&credentials))
        .await
        .unwrap();
    assert_eq!(elsewhere.asked().len(), 2);
    let circle = Server::start(|_, request| status(307, &[("Location", request.path.clone())]));
    let error = pull(&store.store, "web", &circle.reference(), None).await.unwrap_err();
    assert!(
        matches!(error, ImageError::Registry(RegistryError::Http { .. })),
        "{error}"
    );
    assert!(circle.asked().len() < 10);
}

#[tokio::test]
async fn who_a_registry_leads_to_is_not_told_the_password() {
    let elsewhere = Server::start(|port, _| {
        let challenge = format!(r#"Bearer realm="http://127.0.0.1:{port}/token""#);
        status(401, &[("WWW-Authenticate", challenge)])
    });
    let other = elsewhere.port;
    let content = Content::new();
    let server = Server::start(move |_, request| match stage(&request.path) {
        3 => status(
            307,
            &[("Location", format!("http://127.0.0.1:{other}{}", request.path))],
        ),
        _ => content.reply(&request.path),
    });
    let store = TestStore::new();
    let credentials = Credentials {
        username: "user".to_owned(),
        password: "secret".to_owned(),
    };
    let error = pull(&store.store, "web", &server.reference(), Some(&credentials))
        .await
        .unwrap_err();
    assert!(
        matches!(error, ImageError::Registry(RegistryError::Status { status: 401, .. })),
        "{error}"
    );
    assert!(
        elsewhere.asked().iter().all(|path| path.contains("/blobs/")),
        "{:?}",
        elsewhere.asked()
    );
    store.assert_empty();
}

#[tokio::test]
async fn what_names_no_image_is_refused() {
    let store = TestStore::new();
    for reference in [
        "",
        "Web",
        "web:",
        "web@sha256:00",
        "127.0.0.1:1/../web",
        "a b",
        "https://x/y",
    ] {
        let error = pull(&store.store, "web", reference, None).await.unwrap_err();
        assert!(
            matches!(
                error,
                ImageError::Registry(RegistryError::Reference(_)) | ImageError::DigestName(_)
            ),
            "{reference}: {error}"
        );
    }
    // Nobody is there.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = pull(&store.store, "web", &format!("127.0.0.1:{port}/web"), None)
        .await
        .unwrap_err();
    assert!(
        matches!(error, ImageError::Registry(RegistryError::Http { .. })),
        "{error}"
    );
    store.assert_empty();
}
