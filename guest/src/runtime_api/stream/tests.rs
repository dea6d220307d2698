use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body_util::StreamBody;
use stoker_proto::guest::InvokeResponse;
use stoker_proto::limits::STREAM_WINDOW_BYTES;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tonic::Status;

use super::super::Outcome;
use super::super::testing::{ID, invoked_by, post, raw, served};
use super::*;
use crate::parts::Windows;

/// An invocation whose answer may be streamed, and the agent's end of that.
struct Invoked {
    windows: Windows,
    answers: mpsc::Receiver<Result<InvokeResponse, Status>>,
    outcome: oneshot::Receiver<Outcome>,
    address: SocketAddr,
}

impl Invoked {
    async fn new() -> Self {
        let (api, address) = served().await;
        let (mut windows, (to, answers)) = (Windows::default(), mpsc::channel(1));
        let parts = windows.open(7, to);
        let (outcome, _) = invoked_by(&api, address, Some(parts)).await;
        Self {
            windows,
            answers,
            outcome,
            address,
        }
    }

    /// A connection on which an answer was begun.
    async fn answering(&self, more: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(head(more).as_bytes()).await.unwrap();
        stream
    }

    async fn part(&mut self) -> Bytes {
        let part = self.answers.recv().await.unwrap().unwrap();
        assert!(part.more && part.call == 7 && !part.payload.is_empty());
        part.payload
    }

    /// What went out, all in all.
    fn all(&mut self) -> String {
        let mut all = Vec::new();
        while let Ok(part) = self.answers.try_recv() {
            all.extend_from_slice(&part.unwrap().payload);
        }
        String::from_utf8(all).unwrap()
    }
}

fn head(more: &str) -> String {
    format!(
        "POST /2018-06-01/runtime/invocation/{ID}/response HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         Lambda-Runtime-Function-Response-Mode: streaming\r\ntransfer-encoding: chunked\r\n{more}\r\n"
    )
}

#[tokio::test]
async fn a_part_goes_out_while_the_function_still_answers() {
    let mut invoked = Invoked::new().await;
    let mut stream = invoked.answering("").await;
    for part in ["first", "second"] {
        let chunk = format!("{:x}\r\n{part}\r\n", part.len());
        stream.write_all(chunk.as_bytes()).await.unwrap();
        assert_eq!(invoked.part().await, part);
    }
    stream.write_all(b"4\r\nrest\r\n0\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    let Outcome::Answer(rest) = invoked.outcome.await.unwrap() else {
        panic!("no answer")
    };
    assert_eq!(rest, "rest");
    assert!(invoked.answers.try_recv().is_err());
}

