//! `stoker machine exec`

use std::io::{self, IsTerminal as _, Read as _, Write};
use std::process::ExitCode;
use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use nix::libc;
use stoker_proto::limits::{STDIN_WINDOW_BYTES, STDIN_WINDOW_KEY, STREAMED_BYTES};
use stoker_proto::v1;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use v1::exec_request::Part;
use v1::exec_response::Part as Answer;

use super::terminal::{self, Raw};
use super::{client, name_of};
use crate::cli::{Connection, Failure, parse_env};

/// What this exits with where the program's own status is not known, as `docker exec` does.
const FAILED: u8 = 125;

/// What a terminal is taken to be whose size is not known.
const SIZE: v1::TerminalSize = v1::TerminalSize { columns: 80, rows: 24 };

/// How many pieces of input wait to be sent.
const QUEUE: usize = 2;

/// How many signals and sizes do. More than that nobody misses.
const ORDERS: usize = 16;

#[derive(Debug, Args)]
pub(in crate::cli) struct Exec {
    /// machines/MACHINE, or its id alone
    machine: String,
    /// Pass standard input on; else the program's is empty
    #[arg(long, short)]
    interactive: bool,
    /// Give the program a terminal
    #[arg(long, short)]
    tty: bool,
    /// Who it runs as, `USER[:GROUP]` by name or number; the image's user where not given
    #[arg(long, short, default_value = "", hide_default_value = true)]
    user: String,
    /// An environment variable beside those of the machine's program, NAME=VALUE; may be given again
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE", value_parser = parse_env)]
    environment: Vec<(String, String)>,
    /// The folder that it runs in; the image's where not given
    #[arg(long, short, default_value = "", hide_default_value = true)]
    workdir: String,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// How it ended.
enum End {
    /// The program did.
    Exited(i32),
    /// This program was told to end.
    Signal(i32),
}

/// Runs the program, and exits as it does.
pub(super) async fn run(connection: &Connection, exec: Exec) -> ExitCode {
    match call(connection, exec).await {
        Ok(End::Exited(status)) => ExitCode::from(u8::try_from(status).unwrap_or(FAILED)),
        // At once: nobody need read what is still to be written. The terminal is as it was.
        Ok(End::Signal(number)) => std::process::exit(128 + number),
        Err(failure) => {
            eprintln!("{failure}");
            ExitCode::from(FAILED)
        }
    }
}

async fn call(connection: &Connection, exec: Exec) -> Result<End, Failure> {
    let takes_keys = exec.tty && exec.interactive && io::stdin().is_terminal();
    let (is_interactive, has_terminal) = (exec.interactive, exec.tty);
    // First: a change of the size between the two would be missed.
    let resized = heard(SignalKind::window_change())?;
    let first = Part::Start(exec.start());
    let (orders, to_send) = mpsc::channel(ORDERS);
    let (input, to_feed) = mpsc::channel(QUEUE);
    let window = Window::new();
    let for_input = window.clone();
    let fed = ReceiverStream::new(to_feed).then(move |piece: Bytes| {
        let window = for_input.clone();
        // At a terminal the end is a key, and a byte of what its program reads.
        let bytes = piece.len().max(usize::from(has_terminal));
        async move {
            window.take(bytes).await;
            Part::Stdin(piece)
        }
    });
    // Orders pass input that waits here; none waits behind them.
    let rest = ReceiverStream::new(to_send).merge(fed);
    let requests = tokio_stream::once(first).chain(rest);
    let requests = requests.map(|part| v1::ExecRequest { part: Some(part) });
    let mut client = client(connection).await?;
    let answers = client.exec(requests).await?;
    if !answers.metadata().contains_key(STDIN_WINDOW_KEY) {
        window.lift();
    }
    let mut answers = answers.into_inner();
    let signals = Signals {
        window: resized,
        interrupt: heard(SignalKind::interrupt())?,
        quit: heard(SignalKind::quit())?,
        terminate: heard(SignalKind::terminate())?,
        hangup: heard(SignalKind::hangup())?,
    };
    // Not before the program runs: until then keys are orders to this one.
    let raw = takes_keys.then(Raw::set).transpose();
    let _raw = raw.map_err(|error| Failure::local(format!("can't use the terminal: {error}")))?;
    if is_interactive {
        // Not one of the runtime's threads, which the program waits for at its end: a read may take for ever.
        std::thread::spawn(move || feed(&input));
    } else if !has_terminal {
        // Of a terminal at which nobody types there is no end.
        let _ = input.send(Bytes::new()).await;
    }
    tokio::select! {
        end = print(&mut answers, &window) => end,
        number = signals.heed(&orders) => Ok(End::Signal(number)),
    }
}

// === impl Exec ===

impl Exec {
    fn start(self) -> v1::ExecStart {
        v1::ExecStart {
            name: name_of(&self.machine),
            command: self.command,
            environment: self.environment.into_iter().collect(),
            working_dir: self.workdir,
            user: self.user,
            terminal: self.tty.then(|| terminal::size().unwrap_or(SIZE)),
        }
    }
}

/// Sends what comes from standard input, and that there is no more.
fn feed(to: &mpsc::Sender<Bytes>) {
    let mut stdin = io::stdin().lock();
    let mut buffer = vec![0; STREAMED_BYTES];
    loop {
        let read = match stdin.read(&mut buffer) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Of a terminal that is gone nothing more comes.
            Err(_) => 0,
        };
        let piece = buffer.get(..read).unwrap_or_default();
        let is_sent = to.blocking_send(Bytes::copy_from_slice(piece)).is_ok();
        if read == 0 || !is_sent {
            return;
        }
    }
}

