//! What counting costs, by the kernel's own `bpf_stats`: prints a line of JSON for each program and number of subjects,
//! `{"program":"sched_switch","subjects":100,"ns":[84.2,…]}`; `ns` is the mean of a run, for each of several rounds.
//! `read_one` is no program but the time to read one subject, `read` that to read all subjects once, and `accounts` that to read
//! all their accounts. Needs root and cgroup v2. It ends with how many instructions the kernel looked at to verify each program.
//!
//! A token goes round a ring of processes, each in a cgroup of its own, so that every wake-up and every switch is of
//! another subject than the one before; more subjects than processes only make the maps larger. One more process takes
//! and gives back memory.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write, pipe};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use stoker_credits::{Mode, Plan};
use stoker_ebpf::{CgroupId, Ledger, Limits};
use stoker_testkit::tracefs::need_tracefs;

#[path = "../tests/common/system.rs"]
#[allow(dead_code, reason = "made for the tests, which need more of it")]
mod system;

use system::Cgroup;

const SUBJECTS: [u64; 4] = [1, 100, 1_000, 10_000];

/// Processes in the ring at most.
const RING: u64 = 500;

const TOKENS: usize = 4;

const ROUNDS: usize = 7;

/// Of one subject, a round.
const READS: u32 = 200;

const ROUND: Duration = Duration::from_millis(700);

fn main() -> Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("relay") => relay(),
        Some("touch") => touch(),
        _ => {
            need_tracefs()?;
            SUBJECTS.into_iter().try_for_each(measure)
        }
    }
}

fn measure(subjects: u64) -> Result<()> {
    let ledger = Ledger::load(Limits::HOST)?;
    // Of a size at which nothing crosses.
    let terms = Plan::new(2, 400, Mode::Standard).terms()?;
    let own = Cgroup::new("cost")?;
    let real = subjects.min(RING);
    let cgroups = (0..real)
        .map(|number| own.child(&number.to_string()))
        .collect::<Result<Vec<_>>>()?;
    let real = cgroups.iter().map(Cgroup::id).collect::<Result<Vec<_>>>()?;
    let others = (real.len() as u64..subjects).map(|other| CgroupId::from(1 << 62 | other));
    for subject in real.into_iter().chain(others) {
        ledger.add(subject)?;
        ledger.open_account(subject, &terms)?;
    }
    let last = cgroups.last().context("a cgroup")?.id()?;
    let _ring = Ring::new(&cgroups)?;
    let _measuring = ledger.measure()?;
    let mut figures: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for _ in 0..ROUNDS {
        let before = ledger.cost()?;
        thread::sleep(ROUND);
        let start = Instant::now();
        ledger.read()?;
        figures
            .entry("read")
            .or_default()
            .push(start.elapsed().as_secs_f64() * 1e9);
        let start = Instant::now();
        ledger.accounts()?;
        figures
            .entry("accounts")
            .or_default()
            .push(start.elapsed().as_secs_f64() * 1e9);
        // Often, since it is short: what runs meanwhile differs from one to the next.
        let start = Instant::now();
        for _ in 0..READS {
            ledger.read_one(last)?;
        }
        figures
            .entry("read_one")
            .or_default()
            .push(start.elapsed().as_secs_f64() * 1e9 / f64::from(READS));
        for (before, after) in before.iter().zip(ledger.cost()?) {
            let runs = after.runs - before.runs;
            if runs > 0 {
                let time = after.run_time - before.run_time;
                let figures = figures.entry(after.program).or_default();
                figures.push(time.as_secs_f64() * 1e9 / runs as f64);
            }
        }
    }
    for (program, ns) in figures {
        println!(r#"{{"program":"{program}","subjects":{subjects},"ns":{ns:.1?}}}"#);
    }
    for program in ledger.cost()? {
        if let Some(verified) = program.verified_instructions {
            eprintln!("{}: {verified} instructions to verify", program.program);
        }
    }
    Ok(())
}

/// Processes that hand tokens round, and one that takes and gives back memory.
struct Ring(Vec<Child>);

impl Ring {
    fn new(cgroups: &[Cgroup]) -> Result<Self> {
        let this = std::env::current_exe()?;
        let mut ring = Self(Vec::new());
        let (first, mut tokens) = pipe()?;
        let mut reader = first;
        // A ring of one subject needs two processes still.
        let places = cgroups.len().max(2);
        for place in 0..places {
            let (next_reader, writer) = match place + 1 == places {
                true => (None, tokens.try_clone()?),
                false => pipe().map(|(reader, writer)| (Some(reader), writer))?,
            };
            let cgroup = cgroups.get(place % cgroups.len()).context("a cgroup")?;
            ring.start(Command::new(&this).arg("relay").stdin(reader).stdout(writer), cgroup)?;
            match next_reader {
                Some(next) => reader = next,
                None => break,
            }
        }
        let cgroup = cgroups.first().context("a cgroup")?;
        ring.start(Command::new(&this).arg("touch").stdin(Stdio::null()), cgroup)?;
        tokens.write_all(&[0; TOKENS])?;
        Ok(ring)
    }

    fn start(&mut self, command: &mut Command, cgroup: &Cgroup) -> Result<()> {
        let child = command.spawn()?;
        let pid = child.id();
        self.0.push(child);
        Ok(fs::write(cgroup.path().join("cgroup.procs"), pid.to_string())?)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Hands each byte on.
fn relay() -> Result<()> {
    let (mut input, mut output) = (std::io::stdin(), std::io::stdout());
    let mut token = [0];
    while input.read(&mut token)? > 0 {
        output.write_all(&token)?;
        output.flush()?;
    }
    Ok(())
}

fn touch() -> Result<()> {
    loop {
        let mut memory = vec![0u8; 4 << 20];
        for byte in memory.iter_mut().step_by(4096) {
            *byte = 1;
        }
        drop(std::hint::black_box(memory));
        thread::sleep(Duration::from_millis(2));
    }
}
