//! Calls that go through to a guest, either way, until one side ends: `Exec` and `ForwardPort`.
//!
//! Nothing is kept for who does not read: a message is taken from one side once there is room for it on the way to the other, so
//! that who sends waits as long as who receives does (the windows of HTTP/2).

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stoker_policy::MachineId;
use stoker_proto::limits::{EXECS, FORWARDED_PORTS, STREAMED_BYTES};
use stoker_proto::v1;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use v1::exec_request::Part as ExecPart;
use v1::exec_response::Part as ExecAnswer;
use v1::forward_port_request::Part as PortPart;

use super::program::{check_command, check_environment, check_folder, check_user, check_whole};
use crate::api::errors::{Violations, busy, invalid, precondition, unavailable};
use crate::machines::GuestError;

/// How many calls go on in one machine at a time: as many as its guest takes. What nobody reads of them has room on the guest's
/// connection beside what else comes over that.
const CALLS: usize = EXECS + FORWARDED_PORTS;

/// When a caller may try again that was refused because enough calls go on.
const RETRY: Duration = Duration::from_secs(1);

/// How long a caller may take to say what it wants.
const FIRST: Duration = Duration::from_secs(10);

/// The highest number of a signal (signal(7), SIGRTMAX).
const MOST_SIGNAL: i32 = 64;

/// The calls that go on.
#[derive(Clone, Debug, Default)]
pub(super) struct Calls(Arc<Mutex<HashMap<MachineId, usize>>>);

/// One of them, as long as it is there.
#[derive(Debug)]
pub(super) struct Place {
    calls: Calls,
    machine: MachineId,
}

/// What a caller sends.
pub(super) trait Asked: Sized + Send + 'static {
    /// What begins the call.
    type Start;

    /// The first message; nothing where it is another one.
    fn start(&self) -> Option<&Self::Start>;

    /// Checks one that is not the first.
    ///
    /// # Errors
    /// INVALID_ARGUMENT.
    fn check(&self) -> Result<(), Status>;
}

/// What a guest answers.
pub(super) trait Answered: Sized + Send + 'static {
    /// What it was asked to do.
    const OPERATION: &'static str;

    /// How large it is, as far as that has a limit, in bytes.
    fn bytes(&self) -> usize;

    /// Nothing comes after it.
    fn is_last(&self) -> bool;

    /// The guest may end what it sends without a last message, and still be sent to.
    const MAY_END: bool;
}

/// The four ends of a call.
pub(super) struct Ends<I, O> {
    pub(super) from_caller: Streaming<I>,
    pub(super) to_guest: mpsc::Sender<I>,
    pub(super) from_guest: Streaming<O>,
    pub(super) to_caller: mpsc::Sender<Result<O, Status>>,
}

// === impl Calls ===

impl Calls {
    /// A place for one more.
    ///
    /// # Errors
    /// RESOURCE_EXHAUSTED where as many go on in that machine as may.
    pub(super) fn take(&self, machine: MachineId) -> Result<Place, Status> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(machine).or_default();
        if *count >= CALLS {
            let message = format!("{CALLS} programs and connections go through to the machine already; end some");
            return Err(busy("machine", message, RETRY));
        }
        *count += 1;
        Ok(Place {
            calls: self.clone(),
            machine,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.calls.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.machine) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.machine);
            }
        }
    }
}

/// The message that begins a call.
///
/// # Errors
/// INVALID_ARGUMENT where it is another one, DEADLINE_EXCEEDED where none comes.
pub(super) async fn first<I: Asked>(from: &mut Streaming<I>) -> Result<I, Status> {
    let message = tokio::time::timeout(FIRST, from.message()).await;
    let message = message.map_err(|_| Status::deadline_exceeded("the first message has not come"))??;
    let message = message.filter(|message| message.start().is_some());
    message.ok_or_else(|| invalid("start", "must be the first message"))
}

