//! What programs and ports of the machine do.

use stoker_agent::api::errors::unavailable;
use stoker_proto::limits::STDIN_WINDOW_BYTES;
use stoker_proto::v1;
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use v1::exec_request::Part as Asked;
use v1::exec_response::Part as Answer;
use v1::forward_port_request::Part as PortPart;

use super::{CLOSED, COUNT, ECHO, Fake, TAKE};

fn answer(part: Answer) -> Result<v1::ExecResponse, Status> {
    Ok(v1::ExecResponse { part: Some(part) })
}

fn ended() -> Status {
    unavailable("MACHINE_ENDED", "the machine ended: it is so")
}

/// A program that does what its name says.
pub(super) async fn run(
    fake: Fake,
    start: v1::ExecStart,
    mut input: Streaming<v1::ExecRequest>,
    to: mpsc::Sender<Result<v1::ExecResponse, Status>>,
) {
    // A caller that has left hears nothing.
    let say = async |part| {
        let _ = to.send(answer(part)).await;
    };
    let words: Vec<&str> = start.command.iter().map(String::as_str).collect();
    match words[..] {
        ["exit", status] => {
            say(Answer::Stdout("out\n".into())).await;
            say(Answer::Stderr("err\n".into())).await;
            say(Answer::ExitStatus(status.parse().unwrap())).await;
        }
        ["break"] => {
            say(Answer::Stdout("begun\n".into())).await;
            let _ = to.send(Err(ended())).await;
        }
        // Tells its terminal's sizes and its input. It ends with a signal, its input or a `q` in that; by a `b` its machine does.
        ["tell"] => {
            if let Some(size) = start.terminal {
                say(Answer::Stdout(
                    format!("size {}x{}\r\n", size.columns, size.rows).into(),
                ))
                .await;
            } else {
                say(Answer::Stdout("no terminal\n".into())).await;
            }
            while let Ok(Some(message)) = input.message().await {
                match message.part {
                    Some(Asked::Terminal(size)) => {
                        let told = format!("size {}x{}\r\n", size.columns, size.rows);
                        say(Answer::Stdout(told.into())).await;
                    }
                    Some(Asked::Signal(number)) => {
                        say(Answer::ExitStatus(128 + number)).await;
                        return;
                    }
                    Some(Asked::Stdin(bytes)) if bytes.is_empty() || bytes.contains(&b'q') => {
                        say(Answer::ExitStatus(5)).await;
                        return;
                    }
                    Some(Asked::Stdin(bytes)) if bytes.contains(&b'b') => {
                        let _ = to.send(Err(ended())).await;
                        return;
                    }
                    Some(Asked::Stdin(bytes)) => {
                        say(Answer::Stdout(format!("keys {bytes:?}\r\n").into())).await;
                    }
                    _ => {}
                }
            }
        }
        // Reads nothing of its input: no more is taken than may wait for it. It ends with a signal.
        ["unread"] => {
            let unread = || fake.heard().unread;
            while unread() <= STDIN_WINDOW_BYTES
                && let Ok(Some(message)) = input.message().await
            {
                match message.part {
                    Some(Asked::Stdin(bytes)) => fake.heard().unread += bytes.len(),
                    Some(Asked::Signal(number)) => {
                        say(Answer::ExitStatus(128 + number)).await;
                        return;
                    }
                    _ => {}
                }
            }
            std::future::pending().await
        }
        // Tells at the end how much it has read, of which nothing is granted.
        ["count"] => {
            let mut count: usize = 0;
            while let Ok(Some(message)) = input.message().await {
                match message.part {
                    Some(Asked::Stdin(bytes)) if bytes.is_empty() => break,
                    Some(Asked::Stdin(bytes)) => count += bytes.len(),
                    _ => {}
                }
            }
            say(Answer::Stdout(count.to_string().into())).await;
            say(Answer::ExitStatus(0)).await;
        }
        _ => {
            while let Ok(Some(message)) = input.message().await {
                match message.part {
                    Some(Asked::Stdin(bytes)) if !bytes.is_empty() => {
                        let read = u32::try_from(bytes.len()).unwrap();
                        say(Answer::Stdout(bytes)).await;
                        say(Answer::StdinGrant(read)).await;
                    }
                    Some(Asked::Stdin(_)) => break,
                    _ => {}
                }
            }
            say(Answer::ExitStatus(0)).await;
        }
    }
}

/// A connection to a port.
pub(super) async fn connect(
    fake: Fake,
    port: u32,
    mut data: Streaming<v1::ForwardPortRequest>,
    to: mpsc::Sender<Result<v1::ForwardPortResponse, Status>>,
) {
    if port == CLOSED {
        return;
    }
    let mut to = Some(to);
    let answer = |data| Ok(v1::ForwardPortResponse { data });
    if port == TAKE
        && let Some(to) = to.take()
    {
        let _ = to.send(answer("at once".into())).await;
    }
    let mut count = 0;
    while let Ok(Some(message)) = data.message().await {
        let Some(PortPart::Data(bytes)) = message.part else {
            return;
        };
        count += bytes.len();
        if port == ECHO
            && let Some(to) = &to
        {
            let _ = to.send(answer(bytes)).await;
        }
    }
    match &to {
        Some(to) if port == COUNT => {
            let _ = to.send(answer(count.to_string().into())).await;
        }
        Some(_) => {}
        None => fake.heard().taken = count,
    }
}
