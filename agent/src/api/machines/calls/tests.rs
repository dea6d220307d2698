use bytes::{BufMut as _, Bytes, BytesMut};
use http_body::Frame;
use http_body_util::StreamBody;
use prost::Message;
use stoker_proto::limits::PROGRAM_BYTES;
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic::codec::{DecodeBuf, Decoder};
use tonic_types::StatusExt as _;

use super::*;

/// For what should come at once; others use the machine too.
const PATIENCE: Duration = Duration::from_secs(30);

struct Prost<M>(std::marker::PhantomData<M>);

impl<M: Message + Default> Decoder for Prost<M> {
    type Item = M;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<M>, Status> {
        M::decode(from)
            .map(Some)
            .map_err(|error| Status::internal(error.to_string()))
    }
}

/// What somebody sends, message by message, as it comes over HTTP/2.
fn streaming<M: Message + Default + 'static>() -> (mpsc::Sender<Result<M, Status>>, Streaming<M>) {
    let (to, messages) = mpsc::channel(1);
    let frames = ReceiverStream::new(messages).map(|message: Result<M, Status>| {
        let message = message?;
        let mut frame = BytesMut::new();
        frame.put_u8(0);
        frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
        message.encode(&mut frame).unwrap();
        Ok::<_, Status>(Frame::data(frame.freeze()))
    });
    let decoder = Prost(std::marker::PhantomData);
    (to, Streaming::new_request(decoder, StreamBody::new(frames), None, None))
}

/// A call, its caller and its guest.
struct Call<I, O> {
    caller: mpsc::Sender<Result<I, Status>>,
    asked: mpsc::Receiver<I>,
    guest: mpsc::Sender<Result<O, Status>>,
    answers: ReceiverStream<Result<O, Status>>,
    calls: Calls,
}

const MACHINE: MachineId = MachineId(ulid::Ulid(7));

// === impl Call ===

impl<I: Asked + Message + Default, O: Answered + Message + Default> Call<I, O> {
    fn begin() -> Self {
        let calls = Calls::default();
        let (caller, from_caller) = streaming();
        let (guest, from_guest) = streaming();
        let (to_guest, asked) = mpsc::channel(1);
        let why = async { unavailable("MACHINE_ENDED", "the machine ended: it is so") };
        let place = calls.take(MACHINE).unwrap();
        Self {
            caller,
            asked,
            guest,
            answers: pass(place, from_caller, to_guest, from_guest, why),
            calls,
        }
    }

    async fn answer(&mut self) -> Option<Result<O, Status>> {
        tokio::time::timeout(PATIENCE, self.answers.next()).await.unwrap()
    }

    /// The call is over for its guest, and nothing is left of it.
    async fn over(self) {
        let over = async {
            self.guest.closed().await;
            let mut asked = self.asked;
            while asked.recv().await.is_some() {}
        };
        tokio::time::timeout(PATIENCE, over).await.unwrap();
        let gone = async {
            while !self.calls.0.lock().unwrap().is_empty() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, gone).await.unwrap();
    }
}

type Exec = Call<v1::ExecRequest, v1::ExecResponse>;
type Port = Call<v1::ForwardPortRequest, v1::ForwardPortResponse>;

fn asks(part: ExecPart) -> Result<v1::ExecRequest, Status> {
    Ok(v1::ExecRequest { part: Some(part) })
}

fn answers(part: ExecAnswer) -> Result<v1::ExecResponse, Status> {
    Ok(v1::ExecResponse { part: Some(part) })
}

fn data(bytes: impl Into<Bytes>) -> Result<v1::ForwardPortResponse, Status> {
    Ok(v1::ForwardPortResponse { data: bytes.into() })
}

#[tokio::test]
async fn a_program_is_over_with_its_exit_status() {
    let mut call = Exec::begin();
    for part in [
        ExecPart::Stdin("in".into()),
        ExecPart::Signal(2),
        ExecPart::Terminal(v1::TerminalSize { columns: 80, rows: 24 }),
    ] {
        call.caller.send(asks(part.clone())).await.unwrap();
        let asked = tokio::time::timeout(PATIENCE, call.asked.recv()).await.unwrap();
        assert_eq!(asked.unwrap().part, Some(part));
    }
    for part in [
        ExecAnswer::Stdout("out".into()),
        ExecAnswer::Stderr("err".into()),
        ExecAnswer::StdinGrant(7),
        ExecAnswer::ExitStatus(3),
    ] {
        call.guest.send(answers(part.clone())).await.unwrap();
        assert_eq!(call.answer().await.unwrap().unwrap().part, Some(part));
    }
    assert!(call.answer().await.is_none());
    call.over().await;
}

