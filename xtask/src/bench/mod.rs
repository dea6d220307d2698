//! `cargo xtask bench NAME`: what is claimed of speed and memory, measured beside a peer in one run.
//!
//! Every bench prints a table, writes its bars with `--json FILE`, and ends with exit code 1 where one falls short.

mod amounts;
mod boot;
mod bpf;
mod credits;
mod flood;
mod guests;
mod invoke;
mod outlive;
mod path;
mod sample;
mod step;

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use stoker_testkit::{BIN_DIR, CACHE};

use crate::{
    build,
    cache::Cache,
    host::{self, HostCommand},
    image, kernel, lab, process,
    setup::{self, tools},
};
use sample::Sample;

/// What `main` measures in the host, and the file in its `$STOKER_LAB_OUT` in which each part leaves its bars.
const MAIN: &[(&str, Part)] = &[
    ("boot.jsonl", |cache, binaries, options| {
        boot::bars(cache, binaries, options.runs)
    }),
    ("invoke.jsonl", |cache, binaries, options| {
        invoke::bars(cache, binaries, options.runs)
    }),
    ("bpf.jsonl", |_, binaries, _| bpf::cost(binaries, host::place())),
];

/// The same of `world`.
const WORLD: &[(&str, Part)] = &[
    ("path.jsonl", |cache, binaries, options| {
        path::bars(cache, binaries, options.runs)
    }),
    ("flood.jsonl", |cache, binaries, options| {
        flood::bars(cache, binaries, options.runs)
    }),
];

/// The same of `outlive`.
const OUTLIVE: &[(&str, Part)] = &[("outlive.jsonl", |cache, binaries, options| {
    outlive::bars(cache, binaries, &options.outlive)
})];

/// The same of `guests`.
const GUESTS: &[(&str, Part)] = &[("guests.jsonl", guests::bars)];

/// The same of `credits`.
const CREDITS: &[(&str, Part)] = &[("credits.jsonl", credits::bars)];

/// The same of `ledger`.
const LEDGER: &[(&str, Part)] = &[
    ("cost.jsonl", |_, binaries, _| bpf::cost(binaries, host::place())),
    ("loads.jsonl", |_, binaries, options| {
        bpf::loads(binaries, host::place(), options.quick)
    }),
    ("accounts.jsonl", |_, binaries, _| {
        bpf::accounts(binaries, host::place())
    }),
];

/// The same of `amounts`.
const AMOUNTS: &[(&str, Part)] = &[
    ("plug.jsonl", amounts::plug),
    ("functions.jsonl", amounts::functions),
    ("machines.jsonl", amounts::machines),
];

/// How ours and what it is measured against are built, but for `outlive`, which has no peer, and what is to be quick.
const PROFILE: build::Profile = build::Profile::Dist;

/// Of a line that an example prints, so many bytes are shown: one may tell all that was seen.
const SHOWN: usize = 1000;

/// How long a host may take for what is measured in it.
const LIMIT: Duration = Duration::from_secs(3 * 3600);

/// Measures as the options say.
type Part = fn(&Cache, &Path, &Options) -> Result<Vec<Bar>>;

/// What `cargo xtask bench` was asked.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// What to measure.
    name: Name,
    /// Write the bars here, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How many times each thing is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// What of `credits` (of itself `machines`) or `amounts` (of itself all) is measured.
    #[arg(long, value_enum)]
    part: Option<PartName>,
    /// Have `guests`, `credits`, `ledger` and `amounts` soon built, and measured shortly: whether it works, not what it says.
    #[arg(long)]
    quick: bool,
    /// Measure `credits` in a lab whose kernel has sched_ext, Debian's latest.
    #[arg(long)]
    sched_ext: bool,
    /// Write the plot of `amounts` here: a machine's size against the demand.
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    #[command(flatten)]
    outlive: outlive::Counts,
    #[command(flatten)]
    role: credits::RoleOptions,
    /// Measure on this machine, which is the lab or can do what the lab can.
    #[arg(long, hide = true)]
    here: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Name {
    /// Boot, memory, invocations, and what counting costs.
    Main,
    /// What decisions cost, the path of a call without a VM, and what a flood does to others.
    World,
    /// What is lost where the agent is killed, restarted and upgraded under load: nothing.
    Outlive,
    /// What a hostile container costs its neighbour in the same machine, and who is charged for it.
    Guests,
    /// How soon one that wakes up runs among others that compute.
    Credits,
    /// What counting costs, how exact it is over ten minutes of mixed load, and what the agent takes to keep accounts.
    Ledger,
    /// How soon machines are plugged, how functions and machines come to what they need, and what deciding that costs.
    Amounts,
}

