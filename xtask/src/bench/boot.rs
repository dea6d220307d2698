//! Boot to ready, and the memory it takes: ours against QEMU's microvm with the same kernel, initramfs and vCPUs, in turn.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use stoker_testkit::memory::Pss;

use super::{Bar, sample::Sample};
use crate::{cache::Cache, lab, process};

/// What `stoker-init` prints on the console once it can take containers.
const READY: &str = "stoker-init: ready";

const MEMORY_MIB: u64 = 512;
const VCPUS: u32 = 1;
const CID: u32 = 3;

/// What the agent starts its machines with.
const COMMAND_LINE: &str = include_str!("../../../guest/kernel/command-line").trim_ascii();

/// The part of it that is no choice of ours: a console, few words, and an end where the kernel panics.
const PEERS_COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 reboot=t";

/// QEMU's microvm puts the end of the initramfs into the last page of memory, where its firmware has put ACPI tables: with an
/// initramfs that fills more than this of its last page the guest reads tables without end, and hangs.
const LAST_PAGE: usize = 2048;
const PAGE: usize = 4096;

/// As much as the guests of a run touch, and more.
const SCRUBBED_MIB: usize = 1024;

/// A longer boot is a failed one.
const PATIENCE: Duration = Duration::from_secs(120);

/// What a guest is booted from.
struct Guest {
    kernel: PathBuf,
    initramfs: PathBuf,
    image: PathBuf,
}

/// A VMM whose guest is ready.
struct Booted {
    child: Child,
    took: Duration,
}

