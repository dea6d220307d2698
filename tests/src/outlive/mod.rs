//! An agent that is killed, restarted and upgraded under load, again and again: what it did not outlive is a fault.
//!
//! Steady callers have a machine each, with one container that counts what runs in it, so that a call that ran twice, or was
//! lost, is seen by the next. Others deploy functions, and delete them while they are called: machines are booted and end by
//! it. All ask again where their connection breaks, calls with the same request id.

mod client;
mod left;
mod load;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use stoker_linux::Cgroup;
use stoker_proto::v1;
use stoker_proto::v1::machine::State;
use stoker_testkit::agent::Processes;
use tokio::task::JoinSet;
use ulid::Ulid;

use self::load::{Load, Program};
use crate::dice::Dice;
use crate::host::{Host, Options};
use crate::{code, eventually};

/// Callers that deploy functions.
const DEPLOYERS: usize = 2;

/// The most ms that a call sleeps while the agent is killed: most are in the midst of it.
const SLEEP_MS: u64 = 600;

/// The most ms from when all is well to the next kill or restart.
const PAUSE_MS: u64 = 1500;

/// What is done to an agent.
#[derive(Debug)]
pub struct Plan {
    /// Of the moments, and of what is called.
    pub seed: u64,
    /// How often it is killed while functions are deployed and called.
    pub kills: u32,
    /// How often it is told to end and started again while functions are called.
    pub restarts: u32,
    /// How often another build takes its place; the builds in turn.
    pub upgrades: u32,
    /// Machines that serve all the time.
    pub machines: u32,
    /// The code of the example `echo`; Python alone is called without it.
    pub native: Option<Vec<u8>>,
    /// The builds of `stokerd` for the upgrades.
    pub builds: Vec<PathBuf>,
}

/// What may go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A guest or container ended that nobody had decided to end.
    Ended,
    /// What was acknowledged is not so.
    WriteLost,
    /// A request ran more than once, or had two answers.
    RanTwice,
    /// A call failed otherwise than by its connection, or was not answered.
    NoAnswer,
    /// Something was there after the end.
    LeftOver,
}

/// What the callers have seen.
#[derive(Debug, Default)]
pub struct Seen {
    /// Calls of functions.
    pub calls: u64,
    /// Calls that were asked for once more though they were answered.
    pub asked_again: u64,
    /// Functions that were created or deleted.
    pub writes: u64,
    /// Calls, creations, deletions and questions of which a connection broke.
    pub broken: u64,
    /// What went wrong, and how.
    pub faults: Vec<(Fault, String)>,
    /// The functions that there are, and their uids, as far as was acknowledged.
    functions: BTreeMap<String, String>,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How often it was killed.
    pub kills: u32,
    /// Guests that lived when it was.
    pub guests: usize,
    /// From its start to its first answer, after each kill.
    pub first_answer: Vec<Duration>,
    /// From its start until all machines that serve were taken over.
    pub taken_over: Vec<Duration>,
    /// The longest that a caller, who asks again at once, waited for its answer, for each restart and upgrade.
    pub gaps: Vec<Duration>,
    /// By how much of a hundred the CPU time that was counted of all machines differs from the kernel's at the end.
    pub counted_off: f64,
    /// What the callers have seen.
    pub seen: Seen,
    /// What all agents have logged.
    pub log: String,
}

/// The machines that there are: of each its id and its VMM's process.
type Vmms = BTreeMap<Ulid, u32>;

/// An agent under load.
struct Run {
    host: Host,
    load: Arc<Load>,
    dice: Dice,
    /// Those that serve all the time.
    steady: Vmms,
    /// All that had a process when the agent was killed.
    known: BTreeSet<Ulid>,
    outcome: Outcome,
}

/// Does what is planned.
///
/// # Errors
///
/// Where the agent does not serve again, does not answer, or does not end well.
pub async fn run(plan: Plan) -> anyhow::Result<Outcome> {
    let pins = left::pins();
    let host = Host::start(options(&plan)).await?;
    let mut run = Run::begin(host, &plan)?;
    let mut steady = JoinSet::new();
    for index in 0..plan.machines as usize {
        steady.spawn(run.load.clone().steady(index, run.dice.another()));
    }
    run.all_answer().await?;
    run.steady = run.serving().await?;
    ensure!(run.steady.len() == steady.len(), "{:?} serve", run.steady);

    let mut deployments = JoinSet::new();
    for index in 0..DEPLOYERS {
        deployments.spawn(run.load.clone().deployments(index, run.dice.another()));
    }
    deployments.spawn(run.load.clone().writes(run.dice.another()));
    run.load.sleep_ms.store(SLEEP_MS, Ordering::Relaxed);
    while run.outcome.kills < plan.kills {
        run = run.kill().await?;
    }
    run.load.deploys.store(false, Ordering::Relaxed);
    while let Some(ended) = deployments.join_next().await {
        ended?;
    }

    run.load.sleep_ms.store(0, Ordering::Relaxed);
    let turns = plan.restarts + plan.upgrades;
    let mut builds = plan.builds.iter().cycle();
    for turn in 0..turns {
        // Spread evenly among the restarts.
        let is_upgrade = (turn + 1) * plan.upgrades / turns > turn * plan.upgrades / turns;
        let build = if is_upgrade { builds.next() } else { None };
        run = run.restart(build.cloned()).await?;
    }
    run.outcome.counted_off = run.counted_off().await?;
    run.load.end();
    while let Some(ended) = steady.join_next().await {
        ended?;
    }
    run.check_functions().await?;
    run.end(&pins).await
}

