//! What each way in which Linux can be told who runs first gives a machine that wakes up now and then among others that compute
//! without pause, what it costs those, and what it does to a daemon of the host. With plain processes in place of machines.

mod method;
mod place;
mod role;
mod scheduler;
mod table;

use std::{
    env,
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use stoker_linux::sched::{self, Policy};
use stoker_testkit::wake;

use super::super::{Bar, sample::Sample};
use crate::{host, lab};
use method::{DEFAULT, METHODS, Method};
use place::{FullPreemption, Group, Groups};
use role::{Hog, Role, Span, Told, Waker};
use scheduler::{Scheduler, Share};
use table::Row;

pub(crate) use role::RoleOptions;

/// How many compute without pause, for each CPU.
const HOGS_A_CPU: usize = 4;

/// How long each way is measured, and in a quick run: 1% of the wake-ups of the first are four.
const PHASE: Duration = Duration::from_secs(20);
const QUICK_PHASE: Duration = Duration::from_secs(3);

/// How long processes may take to hear that they are to start.
const HEAR: Duration = Duration::from_secs(1);

/// A process that stands for a machine or a daemon; it is killed when this is dropped.
struct Process {
    child: Child,
    output: BufReader<ChildStdout>,
}

/// What was measured of one way.
struct Round {
    quiet: Waker,
    daemon: Waker,
    hogs: Vec<Hog>,
}

/// What all rounds share.
struct Bench<'a> {
    groups: Option<Groups>,
    /// Where the program is that loads our scheduler.
    binaries: Option<&'a Path>,
    hogs: usize,
    /// Turns of the loop that one who wakes up works.
    turns: u64,
    phase: Duration,
}

/// Measures on this very machine, prints a table, and returns what it says of wake-ups. Programs of ours are where they were built, if
/// they were.
pub(super) fn bars(quick: bool, binaries: Option<&Path>) -> Result<Vec<Bar>> {
    if lab::is_inside() {
        place::mount_debugfs();
    }
    let groups = Groups::new()?;
    let kernel = place::kernel(groups.is_some())?;
    let cpus = std::thread::available_parallelism()?.get();
    let bench = Bench {
        groups,
        binaries,
        hogs: HOGS_A_CPU * cpus,
        turns: wake::calibrate()?,
        phase: if quick { QUICK_PHASE } else { PHASE },
    };
    println!(
        "On {} ({kernel}): {} that compute without pause, and one that wakes up every {:?} for {:?} of work.",
        host::place(),
        bench.hogs,
        wake::EVERY,
        wake::WORK,
    );
    let alone = bench.alone()?;
    let mut rows = Vec::new();
    let mut base = None;
    for method in METHODS {
        println!("  {}", method.name);
        match bench.round(method) {
            Ok(round) => {
                let row = Row::new(&round, bench.phase, cpus)?;
                base.get_or_insert(row.turns);
                rows.push((method.name, Ok(row)));
            }
            Err(error) => rows.push((method.name, Err(format!("{error:#}")))),
        }
    }
    // Whether this machine is what it was.
    let again = bench.alone()?;
    print!("\n{}", table::render(&alone, &again, &rows, base.unwrap_or(1.0)));
    let mut bars = Vec::new();
    for (name, row) in &rows {
        let Ok(row) = row else { continue };
        for (by, ours, peer) in [("timer", &row.timer, &alone.timer), ("pipe", &row.pipe, &alone.pipe)] {
            bars.push(Bar::beside(
                &format!("woken by {by}, p99, {name}, {}", host::place()),
                "ms",
                Sample::new(vec![ours.p99])?,
                "alone",
                Sample::new(vec![peer.p99])?,
            ));
        }
    }
    Ok(bars)
}

// === impl Bench ===

