//! What it costs to decide about machines that were launched, as the bench `scale` of the crate `policy` measures it.

use std::{fs, path::Path};

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;

use super::super::{Bar, policy_bench, sample::Sample};
use crate::{cache::Cache, process};

/// The most that a round of a thousand machines may take, in ms.
const LIMIT_MS: f64 = 1.0;

/// What criterion writes of a benchmark (`benchmark.json` of its folder `new`).
#[derive(Deserialize)]
struct Benchmark {
    full_id: String,
}

/// And of its samples (`sample.json`): each so many rounds, which took so many ns in all.
#[derive(Deserialize)]
struct Samples {
    iters: Vec<f64>,
    times: Vec<f64>,
}

pub(in super::super) fn bars(cache: &Cache) -> Result<Vec<Bar>> {
    println!("Deciding about a thousand machines with four thresholds each.");
    let folder = tempfile::tempdir().context("make a folder")?;
    process::run(policy_bench(cache, "scale").env("CRITERION_HOME", folder.path()))?;
    judge(folder.path())
}

/// A bar for each benchmark, in the order of their names.
fn judge(folder: &Path) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for entry in fs::read_dir(folder).context("list what criterion wrote")? {
        let new = entry.context("list what criterion wrote")?.path().join("new");
        let Ok(text) = fs::read(new.join("benchmark.json")) else {
            continue;
        };
        let Benchmark { full_id } = serde_json::from_slice(&text).context("understand benchmark.json")?;
        let text = fs::read(new.join("sample.json")).with_context(|| format!("read the samples of {full_id}"))?;
        let samples: Samples = serde_json::from_slice(&text).with_context(|| format!("the samples of {full_id}"))?;
        let ms = samples
            .times
            .iter()
            .zip(&samples.iters)
            .map(|(ns, rounds)| ns / rounds / 1e6);
        let name = full_id.trim_start_matches("scale/");
        bars.push(Bar::at_most(name, "ms", Sample::new(ms.collect())?, LIMIT_MS));
    }
    ensure!(!bars.is_empty(), "criterion wrote nothing");
    bars.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(bars)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_read_as_criterion_writes_them() {
        let folder = tempfile::tempdir().unwrap();
        for (name, ns) in [("b", 9e5), ("a", 2e6)] {
            let new = folder.path().join(name).join("new");
            fs::create_dir_all(&new).unwrap();
            let id =
                format!(r#"{{"group_id": "scale/{name}", "full_id": "scale/{name}", "directory_name": "{name}"}}"#);
            fs::write(new.join("benchmark.json"), id).unwrap();
            let times = [ns * 10.0, ns * 20.0].map(|ns| ns.to_string()).join(",");
            let samples = format!(r#"{{"sampling_mode": "Linear", "iters": [10.0, 20.0], "times": [{times}]}}"#);
            fs::write(new.join("sample.json"), samples).unwrap();
        }
        fs::create_dir(folder.path().join("report")).unwrap();
        let bars = judge(folder.path()).unwrap();
        let told: Vec<_> = bars
            .iter()
            .map(|bar| (&*bar.name, bar.ours.median(), bar.holds))
            .collect();
        assert_eq!(told, [("a", 2.0, false), ("b", 0.9, true)]);
        assert!(judge(&folder.path().join("report")).is_err());
    }
}
