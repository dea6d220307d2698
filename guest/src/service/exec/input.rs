//! What comes for a program: its input as it reads it, and all else at once.
//!
//! ```text
//!   messages ──┬─ input ──► queue, of a limited size ──► program
//!              │                └─ what it has read is granted anew ──► caller
//!              └─ signals, sizes of its terminal ──────► program
//! ```
//!
//! A caller that sends no more input than it was granted never finds the queue full. For one that sends more, its next message waits, as
//! all that come after it do.

use std::sync::Arc;

use nix::unistd::Pid;
use stoker_proto::limits::{STDIN_WINDOW_BYTES, STREAMED_BYTES};
use stoker_proto::v1::ExecRequest;
use stoker_proto::v1::exec_request::Part as Asked;
use stoker_proto::v1::exec_response::Part as Told;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, ReadHalf, SimplexStream, WriteHalf, simplex};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::{To, terminal_size, told};
use crate::budget;
use crate::container::workload::{self, END_OF_INPUT, End, Input};
use crate::service::checks::at_most;
use crate::service::image::signal;

/// How much is written to a program at a time, in bytes.
const CHUNK: usize = 16 << 10;

/// What it has read is granted anew once it is so much, in bytes: few answers say so, and with all the rest a whole message may be sent.
const GRANT: usize = 32 << 10;

const _: () = assert!(GRANT + STREAMED_BYTES <= STDIN_WINDOW_BYTES);

/// Gives a program what comes for it, until no more does.
pub(super) async fn feed(
    requests: impl Stream<Item = Result<ExecRequest, Status>> + Unpin,
    input: Input,
    pid: Pid,
    to: &To,
) -> Result<(), Status> {
    let (queued, queue) = simplex(STDIN_WINDOW_BYTES);
    let terminal = input.terminal();
    let written = async {
        write(queued, input, to).await;
        Ok(())
    };
    tokio::try_join!(hear(requests, queue, terminal, pid), written).map(|_| ())
}

/// Queues input, and does all else.
async fn hear(
    mut requests: impl Stream<Item = Result<ExecRequest, Status>> + Unpin,
    mut queue: WriteHalf<SimplexStream>,
    terminal: Option<Arc<End>>,
    pid: Pid,
) -> Result<(), Status> {
    while let Some(request) = requests.next().await {
        match request?.part {
            Some(Asked::Stdin(data)) if data.is_empty() => end(&mut queue, terminal.is_some()).await,
            Some(Asked::Stdin(data)) => {
                at_most(STREAMED_BYTES, "`stdin`", data.len())?;
                // What comes after its end is nobody's.
                let _ = queue.write_all(&data).await;
            }
            Some(Asked::Terminal(size)) => {
                let size = terminal_size(size)?;
                if let Some(terminal) = &terminal {
                    terminal.resize(size);
                }
            }
            // It has not been reaped: this is not asked any more once it was.
            Some(Asked::Signal(number)) => workload::signal(pid, signal(number)?),
            Some(Asked::Start(_)) => return Err(Status::invalid_argument("there is one start only")),
            None => return Err(Status::invalid_argument("a message is empty")),
        }
    }
    end(&mut queue, terminal.is_some()).await;
    let _ = queue.shutdown().await;
    Ok(())
}

/// There is no more input: a pipe is closed behind the last of it. At a terminal that is a key, a byte of its input as others are, and
/// others may follow.
async fn end(queue: &mut WriteHalf<SimplexStream>, is_terminal: bool) {
    let _ = match is_terminal {
        true => queue.write_all(&[END_OF_INPUT]).await,
        false => queue.shutdown().await,
    };
}