fn options(plan: &Plan) -> Options {
    let most = plan.machines + 10;
    let native = u32::from(plan.native.is_some());
    Options {
        warming: 0,
        settings: vec![
            ("machines.vcpus", 1.into()),
            ("machines.memory_mib", 128.into()),
            ("pool.warming", json!({ "python3.11": 1, "provided": native })),
            ("pool.max_machines", most.into()),
            ("pool.cpu_overcommit", f64::from(most).into()),
            // What serves all the time stays; what lost its function goes soon.
            ("pool.container_idle_timeout", "1h".into()),
            ("pool.machine_idle_timeout", "1s".into()),
            // That processors are slow is no fault.
            ("machines.boot_timeout", "120s".into()),
            // As it is by default.
            ("telemetry.interval", "10s".into()),
        ],
    }
}

// === impl Seen ===

impl Seen {
    fn fault(&mut self, fault: Fault, what: String) {
        eprintln!("{fault:?}: {what}");
        self.faults.push((fault, what));
    }
}

// === impl Outcome ===

impl Outcome {
    /// How many faults of a kind there were.
    pub fn count(&self, kind: Fault) -> usize {
        self.seen.faults.iter().filter(|(fault, _)| *fault == kind).count()
    }
}

// === impl Run ===

impl Run {
    fn begin(host: Host, plan: &Plan) -> anyhow::Result<Self> {
        let python = Program {
            runtime: "python3.11",
            handler: "app.handler",
            zip: code::python(code::COUNTS)?.into(),
        };
        let native = plan.native.as_deref().map(|zip| Program {
            runtime: "provided",
            handler: "counts",
            zip: zip.into(),
        });
        let programs = native.into_iter().chain([python]).collect();
        let socket = host.folder().join("stokerd.sock");
        Ok(Self {
            load: Arc::new(Load::new(&socket, programs, plan.machines)),
            host,
            dice: Dice::new(plan.seed),
            steady: Vmms::new(),
            known: BTreeSet::new(),
            outcome: Outcome::default(),
        })
    }

    /// Waits until every steady caller has had one more answer.
    async fn all_answer(&self) -> anyhow::Result<()> {
        let before = self.load.answers();
        eventually("each caller to be answered", async || {
            let mut both = self.load.answers().into_iter().zip(&before);
            Ok(both.all(|(now, before)| now > *before).then_some(()))
        })
        .await
    }

    /// The machines that serve accounts of steady callers.
    async fn serving(&self) -> anyhow::Result<Vmms> {
        let machines = self.host.list_machines(false).await?.into_iter();
        let serving = machines.filter(|machine| {
            machine.state() == State::Active && machine.account.starts_with("accounts/steady-") && machine.pid != 0
        });
        serving.map(|machine| Ok((id(&machine.name)?, machine.pid))).collect()
    }

    /// All machines' processes, as their cgroups have them.
    fn vmms(&self) -> anyhow::Result<Vmms> {
        let mut vmms = Vmms::new();
        for cgroup in self.host.machine_cgroups()? {
            let name = cgroup.path().file_name().context("a cgroup's name")?;
            // One that ends meanwhile has none.
            if let Some(&pid) = cgroup.processes().unwrap_or_default().first() {
                vmms.insert(id(&name.to_string_lossy())?, pid);
            }
        }
        Ok(vmms)
    }

    /// Kills the agent at some moment; now and then once more while it starts.
    async fn kill(mut self) -> anyhow::Result<Self> {
        self.dice.pause(PAUSE_MS).await;
        let before = self.vmms()?;
        self.host = self.host.respawn(Signal::SIGKILL).await?;
        self.outcome.kills += 1;
        while self.dice.below(4) == 0 {
            self.dice.pause(PAUSE_MS / 2).await;
            self.host = self.host.respawn(Signal::SIGKILL).await?;
            self.outcome.kills += 1;
        }
        self.host = self.host.serving().await?;
        self.outcome.first_answer.push(self.host.started().elapsed());
        eventually("all machines to be taken over", async || {
            Ok((self.serving().await? == self.steady).then_some(()))
        })
        .await
        .map_err(|error| error.context(self.host.log()))?;
        self.outcome.taken_over.push(self.host.started().elapsed());
        self.outcome.guests += before.len();
        self.known.extend(before.into_keys());
        self.all_answer().await?;
        if self.outcome.kills.is_multiple_of(10) {
            eprintln!("killed {} times", self.outcome.kills);
        }
        Ok(self)
    }