impl Drop for Booted {
    fn drop(&mut self) {
        // It may have ended of itself; either way nothing is left to do about it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(super) fn bars(cache: &Cache, binaries: &Path, runs: u32) -> Result<Vec<Bar>> {
    // Ours is a part of the VMM; QEMU leaves vsock to the kernel.
    process::run(Command::new("modprobe").arg("vhost_vsock"))?;
    let mut bars = Vec::new();
    let (mut own_memory, mut touched) = (Vec::new(), Vec::new());
    for kernel in ["stock", "tuned"] {
        let folder = tempfile::tempdir().context("make a folder")?;
        let guest = Guest {
            kernel: cache.path(format!("kernel/{kernel}/vmlinux")),
            initramfs: padded(
                &cache.path(format!("image/initramfs-{kernel}.cpio")),
                &folder.path().join("initramfs"),
            )?,
            image: cache.path("image/root.erofs"),
        };
        let (mut ours, mut peer, mut peer_alike) = (Vec::new(), Vec::new(), Vec::new());
        for run in 1..=runs {
            scrub();
            let booted = stoker(binaries, &guest)?;
            ours.push(booted.took.as_secs_f64() * 1e3);
            if kernel == "tuned" {
                let pss = Pss::of(booted.child.id(), MEMORY_MIB << 10)?;
                own_memory.push(pss.own_kib as f64 / 1024.0);
                touched.push(pss.guest_kib as f64 / 1024.0);
            }
            let own = booted.took;
            drop(booted);
            scrub();
            let theirs = qemu(cache, &guest, PEERS_COMMAND_LINE)?.took;
            peer.push(theirs.as_secs_f64() * 1e3);
            scrub();
            let alike = qemu(cache, &guest, COMMAND_LINE)?.took;
            peer_alike.push(alike.as_secs_f64() * 1e3);
            println!(
                "{kernel} kernel, run {run} of {runs}: ready after {own:.2?}, under QEMU microvm after {theirs:.2?}, \
                 with our command line after {alike:.2?}"
            );
        }
        let name = format!("boot to ready, {kernel} kernel");
        let ours = Sample::new(ours)?;
        bars.push(Bar::against(
            &name,
            "ms",
            ours.clone(),
            "QEMU microvm",
            Sample::new(peer)?,
            0.5,
        ));
        bars.push(Bar::beside(
            &format!("{name}, our command line for both"),
            "ms",
            ours,
            "QEMU microvm",
            Sample::new(peer_alike)?,
        ));
    }
    bars.push(Bar::at_most(
        "memory of the VMM itself (PSS less guest RAM)",
        "MiB",
        Sample::new(own_memory)?,
        5.0,
    ));
    bars.push(Bar::told(
        "guest memory touched at ready, tuned kernel",
        "MiB",
        Sample::new(touched)?,
    ));
    Ok(bars)
}

/// A copy whose last page has room for what QEMU puts there; zeros at the end of an archive mean nothing.
fn padded(initramfs: &Path, copy: &Path) -> Result<PathBuf> {
    let mut bytes = fs::read(initramfs).with_context(|| format!("reading {}", initramfs.display()))?;
    if bytes.len() % PAGE > LAST_PAGE {
        bytes.resize(bytes.len().next_multiple_of(PAGE) + LAST_PAGE, 0);
    }
    fs::write(copy, bytes).with_context(|| format!("writing {}", copy.display()))?;
    Ok(copy.to_owned())
}

/// Takes memory, writes to it and gives it back. Where QEMU emulates the processor, the first write to a page that code was
/// run from is slow: each guest would pay for the one before it.
fn scrub() {
    let memory = vec![1_u8; SCRUBBED_MIB << 20];
    std::hint::black_box(&memory);
}

fn stoker(binaries: &Path, guest: &Guest) -> Result<Booted> {
    let folder = tempfile::tempdir()?;
    let config = folder.path().join("machine.json");
    let text = json!({
        "id": "bench",
        "vcpus": VCPUS,
        "memory_mib": MEMORY_MIB,
        "kernel": guest.kernel,
        "initramfs": guest.initramfs,
        "cmdline": COMMAND_LINE,
        "drives": [{"path": guest.image, "read_only": true}],
        "vsock": {"cid": CID, "socket": folder.path().join("vsock.sock")},
        "control": folder.path().join("control.sock"),
    });
    fs::write(&config, text.to_string())?;
    let mut command = Command::new(binaries.join("stoker-vmm"));
    command.arg("--config").arg(&config);
    ready(command)
}

/// With its legacy devices (PIC, PIT, RTC), as it is by default: without them the same guests were not quicker.
fn qemu(cache: &Cache, guest: &Guest, command_line: &str) -> Result<Booted> {
    let mut command = lab::qemu(cache);
    command
        .args(["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-nodefaults"])
        .args(["-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot"])
        .args([
            "-smp",
            &VCPUS.to_string(),
            "-m",
            &MEMORY_MIB.to_string(),
            "-append",
            command_line,
        ])
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-initrd")
        .arg(&guest.initramfs)
        .args(["-device", "virtio-blk-device,drive=root", "-drive"])
        .arg(format!(
            "id=root,if=none,format=raw,readonly=on,file={}",
            guest.image.display()
        ))
        .args(["-device", "virtio-rng-device", "-device"])
        .arg(format!("vhost-vsock-device,guest-cid={CID}"));
    ready(command)
}

/// Spawns a VMM whose standard output is its guest's console and waits for the guest to be ready.
fn ready(mut command: Command) -> Result<Booted> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .process_group(0);
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("starting {command:?}"))?;
    let console = child.stdout.take().context("no standard output")?;
    let (line_of, lines) = mpsc::channel();
    // Reads on to the end, so that the VMM never waits for its console.
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n') {
            let Ok(line) = line else { break };
            if line_of
                .send((Instant::now(), String::from_utf8_lossy(&line).into_owned()))
                .is_err()
            {
                continue;
            }
        }
    });
    let mut seen = Vec::new();
    let mut booted = Booted {
        child,
        took: Duration::ZERO,
    };
    loop {
        match lines.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) {
            Ok((at, line)) if line.contains(READY) => {
                booted.took = at - start;
                return Ok(booted);
            }
            Ok((_, line)) => seen.push(line),
            Err(_) => bail!(
                "{command:?}: the guest did not get ready; its console:\n{}",
                seen.join("\n")
            ),
        }
    }
}