/// Passes a call on until either side has ended it, and answers with the rest of it. `why` says what became of a machine whose guest
/// did not answer to the end.
pub(super) fn pass<I: Asked, O: Answered>(
    place: Place,
    from_caller: Streaming<I>,
    to_guest: mpsc::Sender<I>,
    from_guest: Streaming<O>,
    why: impl Future<Output = Status> + Send + 'static,
) -> ReceiverStream<Result<O, Status>> {
    // One message may wait for the caller.
    let (to_caller, answers) = mpsc::channel(1);
    let ends = Ends {
        from_caller,
        to_guest,
        from_guest,
        to_caller,
    };
    tokio::spawn(async move {
        ends.relay(why).await;
        drop(place);
    });
    ReceiverStream::new(answers)
}

// === impl Ends ===

impl<I: Asked, O: Answered> Ends<I, O> {
    async fn relay(self, why: impl Future<Output = Status>) {
        let Self {
            from_caller,
            to_guest,
            from_guest,
            to_caller,
        } = self;
        let mut asking = pin!(ask(from_caller, to_guest));
        let mut is_asked = false;
        let goes_on = {
            let mut answering = pin!(answer(from_guest, &to_caller, why));
            loop {
                tokio::select! {
                    asked = &mut asking, if !is_asked => match asked {
                        Ok(()) => is_asked = true,
                        Err(refused) => break Err(refused),
                    },
                    goes_on = &mut answering => break Ok(goes_on),
                    // The caller has left.
                    () = to_caller.closed() => break Ok(false),
                }
            }
        };
        match goes_on {
            Ok(false) => {}
            Ok(true) => {
                // The caller is told, and may still send.
                drop(to_caller);
                if !is_asked {
                    let _ = asking.await;
                }
            }
            // Its guest has nothing to do with it any more.
            Err(refused) => {
                let _ = to_caller.send(Err(refused)).await;
            }
        }
    }
}

/// Passes on what a caller sends, and that there is no more, until its guest takes no more. (A caller that leaves looks like one that
/// has sent all: then nobody takes the answers.)
async fn ask<I: Asked>(mut from: Streaming<I>, to: mpsc::Sender<I>) -> Result<(), Status> {
    while let Ok(place) = to.reserve().await {
        let message = tokio::select! {
            message = from.message() => message?,
            // Nothing is waited for that nobody wants.
            () = to.closed() => return Ok(()),
        };
        match message {
            Some(message) => {
                message.check()?;
                place.send(message);
            }
            None => break,
        }
    }
    Ok(())
}

/// Passes on what a guest answers, until its end; whether it may still be sent to.
async fn answer<O: Answered>(
    mut from: Streaming<O>,
    to: &mpsc::Sender<Result<O, Status>>,
    why: impl Future<Output = Status>,
) -> bool {
    while let Ok(place) = to.reserve().await {
        match from.message().await {
            Ok(Some(message)) if message.bytes() <= STREAMED_BYTES => {
                let is_last = message.is_last();
                place.send(Ok(message));
                if is_last {
                    return false;
                }
            }
            Ok(Some(_)) => {
                let refused = unavailable("GUEST_FAILED", "the guest sent more at once than it may");
                place.send(Err(refused));
                return false;
            }
            Ok(None) if O::MAY_END => return true,
            Ok(None) => {
                place.send(Err(why.await));
                return false;
            }
            Err(status) => {
                let status = match GuestError::of_call(O::OPERATION, &status) {
                    GuestError::Refused { status, .. } if O::MAY_END || status.code() != Code::Unavailable => {
                        refused(&status)
                    }
                    _ => why.await,
                };
                place.send(Err(status));
                return false;
            }
        }
    }
    false
}

/// What a guest says against a call. Of a guest no details are believed.
pub(super) fn refused(status: &Status) -> Status {
    let message = status.message();
    match status.code() {
        Code::InvalidArgument => invalid("start", message),
        Code::NotFound | Code::FailedPrecondition => precondition("NOT_RUN", message),
        Code::ResourceExhausted => busy("machine", message, RETRY),
        Code::Unavailable => unavailable("NOT_LISTENING", message),
        Code::Aborted => unavailable("CONNECTION_BROKE", message),
        code => unavailable("GUEST_FAILED", format!("the guest failed ({code}): {message}")),
    }
}

