//! PID 1 of a container. A program made for Lambda does not expect to be it: to PID 1 its own signals mean nothing, and
//! every orphan of its pid namespace is its to reap. So runtime and external extensions run as children of this process,
//! which starts them, reaps, and does what init tells it; they can neither signal nor trace it. The program of an image runs
//! so, too: it is alone, and this process is root's where the program may be anybody's.
//!
//! ```text
//!   without extensions:  ── Started / NotExecutable ──►                        the runtime runs, and this ends as it did
//!   with:                ── Extensions + their output ──►  ◄── Start ──        init knows their names before they run
//!                        ── NotLaunched ──►                ◄── Start ──        all have registered
//!                        ── Started / NotExecutable, Exited … ──►  ◄── Terminate, Kill …
//! ```

use std::convert::Infallible;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, ppoll};
use nix::sys::prctl;
use nix::sys::signal::{SigHandler, SigSet, Signal, killpg, signal};
use nix::unistd::{Pid, pipe2};

use super::program::Program;
use super::{Command, Member, Report, wire};

/// Status of a program that could not be run, as shells have it.
pub(super) const NOT_EXECUTABLE: i32 = 127;
/// Added to the number of the signal that a program ended by, as shells do.
const SIGNALLED: i32 = 128;
/// Status of this process where it cannot go on.
const LOST: i32 = 1;

/// What this process is to do.
pub(super) struct Pid1 {
    /// The socket to init.
    control: OwnedFd,
    runtime: (Program, State),
    /// With their names, which are told to init once.
    extensions: Vec<(String, Program, State)>,
    /// What extensions write to, until they have been started.
    output: Option<OwnedFd>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    NotStarted,
    Running(Pid),
    /// With this status.
    Ended(i32),
}

/// Ends the wait for something to do, for which it need do nothing.
extern "C" fn wake(_: libc::c_int) {}

/// Runs the container's programs until all have ended, and ends as the runtime did; the kernel then kills what is left in
/// the namespace.
pub(super) fn run(mut pid1: Pid1) -> ! {
    let Err(error) = pid1.run();
    let _ = pid1.tell(&Report::Failed(format!("{error:#}")));
    exit(LOST)
}

// === impl Pid1 ===

impl Pid1 {
    pub(super) fn new(control: OwnedFd, runtime: Program, extensions: Vec<(String, Program)>) -> Self {
        Self {
            control,
            runtime: (runtime, State::NotStarted),
            extensions: extensions
                .into_iter()
                .map(|(name, program)| (name, program, State::NotStarted))
                .collect(),
            output: None,
        }
    }

    fn run(&mut self) -> anyhow::Result<Infallible> {
        // For who lists processes; and memory that is init's is none of the function's business. Neither is worth an end.
        let _ = prctl::set_name(c"init");
        let _ = prctl::set_dumpable(false);
        // Only while it waits: a child that ends before that ends the wait at once.
        SigSet::from(Signal::SIGCHLD).thread_block()?;
        // SAFETY: the handler does nothing.
        unsafe { signal(Signal::SIGCHLD, SigHandler::Handler(wake)) }?;
        if self.extensions.is_empty() {
            self.start_runtime()?;
        } else {
            self.announce()?;
        }
        loop {
            self.reap()?;
            if let (State::Ended(status), false) = (self.runtime.1, self.extensions_run()) {
                exit(status);
            }
            let mut control = [PollFd::new(self.control.as_fd(), PollFlags::POLLIN)];
            match ppoll(&mut control, None, Some(SigSet::empty())) {
                Ok(_) => {}
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(error).context("cannot wait"),
            }
            match wire::receive(self.control.as_fd()).context("init is gone")?.0 {
                Command::Start if self.output.is_some() => self.start_extensions()?,
                Command::Start => self.start_runtime()?,
                Command::Terminate => signal_group(self.runtime.1, Signal::SIGTERM),
                Command::Signal(number) => signal_alone(self.runtime.1, number),
                Command::Kill(member) => self.kill(member),
                Command::Order(_) | Command::Enter(_) => anyhow::bail!("init gave an order twice"),
            }
        }
    }

    fn tell(&self, report: &Report) -> anyhow::Result<()> {
        wire::send(&self.control, report, None).context("cannot tell init")
    }

