//! `cargo xtask test`: every check there is, from nothing; with filters, the tests that they name ([`select`]).
//!
//! Tests run on this machine, but for those that need a host with KVM, cgroup v2 and eBPF: the test programs of the crate
//! `stoker-tests`, and integration tests named `lab_*` in any crate. These run one by one where `host` says, in the lab
//! all in one boot. The lab is not started where none of them is meant.

mod crates;
mod images;
mod node;
mod select;

use std::{
    collections::BTreeMap,
    env, fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::{Deserialize, Serialize};
use stoker_testkit::{BIN_DIR, CACHE, PACKAGES};

use crate::{
    build,
    cache::Cache,
    demo, dist,
    host::{self, HostCommand},
    image, kernel, lab, process,
    setup::{self, Step, tools},
};
use select::{Selection, Target, Workspace};

/// All of whose tests need a host.
const END_TO_END: &str = "stoker-tests";
/// What names an integration test that needs a host, in any other crate.
const LAB_PREFIX: &str = "lab_";
/// Packages outside the workspace, whose format is checked too.
const OUTSIDE: &[&str] = &["ebpf/programs", "demo", "guest/tests/crates", FUZZ];
/// The fuzz targets, which need flags of their own to run and are only compiled.
const FUZZ: &str = "vmm/fuzz";
/// A test program that takes longer hangs.
const PROGRAM_LIMIT: Duration = Duration::from_secs(20 * 60);
/// All that runs in the lab, its boot included.
const LAB_LIMIT: Duration = Duration::from_secs(60 * 60);
/// The test that installs our packages.
const PACKAGE_TEST: &str = "stoker-tests lab_package";
/// The test of Node.js.
const NODE_TEST: &str = "stoker-tests lab_node";
/// The test of images that other programs make.
const IMAGES_TEST: &str = "stoker-images tools";
/// The list of programs and the result, in the folder that is shared with the host.
const LIST: &str = "programs.json";
const RESULT: &str = "result.json";

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

/// A compiled test program.
#[derive(Debug, Serialize, Deserialize)]
struct Program {
    /// `PACKAGE TARGET`.
    name: String,
    path: PathBuf,
    /// The package's folder, where tests are run.
    folder: PathBuf,
    needs_host: bool,
    /// Parts of the paths of those of its tests that are run; all where there is none.
    paths: Vec<String>,
}

/// How many tests there were of each kind.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Counts {
    passed: u64,
    failed: u64,
}

