//! The test programs that need a host: natively, or all in one boot of the lab.
//!
//! A microVM of a test mostly keeps one processor busy, so that two programs are done in little more time than one. Those in
//! which time is measured, or that change what all of the host has, run alone after the others.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use stoker_testkit::{BIN_DIR, CACHE, PACKAGES};

use super::{
    packages,
    programs::{Counts, Program, Shown, run_program},
};
use crate::{
    cache::Cache,
    host::{self, HostCommand},
    lab,
};

/// Programs that run one after the other, beside those of the other list: one starts containers and VMMs by themselves, the
/// other agents, of which there is one at a time. All that are not named run alone.
const SIDE_BY_SIDE: [&[&str]; 2] = [
    &[
        "stoker-init lab_container",
        "stoker-init lab_images",
        "stoker-vmm lab_boot",
    ],
    &[
        "stoker-agent lab_size",
        "stoker-tests lab_bad_functions",
        "stoker-tests lab_bad_hosts",
        "stoker-tests lab_functions",
        "stoker-tests lab_logs",
        "stoker-tests lab_machine_ends",
        "stoker-tests lab_metrics",
        "stoker-tests lab_node",
        "stoker-tests lab_package",
        "stoker-tests lab_scratch",
        "stoker-tests lab_service",
        "stoker-tests lab_stream",
    ],
];
/// All that runs in the lab, its boot included.
const LAB_LIMIT: Duration = Duration::from_secs(60 * 60);
/// The list of programs and the result, in the folder that is shared with the host.
const LIST: &str = "programs.json";
const RESULT: &str = "result.json";

/// Runs the programs, which need a host, natively or in one boot of the lab.
pub(super) fn run_in_host(
    cache: &Cache,
    programs: &[Program],
    binaries: PathBuf,
    kernel: lab::Kernel,
) -> Result<Counts> {
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
    let mut programs: Vec<Program> = serde_json::from_slice(&list).context("understand the list of tests")?;
    // Of an earlier host that died in the middle.
    let results = results(&out)?;
    programs.retain(|program| !results.contains_key(&program.name));
    let results = Results {
        out,
        outcomes: Mutex::new(results),
    };
    let lanes = SIDE_BY_SIDE.map(|names| take(&mut programs, names));
    let shown = if lanes.iter().all(|lane| !lane.is_empty()) {
        Shown::Beside
    } else {
        Shown::Alone
    };
    thread::scope(|scope| {
        let lanes = lanes
            .each_ref()
            .map(|lane| scope.spawn(|| run_all(lane, shown, &results)));
        for lane in lanes {
            match lane.join() {
                Ok(done) => done?,
                Err(_) => bail!("a thread that runs tests ended"),
            }
        }
        Ok(())
    })?;
    run_all(&programs, Shown::Alone, &results)?;
    Ok(ExitCode::SUCCESS)
}

/// Takes the programs of these names out of the list, in the order of the names.
fn take(programs: &mut Vec<Program>, names: &[&str]) -> Vec<Program> {
    let place = |program: &Program| names.iter().position(|name| *name == program.name);
    let mut taken: Vec<Program> = programs.extract_if(.., |program| place(program).is_some()).collect();
    taken.sort_by_key(place);
    taken
}

/// Runs one program after the other.
fn run_all(programs: &[Program], shown: Shown, results: &Results) -> Result<()> {
    for program in programs {
        let start = Instant::now();
        // One test at a time: they start machines.
        let counts = run_program(program, &["--test-threads=1"], &[], shown)?;
        let seconds = start.elapsed().as_secs_f64();
        results.add(program.name.clone(), Outcome { counts, seconds })?;
    }
    Ok(())
}

/// What came of programs so far, also in a file that outlives this host.
struct Results {
    out: PathBuf,
    outcomes: Mutex<BTreeMap<String, Outcome>>,
}

// === impl Results ===

impl Results {
    fn add(&self, name: String, outcome: Outcome) -> Result<()> {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        outcomes.insert(name, outcome);
        let part = self.out.join("result.part");
        fs::write(&part, serde_json::to_vec(&*outcomes)?).context("write the results")?;
        fs::rename(&part, self.out.join(RESULT)).context("write the results")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// A name that is written wrongly would only make its program run alone.
    #[test]
    fn what_runs_side_by_side_is_there() {
        let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        for name in SIDE_BY_SIDE.concat() {
            let (package, target) = name.split_once(' ').unwrap();
            let folder = checkout.join(match package {
                "stoker-tests" => "tests",
                "stoker-init" => "guest/tests",
                "stoker-vmm" => "vmm/tests",
                _ => "agent/tests",
            });
            let is_there = [format!("{target}.rs"), format!("{target}/main.rs")]
                .iter()
                .any(|file| folder.join(file).exists());
            assert!(is_there, "{name}");
        }
    }
}
