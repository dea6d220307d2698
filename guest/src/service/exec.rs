//! `Exec`: a program's input, output and end over one call.
//!
//! ```text
//!   messages ──► input ──────────► program        signals and sizes of its terminal do not wait for input to be read
//!   answers ◄── one at a time ◄─── its output     nothing is read before there is room for it
//! ```

mod input;

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use stoker_proto::v1::exec_request::Part as Asked;
use stoker_proto::v1::exec_response::Part as Told;
use stoker_proto::v1::{ExecRequest, ExecResponse, ExecStart, TerminalSize};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming};

use super::image::{command, not_running, texts, working_dir};
use crate::budget;
use crate::container::Workload;
use crate::container::launch::EnterError;
use crate::container::workload::{End, Exec, ExecError, Input, NotRunning, Process, Read};
use crate::reaper::Exit;

/// Where answers go.
type To = mpsc::Sender<Result<ExecResponse, Status>>;

/// Who is killed with the container is seen to be so before the container's end is.
const END_OF_CONTAINER: Duration = Duration::from_millis(250);

/// Starts a program as the first message says.
pub(super) async fn start(workload: &Workload, requests: &mut Streaming<ExecRequest>) -> Result<Process, Status> {
    let first = requests.next().await.transpose()?.and_then(|request| request.part);
    let Some(Asked::Start(start)) = first else {
        return Err(Status::invalid_argument("the first message is to be the start"));
    };
    workload.exec(exec(start)?).await.map_err(|error| status(&error))
}

/// Carries it to its end, or the caller's.
pub(super) async fn carry(workload: Workload, process: Process, requests: Streaming<ExecRequest>, to: To) {
    let budget = process.budget.clone();
    let exit = budget.paced(run(process, requests, &to)).await;
    let Some(exit) = exit else { return };
    let end = match exit {
        Exit::Signal(libc::SIGKILL) => tokio::time::timeout(END_OF_CONTAINER, workload.end()).await.ok(),
        _ => None,
    };
    let last = match end {
        Some(ended) => Err(Status::unavailable(NotRunning::Ended(ended).to_string())),
        None => Ok(told(Told::ExitStatus(exit.status()))),
    };
    let _ = to.send(last).await;
}

/// How it ended; none where nobody wants to know any more.
async fn run(mut process: Process, requests: Streaming<ExecRequest>, to: &To) -> Option<Exit> {
    let terminal = process.stderr.is_none();
    if let Some(why) = process.not_run.take() {
        let text = Bytes::from(if terminal {
            format!("{why}\r\n")
        } else {
            format!("{why}\n")
        });
        let part = if terminal {
            Told::Stdout(text)
        } else {
            Told::Stderr(text)
        };
        to.send(Ok(told(part))).await.ok()?;
    }
    let (stdout, stderr) = (process.stdout.clone(), process.stderr.clone());
    let input = std::mem::replace(&mut process.input, Input::Pipe(None));
    let exit = {
        let mut fed = pin!(input::feed(requests, input, process.pid(), to));
        let mut written = pin!(async {
            tokio::join!(pass_on(&stdout, Told::Stdout, to), async {
                if let Some(stderr) = &stderr {
                    pass_on(stderr, Told::Stderr, to).await;
                }
            })
        });
        let (mut feeding, mut writing) = (true, true);
        loop {
            tokio::select! {
                biased;
                () = to.closed() => return None,
                exit = process.exited() => break exit,
                said = &mut fed, if feeding => match said {
                    Ok(()) => feeding = false,
                    Err(wrong) => {
                        let _ = to.send(Err(wrong)).await;
                        return None;
                    }
                },
                _ = &mut written, if writing => writing = false,
            }
        }
    };
    // With it goes what it has started.
    drop(process);
    pass_rest(&stdout, Told::Stdout, to).await?;
    if let Some(stderr) = &stderr {
        pass_rest(stderr, Told::Stderr, to).await?;
    }
    Some(exit)
}