impl Counts {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
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
        println!("\n=== {name}");
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
    let programs = compile(cache, &selection)?;
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
        counts.add(run_program(program, &[], &[(CACHE, cache.root())])?);
    }
    counts.add(doc_tests(cache, &selection)?);

    if let Some(binaries) = binaries {
        phases.begin("Tests that need a host");
        counts.add(run_in_host(cache, &in_host, binaries, kernel)?);
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

/// Compiles the selected tests and lists those programs in which there are any.
fn compile(cache: &Cache, selection: &Selection) -> Result<Vec<Program>> {
    if let Some(mut examples) = selection.examples(tools::cargo(cache)) {
        process::run(&mut examples)?;
    }
    let mut cargo = tools::cargo(cache);
    cargo.args(["test", "--no-run", "--message-format=json-render-diagnostics"]);
    selection.restrict_build(&mut cargo);
    let mut cargo = cargo
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo")?;
    let output = cargo.stdout.take().context("no pipe from cargo")?;
    let mut programs = Vec::new();
    for line in BufReader::new(output).lines() {
        programs.extend(program(&line.context("read cargo's messages")?, selection)?);
    }
    if !cargo.wait().context("wait for cargo")?.success() {
        bail!("the tests do not compile");
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    if selection.paths.is_empty() {
        return Ok(programs);
    }
    let mut matching = Vec::new();
    for program in programs {
        if has_matching_tests(&program)? {
            matching.push(program);
        }
    }
    Ok(matching)
}

/// Whether the program has tests of these paths; it lists them without running any, so that this needs no host.
fn has_matching_tests(program: &Program) -> Result<bool> {
    let mut command = Command::new(&program.path);
    command.arg("--list").args(&program.paths).current_dir(&program.folder);
    let list = process::output(&mut command)?;
    Ok(list.lines().any(|line| line.ends_with(": test")))
}

/// A message of cargo's, as far as it is about a compiled program.
#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<Target>,
    profile: Option<Profile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The test program that this line of cargo's output speaks of, if it does and the program is meant.
fn program(line: &str, selection: &Selection) -> Result<Option<Program>> {
    let message: Message = serde_json::from_str(line).with_context(|| format!("understand cargo's message {line}"))?;
    let (Some(manifest), Some(target), Some(profile), Some(path)) = (
        message.manifest_path,
        message.target,
        message.profile,
        message.executable,
    ) else {
        return Ok(None);
    };
    if message.reason != "compiler-artifact" || !profile.test || !selection.has_program(&target.name) {
        return Ok(None);
    }
    let folder = manifest.parent().context("a manifest without a folder")?.to_owned();
    let manifest_text = fs::read_to_string(&manifest).with_context(|| format!("read {}", manifest.display()))?;
    let package = manifest_text
        .lines()
        .find_map(|line| line.strip_prefix("name = \""))
        .and_then(|rest| rest.split('"').next())
        .with_context(|| format!("{} names no package", manifest.display()))?
        .to_owned();
    let is_integration = target.kind.iter().any(|kind| kind == "test");
    let needs_host = is_integration && (package == END_TO_END || target.name.starts_with(LAB_PREFIX));
    Ok(Some(Program {
        name: format!("{package} {}", target.name),
        path,
        folder,
        needs_host,
        paths: selection.paths.clone(),
    }))
}

fn doc_tests(cache: &Cache, selection: &Selection) -> Result<Counts> {
    let mut command = tools::cargo(cache);
    command.args(["test", "--quiet", "--doc", "--no-fail-fast"]);
    if !selection.restrict_doc_tests(&mut command) {
        return Ok(Counts::default());
    }
    counted("documentation", &mut command)
}

/// Runs the programs, which need a host, natively or in one boot of the lab.
fn run_in_host(cache: &Cache, programs: &[Program], binaries: PathBuf, kernel: lab::Kernel) -> Result<Counts> {
    let out = tempfile::Builder::new()
        .prefix("stoker-test-")
        .tempdir()
        .context("make a folder for results")?;
    fs::write(out.path().join(LIST), serde_json::to_vec(programs)?).context("write the list of tests")?;
    let this = env::current_exe().context("find xtask itself")?;
    let code = host::run_in_host(
        cache,
        &HostCommand {
            command: vec![this.into(), "tests-here".into()],
            env: vec![
                (BIN_DIR.to_owned(), binaries.into()),
                (CACHE.to_owned(), cache.root().into()),
                (PACKAGES.to_owned(), packages(cache).into()),
            ],
            out: out.path().to_owned(),
            timeout: LAB_LIMIT,
            kernel,
            labs: host::LABS,
        },
    )?;
    let results = results(out.path())?;
    // What ended before it could write its result has failed, whatever passed in it.
    ensure!(
        results.len() == programs.len(),
        "the tests that need a host ended with code {code} and {} results of {}",
        results.len(),
        programs.len()
    );
    let mut counts = Counts::default();
    for (name, result) in results {
        println!("{:8.1} s  {name}", result.seconds);
        counts.add(result.counts);
    }
    Ok(counts)
}

/// What came of a program that ran in a host.
#[derive(Debug, Serialize, Deserialize)]
struct Outcome {
    counts: Counts,
    seconds: f64,
}

/// The results that are there so far, by the program's name.
fn results(out: &Path) -> Result<BTreeMap<String, Outcome>> {
    match fs::read(out.join(RESULT)) {
        Ok(text) => serde_json::from_slice(&text).context("understand the results of the tests that need a host"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(error) => Err(error).context("read the results of the tests that need a host"),
    }
}

/// Runs the listed programs that have no result yet; this is what runs in the host.
pub(crate) fn run_here() -> Result<ExitCode> {
    let out = PathBuf::from(env::var_os("STOKER_LAB_OUT").context("STOKER_LAB_OUT is not set")?);
    let list = fs::read(out.join(LIST)).context("read the list of tests")?;
    let programs: Vec<Program> = serde_json::from_slice(&list).context("understand the list of tests")?;
    // Of an earlier host that died in the middle.
    let mut results = results(&out)?;
    for program in programs {
        if results.contains_key(&program.name) {
            continue;
        }
        let start = Instant::now();
        // One at a time: they start machines, and time them.
        let counts = run_program(&program, &["--test-threads=1"], &[])?;
        let seconds = start.elapsed().as_secs_f64();
        results.insert(program.name, Outcome { counts, seconds });
        let part = out.join("result.part");
        fs::write(&part, serde_json::to_vec(&results)?).context("write the results")?;
        fs::rename(&part, out.join(RESULT)).context("write the results")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a test program and counts its tests; the time of each is shown.
fn run_program(program: &Program, arguments: &[&str], env: &[(&str, &Path)]) -> Result<Counts> {
    let mut command = Command::new(&program.path);
    command
        .args(["-Z", "unstable-options", "--report-time"])
        .args(arguments)
        .args(&program.paths)
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        .envs(env.iter().copied())
        // The test harness shows times only where unstable options are allowed; nothing is compiled here.
        .env("RUSTC_BOOTSTRAP", "1");
    counted(&program.name, &mut command)
}

/// Runs what prints as the test harness does, shows what it prints, and counts.
fn counted(name: &str, command: &mut Command) -> Result<Counts> {
    println!("\n--- {name}");
    let (mut child, reader) = process::piped(command)?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(reader).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                break;
            }
        }
    });
    let start = Instant::now();
    let mut counts = Counts::default();
    let status = loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(line) => {
                println!("{line}");
                counts.add(count(&line));
                continue;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => thread::sleep(Duration::from_millis(10)),
        }
        // Nothing to show: it may have ended, also where something it left behind holds on to the pipe.
        if let Some(status) = child.try_wait().context("wait for a test program")? {
            break Some(status);
        }
        if start.elapsed() > PROGRAM_LIMIT {
            child.kill().context("stop a test program that hangs")?;
            child.wait().context("wait for a test program")?;
            println!("{name} was stopped after {} s", PROGRAM_LIMIT.as_secs());
            break None;
        }
    };
    if status.is_none_or(|status| !status.success()) && counts.failed == 0 {
        println!(
            "{name} failed: {}",
            status.map_or("it hung".to_owned(), |status| status.to_string())
        );
        counts.failed += 1;
    }
    Ok(counts)
}

