//! Answers that are streamed.

use stoker_proto::limits::{STREAM_PART_BYTES, STREAM_WINDOW_BYTES};
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::invocations_server::InvocationsServer;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::Code;
use tonic::transport::Server;
use tonic_types::StatusExt as _;

use super::*;
use crate::address::Address;
use crate::api::held::Counted;
use crate::api::invocations::Invocations;

/// What guests stream, and have streamed.
#[derive(Debug, Default)]
pub(super) struct Script {
    /// How many bytes go out before the answer.
    bytes: usize,
    /// They go out whether they were granted or not.
    heedless: bool,
    /// Their answers are what is left of those that went to another agent.
    pub(super) partial: bool,
    /// How many went out.
    sent: usize,
    /// By call: how many more may.
    room: HashMap<u64, Arc<tokio::sync::Semaphore>>,
}

impl InProcess {
    pub(super) fn grant(&self, request: &proto::InvokeRequest) {
        let granted = usize::try_from(request.grant_bytes).unwrap();
        self.script().streaming.room[&request.call].add_permits(granted);
    }

    /// Streams as it is told to.
    pub(super) async fn stream(
        &self,
        request: &proto::InvokeRequest,
        to: &mpsc::Sender<Result<proto::InvokeResponse, Status>>,
    ) {
        let room = Arc::new(tokio::sync::Semaphore::new(STREAM_WINDOW_BYTES));
        let (bytes, heedless) = {
            let streaming = &mut self.script().streaming;
            streaming.room.insert(request.call, room.clone());
            (streaming.bytes, streaming.heedless)
        };
        for begin in (0..bytes).step_by(STREAM_PART_BYTES) {
            let length = STREAM_PART_BYTES.min(bytes - begin);
            if !heedless {
                room.acquire_many(length.try_into().unwrap()).await.unwrap().forget();
            }
            let part = proto::InvokeResponse {
                payload: vec![b'x'; length].into(),
                call: request.call,
                more: true,
                ..Default::default()
            };
            let _ = to.send(Ok(part)).await;
            self.script().streaming.sent += length;
        }
    }
}

impl Fixture {
    /// With a warm container.
    async fn streaming(dir: &Path, bytes: usize) -> Self {
        let fixture = Self::start(dir).await;
        fixture.invoke("").await.unwrap();
        fixture.guests.script().streaming.bytes = bytes;
        fixture
    }

    fn sent(&self) -> usize {
        self.guests.script().streaming.sent
    }
}

fn chunk(event: Option<Event>) -> usize {
    let Some(Event::Chunk(chunk)) = event else {
        panic!("no chunk: {event:?}")
    };
    chunk.len()
}

#[tokio::test]
async fn what_is_streamed_comes_while_the_function_runs() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::streaming(dir.path(), 3).await;
    fixture.guests.held.send_replace(true);
    let (to, mut parts) = mpsc::channel(1);
    let hearing = async {
        let Some(Event::Head(head)) = parts.recv().await else {
            panic!("no head")
        };
        assert_eq!(chunk(parts.recv().await), 3);
        // Only now the function goes on to its end.
        fixture.guests.held.send_replace(false);
        assert_eq!(parts.recv().await, None);
        head.request_id
    };
    let (answer, request_id) = tokio::join!(fixture.invoke_with("", Some(to)), hearing);
    let answer = answer.unwrap();
    assert_eq!((&answer.payload[..], &answer.request_id), (&b"1"[..], &request_id));
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn who_reads_slowly_keeps_nobody_else_waiting() {
    const BYTES: usize = 10 * STREAM_WINDOW_BYTES;
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::streaming(dir.path(), BYTES).await;
    let (to, mut parts) = mpsc::channel(1);
    let mut slow = std::pin::pin!(fixture.invoke_with("", Some(to)));
    let other = async {
        eventually("the window to be used up", async || {
            fixture.sent() == STREAM_WINDOW_BYTES
        })
        .await;
        // In the same machine: there is no other.
        let other = fixture.invoke("").await.unwrap();
        assert_eq!(fixture.sent(), STREAM_WINDOW_BYTES);
        other
    };
    tokio::select! {
        answer = &mut slow => panic!("nobody read it: {answer:?}"),
        other = other => drop(other),
    }
    let reading = async {
        let head = parts.recv().await;
        assert!(matches!(head, Some(Event::Head(_))), "{head:?}");
        let mut got = 0;
        while let Some(event) = parts.recv().await {
            got += chunk(Some(event));
            assert!(fixture.sent() <= got + STREAM_WINDOW_BYTES + STREAM_PART_BYTES);
        }
        got
    };
    let (answer, got) = tokio::join!(slow, reading);
    assert_eq!((got, &answer.unwrap().payload[..]), (BYTES, &b"1"[..]));
    fixture.host.drain(PATIENCE).await;
}