    /// Tells the agent to end, at some moment, and starts it again, or another build in its place.
    async fn restart(mut self, build: Option<PathBuf>) -> anyhow::Result<Self> {
        if let Some(build) = build {
            self.host = self.host.upgrade(build).await?;
        }
        self.dice.pause(PAUSE_MS).await;
        self.load.longest_wait();
        self.host = self.host.restart(Signal::SIGTERM).await?;
        self.all_answer().await?;
        self.outcome.gaps.push(self.load.longest_wait());
        let serving = self.serving().await?;
        if serving != self.steady {
            let what = format!("{:?} served, and now {serving:?}", self.steady);
            self.load.seen().fault(Fault::Ended, what);
        }
        if self.outcome.gaps.len().is_multiple_of(10) {
            eprintln!("restarted {} times", self.outcome.gaps.len());
        }
        Ok(self)
    }

    /// Compares the CPU time that was counted of the machines that serve with what their cgroups say.
    async fn counted_off(&self) -> anyhow::Result<f64> {
        let kernels = |machines: &[v1::Machine]| -> anyhow::Result<u64> {
            let mount = Cgroup::mount()?;
            let used = machines.iter().map(|machine| {
                let cgroup = Cgroup::at(mount.join(&machine.cgroup));
                cgroup.keyed_number("cpu.stat", "usage_usec").context("CPU time")
            });
            used.sum()
        };
        let mut machines = self.host.list_machines(false).await?;
        machines.retain(|machine| machine.account.starts_with("accounts/steady-"));
        let least = kernels(&machines)?;
        let mut counted = 0;
        for machine in &machines {
            let name = machine.name.clone();
            let machine = self.host.machines().get_machine(v1::GetMachineRequest { name }).await?;
            counted += machine.into_inner().usage.context("a use")?.cpu_ns / 1000;
        }
        let most = kernels(&machines)?;
        let off = counted.saturating_sub(most).max(least.saturating_sub(counted));
        Ok(off as f64 * 100.0 / most as f64)
    }

    /// Exactly what was acknowledged is there.
    async fn check_functions(&self) -> anyhow::Result<()> {
        let request = v1::ListFunctionsRequest {
            parent: "accounts/-".into(),
            page_size: 1000,
            ..Default::default()
        };
        let listed = self.host.functions().list_functions(request).await?.into_inner();
        ensure!(listed.next_page_token.is_empty(), "more functions than a page has");
        let listed = listed.functions.into_iter();
        let listed: BTreeMap<_, _> = listed.map(|function| (function.name, function.uid)).collect();
        let mut seen = self.load.seen();
        if listed != seen.functions {
            let what = format!("{:?} were acknowledged, and there are {listed:?}", seen.functions);
            seen.fault(Fault::WriteLost, what);
        }
        Ok(())
    }

    /// Ends the agent with its machines, and looks back.
    async fn end(self, pins: &BTreeSet<std::ffi::OsString>) -> anyhow::Result<Outcome> {
        let Self {
            host,
            load,
            known,
            mut outcome,
            ..
        } = self;
        let ended_before: BTreeSet<Ulid> = {
            let there = host.list_machines(false).await?;
            let there: BTreeSet<_> = there
                .iter()
                .map(|machine| id(&machine.name))
                .collect::<Result<_, _>>()?;
            known.difference(&there).copied().collect()
        };
        let ended = host.stop().await?;
        let mut seen = std::mem::take(&mut *load.seen());
        for what in left::behind(&ended, pins) {
            seen.fault(Fault::LeftOver, what);
        }
        for what in undecided(&ended, &ended_before) {
            seen.fault(Fault::Ended, what);
        }
        outcome.seen = seen;
        outcome.log = ended.log();
        Ok(outcome)
    }
}

/// The id that a resource name ends in.
fn id(name: &str) -> anyhow::Result<Ulid> {
    let id = name.rsplit('/').next().unwrap_or_default();
    id.parse().with_context(|| format!("a machine's id: {name}"))
}

/// Those of these machines of which no agent had decided that they end, with what the log says of them.
fn undecided(agent: &Processes, machines: &BTreeSet<Ulid>) -> Vec<String> {
    let log = agent.log();
    let decided = |machine: &Ulid| log.contains(&format!("DestroyMachine {{ machine: MachineId(Ulid({}))", machine.0));
    let mut told = Vec::new();
    for machine in machines.iter().filter(|machine| !decided(machine)) {
        let name = machine.to_string();
        let lines: Vec<_> = log.lines().filter(|line| line.contains(&name)).collect();
        told.push(format!("machine {name}: {}", lines.join("\n")));
    }
    told
}