/// Passes on what a program writes, as there is room for it, until there is no more. Nothing is lost where this is given up.
async fn pass_on(end: &End, part: fn(Bytes) -> Told, to: &To) {
    while let Ok(mut ready) = end.readable().await {
        let Ok(place) = to.reserve().await else { return };
        match End::read_ready(&mut ready) {
            Read::Some(bytes) => {
                budget::passed_on(bytes.len());
                place.send(Ok(told(part(bytes))));
            }
            Read::Nothing => {}
            Read::End => return,
        }
    }
}

/// Passes on what is left. None where nobody wants it any more.
async fn pass_rest(end: &End, part: fn(Bytes) -> Told, to: &To) -> Option<()> {
    loop {
        let place = to.reserve().await.ok()?;
        match end.read_now() {
            Read::Some(bytes) => {
                budget::passed_on(bytes.len());
                place.send(Ok(told(part(bytes))));
            }
            Read::Nothing | Read::End => return Some(()),
        }
    }
}

fn told(part: Told) -> ExecResponse {
    ExecResponse { part: Some(part) }
}

fn exec(start: ExecStart) -> Result<Exec, Status> {
    command(&start.command)?;
    let names = start.environment.keys();
    if let Some(wrong) = names.clone().find(|name| name.is_empty() || name.contains('=')) {
        return Err(Status::invalid_argument(format!(
            "{wrong:?} cannot be an environment variable"
        )));
    }
    if !start.working_dir.is_empty() {
        working_dir(&start.working_dir)?;
    }
    let others = [&start.working_dir, &start.user];
    let values = start.environment.values();
    texts(start.command.iter().chain(names).chain(values).chain(others))?;
    Ok(Exec {
        command: start.command,
        environment: start.environment.into_iter().collect(),
        working_dir: start.working_dir,
        user: start.user,
        terminal: start.terminal.map(terminal_size).transpose()?,
    })
}

fn terminal_size(size: TerminalSize) -> Result<(u16, u16), Status> {
    match (size.columns.try_into(), size.rows.try_into()) {
        (Ok(columns), Ok(rows)) => Ok((columns, rows)),
        _ => Err(Status::invalid_argument(
            "a terminal has at most 65535 columns and rows",
        )),
    }
}

fn status(error: &ExecError) -> Status {
    let message = error.to_string();
    match error {
        ExecError::NotRunning(error) => not_running(error),
        ExecError::TooMany => Status::resource_exhausted(message),
        ExecError::Enter(EnterError::NoUser(_)) => Status::invalid_argument(message),
        ExecError::Cgroup(_) | ExecError::Enter(_) | ExecError::Pipe(_) => Status::internal(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> ExecStart {
        ExecStart {
            name: "machines/01J".to_owned(),
            command: vec!["sh".to_owned()],
            environment: [("A".to_owned(), "b=c".to_owned())].into(),
            ..ExecStart::default()
        }
    }

    fn refused(change: impl FnOnce(&mut ExecStart)) -> String {
        let mut start = start();
        change(&mut start);
        exec(start).unwrap_err().message().to_owned()
    }

    #[test]
    fn what_cannot_be_run_is_refused() {
        let whole = exec(start()).unwrap();
        assert_eq!(whole.environment, [("A".to_owned(), "b=c".to_owned())]);
        assert_eq!((whole.working_dir.as_str(), whole.terminal), ("", None));
        assert!(refused(|start| start.command.clear()).contains("command"));
        for name in ["", "A=b"] {
            let variable = (name.to_owned(), String::new());
            assert!(refused(|start| start.environment = [variable].into()).contains("environment"));
        }
        assert!(refused(|start| start.working_dir = "x".to_owned()).contains("working_dir"));
        assert!(refused(|start| start.user = "a\0".to_owned()).contains("zero byte"));
        let size = TerminalSize {
            columns: 65_536,
            rows: 1,
        };
        assert!(refused(|start| start.terminal = Some(size)).contains("65535"));
        assert!(refused(|start| start.command.push("x".repeat(64 << 10))).contains("at most"));
    }
}