#[tokio::test]
async fn either_side_of_a_connection_may_end_first() {
    let mut call = Port::begin();
    // The caller has sent all, and still reads.
    let (gone, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut call.caller, gone));
    assert!(
        tokio::time::timeout(PATIENCE, call.asked.recv())
            .await
            .unwrap()
            .is_none()
    );
    call.guest.send(data("late")).await.unwrap();
    assert_eq!(call.answer().await.unwrap().unwrap().data, "late");
    let (gone, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut call.guest, gone));
    assert!(call.answer().await.is_none());
    call.over().await;

    // The guest has sent all, and is still sent to.
    let mut call = Port::begin();
    let (gone, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut call.guest, gone));
    assert!(call.answer().await.is_none());
    let late = PortPart::Data("late".into());
    let sent = v1::ForwardPortRequest {
        part: Some(late.clone()),
    };
    call.caller.send(Ok(sent)).await.unwrap();
    let asked = tokio::time::timeout(PATIENCE, call.asked.recv()).await.unwrap();
    assert_eq!(asked.unwrap().part, Some(late));
    let (gone, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut call.caller, gone));
    call.over().await;

    // The guest has sent all, and then takes no more: a caller that is silent keeps no place.
    let mut call = Port::begin();
    let (gone, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut call.guest, gone));
    assert!(call.answer().await.is_none());
    call.asked.close();
    let caller = call.caller.clone();
    call.over().await;
    assert!(caller.is_closed());
}

#[tokio::test]
async fn a_caller_that_leaves_ends_the_call() {
    let mut call = Exec::begin();
    call.guest
        .send(answers(ExecAnswer::Stdout("out".into())))
        .await
        .unwrap();
    call.answer().await.unwrap().unwrap();
    call.answers.close();
    let (caller, guest) = (call.caller.clone(), call.guest.clone());
    call.over().await;
    assert!(caller.is_closed() && guest.is_closed());
}

/// How many messages find room before somebody has to wait.
async fn until_full<M: Clone>(to: &mpsc::Sender<M>, message: M) -> usize {
    let mut sent = 0;
    while tokio::time::timeout(Duration::from_millis(200), to.send(message.clone()))
        .await
        .is_ok()
    {
        sent += 1;
        assert!(sent < 100, "all of it is kept");
    }
    sent
}

#[tokio::test]
async fn nothing_is_kept_for_who_does_not_read() {
    let mut call = Port::begin();
    let piece = data(vec![7; STREAMED_BYTES]);
    let sent = until_full(&call.guest, piece).await;
    // What waits in the channels of this test is not the relay's.
    assert!(sent <= 4, "{sent}");
    let stdin = Ok(v1::ForwardPortRequest {
        part: Some(PortPart::Data(vec![7; STREAMED_BYTES].into())),
    });
    let asked = until_full(&call.caller, stdin).await;
    assert!(asked <= 4, "{asked}");
    // Who reads again has all of it.
    for _ in 0..sent {
        assert_eq!(call.answer().await.unwrap().unwrap().data.len(), STREAMED_BYTES);
    }
}

#[tokio::test]
async fn what_may_not_be_sent_ends_the_call() {
    for part in [
        None,
        Some(ExecPart::Start(v1::ExecStart::default())),
        Some(ExecPart::Stdin(vec![0; STREAMED_BYTES + 1].into())),
        Some(ExecPart::Signal(0)),
        Some(ExecPart::Signal(65)),
        Some(ExecPart::Terminal(v1::TerminalSize {
            columns: 65_536,
            rows: 1,
        })),
    ] {
        let mut call = Exec::begin();
        call.caller.send(Ok(v1::ExecRequest { part })).await.unwrap();
        let refused = call.answer().await.unwrap().unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        call.over().await;
    }
}