/// Writes what the program writes, until it ends.
async fn print(answers: &mut Streaming<v1::ExecResponse>, window: &Window) -> Result<End, Failure> {
    while let Some(answer) = answers.message().await? {
        let written = match answer.part {
            Some(Answer::Stdout(bytes)) => write(io::stdout(), bytes).await,
            Some(Answer::Stderr(bytes)) => write(io::stderr(), bytes).await,
            Some(Answer::ExitStatus(status)) => return Ok(End::Exited(status)),
            Some(Answer::StdinGrant(bytes)) => {
                window.grant(bytes);
                Ok(())
            }
            // Of a later agent.
            None => Ok(()),
        };
        match written {
            Ok(()) => {}
            // Nobody reads any further (`stoker machine exec ... | head`).
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(End::Signal(libc::SIGPIPE)),
            Err(error) => return Err(Failure::Failed(format!("can't write what the program writes: {error}"))),
        }
    }
    Err(Failure::Failed(
        "the agent ended the call before the program's exit status".to_owned(),
    ))
}

/// Elsewhere, for who reads may pause, and signals are heard meanwhile.
async fn write(mut to: impl Write + Send + 'static, bytes: Bytes) -> io::Result<()> {
    let writing = tokio::task::spawn_blocking(move || {
        to.write_all(&bytes)?;
        to.flush()
    });
    writing.await.map_err(io::Error::other)?
}

/// How much input may be sent that the program has not read; clones are the same.
#[derive(Clone)]
struct Window(Arc<Semaphore>);

// === impl Window ===

impl Window {
    fn new() -> Self {
        Self(Arc::new(Semaphore::new(STDIN_WINDOW_BYTES)))
    }

    /// Nothing will be granted: no more waits for that.
    fn lift(&self) {
        self.0.close();
    }

    /// Waits until so many bytes may be sent, no more than one message has.
    async fn take(&self, bytes: usize) {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        // One that is closed has no limit.
        if let Ok(room) = self.0.acquire_many(bytes).await {
            room.forget();
        }
    }

    /// So many more may be sent, up to what may be at first: a guest says how many.
    fn grant(&self, bytes: u32) {
        let room = STDIN_WINDOW_BYTES.saturating_sub(self.0.available_permits());
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        self.0.add_permits(bytes.min(room));
    }
}

/// What this program is told meanwhile.
struct Signals {
    window: Signal,
    interrupt: Signal,
    quit: Signal,
    terminate: Signal,
    hangup: Signal,
}

// === impl Signals ===

impl Signals {
    /// Passes on what is the program's, until one comes that ends the call, and the program with it. Its number.
    async fn heed(mut self, to: &mpsc::Sender<Part>) -> i32 {
        loop {
            let part = tokio::select! {
                _ = self.window.recv() => terminal::size().map(Part::Terminal),
                _ = self.interrupt.recv() => Some(Part::Signal(libc::SIGINT)),
                _ = self.quit.recv() => Some(Part::Signal(libc::SIGQUIT)),
                _ = self.terminate.recv() => return libc::SIGTERM,
                _ = self.hangup.recv() => return libc::SIGHUP,
            };
            if let Some(part) = part {
                // Where so many are not even sent the program reads nothing, and has enough to read.
                let _ = to.try_send(part);
            }
        }
    }
}

fn heard(kind: SignalKind) -> Result<Signal, Failure> {
    signal(kind).map_err(|error| Failure::local(format!("can't hear signals: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn no_more_is_granted_than_there_may_be() {
        let window = Window::new();
        window.take(STDIN_WINDOW_BYTES).await;
        assert_eq!(window.0.available_permits(), 0);
        window.grant(7);
        assert_eq!(window.0.available_permits(), 7);
        for _ in 0..3 {
            window.grant(u32::MAX);
        }
        assert_eq!(window.0.available_permits(), STDIN_WINDOW_BYTES);
    }
}
