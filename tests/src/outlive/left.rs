//! What an agent that was told to end has left behind.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use stoker_testkit::agent::Processes;

/// Where agents pin their eBPF programs.
const BPFFS: &str = "/sys/fs/bpf";

/// The folders of pins that there are, all agents' on this machine.
pub(super) fn pins() -> BTreeSet<OsString> {
    let entries = fs::read_dir(BPFFS).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name());
    names
        .filter(|name| name.to_string_lossy().starts_with("stoker-"))
        .collect()
}

/// Processes, folders of machines and sockets that are left of an agent, and pins that were not there `before`.
pub(super) fn behind(ended: &Processes, before: &BTreeSet<OsString>) -> Vec<String> {
    let mut left = processes(ended.folder());
    let pins = pins();
    left.extend(pins.difference(before).map(|name| format!("pins {}", name.display())));
    let run = ended.path("run");
    for path in below(&run) {
        let kind = path.symlink_metadata().map(|data| data.file_type());
        let is_socket = kind.as_ref().is_ok_and(FileTypeExt::is_socket);
        let is_machine = path.parent() == Some(&run) && path.join("machine.json").exists();
        if is_socket || is_machine {
            left.push(path.display().to_string());
        }
    }
    left
}

/// `stokerd` and VMMs whose command line names the folder.
fn processes(folder: &Path) -> Vec<String> {
    let folder = folder.display().to_string();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = entries.filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let program = line.split(' ').next().unwrap_or_default();
        let is_ours = program.ends_with("stokerd") || program.ends_with("stoker-vmm");
        (is_ours && line.contains(&folder)).then_some(line)
    });
    lines.collect()
}

fn below(folder: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(below(&entry.path()));
        }
        all.push(entry.path());
    }
    all
}
