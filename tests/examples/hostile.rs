//! A `provided` function that attacks the machine that it is in, for `cargo xtask bench guests`. Its payload says how and how
//! long: `{"attack": "requests", "ms": 5000}`. All attacks are made by many threads at full speed:
//!
//! | attack | does |
//! |---|---|
//! | `requests` | asks the Runtime API for what it was given, again and again, and for what is not there; over kept connections, thousands of requests at once, and over new ones; with heads of 1 MiB |
//! | `logs` | writes empty lines, short ones, one without an end, and single bytes |
//! | `connections` | opens as many as it can, resets them, closes them by half, and sends byte by byte |
//! | `forks` | starts programs that end at once, and forks until it may not any more |
//! | `all` | all of these |
//! | `spin` | nothing of that kind: it uses the CPU time that it was given, and is what the others are compared with |
//!
//! It answers what it and the whole guest used meanwhile ([`Used`]).

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use nix::libc;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeValLike as _;
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, pause};
use serde_json::{Value, json};
use stoker_tests::cpu;
use stoker_tests::runtime_api::{INVOCATION, RuntimeApi, address};

/// Threads of each kind of request, connection and so on.
const THREADS: usize = 2;
/// Threads of `spin`: as many as most attacks have.
const SPINNERS: usize = 8;
/// How long a connection is waited for.
const PATIENCE: Duration = Duration::from_millis(200);
/// Requests that are sent before any is answered.
const AT_ONCE: usize = 400;
/// Connections that are opened before any is closed: twice as many as a container may have.
const CROWD: usize = 64;
/// What is written to the log at a time, in bytes: as much as its pipe holds.
const BLOCK: usize = 64 << 10;
/// Bytes of a head that come one by one.
const DRIBBLE: usize = 2000;
/// The head of a large request, in bytes: nearly as much as one may have.
const LARGE_HEAD: usize = 1 << 20;

/// Attacks once, and tells whether it could.
type Attack = fn(&Target) -> io::Result<()>;

const REQUESTS: &[Attack] = &[ask_again, ask_much_at_once, ask_once, ask_at_length];
const LOGS: &[Attack] = &[
    |_| log(&[b'\n'; BLOCK]),
    |_| log(&b"x\n".repeat(BLOCK / 2)),
    |_| log(&[b'x'; BLOCK]),
    |_| log(b"x"),
];
const CONNECTIONS: &[Attack] = &[reset, close_by_half, crowd, dribble];
const FORKS: &[Attack] = &[run, run, run, fork_all];

/// What is attacked, and until when.
struct Target {
    api: SocketAddr,
    until: Instant,
}

/// What was used up to a moment.
struct Used {
    /// CPU time of this process and of those that it has waited for.
    own: Duration,
    /// Time that the guest's CPUs were not idle.
    guest: Duration,
}

// === impl Target ===

impl Target {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// Attacks by all these means at once.
    fn attack(&self, by: &[Attack]) {
        thread::scope(|scope| {
            for attack in by.iter().cycle().take(by.len() * THREADS) {
                scope.spawn(|| {
                    while self.goes_on() {
                        // That it fails is a defence.
                        let _ = attack(self);
                    }
                });
            }
        });
    }

    fn spin(&self) {
        thread::scope(|scope| {
            for _ in 0..SPINNERS {
                scope.spawn(|| while self.goes_on() {});
            }
        });
    }

    fn connect(&self) -> io::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&self.api, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(stream)
    }
}

// === impl Used ===

impl Used {
    fn now() -> anyhow::Result<Self> {
        let mut own = Duration::ZERO;
        for who in [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN] {
            let usage = getrusage(who)?;
            let us = (usage.user_time() + usage.system_time()).num_microseconds();
            own += Duration::from_micros(us.try_into()?);
        }
        Ok(Self {
            own,
            guest: cpu::busy()?,
        })
    }
}

fn main() -> anyhow::Result<()> {
    let api = address()?.parse().context("understand AWS_LAMBDA_RUNTIME_API")?;
    let mut runtime = RuntimeApi::connect()?;
    loop {
        let invocation = runtime.next_invocation()?;
        let order: Value = serde_json::from_slice(&invocation.payload)?;
        let ms = order.get("ms").and_then(Value::as_u64).context("no `ms`")?;
        let (began, before) = (Instant::now(), Used::now()?);
        let target = Target {
            api,
            until: began + Duration::from_millis(ms),
        };
        match order.get("attack").and_then(Value::as_str) {
            Some("requests") => target.attack(REQUESTS),
            Some("logs") => target.attack(LOGS),
            Some("connections") => target.attack(CONNECTIONS),
            Some("forks") => target.attack(FORKS),
            Some("all") => target.attack(&[REQUESTS, LOGS, CONNECTIONS, FORKS].concat()),
            Some("spin") => target.spin(),
            other => bail!("there is no attack {other:?}"),
        }
        let (took, after) = (began.elapsed(), Used::now()?);
        let answer = json!({
            "took_ns": took.as_nanos(),
            "own_cpu_ns": after.own.saturating_sub(before.own).as_nanos(),
            "guest_busy_ns": after.guest.saturating_sub(before.guest).as_nanos(),
        });
        runtime.answer(&invocation.id, answer.to_string().as_bytes())?;
    }
}