/// A part of `credits` or `amounts`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PartName {
    /// Of `credits`, machines and the agent: what credits do for one that wakes up, and what becomes of one without; and
    /// `payloads`, where machines are in the lab. Of `amounts`, a web server whose machine follows its load.
    Machines,
    /// Of `credits`, guests without a kernel on this machine, as far as its KVM runs them: the same, without an agent.
    Payloads,
    /// Of `credits`, plain processes in place of machines: what each way in which Linux can be told who runs first would do.
    Ways,
    /// Of `amounts`, how soon vCPUs and memory come and go, beside QEMU.
    Plug,
    /// Of `amounts`, functions whose amounts do not fit.
    Functions,
    /// Of `amounts`, what it costs to decide.
    Policy,
}

// === impl Options ===

impl Options {
    /// How programs are built of what can be quick.
    fn profile(&self) -> build::Profile {
        match self.quick {
            true => build::Profile::Release,
            false => PROFILE,
        }
    }

    /// What the lab boots.
    fn kernel(&self) -> lab::Kernel {
        lab::Kernel::with_sched_ext(self.sched_ext)
    }
}

// === impl Name ===

impl Name {
    fn text(self) -> &'static str {
        match self {
            Self::Main => "main",
            Self::World => "world",
            Self::Outlive => "outlive",
            Self::Guests => "guests",
            Self::Credits => "credits",
            Self::Ledger => "ledger",
            Self::Amounts => "amounts",
        }
    }

    /// What is measured in a host.
    fn parts(self) -> &'static [(&'static str, Part)] {
        match self {
            Self::Main => MAIN,
            Self::World => WORLD,
            Self::Outlive => OUTLIVE,
            Self::Guests => GUESTS,
            Self::Credits => CREDITS,
            Self::Ledger => LEDGER,
            Self::Amounts => AMOUNTS,
        }
    }
}

/// One thing measured and what it is held to.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bar {
    name: String,
    /// What was measured of ours.
    ours: Sample,
    /// The same of the peer, measured in turn with ours.
    peer: Option<Sample>,
    /// Which peer.
    peer_name: Option<String>,
    /// Median of ours by median of the peer's.
    ratio: Option<f64>,
    unit: String,
    /// The most that `ratio` may be, or the median of `ours` where there is no peer; without one it only informs.
    limit: Option<f64>,
    holds: bool,
}

// === impl Bar ===

impl Bar {
    /// Only told, held to nothing.
    fn told(name: &str, unit: &str, ours: Sample) -> Self {
        Self {
            name: name.into(),
            ours,
            peer: None,
            peer_name: None,
            ratio: None,
            unit: unit.into(),
            limit: None,
            holds: true,
        }
    }

    /// Held to a figure of its own.
    fn at_most(name: &str, unit: &str, ours: Sample, limit: f64) -> Self {
        let holds = ours.median() <= limit;
        Self {
            limit: Some(limit),
            holds,
            ..Self::told(name, unit, ours)
        }
    }

    /// Told beside the peer's figure, held to nothing.
    fn beside(name: &str, unit: &str, ours: Sample, peer_name: &str, peer: Sample) -> Self {
        Self {
            ratio: Some(ours.median() / peer.median()),
            peer: Some(peer),
            peer_name: Some(peer_name.into()),
            ..Self::told(name, unit, ours)
        }
    }

    /// Held to a share of the peer's figure.
    fn against(name: &str, unit: &str, ours: Sample, peer_name: &str, peer: Sample, limit: f64) -> Self {
        let beside = Self::beside(name, unit, ours, peer_name, peer);
        Self {
            limit: Some(limit),
            holds: beside.ratio.is_some_and(|ratio| ratio <= limit),
            ..beside
        }
    }

    fn row(&self) -> String {
        let peer = match (&self.peer_name, &self.peer) {
            (Some(name), Some(sample)) => format!("{name} {sample}"),
            _ => String::new(),
        };
        let verdict = match (self.limit, self.ratio) {
            (Some(limit), ratio) => format!(
                "{:.2} of at most {limit} {}",
                ratio.unwrap_or_else(|| self.ours.median()),
                if self.holds { "holds" } else { "FALLS SHORT" }
            ),
            (None, Some(ratio)) => format!("{ratio:.2}"),
            (None, None) => String::new(),
        };
        format!(
            "| {} | {} | {} | {} | {} |",
            self.name, self.unit, self.ours, peer, verdict
        )
    }
}

