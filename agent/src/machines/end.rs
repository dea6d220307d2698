//! Why a machine ended, in a word and in plain words: a pure function of what ended it and of what its VMM left.
//!
//! What is left counts first. A connection that breaks or a guest that says nothing any more is often only the first that is
//! seen of a VMM that has ended, and that one's exit report, exit status or cgroup tell why.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use nix::sys::signal::Signal;
use stoker_proto::v1;
use stoker_proto::v1::machine_end::Reason;
use stoker_vmm::exit_report::{self, ExitReport};
use stoker_vmm::machine::state::PANIC_LINE;

use super::{Cause, Stop};

/// How much of a console's last words is part of a cause, in characters.
const MAX_WORDS: usize = 300;

/// What `stoker-init` begins its own last line on the console with.
const INIT_LINE: &str = "stoker-init: ";

/// Signals that a program gets for what it does itself.
const OWN_FAULTS: [Signal; 7] = [
    Signal::SIGABRT,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGSEGV,
    Signal::SIGSYS,
    Signal::SIGTRAP,
];

/// What is left of a VMM that runs no more. Its texts are clean and bounded.
#[derive(Debug, Default)]
pub(super) struct Left {
    /// What it wrote last of all.
    pub(super) report: Option<ExitReport>,
    /// Its exit status. Of one that an earlier agent started nobody knows it.
    pub(super) exit: Option<ExitStatus>,
    /// That the kernel killed it for memory.
    pub(super) out_of_memory: Option<OutOfMemory>,
    /// The last of what it wrote to its standard error.
    pub(super) log: String,
    /// The last lines of its serial console.
    pub(super) console: String,
}

/// Whose memory was used up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum OutOfMemory {
    /// What its cgroup may have, in bytes where that is known.
    OfCgroup(Option<u64>),
    /// The host's, or that of a cgroup above the machines'.
    OfHost,
}

/// Why the machine ended that `cause` put an end to, and of which this is left.
pub(super) fn of(cause: Cause, runtime: &str, left: &Left) -> v1::MachineEnd {
    let hung = |detail: String| match left.tells_why() {
        // Its VMM had ended before it was killed: what was seen is what that looked like from outside.
        true => {
            let (reason, why) = of_itself(left);
            (reason, format!("{why}; {detail}"))
        }
        false => (Reason::GuestHung, with_words(detail, &left.console)),
    };
    let (reason, detail) = match cause {
        Cause::Stopped(Stop::Gently(why) | Stop::Now(why) | Stop::AfterProgram { why, .. }) => {
            return v1::MachineEnd {
                reason: Reason::Stopped.into(),
                detail: why,
                ..Default::default()
            };
        }
        Cause::Stopped(Stop::ProgramEnded { detail, exit_status }) => {
            return v1::MachineEnd {
                reason: Reason::ProgramEnded.into(),
                detail,
                exit_status,
                ..Default::default()
            };
        }
        Cause::Stopped(Stop::ProgramFailed(why)) => (Reason::ProgramFailed, why),
        Cause::Stopped(Stop::Broken(detail)) => hung(detail),
        Cause::HungUp(detail) => hung(format!("the guest hung up: {detail}")),
        Cause::NotBack(limit) => hung(format!(
            "the guest did not dial the agent again within {limit:?} of its start"
        )),
        Cause::NoAnswer(limit) => match hung(format!(
            "the guest had not answered {limit:?} after its VMM was started"
        )) {
            (Reason::GuestHung, detail) => (Reason::BootTimedOut, detail),
            other => other,
        },
        Cause::NoRuntime(why) => (
            Reason::RuntimeFailed,
            format!("the runtime {runtime} does not start: {why}"),
        ),
        Cause::NoDrive(why) => (
            Reason::ScratchFailed,
            with_words(format!("the guest can't use its scratch disk: {why}"), &left.console),
        ),
        Cause::Exited(Ok(_)) => of_itself(left),
        Cause::Exited(Err(error)) => {
            let (reason, why) = of_itself(left);
            (reason, format!("{why}; the agent can't wait for the VMM: {error}"))
        }
    };
    v1::MachineEnd {
        reason: reason.into(),
        detail,
        console_tail: left.console.clone(),
        end_time: None,
        exit_status: None,
    }
}

