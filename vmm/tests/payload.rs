//! A guest of a few bytes, natively where this machine's KVM can run it: what the VMM does around a guest, without a
//! kernel. Where it cannot, each test says why and passes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is a test, its helpers too"
)]

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stoker_linux::{Cgroup, sched};
use stoker_proto::vmm::status::State;
use stoker_testkit::cgroup::with_cgroups;
use stoker_testkit::elf::elf;
use stoker_vmm::config::MachineConfig;
use stoker_vmm::control::Client;
use stoker_vmm::exit_report::{ExitReport, Reason};
use stoker_vmm::vcpu::THREAD_NAME;

#[path = "payload/memory.rs"]
mod memory;

const PATIENCE: Duration = Duration::from_secs(30);

/// `mov dx, port; mov al, value; out dx, al`.
fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

const LOOP: [u8; 2] = [0xeb, 0xfe];

struct Guest {
    child: Child,
    folder: tempfile::TempDir,
}

impl Guest {
    fn start(code: &[u8]) -> Self {
        Self::start_with(code, |_| {})
    }

    fn start_with(code: &[u8], change: impl FnOnce(&mut MachineConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, elf(0x10_0000, code)).unwrap();
        let mut config = MachineConfig {
            id: "payload".into(),
            vcpus: 2,
            memory_mib: 32,
            max_memory_mib: None,
            balloon: false,
            kernel,
            initramfs: None,
            cmdline: String::new(),
            drives: Vec::new(),
            scratch: None,
            vsock: None,
            control: Some(folder.path().join("control")),
            vcpus_cgroup: None,
            console: Some(folder.path().join("console")),
        };
        change(&mut config);
        let file = folder.path().join("machine.json");
        fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_stoker-vmm"))
            .arg("--config")
            .arg(file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    fn end(self) -> ExitReport {
        let output = self.child.wait_with_output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        ExitReport::find(&text).unwrap_or_else(|| panic!("no exit report: {text}"))
    }

    fn control(&self) -> Client {
        let path = self.folder.path().join("control");
        let start = Instant::now();
        loop {
            match Client::connect(&path, PATIENCE) {
                Ok(client) => return client,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::yield_now();
        }
    }
}

/// Whether a payload that powers off at once can be run here.
fn runnable() -> bool {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("skipped: there is no /dev/kvm");
        return false;
    }
    let report = Guest::start(&[out(0x600, 0x34), LOOP.to_vec()].concat()).end();
    if report.reason == Reason::Error {
        eprintln!("skipped: this KVM cannot run it: {}", report.detail);
    }
    report.reason == Reason::GuestOff
}

#[test]
fn a_payload_speaks_and_ends_itself() {
    if !runnable() {
        return;
    }
    let off = [out(0x3f8, b'h'), out(0x3f8, b'i'), out(0x600, 0x34), LOOP.to_vec()].concat();
    let report = Guest::start(&off).end();
    assert_eq!(
        (report.reason, report.console_tail.as_str()),
        (Reason::GuestOff, "hi"),
        "{report:?}"
    );
    let ends = [
        (out(0x602, 1), Reason::GuestReset),
        (out(0x64, 0xfe), Reason::GuestReset),
        (out(0x505, 1), Reason::GuestPanic),
    ];
    for (code, reason) in ends {
        let report = Guest::start(&[code, LOOP.to_vec()].concat()).end();
        assert_eq!(report.reason, reason, "{report:?}");
    }
}

/// Code outside of its memory is what KVM can neither run nor emulate; Linux says "internal error", suberror 1.
#[test]
fn a_guest_that_kvm_cannot_run_on_leaves_its_registers() {
    if !runnable() {
        return;
    }
    // mov r15d, 0x57; mov eax, 0x1000_0000; jmp rax: within the first page tables, behind 32 MiB of memory.
    let code = [
        vec![0x41, 0xbf, 0x57, 0, 0, 0],
        vec![0xb8, 0, 0, 0, 0x10],
        vec![0xff, 0xe0],
    ];
    let report = Guest::start(&code.concat()).end();
    assert_eq!(report.reason, Reason::Error, "{report:?}");
    for word in ["suberror 1 ", "rip=0x10000000", "r15=0x57", "cr3=0x"] {
        assert!(report.detail.contains(word), "{word}: {report:?}");
    }
}

#[test]
fn a_payload_that_never_ends_is_paused_and_stopped() {
    if !runnable() {
        return;
    }
    let guest = Guest::start(&LOOP);
    let mut control = guest.control();
    for _ in 0..50 {
        assert_eq!(control.pause().unwrap().state(), State::Paused);
        assert_eq!(control.query().unwrap().state(), State::Paused);
        assert_eq!(control.resume().unwrap().state(), State::Running);
    }
    assert_eq!(control.stop().unwrap().state(), State::Stopping);
    assert_eq!(guest.end().reason, Reason::Stopped);
}

#[test]
fn a_signal_is_a_clean_end() {
    if !runnable() {
        return;
    }
    let guest = Guest::start(&LOOP);
    drop(guest.control());
    let pid = guest.child.id() as i32;
    // SAFETY: the process is a child of ours that has not been waited for.
    unsafe { libc::kill(pid, libc::SIGTERM) };
    let report = guest.end();
    assert_eq!(report.reason, Reason::Killed, "{report:?}");
}

/// A cgroup below this one; it goes when this is dropped, once nothing is in it.
struct TestCgroup(Cgroup);

impl TestCgroup {
    /// With a threaded one in it, for vCPUs.
    fn new(mount: &Path, name: &str) -> (Self, Cgroup) {
        let name = format!("stoker-test-{name}-{}", std::process::id());
        let cgroup = Cgroup::at(mount.to_owned()).create(name).unwrap();
        let vcpus = cgroup.create("vcpus").unwrap();
        vcpus.make_threaded().unwrap();
        (Self(cgroup), vcpus)
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = self.0.destroy();
    }
}

/// The VMM is moved before it starts its vCPUs' threads: it waits for its console, a pipe, to be read. Returns that too.
fn started_in(cgroup: &Cgroup, vcpus: &Cgroup, meanwhile: impl FnOnce()) -> (Guest, fs::File) {
    let guest = Guest::start_with(&LOOP, |config| {
        nix::unistd::mkfifo(config.console.as_ref().unwrap(), nix::sys::stat::Mode::S_IRWXU).unwrap();
        config.vcpus_cgroup = Some(vcpus.path().to_owned());
    });
    let console = guest.folder.path().join("console");
    cgroup.take(guest.child.id()).unwrap();
    meanwhile();
    // Opened for both, it does not block, and nor does the VMM any more.
    let opened = fs::File::options().read(true).write(true).open(&console).unwrap();
    (guest, opened)
}

#[test]
fn threads_of_vcpus_and_no_others_move_to_their_cgroup() {
    if !runnable() {
        return;
    }
    with_cgroups(|mount| {
        let (cgroup, vcpus) = TestCgroup::new(mount, "move");
        let (guest, _console) = started_in(&cgroup.0, &vcpus, || {});
        let mut control = guest.control();
        // Answered once its vCPUs run.
        assert_eq!(control.query().unwrap().state(), State::Running);
        let pid = guest.child.id();
        let names = |threads: Vec<u32>| -> Vec<String> {
            let names = threads.into_iter().map(|thread| sched::name(pid, thread).unwrap());
            // KVM makes a thread of its own where it is needed first, with newer kernels in that of a vCPU.
            let mut names: Vec<_> = names.filter(|name| !name.starts_with("kvm-")).collect();
            names.sort_unstable();
            names
        };
        assert_eq!(names(vcpus.threads().unwrap()), ["vcpu0", "vcpu1"]);
        let others = names(cgroup.0.threads().unwrap());
        assert!(others.iter().any(|name| name == "rng"), "{others:?}");
        assert!(others.iter().all(|name| !name.starts_with(THREAD_NAME)), "{others:?}");
        assert_eq!(cgroup.0.processes().unwrap(), [pid]);
        control.stop().unwrap();
        assert_eq!(guest.end().reason, Reason::Stopped);
    });
}

#[test]
fn a_guest_does_not_run_outside_of_its_cgroup() {
    if !runnable() {
        return;
    }
    with_cgroups(|mount| {
        // Of another subtree: a thread can't leave its process's.
        let ((cgroup, _), (_other, vcpus)) = (TestCgroup::new(mount, "here"), TestCgroup::new(mount, "there"));
        let (guest, _console) = started_in(&cgroup.0, &vcpus, || {});
        let report = guest.end();
        assert_eq!(report.reason, Reason::Error, "{report:?}");
        assert!(report.detail.contains("not a threaded cgroup below"), "{report:?}");
        let (cgroup, vcpus) = TestCgroup::new(mount, "gone");
        let (guest, _console) = started_in(&cgroup.0, &vcpus, || vcpus.remove().unwrap());
        let report = guest.end();
        assert_eq!(report.reason, Reason::Error, "{report:?}");
        assert!(report.detail.contains("vcpus_cgroup"), "{report:?}");
    });
}
