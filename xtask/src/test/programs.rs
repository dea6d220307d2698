//! Test programs: which there are, and how they are run.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::select::{Selection, Target};
use crate::{cache::Cache, process, setup::tools};

/// All of whose tests need a host.
const END_TO_END: &str = "stoker-tests";
/// What names an integration test that needs a host, in any other crate.
const LAB_PREFIX: &str = "lab_";
/// A test program that takes longer hangs.
const PROGRAM_LIMIT: Duration = Duration::from_secs(20 * 60);

/// A compiled test program.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Program {
    /// `PACKAGE TARGET`.
    pub(super) name: String,
    path: PathBuf,
    /// The package's folder, where tests are run.
    folder: PathBuf,
    pub(super) needs_host: bool,
    /// Parts of the paths of those of its tests that are run; all where there is none.
    paths: Vec<String>,
}

/// How many tests there were of each kind.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) passed: u64,
    pub(super) failed: u64,
}

impl Counts {
    pub(super) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

/// Compiles the selected tests and lists those programs in which there are any.
pub(super) fn compile(cache: &Cache, selection: &Selection) -> Result<Vec<Program>> {
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

/// Runs a test program and counts its tests; the time of each is shown.
pub(super) fn run_program(program: &Program, arguments: &[&str], env: &[(&str, &Path)]) -> Result<Counts> {
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
pub(super) fn counted(name: &str, command: &mut Command) -> Result<Counts> {
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