/// Measures and prints.
pub(crate) fn run(cache: &Cache, options: &Options) -> Result<()> {
    if options.role.run()? {
        return Ok(());
    }
    if options.here {
        let out = env::var_os("STOKER_LAB_OUT").context("STOKER_LAB_OUT is not set")?;
        return here(cache, Path::new(&out), options);
    }
    let bars = match options.name {
        Name::Main => main_everywhere(cache, options)?,
        Name::World => world_everywhere(cache, options)?,
        Name::Outlive => outlive_everywhere(cache, options)?,
        Name::Guests => guests_everywhere(cache, options)?,
        Name::Credits => credits_everywhere(cache, options)?,
        Name::Ledger => ledger_everywhere(cache, options)?,
        Name::Amounts => amounts_everywhere(cache, options)?,
    };
    if let Some(file) = &options.json {
        write(file, &bars)?;
    }
    println!("\n| what | unit | ours: median (least to most) | peer | bar |\n|---|---|---|---|---|");
    for bar in &bars {
        println!("{}", bar.row());
    }
    let short = bars.iter().filter(|bar| !bar.holds).count();
    if short > 0 {
        bail!("{short} of {} bars fall short", bars.len());
    }
    Ok(())
}

/// The cost of counting on this very machine, and everything else where microVMs can run.
fn main_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    // QEMU is the peer too.
    let steps = [image::STEPS, &[&kernel::TUNED, &lab::QEMU, &lab::KERNEL]].concat();
    setup::ensure(cache, &steps)?;
    image::everything(cache, PROFILE)?;
    let binaries = build::programs(cache, PROFILE)?;
    build::examples(cache, PROFILE, "stoker-ebpf")?;
    println!("Counting what counting costs on this machine.");
    let mut bars = bpf::cost(&binaries, host::HERE)?;
    bars.extend(in_host(cache, options, vec![(BIN_DIR.into(), binaries.into())])?);
    Ok(bars)
}

/// What decisions cost on this very machine, and all else in a host.
fn world_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    let binaries = build::for_examples(cache, PROFILE)?;
    let mut bars = step::bars(cache, options.runs)?;
    let variables = vec![
        (BIN_DIR.into(), binaries.into()),
        (path::INIT.into(), image::init_binary(cache).into()),
    ];
    bars.extend(in_host(cache, options, variables)?);
    Ok(bars)
}

/// All in a host.
fn outlive_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    let profile = build::Profile::Release;
    let other = build::other_agent(cache, profile)?;
    let binaries = build::for_examples(cache, profile)?;
    let variables = vec![
        (BIN_DIR.into(), binaries.into()),
        (outlive::OTHER_BUILD.into(), other.into()),
    ];
    in_host(cache, options, variables)
}

/// All in a host.
fn guests_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    let binaries = build::for_examples(cache, options.profile())?;
    in_host(cache, options, vec![(BIN_DIR.into(), binaries.into())])
}

/// Machines in a host. What needs none is measured on this very machine, as far as its KVM, its cgroups and its user let it, and plain
/// processes in a host too, where that is another.
fn credits_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    let part = credits::Part::of(options)?;
    if part == credits::Part::Payloads {
        return credits::payloads(&build::vmm(cache, options.profile())?, options);
    }
    let machines = part == credits::Part::Machines;
    let binaries = match machines {
        true => build::for_examples(cache, options.profile())?,
        // One of them loads our scheduler.
        false if options.sched_ext => build::examples(cache, options.profile(), "stoker-ebpf")?,
        false => cache.root().to_owned(),
    };
    let steps = host::steps(options.kernel());
    setup::ensure(cache, &steps)?;
    let mut bars = Vec::new();
    if !steps.is_empty() {
        bars.extend(match machines {
            true => credits::payloads(&binaries, options)?,
            false => credits::ways(options, None)?,
        });
    }
    bars.extend(in_host(cache, options, vec![(BIN_DIR.into(), binaries.into())])?);
    Ok(bars)
}

/// All on this very machine, and in a host where that is another.
fn ledger_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    let profile = options.profile();
    let steps = host::steps(options.kernel());
    setup::ensure(cache, &steps)?;
    let binaries = build::programs(cache, profile)?;
    for package in ["stoker-ebpf", "stoker-agent"] {
        build::examples(cache, profile, package)?;
    }
    let mut bars = Vec::new();
    if !steps.is_empty() {
        for (_, measure) in LEDGER {
            bars.extend(measure(cache, &binaries, options)?);
        }
    }
    bars.extend(in_host(cache, options, vec![(BIN_DIR.into(), binaries.into())])?);
    Ok(bars)
}

