//! `cargo xtask test`: every check there is, from nothing; with filters, the tests that they name ([`select`]).
//!
//! Tests run on this machine, but for those that need a host with KVM, cgroup v2 and eBPF: the test programs of the crate
//! `stoker-tests`, and integration tests named `lab_*` in any crate. These run where `host` says ([`in_host`]). The
//! lab is not started where none of them is meant.

mod crates;
mod images;
mod in_host;
mod node;
mod programs;
mod select;

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use clap::Args;
use stoker_testkit::CACHE;

use crate::{
    build,
    cache::Cache,
    demo, dist, host, image, kernel, lab, process,
    setup::{self, Step, tools},
};
pub(crate) use in_host::run_here;
use programs::{Counts, Program};
use select::{Selection, Workspace};

/// Packages outside the workspace, whose format is checked too.
const OUTSIDE: &[&str] = &["ebpf/programs", "demo", "guest/tests/crates", FUZZ];
/// The fuzz targets, which need flags of their own to run and are only compiled.
const FUZZ: &str = "vmm/fuzz";
/// The test that installs our packages.
const PACKAGE_TEST: &str = "stoker-tests lab_package";
/// The test of Node.js.
const NODE_TEST: &str = "stoker-tests lab_node";
/// The test of images that other programs make.
const IMAGES_TEST: &str = "stoker-images tools";

/// What `cargo xtask test` was asked.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Run only these tests, and no checks. A FILTER is the name or the folder of a package (stoker-vmm, vmm), the name of a
    /// test program (lab_boot, native), or a part of a test's path (zip::tests, is_refused), looked for in this order. Of
    /// several, those of one kind add up and each kind narrows down the others.
    #[arg(value_name = "FILTER")]
    filters: Vec<String>,
    /// Run what needs a host in a lab whose kernel has sched_ext, Debian's latest.
    #[arg(long)]
    sched_ext: bool,
}