#[tokio::test]
async fn a_guest_that_breaks_off_is_told_of_with_why() {
    let reason = |status: &Status| status.get_error_details().error_info().unwrap().reason.clone();
    let mut call = Exec::begin();
    let (gone, _) = mpsc::channel(1);
    drop(std::mem::replace(&mut call.guest, gone));
    let ended = call.answer().await.unwrap().unwrap_err();
    assert_eq!((ended.code(), &*reason(&ended)), (Code::Unavailable, "MACHINE_ENDED"));
    assert!(ended.message().contains("it is so"));
    call.over().await;

    // One that sends more than it may.
    let mut call = Exec::begin();
    let large = ExecAnswer::Stdout(vec![0; STREAMED_BYTES + 1].into());
    call.guest.send(answers(large)).await.unwrap();
    let refused = call.answer().await.unwrap().unwrap_err();
    assert_eq!(
        (refused.code(), &*reason(&refused)),
        (Code::Unavailable, "GUEST_FAILED")
    );
    call.over().await;
}

#[test]
fn what_a_guest_says_is_told_by_what_can_be_done() {
    for (of_guest, told) in [
        (Code::InvalidArgument, Code::InvalidArgument),
        (Code::NotFound, Code::FailedPrecondition),
        (Code::FailedPrecondition, Code::FailedPrecondition),
        (Code::ResourceExhausted, Code::ResourceExhausted),
        (Code::Unavailable, Code::Unavailable),
        (Code::Aborted, Code::Unavailable),
        (Code::Internal, Code::Unavailable),
    ] {
        let status = refused(&Status::new(of_guest, "it is so"));
        assert_eq!(status.code(), told);
        assert!(status.message().contains("it is so"), "{status:?}");
    }
}

#[test]
fn so_many_calls_go_on_in_a_machine_and_no_more() {
    let calls = Calls::default();
    let places: Vec<_> = (0..CALLS).map(|_| calls.take(MACHINE).unwrap()).collect();
    assert_eq!(calls.take(MACHINE).unwrap_err().code(), Code::ResourceExhausted);
    let other = calls.take(MachineId(ulid::Ulid(8))).unwrap();
    drop((places, other));
    assert!(calls.0.lock().unwrap().is_empty());
    calls.take(MACHINE).unwrap();
}

#[tokio::test]
async fn the_first_message_begins_the_call() {
    let (caller, mut from) = streaming::<v1::ExecRequest>();
    caller.send(asks(ExecPart::Signal(2))).await.unwrap();
    assert_eq!(first(&mut from).await.unwrap_err().code(), Code::InvalidArgument);
    let (caller, mut from) = streaming::<v1::ForwardPortRequest>();
    drop(caller);
    assert_eq!(first(&mut from).await.unwrap_err().code(), Code::InvalidArgument);
}

#[test]
fn all_that_is_wrong_with_a_program_is_told_at_once() {
    let start = v1::ExecStart {
        command: vec![String::new()],
        environment: [("=".to_owned(), String::new())].into(),
        working_dir: "srv".into(),
        user: "a b".into(),
        terminal: Some(v1::TerminalSize {
            columns: 70_000,
            rows: 70_000,
        }),
        ..Default::default()
    };
    let status = check_start(&start).unwrap_err();
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    let fields: Vec<_> = violations.iter().map(|violation| &*violation.field).collect();
    assert_eq!(
        fields,
        [
            "start.command",
            "start.environment[\"=\"]",
            "start.working_dir",
            "start.user",
            "start.terminal.columns",
            "start.terminal.rows"
        ]
    );
}

#[test]
fn command_and_environment_together_are_what_a_guest_takes() {
    let start = |bytes: usize| v1::ExecStart {
        command: vec!["a".repeat(bytes)],
        environment: [("A".to_owned(), "b".repeat(bytes))].into(),
        ..Default::default()
    };
    check_start(&start(PROGRAM_BYTES / 2 - 8)).unwrap();
    let status = check_start(&start(PROGRAM_BYTES / 2)).unwrap_err();
    let details = status.get_error_details();
    let violations = &details.bad_request().unwrap().field_violations;
    assert_eq!((violations.len(), &*violations[0].field), (1, "start"), "{status:?}");
}