// === impl Asked ===

impl Asked for v1::ExecRequest {
    type Start = v1::ExecStart;

    fn start(&self) -> Option<&v1::ExecStart> {
        match &self.part {
            Some(ExecPart::Start(start)) => Some(start),
            _ => None,
        }
    }

    fn check(&self) -> Result<(), Status> {
        match &self.part {
            None => Err(invalid("part", "is missing")),
            Some(ExecPart::Start(_)) => Err(invalid("start", "must be the first message only")),
            Some(ExecPart::Stdin(bytes)) => check_bytes("stdin", bytes.len()),
            Some(ExecPart::Terminal(size)) => {
                let mut violations = Violations::default();
                check_terminal("terminal", *size, &mut violations);
                violations.check()
            }
            Some(ExecPart::Signal(number)) => match (1..=MOST_SIGNAL).contains(number) {
                true => Ok(()),
                false => Err(invalid("signal", format!("{number} is not 1 to {MOST_SIGNAL}"))),
            },
        }
    }
}

impl Asked for v1::ForwardPortRequest {
    type Start = v1::ForwardPortStart;

    fn start(&self) -> Option<&v1::ForwardPortStart> {
        match &self.part {
            Some(PortPart::Start(start)) => Some(start),
            _ => None,
        }
    }

    fn check(&self) -> Result<(), Status> {
        match &self.part {
            None => Err(invalid("part", "is missing")),
            Some(PortPart::Start(_)) => Err(invalid("start", "must be the first message only")),
            Some(PortPart::Data(bytes)) => check_bytes("data", bytes.len()),
        }
    }
}

// === impl Answered ===

impl Answered for v1::ExecResponse {
    const OPERATION: &'static str = "run a program";
    const MAY_END: bool = false;

    fn bytes(&self) -> usize {
        match &self.part {
            Some(ExecAnswer::Stdout(bytes) | ExecAnswer::Stderr(bytes)) => bytes.len(),
            Some(ExecAnswer::ExitStatus(_) | ExecAnswer::StdinGrant(_)) | None => 0,
        }
    }

    fn is_last(&self) -> bool {
        matches!(self.part, Some(ExecAnswer::ExitStatus(_)))
    }
}

impl Answered for v1::ForwardPortResponse {
    const OPERATION: &'static str = "pass a connection on";
    const MAY_END: bool = true;

    fn bytes(&self) -> usize {
        self.data.len()
    }

    fn is_last(&self) -> bool {
        false
    }
}

/// Checks what a program is to be run with.
///
/// # Errors
/// INVALID_ARGUMENT with all that is wrong.
pub(super) fn check_start(start: &v1::ExecStart) -> Result<(), Status> {
    let mut violations = Violations::default();
    check_command("start.command", &start.command, &mut violations);
    check_environment("start.environment", &start.environment, &mut violations);
    check_folder("start.working_dir", &start.working_dir, &mut violations);
    check_user("start.user", &start.user, &mut violations);
    if let Some(size) = start.terminal {
        check_terminal("start.terminal", size, &mut violations);
    }
    check_whole(start, &mut violations);
    violations.check()
}

/// As ioctl_tty(2) has it.
fn check_terminal(field: &str, size: v1::TerminalSize, violations: &mut Violations) {
    for (part, value) in [("columns", size.columns), ("rows", size.rows)] {
        if value > u32::from(u16::MAX) {
            violations.add(format!("{field}.{part}"), format!("{value} is not 0 to {}", u16::MAX));
        }
    }
}

fn check_bytes(field: &str, bytes: usize) -> Result<(), Status> {
    match bytes <= STREAMED_BYTES {
        true => Ok(()),
        false => Err(invalid(field, format!("must be at most {STREAMED_BYTES} bytes"))),
    }
}

#[cfg(test)]
mod tests;