    /// Tells init of the extensions, which are then to be started.
    fn announce(&mut self) -> anyhow::Result<()> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).context("cannot make a pipe")?;
        let names = self.extensions.iter().map(|(name, ..)| name.clone()).collect();
        wire::send(&self.control, &Report::Extensions(names), Some(read.as_fd())).context("cannot tell init")?;
        self.output = Some(write);
        Ok(())
    }

    fn start_extensions(&mut self) -> anyhow::Result<()> {
        let output = self.output.take();
        for index in 0..self.extensions.len() {
            let Some((_, program, state)) = self.extensions.get_mut(index) else {
                continue;
            };
            match program.start(output.as_ref().map(OwnedFd::as_fd)) {
                Ok(pid) => *state = State::Running(pid),
                Err(why) => {
                    *state = State::Ended(NOT_EXECUTABLE);
                    self.tell(&Report::NotLaunched(index, format!("{why:#}")))?;
                    // It is the end of the container.
                    break;
                }
            }
        }
        Ok(())
    }

    fn start_runtime(&mut self) -> anyhow::Result<()> {
        if self.runtime.1 != State::NotStarted {
            return Ok(());
        }
        let started = self.runtime.0.start(None);
        self.close_others();
        match started {
            Ok(pid) => {
                self.runtime.1 = State::Running(pid);
                self.tell(&Report::Started)
            }
            Err(why) => {
                self.runtime.1 = State::Ended(NOT_EXECUTABLE);
                self.tell(&Report::NotExecutable(format!("{why:#}")))
            }
        }
    }

    /// The log's readers shall see an end when the programs' own descriptors are closed.
    fn close_others(&self) {
        let control = self.control.as_raw_fd().cast_unsigned();
        // SAFETY: nothing that owns one of these descriptors is used or dropped from here on: `run` never returns.
        unsafe {
            if let Some(last) = control.checked_sub(1) {
                libc::close_range(0, last, 0);
            }
            libc::close_range(control + 1, libc::c_uint::MAX, 0);
        }
    }

    fn extensions_run(&self) -> bool {
        self.extensions
            .iter()
            .any(|(.., state)| matches!(state, State::Running(_)))
    }

    fn kill(&mut self, member: Member) {
        let state = match member {
            Member::Runtime => Some(&mut self.runtime.1),
            Member::Extension(index) => self.extensions.get_mut(index).map(|(.., state)| state),
        };
        if let Some(state) = state {
            signal_group(*state, Signal::SIGKILL);
            if *state == State::NotStarted {
                *state = State::Ended(SIGNALLED + libc::SIGKILL);
            }
        }
    }

    /// Takes note of all children that have ended.
    fn reap(&mut self) -> anyhow::Result<()> {
        loop {
            let mut status = 0;
            // Not by `nix`, which takes an end by a real-time signal for an error.
            // SAFETY: the call writes one integer, to a place that is ours.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::WNOHANG) };
            if pid <= 0 {
                return Ok(());
            }
            let status = if libc::WIFSIGNALED(status) {
                SIGNALLED + libc::WTERMSIG(status)
            } else {
                libc::WEXITSTATUS(status)
            };
            let running = State::Running(Pid::from_raw(pid));
            let ended = if self.runtime.1 == running {
                self.runtime.1 = State::Ended(status);
                Member::Runtime
            } else if let Some(index) = self.extensions.iter().position(|(.., state)| *state == running) {
                if let Some((.., state)) = self.extensions.get_mut(index) {
                    *state = State::Ended(status);
                }
                Member::Extension(index)
            } else {
                // An orphan.
                continue;
            };
            if !self.extensions.is_empty() {
                self.tell(&Report::Exited(ended, status))?;
            }
        }
    }
}

/// Signals what runs, and all that it started and left in its process group.
fn signal_group(state: State, signal: Signal) {
    if let State::Running(pid) = state {
        // It has not been reaped, so that the number is still its own.
        let _ = killpg(pid, signal);
    }
}

/// Signals what runs, and nothing that it started.
fn signal_alone(state: State, number: i32) {
    if let State::Running(pid) = state {
        // Not by `nix`, which knows no real-time signals.
        // SAFETY: integers go in. It has not been reaped, so that the number is still its own.
        unsafe { libc::kill(pid.as_raw(), number) };
    }
}

/// Ends this process and does nothing else: what `exit(3)` would do besides is the launcher's.
pub(super) fn exit(status: i32) -> ! {
    // SAFETY: no call needs anything of this process any more.
    unsafe { libc::_exit(status) }
}

/// The signal that a container's PID 1 tells of by a status, if it is one.
pub(super) fn signal_of(status: i32) -> Option<i32> {
    let signal = status.checked_sub(SIGNALLED)?;
    (1..=libc::SIGRTMAX()).contains(&signal).then_some(signal)
}

#[cfg(test)]
#[path = "pid1_tests.rs"]
mod tests;