/// Asks for the invocation that this is, which is given again as long as it is not answered, with all of its payload.
fn ask_again(target: &Target) -> io::Result<()> {
    let mut api = RuntimeApi::connect().map_err(io::Error::other)?;
    while target.goes_on() {
        api.next_invocation().map_err(io::Error::other)?;
    }
    Ok(())
}

/// Sends many requests before it reads their answers: what is not there, what may not be asked so, and answers of nobody.
fn ask_much_at_once(target: &Target) -> io::Result<()> {
    let requests = [
        request("GET", "/nothing", ""),
        request("POST", &format!("{INVOCATION}next"), ""),
        request("POST", &format!("{INVOCATION}nobody/response"), "{}"),
        request("POST", &format!("{INVOCATION}nobody/error"), "{}"),
    ];
    let requests = requests.concat().repeat(AT_ONCE / requests.len());
    let mut stream = target.connect()?;
    while target.goes_on() {
        stream.write_all(&requests)?;
        read_answers(&mut stream, AT_ONCE)?;
    }
    Ok(())
}

/// One request on a connection of its own.
fn ask_once(target: &Target) -> io::Result<()> {
    let mut stream = target.connect()?;
    stream.write_all(&request("GET", "/nothing", ""))?;
    read_answers(&mut stream, 1)
}

/// A request with as large a head as one may have.
fn ask_at_length(target: &Target) -> io::Result<()> {
    let mut stream = target.connect()?;
    stream.write_all(b"GET /nothing HTTP/1.1\r\nHost: a\r\nLong: ")?;
    stream.write_all(&vec![b'x'; LARGE_HEAD])?;
    stream.write_all(b"\r\n\r\n")?;
    read_answers(&mut stream, 1)
}

fn request(method: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n{body}").into_bytes()
}

/// Reads until so many answers have begun.
fn read_answers(stream: &mut TcpStream, count: usize) -> io::Result<()> {
    const BEGINNING: &[u8] = b"HTTP/1.1 ";
    let (mut read, mut seen) = (Vec::new(), 0);
    let mut chunk = vec![0; BLOCK];
    while seen < count {
        let length = stream.read(&mut chunk)?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read.extend_from_slice(chunk.get(..length).unwrap_or_default());
        seen += read.windows(BEGINNING.len()).filter(|&part| part == BEGINNING).count();
        // What may be the first part of one more.
        read.drain(..read.len().saturating_sub(BEGINNING.len() - 1));
    }
    Ok(())
}

fn log(text: &[u8]) -> io::Result<()> {
    // Without the buffer and the lock of Rust's own.
    File::from(io::stdout().as_fd().try_clone_to_owned()?).write_all(text)
}

/// Breaks off in the middle of a head.
fn reset(target: &Target) -> io::Result<()> {
    let mut stream = target.connect()?;
    stream.write_all(b"GET /nothing HTTP/1.1\r\nHo")?;
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    setsockopt(&stream, sockopt::Linger, &at_once)?;
    Ok(())
}

/// Ends its own side, and reads what is answered.
fn close_by_half(target: &Target) -> io::Result<()> {
    let mut stream = target.connect()?;
    stream.write_all(&request("GET", "/nothing", ""))?;
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

/// As many connections as it can have, and then none.
fn crowd(target: &Target) -> io::Result<()> {
    let streams = (0..CROWD).map(|_| {
        let mut stream = target.connect()?;
        stream.write_all(b"GET")?;
        Ok(stream)
    });
    streams.collect::<io::Result<Vec<_>>>().map(drop)
}

/// A head that comes byte by byte.
fn dribble(target: &Target) -> io::Result<()> {
    let mut stream = target.connect()?;
    stream.write_all(b"GET /nothing HTTP/1.1\r\nLong: ")?;
    for _ in 0..DRIBBLE {
        if !target.goes_on() {
            break;
        }
        stream.write_all(b"x")?;
    }
    Ok(())
}

/// A program that ends at once.
fn run(_: &Target) -> io::Result<()> {
    Command::new("/bin/true").status().map(drop)
}

/// Forks until there may be no more processes, and kills them.
fn fork_all(target: &Target) -> io::Result<()> {
    let mut children = Vec::new();
    while target.goes_on()
        && let Ok(child) = fork_one()
    {
        children.push(child);
    }
    for child in &children {
        kill(*child, Signal::SIGKILL)?;
    }
    for child in children {
        // So that what it used is counted as ours.
        waitpid(child, None)?;
    }
    Ok(())
}

/// A process that does nothing until it is killed.
fn fork_one() -> nix::Result<Pid> {
    // SAFETY: the child calls pause(2) alone, which is safe after a fork of a process with threads.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => loop {
            pause();
        },
    }
}