/// What the phases of a run took.
struct Phases {
    start: Instant,
    done: Vec<(&'static str, Duration)>,
    current: Option<(&'static str, Instant)>,
}

// === impl Phases ===

impl Phases {
    fn new() -> Self {
        Self {
            start: Instant::now(),
            done: Vec::new(),
            current: None,
        }
    }

    /// Ends the phase before, if there is one, and says which begins.
    fn begin(&mut self, name: &'static str) {
        self.end();
        println!("\n=== {name} (after {} s)", self.start.elapsed().as_secs());
        self.current = Some((name, Instant::now()));
    }

    fn end(&mut self) {
        if let Some((name, start)) = self.current.take() {
            self.done.push((name, start.elapsed()));
        }
    }

    fn sum_up(mut self) {
        self.end();
        println!();
        for (name, took) in &self.done {
            println!("{:8.1} s  {name}", took.as_secs_f64());
        }
        println!("All of it took {} s.", self.start.elapsed().as_secs());
    }
}

/// Runs what is meant, all without filters, and ends with a line that sums it up.
pub(crate) fn run(cache: &Cache, options: &Options) -> Result<ExitCode> {
    let mut phases = Phases::new();
    let kernel = lab::Kernel::with_sched_ext(options.sched_ext);
    let selection = Workspace::read(cache)?.select(&cache.source(""), &options.filters)?;
    if selection.is_everything {
        // In one go, so that all that is missing is said at once.
        let steps = [
            host_steps(kernel),
            dist::TEST_STEPS.to_vec(),
            vec![&tools::CARGO_DENY, &node::FUNCTION, &images::TOOLS],
        ];
        setup::ensure(cache, &steps.concat())?;
        checks(cache, &mut phases)?;
    } else {
        setup::ensure(cache, &[&tools::RUST_SRC])?;
    }

    phases.begin("Compiling the tests");
    let programs = programs::compile(cache, &selection)?;
    let (in_host, here): (Vec<Program>, Vec<Program>) = programs.into_iter().partition(|program| program.needs_host);
    // Optimised ones: the lab's processors are slow.
    let binaries = if in_host.is_empty() {
        None
    } else {
        phases.begin("Compiling what runs in a host");
        setup::ensure(cache, &host_steps(kernel))?;
        image::everything(cache, build::Profile::Release)?;
        let binaries = build::programs(cache, build::Profile::Release)?;
        let has = |test| in_host.iter().any(|program| program.name == test);
        if has(PACKAGE_TEST) {
            dist::for_test(cache, &packages(cache))?;
        }
        if has(NODE_TEST) {
            setup::ensure(cache, &[&node::FUNCTION])?;
        }
        Some(binaries)
    };

    phases.begin("Tests on this machine");
    if here.iter().any(|program| program.name == IMAGES_TEST) {
        setup::ensure(cache, &[&images::TOOLS])?;
    }
    let mut counts = Counts::default();
    for program in &here {
        counts.add(programs::run_program(program, &[], &[(CACHE, cache.root())])?);
    }
    counts.add(doc_tests(cache, &selection)?);

    if let Some(binaries) = binaries {
        phases.begin("Tests that need a host");
        counts.add(in_host::run_in_host(cache, &in_host, binaries, kernel)?);
    }

    ensure!(counts != Counts::default(), "no test matches");
    phases.sum_up();
    println!("{} passed, {} failed", counts.passed, counts.failed);
    Ok(if counts.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// What must be made before tests that need a host are run.
fn host_steps(kernel: lab::Kernel) -> Vec<&'static Step> {
    let mut steps = [image::STEPS, &[&kernel::TUNED]].concat();
    steps.extend(host::steps(kernel));
    steps.extend(demo::FUNCTIONS);
    steps.push(&crates::CRATES);
    steps
}

/// The folder of the packages that are tested.
fn packages(cache: &Cache) -> PathBuf {
    tools::target_dir(cache).join("tested-packages")
}

/// Formatting, lints, licences and sources of dependencies.
fn checks(cache: &Cache, phases: &mut Phases) -> Result<()> {
    phases.begin("Format");
    process::run(tools::cargo(cache).args(["fmt", "--all", "--check"]))?;
    for folder in OUTSIDE {
        for manifest in manifests(&cache.source(folder)) {
            process::run(
                tools::cargo(cache)
                    .args(["fmt", "--check", "--manifest-path"])
                    .arg(manifest),
            )?;
        }
    }
    phases.begin("Lints");
    process::run(tools::cargo(cache).args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    phases.begin("Fuzz targets");
    process::run(
        tools::cargo(cache)
            // Without the fuzzer itself, which is C++.
            .args(["clippy", "--locked", "--no-default-features", "--manifest-path"])
            .arg(cache.source(FUZZ).join("Cargo.toml"))
            .arg("--target-dir")
            .arg(tools::target_dir(cache).join("fuzz"))
            .args(["--", "-D", "warnings"]),
    )?;
    phases.begin("Dependencies");
    process::run(
        Command::new(cache.path("bin/cargo-deny"))
            .args(["--offline", "check", "bans", "licenses", "sources"])
            .current_dir(cache.source("")),
    )
}

/// The manifests in a folder or in those directly in it.
fn manifests(folder: &Path) -> Vec<PathBuf> {
    let inner = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let mut manifests: Vec<PathBuf> = inner
        .chain([folder.to_owned()])
        .map(|folder| folder.join("Cargo.toml"))
        .filter(|path| path.exists())
        .collect();
    manifests.sort();
    manifests
}

fn doc_tests(cache: &Cache, selection: &Selection) -> Result<Counts> {
    let mut command = tools::cargo(cache);
    command.args(["test", "--quiet", "--doc", "--no-fail-fast"]);
    if !selection.restrict_doc_tests(&mut command) {
        return Ok(Counts::default());
    }
    programs::counted("documentation", &mut command)
}
