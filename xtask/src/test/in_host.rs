//! The test programs that need a host: natively, or all in one boot of the lab. They run one after the other: a microVM and what serves
//! it keep two emulated processors busy, so that two programs at a time are done no sooner.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use stoker_testkit::{BIN_DIR, CACHE, PACKAGES};

use super::{
    packages,
    programs::{Counts, Program, run_program},
};
use crate::{
    cache::Cache,
    host::{self, HostCommand},
    lab,
};

/// All that runs in the lab, its boot included.
const LAB_LIMIT: Duration = Duration::from_secs(90 * 60);
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