/// And who asks for it again is told that it is over.
#[tokio::test]
async fn a_function_whose_caller_leaves_streams_to_its_end() {
    const BYTES: usize = 10 * STREAM_WINDOW_BYTES;
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::streaming(dir.path(), BYTES).await;
    let begun = fixture.guests.script().begun;
    let (to, mut parts) = mpsc::channel(1);
    tokio::select! {
        answer = fixture.invoke_with("mine", Some(to)) => panic!("nobody read it: {answer:?}"),
        head = parts.recv() => assert!(matches!(head, Some(Event::Head(_))), "{head:?}"),
    }
    drop(parts);
    for streams in [false, true] {
        let (to, parts) = mpsc::channel(1);
        let error = fixture.invoke_with("mine", streams.then_some(to)).await.unwrap_err();
        assert_eq!(error, InvokeError::Streamed);
        drop(parts);
    }
    assert_eq!((fixture.sent(), fixture.guests.script().begun), (BYTES, begun + 1));
    fixture.container_is(v1::container::State::Idle).await;
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_container_is_free_before_its_answer_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::streaming(dir.path(), STREAM_WINDOW_BYTES).await;
    let (to, mut parts) = mpsc::channel(1);
    let mut unread = std::pin::pin!(fixture.invoke_with("", Some(to)));
    tokio::select! {
        answer = &mut unread => panic!("nobody read it: {answer:?}"),
        () = async {
            eventually("all to be sent", async || fixture.sent() == STREAM_WINDOW_BYTES).await;
            fixture.container_is(v1::container::State::Idle).await;
        } => {}
    }
    let reading = async { while parts.recv().await.is_some() {} };
    tokio::join!(unread, reading).0.unwrap();
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_guest_that_streams_more_than_was_granted_is_not_relied_on() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::streaming(dir.path(), 10 * STREAM_WINDOW_BYTES).await;
    fixture.guests.script().streaming.heedless = true;
    let (to, _parts) = mpsc::channel(1);
    let error = fixture.invoke_with("", Some(to)).await.unwrap_err();
    let InvokeError::MachineLost { detail } = &error else {
        panic!("{error}")
    };
    assert!(detail.contains("streamed what it was not to"), "{detail}");
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn a_stream_that_another_agent_had_is_not_told_as_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Fixture::streaming(dir.path(), 0).await;
    fixture.guests.script().streaming.partial = true;
    let error = fixture.invoke("mine").await.unwrap_err();
    assert_eq!(error, InvokeError::Streamed);
    assert_eq!(fixture.invoke("mine").await.unwrap_err(), InvokeError::Streamed);
    fixture.host.drain(PATIENCE).await;
}

#[tokio::test]
async fn the_api_streams_while_the_function_runs() {
    let dir = tempfile::tempdir().unwrap();
    let guests = InProcess::default();
    let deps = Fixture::deps(dir.path(), guests.clone(), |_| {}).await;
    let (store, codes) = (deps.store.clone(), deps.code.clone());
    let catalog = Catalog::open(
        store,
        codes,
        Limits::default(),
        PATIENCE,
        ResizingDefaults::default(),
        Arc::new(|_, _| Ok(())),
        Arc::new(|_| {}),
    );
    let (catalog, host) = (catalog.await.unwrap(), HostHandle::start(deps).await.unwrap());
    let mut upload = catalog.upload().unwrap();
    let zip = stoker_testkit::zip::zip(&[("app.py", 0o644, b"")]).unwrap();
    upload.write(zip.into()).await.unwrap();
    let spec = FunctionSpec {
        name: "accounts/a/functions/f".parse().unwrap(),
        runtime: "python3.11".into(),
        handler: "app.handler".into(),
        environment: Default::default(),
        timeout: PATIENCE,
        amount: function().amount,
        freeze: true,
        ephemeral_storage_mib: 512,
        resizing: None,
    };
    let staged = upload.finish().await.unwrap();
    catalog.create(spec, String::new(), staged, 4096).await.unwrap();

    let socket = dir.path().join("s");
    let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
    let service = InvocationsServer::new(Invocations::new(catalog, host.clone()));
    let served = Counted::new(service, host.memory().clone());
    tokio::spawn(Server::builder().add_service(served).serve_with_incoming(incoming));
    let mut client = InvocationsClient::new(Address::Unix(socket).connect().await.unwrap());
    let asked = |name: &str, request_id: &str| v1::InvokeRequest {
        name: name.into(),
        payload: "1".into(),
        request_id: request_id.into(),
        ..Default::default()
    };
    client.invoke(asked("accounts/a/functions/f", "")).await.unwrap();

    guests.script().streaming.bytes = 3;
    guests.held.send_replace(true);
    let mine = asked("accounts/a/functions/f", "mine");
    let mut events = client
        .invoke_with_response_stream(mine.clone())
        .await
        .unwrap()
        .into_inner();
    let mut next = async || events.message().await.unwrap().map(|message| message.event.unwrap());
    assert!(matches!(next().await, Some(Event::Head(head)) if head.request_id == "mine"));
    assert_eq!(chunk(next().await), 3);
    guests.held.send_replace(false);
    assert_eq!(next().await, Some(Event::Chunk(Bytes::from_static(b"1"))));
    let Some(Event::Complete(complete)) = next().await else {
        panic!("it is over")
    };
    assert!(complete.function_error.is_empty() && complete.placement.is_some() && complete.latency.is_some());
    assert_eq!(next().await, None);

    let nobody = client
        .invoke_with_response_stream(asked("accounts/a/functions/g", ""))
        .await;
    assert_eq!(nobody.unwrap_err().code(), Code::NotFound);
    let again = client.invoke_with_response_stream(mine).await.unwrap_err();
    assert_eq!(again.code(), Code::Aborted);
    assert_eq!(again.get_error_details().error_info().unwrap().reason, "STREAMED");
    host.drain(PATIENCE).await;
}