impl Bench<'_> {
    fn alone(&self) -> Result<Row> {
        println!("  alone");
        let round = self.measure(&DEFAULT, 0)?;
        Row::new(&round, self.phase, 1)
    }

    /// Measures one way, or says why it is not possible here.
    fn round(&self, method: &Method) -> Result<Round> {
        ensure!(
            self.groups.is_some() || !method.takes_cgroups(),
            "cgroup v2 has no CPU controller here"
        );
        // It is of the whole machine, which others may use.
        ensure!(!method.full_preemption || lab::is_inside(), "only in the lab");
        ensure!(
            method.sched_ext.is_none() || scheduler::is_there(),
            "this kernel has no sched_ext"
        );
        let _preemption = method.full_preemption.then(FullPreemption::new).transpose()?;
        self.measure(method, self.hogs)
    }

    fn measure(&self, method: &Method, hogs: usize) -> Result<Round> {
        let measured = self.measured(method, hogs);
        if let Some(groups) = &self.groups {
            groups.clear()?;
        }
        measured
    }

    fn measured(&self, method: &Method, hogs: usize) -> Result<Round> {
        let processes = self.processes(method, hogs)?;
        let Some(baseline) = method.sched_ext else {
            return self.span(processes);
        };
        let binaries = self.binaries.context("our scheduler was not built: --sched-ext")?;
        let mut scheduler = Scheduler::start(binaries)?;
        // The second is the daemon, which knows nothing of it.
        for (index, process) in processes.iter().enumerate().filter(|(index, _)| *index != 1) {
            let share = Share {
                high: index == 0 || index == 2 && method.first_hog_too,
                baseline_millis: if index == 0 { 0 } else { baseline },
            };
            scheduler.set(process.child.id(), share)?;
            process.schedule(Policy::Extensible { nice: 0 })?;
        }
        let round = self.span(processes)?;
        scheduler.end()?;
        Ok(round)
    }

    /// The one that wakes up, the daemon, and those that compute, each as the method has it.
    fn processes(&self, method: &Method, hogs: usize) -> Result<Vec<Process>> {
        let (quiet, group) = self.machine("quiet", Role::Waker)?;
        set_up(&quiet, method.quiet, group.as_ref(), method.quiet_files, &[])?;
        let daemon = Process::start(Role::Waker, self.turns)?;
        let mut processes = vec![quiet, daemon];
        for hog in 0..hogs {
            let (process, group) = self.machine(&format!("hog{hog}"), Role::Hog)?;
            let policy = match method.first_hog_too && hog == 0 {
                true => method.quiet,
                false => method.hogs,
            };
            set_up(&process, policy, group.as_ref(), method.hog_files, method.hog_limit)?;
            processes.push(process);
        }
        Ok(processes)
    }

    fn machine(&self, name: &str, role: Role) -> Result<(Process, Option<Group>)> {
        let process = Process::start(role, self.turns)?;
        let group = self.groups.as_ref().map(|groups| groups.group(name)).transpose()?;
        if let Some(group) = &group {
            group.threads.take(process.child.id())?;
        }
        Ok((process, group))
    }

    /// Lets them run, and takes what they tell.
    fn span(&self, mut processes: Vec<Process>) -> Result<Round> {
        let start_ns = wake::now_ns()? + HEAR.as_nanos() as u64;
        let end_ns = start_ns + self.phase.as_nanos() as u64;
        for process in &mut processes {
            process.tell(Span { start_ns, end_ns })?;
        }
        let (mut wakers, mut hogs) = (Vec::new(), Vec::new());
        for process in &mut processes {
            match process.told()? {
                Told::Waker(waker) => wakers.push(waker),
                Told::Hog(hog) => hogs.push(hog),
            }
        }
        match <[Waker; 2]>::try_from(wakers) {
            Ok([quiet, daemon]) => Ok(Round { quiet, daemon, hogs }),
            Err(others) => bail!("{} told of waking up, not 2", others.len()),
        }
    }
}

fn set_up(
    process: &Process,
    policy: Option<Policy>,
    group: Option<&Group>,
    files: &[(&str, &str)],
    limit: &[(&str, &str)],
) -> Result<()> {
    if let Some(policy) = policy {
        process.schedule(policy)?;
    }
    if let Some(group) = group {
        for (file, value) in files {
            group.machine.write(file, value)?;
        }
        for (file, value) in limit {
            group.threads.write(file, value)?;
        }
    }
    Ok(())
}

// === impl Process ===

impl Process {
    /// Starts one, which waits until it is told to begin.
    fn start(role: Role, turns: u64) -> Result<Self> {
        let mut child = Command::new(env::current_exe().context("find xtask")?)
            .args(["bench", "credits", "--role", role.text(), "--turns"])
            .arg(turns.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let output = child.stdout.take().context("it has no output")?;
        let mut process = Self {
            child,
            output: BufReader::new(output),
        };
        let line = process.line()?;
        ensure!(
            line.trim() == "ready",
            "a process told {line:?} in place of being ready"
        );
        Ok(process)
    }

    /// Schedules all its threads so.
    fn schedule(&self, policy: Policy) -> Result<()> {
        for thread in sched::threads(self.child.id())? {
            policy
                .apply(thread)
                .with_context(|| format!("schedule as {policy:?}"))?;
        }
        Ok(())
    }

    fn tell(&mut self, span: Span) -> Result<()> {
        let mut input = self.child.stdin.as_ref().context("it has no input")?;
        input
            .write_all(span.line().as_bytes())
            .context("tell a process to start")
    }

    fn told(&mut self) -> Result<Told> {
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("understand {line:?}"))
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line).context("hear a process")?;
        Ok(line)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended is only waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