/// Writes what is queued to the program as it reads it, and grants as much anew once there is room for that among the answers. Who takes
/// none before all is sent is read on from: what is to be granted only adds up.
async fn write(mut queue: ReadHalf<SimplexStream>, mut input: Input, to: &To) {
    let mut chunk = vec![0; CHUNK];
    let mut read = 0;
    loop {
        let length = tokio::select! {
            biased;
            place = to.reserve(), if read >= GRANT => {
                let Ok(place) = place else { return };
                // Who sends more than this can say does not go by grants.
                let grant = u32::try_from(read).unwrap_or(u32::MAX);
                place.send(Ok(told(Told::StdinGrant(grant))));
                read = 0;
                continue;
            }
            length = queue.read(&mut chunk) => length,
        };
        let Ok(length @ 1..) = length else { return };
        input.write(chunk.get(..length).unwrap_or_default()).await;
        budget::passed_on(length);
        read += length;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read as _, pipe};
    use std::os::unix::process::ExitStatusExt as _;
    use std::time::Duration;

    use stoker_proto::v1::ExecResponse;
    use tokio::io::Interest;
    use tokio::process::{Child, Command};
    use tokio::sync::mpsc;
    use tokio::task::JoinHandle;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    /// A program of which this reads the input.
    struct Fed {
        program: Child,
        reader: PipeReader,
        ask: mpsc::Sender<Result<ExecRequest, Status>>,
        answers: mpsc::Receiver<Result<ExecResponse, Status>>,
        feeding: JoinHandle<Result<(), Status>>,
    }

    // === impl Fed ===

    impl Fed {
        fn start() -> Self {
            Self::with(|end| Input::Pipe(Some(end)))
        }

        fn with(input: impl FnOnce(End) -> Input) -> Self {
            let program = Command::new("sleep").arg("1000").kill_on_drop(true).spawn().unwrap();
            let pid = Pid::from_raw(program.id().unwrap().try_into().unwrap());
            let (reader, writer) = pipe().unwrap();
            let input = input(End::new(writer.into(), Interest::WRITABLE).unwrap());
            let (ask, requests) = mpsc::channel(1);
            let (to, answers) = mpsc::channel(1);
            Self {
                program,
                reader,
                ask,
                answers,
                feeding: tokio::spawn(async move { feed(ReceiverStream::new(requests), input, pid, &to).await }),
            }
        }

        async fn ask(&self, part: Asked) {
            let request = ExecRequest { part: Some(part) };
            let sent = tokio::time::timeout(PATIENCE, self.ask.send(Ok(request))).await;
            sent.expect("it waits").unwrap();
        }

        /// The next grant.
        async fn grant(&mut self) -> usize {
            let answer = tokio::time::timeout(PATIENCE, self.answers.recv()).await.unwrap();
            match answer.unwrap().unwrap().part {
                Some(Told::StdinGrant(bytes)) => bytes.try_into().unwrap(),
                other => panic!("{other:?}"),
            }
        }
    }

    fn piece() -> Asked {
        Asked::Stdin(vec![7; STREAMED_BYTES].into())
    }

    #[tokio::test]
    async fn a_signal_passes_input_that_waits() {
        let mut fed = Fed::start();
        // A pipe takes so much of it, and is full then.
        let mut sent = STREAMED_BYTES;
        fed.ask(piece()).await;
        let mut window = STDIN_WINDOW_BYTES - sent;
        while window < STDIN_WINDOW_BYTES {
            window += fed.grant().await;
        }
        while window > 0 {
            fed.ask(piece()).await;
            (sent, window) = (sent + STREAMED_BYTES, window - STREAMED_BYTES);
        }
        assert_eq!(sent, STREAMED_BYTES + STDIN_WINDOW_BYTES);
        // (One that a shell's background job does not ignore.)
        fed.ask(Asked::Signal(libc::SIGTERM)).await;
        let ended = tokio::time::timeout(PATIENCE, fed.program.wait())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGTERM));
        // None of its input is lost.
        drop(fed.ask);
        let mut reader = fed.reader;
        let read = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            all.len()
        });
        while fed.answers.recv().await.is_some() {}
        assert_eq!(tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap(), sent);
        fed.feeding.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_key_that_ends_input_at_a_terminal_is_a_byte_of_it() {
        let mut fed = Fed::with(|end| Input::Terminal(Arc::new(end)));
        fed.ask(Asked::Stdin(vec![7; GRANT - 1].into())).await;
        fed.ask(Asked::Stdin(Vec::new().into())).await;
        assert_eq!(fed.grant().await, GRANT);
        fed.feeding.abort();
    }

    #[tokio::test]
    async fn who_takes_no_grants_before_all_is_sent_does_not_wait_for_them() {
        const PIECES: usize = 40;
        let mut fed = Fed::start();
        let mut reader = fed.reader.try_clone().unwrap();
        let read = tokio::task::spawn_blocking(move || {
            let mut all = vec![0; PIECES * STREAMED_BYTES];
            reader.read_exact(&mut all).unwrap();
            all.len()
        });
        for _ in 0..PIECES {
            fed.ask(piece()).await;
        }
        let sent = tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
        // All of it is granted, but for what is too little.
        let mut granted = 0;
        while sent - granted >= GRANT {
            granted += fed.grant().await;
        }
        fed.feeding.abort();
    }

    #[tokio::test]
    async fn who_sends_more_than_was_granted_waits() {
        let fed = Fed::start();
        let request = || Ok(ExecRequest { part: Some(piece()) });
        let mut sent = 0;
        while tokio::time::timeout(Duration::from_millis(200), fed.ask.send(request()))
            .await
            .is_ok()
        {
            sent += 1;
            // The pipe, the chunk that waits for it, the window, and the channels of this test.
            assert!(
                sent * STREAMED_BYTES <= STDIN_WINDOW_BYTES + 4 * STREAMED_BYTES,
                "all of it is kept"
            );
        }
        fed.feeding.abort();
    }
}