/// What decisions cost on this very machine, and all else in a host.
fn amounts_everywhere(cache: &Cache, options: &Options) -> Result<Vec<Bar>> {
    let parts = amounts::Part::of(options)?;
    let mut bars = Vec::new();
    if parts.iter().any(|part| !part.is_of_a_host()) {
        bars.extend(amounts::policy(cache)?);
    }
    if parts.iter().any(|part| part.is_of_a_host()) {
        setup::ensure(cache, amounts::STEPS)?;
        let binaries = build::for_examples(cache, options.profile())?;
        bars.extend(in_host(cache, options, vec![(BIN_DIR.into(), binaries.into())])?);
    }
    Ok(bars)
}

/// A bench of the crate `policy`, compiled as users are given it.
fn policy_bench(cache: &Cache, name: &str) -> Command {
    let mut bench = tools::cargo(cache);
    bench
        .args(["bench", "--quiet", "--package", "stoker-policy", "--bench", name])
        .args(["--profile", "dist"]);
    bench
}

/// Runs an example of the end-to-end tests, which measures on this machine, and takes the lines of JSON that it prints. What it tells
/// on standard error is shown.
fn example<T: DeserializeOwned>(cache: &Cache, binaries: &Path, name: &str, arguments: &[String]) -> Result<Vec<T>> {
    let text = process::output(
        Command::new(binaries.join("examples").join(name))
            .args(arguments)
            .stderr(Stdio::inherit())
            .env(CACHE, cache.root())
            .env(BIN_DIR, binaries),
    )?;
    let mut told = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        println!("  {}", line.get(..SHOWN).unwrap_or(line));
        told.push(serde_json::from_str(line).with_context(|| format!("understand {line}"))?);
    }
    ensure!(!told.is_empty(), "the example {name} told nothing");
    Ok(told)
}

/// Measures the parts of a bench that need a host.
fn in_host(cache: &Cache, options: &Options, variables: Vec<(String, OsString)>) -> Result<Vec<Bar>> {
    let out = tempfile::tempdir().context("make a folder")?;
    let mut command: Vec<OsString> = vec![env::current_exe().context("find xtask")?.into()];
    command.extend(["bench", options.name.text(), "--here", "--runs"].map(OsString::from));
    command.push(options.runs.to_string().into());
    command.extend(options.quick.then(|| "--quick".into()));
    command.extend(options.sched_ext.then(|| "--sched-ext".into()));
    command.extend(options.outlive.arguments().map(OsString::from));
    if let Some(part) = options.part.as_ref().and_then(ValueEnum::to_possible_value) {
        command.push(format!("--part={}", part.get_name()).into());
    }
    let code = host::run_in_host(
        cache,
        &HostCommand {
            command,
            env: variables,
            out: out.path().to_owned(),
            timeout: LIMIT,
            kernel: options.kernel(),
            labs: host::LABS,
        },
    )?;
    ensure!(code == 0, "measuring failed (exit code {code})");
    let mut bars = Vec::new();
    for (file, _) in options.name.parts() {
        bars.extend(read(&out.path().join(file))?);
    }
    let drawn = out.path().join(amounts::PLOT);
    if let Some(plot) = options.plot.as_ref().filter(|_| drawn.exists()) {
        fs::copy(&drawn, plot).with_context(|| format!("write {}", plot.display()))?;
    }
    Ok(bars)
}

/// Measures the parts that an earlier host, which died in the middle, has not.
fn here(cache: &Cache, out: &Path, options: &Options) -> Result<()> {
    let binaries = build::named()?;
    for (file, measure) in options.name.parts() {
        let file = out.join(file);
        if !file.exists() {
            let part = file.with_extension("part");
            write(&part, &measure(cache, &binaries, options)?)?;
            fs::rename(&part, &file).with_context(|| format!("write {}", file.display()))?;
        }
    }
    Ok(())
}

fn write(file: &Path, bars: &[Bar]) -> Result<()> {
    let mut lines = String::new();
    for bar in bars {
        lines += &(serde_json::to_string(bar)? + "\n");
    }
    fs::write(file, lines).with_context(|| format!("write {}", file.display()))
}

fn read(file: &Path) -> Result<Vec<Bar>> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| line.to_owned()))
        .collect()
}
