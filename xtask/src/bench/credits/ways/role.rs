//! What a process does that stands for a machine, or for a daemon of the host.

use std::{
    io::{self, BufRead as _, Read as _, Write as _},
    sync::{Arc, Barrier, OnceLock},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use nix::{sys::prctl::set_timerslack, unistd::setsid};
use serde::{Deserialize, Serialize};
use stoker_testkit::wake;

/// What a process of the bench is told. No user ever gives it.
#[derive(Debug, Args)]
pub(crate) struct RoleOptions {
    /// What this process does.
    #[arg(long, hide = true)]
    role: Option<Role>,
    /// Turns of the loop that take as long as one that wakes up works.
    #[arg(long, hide = true, default_value_t = 0)]
    turns: u64,
}

/// What a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Role {
    /// Computes without pause.
    Hog,
    /// Wakes up now and then: by its own timer, and by a pipe that another thread of its writes to.
    Waker,
}

/// What it tells at the end.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Told {
    Hog(Hog),
    Waker(Waker),
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hog {
    /// The CPU time it had, in ns.
    pub(super) cpu_ns: u64,
    /// Turns of its loop.
    pub(super) turns: u64,
    /// The longest time in which it did not run, in ns.
    pub(super) longest_wait_ns: u64,
}

/// From each moment when it was due to when it had done its work, in ns.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Waker {
    /// Woken by its own timer.
    pub(super) timer_ns: Vec<u64>,
    /// A thread was woken by its timer, and woke the one that works by a pipe.
    pub(super) pipe_ns: Vec<u64>,
}

/// When a process starts and ends, in ns of the monotonic clock.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
}

/// Threads that are there, and begin when they are told to.
struct Start {
    ready: Barrier,
    begin: Barrier,
    span: OnceLock<Span>,
}

// === impl Role ===

impl Role {
    pub(super) fn text(self) -> &'static str {
        match self {
            Self::Hog => "hog",
            Self::Waker => "waker",
        }
    }
}

// === impl RoleOptions ===

impl RoleOptions {
    /// Does what this process is for, if it is one of the bench's, and says so.
    pub(crate) fn run(&self) -> Result<bool> {
        let Some(role) = self.role else {
            return Ok(false);
        };
        // Of processes in no cgroup of their own the kernel takes those of one session together (sched(7), "autogroup").
        let _ = setsid();
        // What the hypervisor's timers have: none.
        set_timerslack(1)?;
        let told = match role {
            Role::Hog => Told::Hog(hog(self.turns)?),
            Role::Waker => Told::Waker(waker(self.turns)?),
        };
        println!("{}", serde_json::to_string(&told)?);
        Ok(true)
    }
}

/// Says that this process is ready, and waits for what it is told.
fn told_span() -> Result<Span> {
    println!("ready");
    io::stdout().flush()?;
    let mut line = String::new();
    io::stdin().lock().read_line(&mut line)?;
    Span::parse(&line).with_context(|| format!("understand {line:?}"))
}

fn hog(turns: u64) -> Result<Hog> {
    let span = told_span()?;
    wake::sleep_until(span.start_ns)?;
    let wake::Hog {
        cpu_ns,
        turns,
        longest_wait_ns,
    } = wake::hog(turns, span.end_ns)?;
    Ok(Hog {
        cpu_ns,
        turns,
        longest_wait_ns,
    })
}

fn waker(turns: u64) -> Result<Waker> {
    let start = Arc::new(Start {
        ready: Barrier::new(4),
        begin: Barrier::new(4),
        span: OnceLock::new(),
    });
    let (mut reader, mut writer) = io::pipe()?;
    let own = start.clone();
    let by_timer = thread::spawn(move || -> Result<Vec<u64>> {
        let mut done = Vec::new();
        for due in own.dues(Duration::ZERO) {
            wake::sleep_until(due)?;
            wake::work(turns);
            done.push(wake::now_ns()?.saturating_sub(due));
        }
        Ok(done)
    });
    let own = start.clone();
    let device = thread::spawn(move || -> Result<()> {
        for due in own.dues(wake::EVERY / 2) {
            wake::sleep_until(due)?;
            writer.write_all(&due.to_ne_bytes())?;
        }
        Ok(())
    });
    let own = start.clone();
    let by_pipe = thread::spawn(move || -> Result<Vec<u64>> {
        own.begin();
        let (mut done, mut due) = (Vec::new(), [0; 8]);
        while reader.read_exact(&mut due).is_ok() {
            wake::work(turns);
            done.push(wake::now_ns()?.saturating_sub(u64::from_ne_bytes(due)));
        }
        Ok(done)
    });
    start.ready.wait();
    let span = told_span()?;
    // Set once.
    let _ = start.span.set(span);
    start.begin.wait();
    let died = |_| anyhow::anyhow!("a thread panicked");
    device.join().map_err(died)??;
    Ok(Waker {
        timer_ns: by_timer.join().map_err(died)??,
        pipe_ns: by_pipe.join().map_err(died)??,
    })
}

// === impl Span ===

impl Span {
    /// As a process is told it.
    pub(super) fn line(self) -> String {
        format!("{} {}\n", self.start_ns, self.end_ns)
    }

    fn parse(line: &str) -> Option<Self> {
        let (start, end) = line.trim().split_once(' ')?;
        Some(Self {
            start_ns: start.parse().ok()?,
            end_ns: end.parse().ok()?,
        })
    }

    /// The moments in it at which somebody wakes up.
    fn dues(self, phase: Duration) -> impl Iterator<Item = u64> {
        wake::dues(self.start_ns + phase.as_nanos() as u64, self.end_ns)
    }
}

// === impl Start ===

impl Start {
    fn begin(&self) -> Span {
        self.ready.wait();
        self.begin.wait();
        // Set before that.
        let nothing = Span { start_ns: 0, end_ns: 0 };
        self.span.get().copied().unwrap_or(nothing)
    }

    fn dues(&self, phase: Duration) -> impl Iterator<Item = u64> + use<> {
        self.begin().dues(phase)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_told_in_a_line() {
        let span = Span {
            start_ns: 1,
            end_ns: u64::MAX,
        };
        let again = Span::parse(&span.line()).unwrap();
        assert_eq!((again.start_ns, again.end_ns), (1, u64::MAX));
        assert!(Span::parse("1").is_none() && Span::parse("a b").is_none());
    }
}