/// Why a VMM ended that nobody asked to.
fn of_itself(left: &Left) -> (Reason, String) {
    if let Some(report) = &left.report {
        return reported(report, &left.console);
    }
    if let Some(memory) = left.out_of_memory {
        return (Reason::OutOfMemory, memory.to_string());
    }
    let Some(exit) = left.exit else {
        // An earlier agent's child, whose status is lost.
        return match left.log.is_empty() {
            true => (
                Reason::Killed,
                "the VMM ended at once, without an exit report and without a word, as one does that is killed by SIGKILL or \
                 dies of a fault of its own (then the kernel's log has it); it is not known which, for an earlier agent \
                 started it"
                    .to_owned(),
            ),
            false => (
                Reason::VmmError,
                format!("the VMM ended without an exit report; the last it said: {}", left.log),
            ),
        };
    };
    if let Some(signal) = exit.signal() {
        return by_signal(signal, left);
    }
    let code = exit.code().and_then(|code| u8::try_from(code).ok());
    match code.and_then(exit_report::Reason::of_exit_code) {
        // Where the disk is full, say, it can't write its report.
        Some(reason) if reason != exit_report::Reason::Error => {
            let (reason, detail) = reported(
                &ExitReport {
                    reason,
                    detail: described(reason).to_owned(),
                    uptime_us: 0,
                    console_tail: String::new(),
                },
                &left.console,
            );
            (
                reason,
                format!("{detail}; so says its {exit}, for there is no exit report"),
            )
        }
        _ => (
            Reason::VmmError,
            format!("the VMM ended with {exit} and no exit report; {}", left.last_said()),
        ),
    }
}

/// Why it ended by its exit report.
fn reported(report: &ExitReport, console: &str) -> (Reason, String) {
    use exit_report::Reason as Said;
    let detail = report.detail.clone();
    match report.reason {
        Said::GuestOff | Said::GuestReset => (Reason::GuestOff, with_words(detail, console)),
        Said::GuestPanic => (Reason::GuestPanic, with_words(detail, console)),
        Said::Stopped | Said::Killed => (
            Reason::Killed,
            format!("the VMM was {detail}, and this agent did not do that"),
        ),
        Said::Error => (Reason::VmmError, detail),
    }
}

/// What an exit report says in words, where there is only its exit code.
fn described(reason: exit_report::Reason) -> &'static str {
    use exit_report::Reason as Said;
    match reason {
        Said::GuestOff => "the guest powered itself off",
        Said::GuestReset => "the guest was reset",
        Said::GuestPanic => "the guest's kernel panicked",
        Said::Stopped => "stopped through the control socket",
        Said::Killed => "ended by SIGTERM or SIGINT",
        Said::Error => "failed",
    }
}

fn by_signal(signal: i32, left: &Left) -> (Reason, String) {
    let known = Signal::try_from(signal).ok();
    let name = known.map_or_else(|| signal.to_string(), |known| format!("{signal} ({known})"));
    match known.is_some_and(|known| OWN_FAULTS.contains(&known)) {
        true => (
            Reason::VmmError,
            format!(
                "the VMM died of a fault of its own, signal {name}; {}; please report it",
                left.last_said()
            ),
        ),
        false => (
            Reason::Killed,
            format!("the VMM was killed by signal {name}, which neither this agent sent nor the kernel for memory"),
        ),
    }
}

/// A cause and what the guest's console says of it.
fn with_words(cause: String, console: &str) -> String {
    match last_words(console) {
        Some(words) => format!("{cause}; its console says: {words}"),
        None => format!("{cause}; its console says nothing"),
    }
}

/// What a guest said of its end: `stoker-init`'s word and the kernel's, else the last line of all.
fn last_words(console: &str) -> Option<String> {
    let lines = || console.lines().rev().map(untimed).filter(|line| !line.is_empty());
    let init = lines().find(|line| line.starts_with(INIT_LINE));
    let panic = lines().find(|line| line.contains(PANIC_LINE));
    // That it powers off or resets is told already.
    let last = || lines().find(|line| !line.starts_with("reboot: "));
    let words = match (init, panic) {
        (Some(init), Some(panic)) => format!("{init} / {panic}"),
        (one, other) => one.or(other).or_else(last)?.to_owned(),
    };
    Some(words.chars().take(MAX_WORDS).collect())
}

/// A line of the kernel's without its time (`[    1.234567] `).
fn untimed(line: &str) -> &str {
    let rest = line
        .trim_start()
        .strip_prefix('[')
        .and_then(|line| line.split_once(']'));
    match rest {
        Some((time, line)) if time.trim().parse::<f64>().is_ok() => line.trim(),
        _ => line.trim(),
    }
}

// === impl Left ===

impl Left {
    /// Whether it tells that the VMM had ended by itself, rather than with what the agent kills at the end.
    fn tells_why(&self) -> bool {
        let by_itself = |exit: ExitStatus| exit.signal() != Some(Signal::SIGKILL as i32);
        self.report.is_some() || self.out_of_memory.is_some() || self.exit.is_some_and(by_itself)
    }

    fn last_said(&self) -> String {
        match self.log.as_str() {
            "" => "it said nothing".to_owned(),
            log => format!("the last it said: {log}"),
        }
    }
}

// === impl OutOfMemory ===

impl std::fmt::Display for OutOfMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::OfCgroup(limit) => {
                f.write_str("the kernel killed the VMM, for it had used all the memory that its cgroup may have (memory.max")?;
                match limit {
                    Some(bytes) => write!(f, ", {} MiB)", bytes >> 20),
                    None => f.write_str(")"),
                }
            }
            Self::OfHost => f.write_str(
                "the kernel killed the VMM, for the host had no memory left, or a cgroup above the machines' had used all that \
                 it may have",
            ),
        }
    }
}

#[cfg(test)]
mod tests;