/// What this line of the harness counts: `test result: ok. 3 passed; 0 failed; ...`.
fn count(line: &str) -> Counts {
    let Some(rest) = line.trim_start().strip_prefix("test result: ") else {
        return Counts::default();
    };
    let number = |what: &str| {
        rest.split([';', '.'])
            .find_map(|part| part.trim().strip_suffix(what))
            .and_then(|number| number.trim().parse().ok())
            .unwrap_or(0)
    };
    Counts {
        passed: number("passed"),
        failed: number("failed"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_is_counted() {
        let line = "test result: FAILED. 12 passed; 3 failed; 1 ignored; 0 measured; 0 filtered out; finished in 1.02s";
        assert_eq!(count(line), Counts { passed: 12, failed: 3 });
        assert_eq!(count("test a ... ok <0.1s>"), Counts::default());
    }

    #[test]
    fn a_program_that_fails_without_a_count_counts_as_failed() {
        let counts = counted("false", &mut Command::new("false")).unwrap();
        assert_eq!(counts, Counts { passed: 0, failed: 1 });
    }

    #[test]
    fn what_a_program_leaves_behind_is_not_waited_for() {
        let mut command = Command::new("sh");
        command.args(["-c", "sleep 30 & echo 'test result: ok. 2 passed; 0 failed'; exit 0"]);
        let start = Instant::now();
        assert_eq!(counted("sh", &mut command).unwrap(), Counts { passed: 2, failed: 0 });
        assert!(start.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn only_integration_tests_named_for_it_need_the_lab() {
        let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let everything = Selection::everything();
        let needs_host = |name: &str, kind: &str| {
            let line = format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"{manifest}","target":{{"name":"{name}","kind":["{kind}"]}},
                "profile":{{"test":true}},"executable":"/t"}}"#
            );
            program(&line, &everything).unwrap().unwrap().needs_host
        };
        assert!(needs_host("lab_boot", "test"));
        assert!(!needs_host("boot", "test"));
        assert!(!needs_host("lab_boot", "bin"));
        assert!(
            program(r#"{"reason":"build-finished","success":true}"#, &everything)
                .unwrap()
                .is_none()
        );
    }
}
