//! How soon vCPUs and memory come and go, by our VMM and beside it by QEMU's q35.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use super::super::{Bar, Options, sample::Sample};
use crate::{cache::Cache, lab};

/// In ms: the most in which what a guest has freed must be back at the host.
const FREED_MS: f64 = 5000.0;

/// Ours may be no slower than QEMU's.
const LIMIT: f64 = 1.0;

const OURS: &str = "ours";
const VIRTIO_MEM: &str = "virtio-mem";
const DIMM: &str = "pc-dimm";

/// A line that the example prints: a machine.
#[derive(Debug, Deserialize)]
struct Line {
    kernel: String,
    vmm: String,
    took: Took,
}

/// In ms.
#[derive(Debug, Deserialize)]
struct Took {
    boot_ms: f64,
    memory_ms: f64,
    filled_ms: f64,
    vcpus_ms: Vec<f64>,
    freed_ms: Option<f64>,
    memory_given_ms: Option<f64>,
    vcpus_given_ms: f64,
}

type Figures = fn(&Took) -> Vec<f64>;

/// All machines of a kernel.
struct Of<'a> {
    kernel: &'a str,
    lines: &'a [Line],
}

pub(super) fn bars(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    let runs = if options.quick { 1 } else { options.runs };
    println!("Plugging vCPUs and memory, {runs} runs with each kernel and VMM.");
    let qemu = lab::qemu(cache).get_program().to_string_lossy().into_owned();
    let arguments = ["plug".into(), runs.to_string(), qemu];
    judge(&super::example(cache, binaries, &arguments)?)
}

fn judge(lines: &[Line]) -> Result<Vec<Bar>> {
    let mut bars = Vec::new();
    for kernel in ["stock", "tuned"] {
        bars.extend(Of { kernel, lines }.judge()?);
    }
    Ok(bars)
}

// === impl Of ===

impl Of<'_> {
    fn judge(&self) -> Result<Vec<Bar>> {
        let memory: Figures = |took| vec![took.memory_ms];
        // The kernel that has no driver for QEMU's virtio devices is told of vCPUs and memory by ACPI alone.
        let peer = if self.has(VIRTIO_MEM) { VIRTIO_MEM } else { DIMM };
        let mut bars = vec![
            self.held("a vCPU: from request to running on it", peer, |took| {
                took.vcpus_ms.clone()
            })?,
            self.held("1 GiB: from request to usable", peer, memory)?,
        ];
        if peer != DIMM {
            bars.push(self.beside("the same, by a module of memory", DIMM, memory)?);
        }
        bars.push(self.beside("1 GiB: from usable to filled", peer, |took| vec![took.filled_ms])?);
        let freed: Figures = |took| took.freed_ms.into_iter().collect();
        let name = "1 GiB that the guest freed: back at the host";
        bars.push(Bar::at_most(
            &self.named(name),
            "ms",
            self.sample(OURS, freed)?,
            FREED_MS,
        ));
        let given: Figures = |took| took.memory_given_ms.into_iter().collect();
        let back = "1 GiB: from request to given back";
        bars.push(match peer == DIMM {
            true => Bar::told(&self.named(back), "ms", self.sample(OURS, given)?),
            false => self.beside(back, peer, given)?,
        });
        if peer != DIMM {
            bars.push(self.beside("freed memory back at the host, beside", peer, freed)?);
        }
        bars.push(self.beside("3 vCPUs: from request to given back", peer, |took| {
            vec![took.vcpus_given_ms]
        })?);
        bars.push(self.beside("boot of the machine that is plugged", peer, |took| vec![took.boot_ms])?);
        Ok(bars)
    }

    fn has(&self, vmm: &str) -> bool {
        self.lines
            .iter()
            .any(|line| line.kernel == self.kernel && line.vmm == vmm)
    }

    fn sample(&self, vmm: &str, figures: Figures) -> Result<Sample> {
        let of = self
            .lines
            .iter()
            .filter(|line| line.kernel == self.kernel && line.vmm == vmm);
        let figures = of.flat_map(|line| figures(&line.took)).collect();
        Sample::new(figures).with_context(|| format!("{} kernel, {vmm}", self.kernel))
    }

    fn held(&self, name: &str, peer: &str, figures: Figures) -> Result<Bar> {
        let (ours, of_peer) = (self.sample(OURS, figures)?, self.sample(peer, figures)?);
        let peer = format!("QEMU q35, {peer}");
        Ok(Bar::against(&self.named(name), "ms", ours, &peer, of_peer, LIMIT))
    }

    fn beside(&self, name: &str, peer: &str, figures: Figures) -> Result<Bar> {
        let (ours, of_peer) = (self.sample(OURS, figures)?, self.sample(peer, figures)?);
        let peer = format!("QEMU q35, {peer}");
        Ok(Bar::beside(&self.named(name), "ms", ours, &peer, of_peer))
    }

    fn named(&self, what: &str) -> String {
        format!("{what}, {} kernel", self.kernel)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn line(kernel: &str, vmm: &str, ms: f64) -> Line {
        let gives_back = vmm != DIMM;
        serde_json::from_value(json!({ "kernel": kernel, "vmm": vmm, "took": {
            "boot_ms": 100.0, "memory_ms": ms, "filled_ms": 50.0, "vcpus_ms": [ms, ms + 1.0],
            "freed_ms": gives_back.then_some(ms * 100.0), "memory_given_ms": gives_back.then_some(ms),
            "vcpus_given_ms": ms,
        }}))
        .unwrap()
    }

    fn lines(ours: f64) -> Vec<Line> {
        vec![
            line("stock", OURS, ours),
            line("stock", VIRTIO_MEM, 20.0),
            line("stock", DIMM, 15.0),
            line("tuned", OURS, ours),
            line("tuned", DIMM, 20.0),
        ]
    }

    #[test]
    fn ours_is_held_to_the_peer_that_the_kernel_knows_and_to_5_s() {
        let short = |ours| judge(&lines(ours)).unwrap().iter().filter(|bar| !bar.holds).count();
        assert_eq!(short(19.0), 0);
        // vCPUs and memory, with both kernels.
        assert_eq!(short(21.0), 4);
        assert_eq!(short(51.0), 6);
        let bars = judge(&lines(10.0)).unwrap();
        let of = |name: &str| bars.iter().find(|bar| bar.name == name).unwrap();
        let tuned = of("1 GiB: from request to usable, tuned kernel");
        assert_eq!(tuned.peer_name.as_deref(), Some("QEMU q35, pc-dimm"));
        assert_eq!(tuned.ratio, Some(0.5));
    }

    #[test]
    fn what_is_missing_is_an_error() {
        assert!(judge(&lines(10.0)[1..]).is_err());
        assert!(judge(&[]).is_err());
    }
}