#[tokio::test]
async fn a_function_is_read_no_faster_than_its_caller_reads() {
    const CHUNK: usize = 1 << 20;
    const CHUNKS: usize = 64;
    /// What two sockets, hyper and the parts on their way hold at most.
    const BETWEEN: usize = 24 << 20;
    let mut invoked = Invoked::new().await;
    let mut stream = invoked.answering("").await;
    let written = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&written);
    let writing = tokio::spawn(async move {
        let chunk = [
            format!("{CHUNK:x}\r\n").into_bytes(),
            vec![b'x'; CHUNK],
            b"\r\n".to_vec(),
        ]
        .concat();
        for _ in 0..CHUNKS {
            stream.write_all(&chunk).await.unwrap();
            count.fetch_add(CHUNK, Ordering::Relaxed);
        }
        stream.write_all(b"0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    });
    let (mut granted, mut got) = (STREAM_WINDOW_BYTES, 0);
    let rest = loop {
        let part = tokio::select! {
            biased;
            Some(part) = invoked.answers.recv() => part.unwrap().payload,
            outcome = &mut invoked.outcome => break outcome.unwrap(),
        };
        got += part.len();
        assert!(got <= granted && part.len() <= STREAM_PART_BYTES);
        assert!(written.load(Ordering::Relaxed) <= got + BETWEEN);
        if granted - got < STREAM_PART_BYTES {
            let more = STREAM_WINDOW_BYTES - (granted - got);
            granted += more;
            // More than the window is never given.
            invoked.windows.grant(7, u32::MAX);
        }
    };
    let Outcome::Answer(rest) = rest else {
        panic!("no answer: {rest:?}")
    };
    assert_eq!(got + rest.len(), CHUNK * CHUNKS);
    assert!(writing.await.unwrap().starts_with("HTTP/1.1 202"));
}

#[tokio::test]
async fn a_function_whose_agent_leaves_answers_to_its_end() {
    let mut invoked = Invoked::new().await;
    let mut stream = invoked.answering("").await;
    stream.write_all(b"1\r\nx\r\n").await.unwrap();
    assert_eq!(invoked.part().await, "x");
    drop((invoked.windows, invoked.answers));
    let chunk = [
        format!("{:x}\r\n", 1 << 20).into_bytes(),
        vec![b'x'; 1 << 20],
        b"\r\n".to_vec(),
    ]
    .concat();
    for _ in 0..8 {
        stream.write_all(&chunk).await.unwrap();
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    assert!(matches!(invoked.outcome.await.unwrap(), Outcome::Answer(_)));
}

#[tokio::test]
async fn what_came_before_a_stream_broke_off_goes_out() {
    let mut invoked = Invoked::new().await;
    let mut stream = invoked.answering("").await;
    stream.write_all(b"4\r\nhalf\r\n4\r\nno").await.unwrap();
    drop(stream);
    assert_eq!((&mut invoked.outcome).await.unwrap(), Outcome::BrokenOff);
    assert!(invoked.all().starts_with("half"));
}

#[tokio::test]
async fn what_came_before_a_stream_failed_goes_out() {
    let lines = "Lambda-Runtime-Function-Error-Type: Function.T\r\nLambda-Runtime-Function-Error-Body: e30=\r\n";
    for end in [
        format!("0\r\n{lines}\r\n"),
        format!("{:x}\r\n{lines}\r\n0\r\n\r\n", lines.len()),
    ] {
        let mut invoked = Invoked::new().await;
        let trailer = "trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n";
        let request = head(trailer) + "4\r\nhalf\r\n" + &end;
        let answer = raw(invoked.address, request.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
        let outcome = (&mut invoked.outcome).await.unwrap();
        assert!(matches!(outcome, Outcome::Error { kind, .. } if kind == "Function.T"));
        assert_eq!(invoked.all(), "half");
    }
}

#[tokio::test]
async fn an_answer_that_is_not_streamed_comes_whole() {
    let mut invoked = Invoked::new().await;
    let path = format!("/2018-06-01/runtime/invocation/{ID}/response");
    let body = vec![b'x'; 1 << 20];
    let answer = post(invoked.address, &path, "", &body).await;
    assert!(answer.starts_with("HTTP/1.1 202"), "{answer}");
    assert_eq!((&mut invoked.outcome).await.unwrap(), Outcome::Answer(body.into()));
    assert_eq!(invoked.all(), "");
}

#[tokio::test]
async fn a_stream_goes_out_up_to_its_limit() {
    let (mut windows, (to, mut answers)) = (Windows::default(), mpsc::channel(8));
    let parts = windows.open(1, to);
    let body = |pieces: &[&'static str]| {
        let frame = |piece: &&'static str| Ok::<_, Infallible>(Frame::data(Bytes::from_static(piece.as_bytes())));
        StreamBody::new(tokio_stream::iter(pieces.iter().map(frame).collect::<Vec<_>>()))
    };
    let read = pass_on(body(&["fo", "ur"]), &HeaderMap::new(), 4, &parts).await;
    assert!(matches!(read, Read::Whole { bytes, .. } if bytes == "four"));
    let read = pass_on(body(&["fo", "ur", "s"]), &HeaderMap::new(), 4, &parts).await;
    assert!(matches!(read, Read::TooLarge));
    assert_eq!(answers.try_recv().unwrap().unwrap().payload, "four");
    assert!(parts.end().await);
    parts.send(Bytes::from_static(b"late")).await;
    assert!(answers.try_recv().is_err());
}
