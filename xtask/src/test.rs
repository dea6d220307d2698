//! `cargo xtask test`: every check there is, from nothing.
//!
//! Tests run on this machine, but for those that need a host with KVM, cgroup v2 and eBPF: the test programs of the crate
//! `stoker-tests`, and integration tests named `lab_*` in any crate. These run one by one where `host` says, in the lab
//! all in one boot.

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
use serde::{Deserialize, Serialize};

use crate::{
    build,
    cache::Cache,
    demo,
    host::{self, HostCommand},
    image, kernel, process,
    setup::{self, tools},
};

/// All of whose tests need a host.
const END_TO_END: &str = "stoker-tests";
/// What names an integration test that needs a host, in any other crate.
const LAB_PREFIX: &str = "lab_";
/// Packages outside the workspace, which it formats too.
const OUTSIDE: &[&str] = &["ebpf/programs", "demo"];
/// A test program that takes longer hangs.
const PROGRAM_LIMIT: Duration = Duration::from_secs(20 * 60);
/// All that runs in the lab, its boot included.
const LAB_LIMIT: Duration = Duration::from_secs(40 * 60);
/// The list of programs and the result, in the folder that is shared with the host.
const LIST: &str = "programs.json";
const RESULT: &str = "result.json";

/// A compiled test program.
#[derive(Debug, Serialize, Deserialize)]
struct Program {
    /// `PACKAGE TARGET`.
    name: String,
    path: PathBuf,
    /// The package's folder, where tests are run.
    folder: PathBuf,
    needs_host: bool,
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

/// Runs everything and ends with a line that sums it up.
pub(crate) fn run(cache: &Cache) -> Result<ExitCode> {
    let start = Instant::now();
    let mut steps = [image::STEPS, &[&kernel::TUNED, &tools::CARGO_DENY]].concat();
    steps.extend(host::steps());
    steps.extend(demo::FUNCTIONS);
    setup::ensure(cache, &steps)?;
    image::everything(cache)?;
    checks(cache)?;

    heading("Compiling the tests");
    let programs = compile(cache)?;
    // Released ones: they are what users run, and the lab's processors are slow.
    let binaries = build::release(cache)?;

    heading("Tests on this machine");
    let mut counts = Counts::default();
    for program in programs.iter().filter(|program| !program.needs_host) {
        counts.add(run_program(program, &[])?);
    }
    counts.add(doc_tests(cache)?);

    heading("Tests that need a host");
    counts.add(in_host(cache, programs, binaries)?);

    println!("\nAll of it took {} s.", start.elapsed().as_secs());
    println!("{} passed, {} failed", counts.passed, counts.failed);
    Ok(if counts.failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Formatting, lints, licences and sources of dependencies.
fn checks(cache: &Cache) -> Result<()> {
    heading("Format");
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
    heading("Lints");
    process::run(tools::cargo(cache).args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    heading("Dependencies");
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

/// Compiles all tests of the workspace and lists their programs.
fn compile(cache: &Cache) -> Result<Vec<Program>> {
    let mut cargo = tools::cargo(cache)
        .args([
            "test",
            "--workspace",
            "--no-run",
            "--message-format=json-render-diagnostics",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("start cargo")?;
    let output = cargo.stdout.take().context("no pipe from cargo")?;
    let mut programs = Vec::new();
    for line in BufReader::new(output).lines() {
        programs.extend(program(&line.context("read cargo's messages")?)?);
    }
    if !cargo.wait().context("wait for cargo")?.success() {
        bail!("the tests do not compile");
    }
    programs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(programs)
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
struct Target {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// The test program that this line of cargo's output speaks of, if it does.
fn program(line: &str) -> Result<Option<Program>> {
    let message: Message = serde_json::from_str(line).with_context(|| format!("understand cargo's message {line}"))?;
    let (Some(manifest), Some(target), Some(profile), Some(path)) = (
        message.manifest_path,
        message.target,
        message.profile,
        message.executable,
    ) else {
        return Ok(None);
    };
    if message.reason != "compiler-artifact" || !profile.test {
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
    }))
}

fn doc_tests(cache: &Cache) -> Result<Counts> {
    let mut command = tools::cargo(cache);
    command.args(["test", "--quiet", "--workspace", "--doc", "--no-fail-fast"]);
    counted("documentation", &mut command)
}

/// Runs the programs that need a host, natively or in one boot of the lab.
fn in_host(cache: &Cache, programs: Vec<Program>, binaries: PathBuf) -> Result<Counts> {
    let programs: Vec<Program> = programs.into_iter().filter(|program| program.needs_host).collect();
    let out = tempfile::Builder::new()
        .prefix("stoker-test-")
        .tempdir()
        .context("make a folder for results")?;
    fs::write(out.path().join(LIST), serde_json::to_vec(&programs)?).context("write the list of tests")?;
    let this = env::current_exe().context("find xtask itself")?;
    let code = host::run_in_host(
        cache,
        &HostCommand {
            command: vec![this.into(), "tests-here".into()],
            env: vec![
                (build::BIN_DIR.to_owned(), binaries.into()),
                ("STOKER_CACHE".to_owned(), cache.root().into()),
            ],
            out: out.path().to_owned(),
            timeout: LAB_LIMIT,
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
        let counts = run_program(&program, &["--test-threads=1"])?;
        let seconds = start.elapsed().as_secs_f64();
        results.insert(program.name, Outcome { counts, seconds });
        let part = out.join("result.part");
        fs::write(&part, serde_json::to_vec(&results)?).context("write the results")?;
        fs::rename(&part, out.join(RESULT)).context("write the results")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs a test program and counts its tests; the time of each is shown.
fn run_program(program: &Program, arguments: &[&str]) -> Result<Counts> {
    let mut command = Command::new(&program.path);
    command
        .args(["-Z", "unstable-options", "--report-time"])
        .args(arguments)
        .current_dir(&program.folder)
        .env("CARGO_MANIFEST_DIR", &program.folder)
        // The test harness shows times only where unstable options are allowed; nothing is compiled here.
        .env("RUSTC_BOOTSTRAP", "1");
    counted(&program.name, &mut command)
}

/// Runs what prints as the test harness does, shows what it prints, and counts.
fn counted(name: &str, command: &mut Command) -> Result<Counts> {
    println!("\n--- {name}");
    let (reader, writer) = std::io::pipe().context("make a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("share the pipe")?)
        .stderr(writer)
        .spawn()
        .with_context(|| format!("start {}", process::line(command)))?;
    // Ours must be closed, or the pipe never ends.
    command.stdout(Stdio::null()).stderr(Stdio::null());
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

fn heading(text: &str) {
    println!("\n=== {text}");
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
        let needs_host = |name: &str, kind: &str| {
            let line = format!(
                r#"{{"reason":"compiler-artifact","manifest_path":"{manifest}","target":{{"name":"{name}","kind":["{kind}"]}},
                "profile":{{"test":true}},"executable":"/t"}}"#
            );
            program(&line).unwrap().unwrap().needs_host
        };
        assert!(needs_host("lab_boot", "test"));
        assert!(!needs_host("boot", "test"));
        assert!(!needs_host("lab_boot", "bin"));
        assert!(
            program(r#"{"reason":"build-finished","success":true}"#)
                .unwrap()
                .is_none()
        );
    }
}
