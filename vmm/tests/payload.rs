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
use stoker_proto::vmm::Status;
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
            max_vcpus: None,
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

/// What a guest of several CPUs does with the second, over and over: waits until it is plugged, says `p`, starts it, which says
/// `a` itself, waits until it is asked for it, says `r`, and gives it back.
fn plugging() -> Vec<u8> {
    // In 16 bits: mov dx, 0x3f8; mov al, 'a'; out dx, al; cli; hlt; jmp.
    let on_second: [[u8; 8]; 2] = [
        [0xba, 0xf8, 0x03, 0xb0, b'a', 0xee, 0xfa, 0xf4],
        [0xeb, 0xfd, 0, 0, 0, 0, 0, 0],
    ];
    // mov rax, bytes; mov [address], rax.
    let put =
        |bytes: [u8; 8], address: u64| [&[0x48, 0xb8][..], &bytes, &[0x48, 0xa3], &address.to_le_bytes()].concat();
    let state = 0xcdc_u16;
    let icr = |low: u32| [&[0xb8][..], &low.to_le_bytes(), &[0xba, 1, 0, 0, 0, 0x0f, 0x30]].concat();
    let set_up = [
        put(on_second[0], 0x8000),
        put(on_second[1], 0x8008),
        // x2APIC: mov ecx, 0x1b; rdmsr; or eax, 0xc00; wrmsr.
        vec![0xb9, 0x1b, 0, 0, 0, 0x0f, 0x32, 0x0d, 0, 0x0c, 0, 0, 0x0f, 0x30],
    ];
    let round = [
        // The second: mov edx, 0xcd8; mov eax, 1; out dx, eax.
        vec![0xba, 0xd8, 0x0c, 0, 0, 0xb8, 1, 0, 0, 0, 0xef],
        until(state, 1),
        // Heard: out dx, al.
        out(state, 2),
        out(0x3f8, b'p'),
        // INIT and then start at 0x8000: mov ecx, 0x830; mov eax, ...; mov edx, 1; wrmsr.
        vec![0xb9, 0x30, 0x08, 0, 0],
        icr(0x4500),
        icr(0x4608),
        until(state, 4),
        out(0x3f8, b'r'),
        out(state, 4),
        out(state, 8),
    ]
    .concat();
    // jmp back
    let back = -i32::try_from(round.len() + 5).unwrap();
    [set_up.concat(), round, vec![0xe9], back.to_le_bytes().to_vec()].concat()
}

/// `mov dx, port; again: in al, dx; test al, mask; jz again`.
fn until(port: u16, mask: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xec, 0xa8, mask, 0x74, 0xfb]
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
    for word in ["vCPU 0", "suberror 1 ", "rip=0x10000000", "r15=0x57", "cr3=0x"] {
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
    started_with(cgroup, vcpus, &LOOP, |_| {}, meanwhile)
}

/// The same with this code and configuration.
fn started_in_with(
    cgroup: &Cgroup,
    vcpus: &Cgroup,
    code: &[u8],
    change: impl FnOnce(&mut MachineConfig),
) -> (Guest, fs::File) {
    started_with(cgroup, vcpus, code, change, || {})
}

fn started_with(
    cgroup: &Cgroup,
    vcpus: &Cgroup,
    code: &[u8],
    change: impl FnOnce(&mut MachineConfig),
    meanwhile: impl FnOnce(),
) -> (Guest, fs::File) {
    let guest = Guest::start_with(code, |config| {
        change(config);
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

/// Names of threads of a process, but for KVM's own: it makes one where it is needed first, with newer kernels in that of a vCPU.
fn names(pid: u32, threads: Vec<u32>) -> Vec<String> {
    // One that is on its way out may be gone.
    let names = threads.into_iter().filter_map(|thread| sched::name(pid, thread).ok());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with("kvm-")).collect();
    names.sort_unstable();
    names
}

fn vcpu_threads(guest: &Guest, vcpus: &Cgroup) -> Vec<String> {
    names(guest.child.id(), vcpus.threads().unwrap())
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
        assert_eq!(names(pid, vcpus.threads().unwrap()), ["vcpu0", "vcpu1"]);
        let others = names(pid, cgroup.0.threads().unwrap());
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

/// Waits for what the machine tells of itself.
fn wait_until(control: &mut Client, is: impl Fn(&Status) -> bool) {
    let start = Instant::now();
    loop {
        let status = control.query().unwrap();
        if is(&status) {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{status:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_vcpu_is_plugged_started_and_given_back() {
    if !runnable() {
        return;
    }
    with_cgroups(|mount| {
        let (cgroup, vcpus) = TestCgroup::new(mount, "plug");
        let (guest, _console) = started_in_with(&cgroup.0, &vcpus, &plugging(), |config| {
            (config.vcpus, config.max_vcpus) = (1, Some(3));
        });
        let mut control = guest.control();
        let threads = || vcpu_threads(&guest, &vcpus);
        assert_eq!(control.query().unwrap().vcpus, 1);
        assert_eq!(threads(), ["vcpu0"], "the others cost no thread");
        for _ in 0..20 {
            let status = control.resize(Some(2), None).unwrap();
            assert_eq!(status.amounts.unwrap().vcpus_asked, 2);
            // At once, but where its last thread has not quite ended.
            wait_until(&mut control, |status| status.vcpus == 2);
            assert!(
                threads().contains(&"vcpu1".to_owned()),
                "it is told once it is in its cgroup"
            );
            wait_until(&mut control, |status| status.amounts.as_ref().unwrap().vcpus_taken == 2);
            control.pause().unwrap();
            let status = control.resize(Some(1), None).unwrap();
            assert_eq!(status.vcpus, 2, "nobody waits for the guest");
            assert_eq!(control.pause().unwrap().state(), State::Paused);
            control.resume().unwrap();
            wait_until(&mut control, |status| status.vcpus == 1);
        }
        // What the guest never started it has not taken.
        control.resize(Some(3), None).unwrap();
        wait_until(&mut control, |status| status.vcpus == 3);
        wait_until(&mut control, |status| status.amounts.as_ref().unwrap().vcpus_taken == 2);
        // Those that were given back have ended.
        wait_until(&mut control, |_| threads() == ["vcpu0", "vcpu1", "vcpu2"]);
        control.pause().unwrap();
        control.resume().unwrap();
        control.stop().unwrap();
        assert_eq!(guest.end().reason, Reason::Stopped);
    });
}

#[test]
fn a_resize_that_can_not_be_changes_nothing() {
    if !runnable() {
        return;
    }
    with_cgroups(|mount| {
        let (cgroup, vcpus) = TestCgroup::new(mount, "unplug");
        let (guest, _console) = started_in_with(&cgroup.0, &vcpus, &LOOP, |config| {
            (config.max_vcpus, config.max_memory_mib) = (Some(4), Some(64));
        });
        let mut control = guest.control();
        let refusals = [
            (Some(0), None, "1 to 4"),
            (Some(5), None, "1 to 4"),
            (Some(3), Some(66), "32 MiB, which it started with, to 64 MiB"),
            (Some(5), Some(64), "1 to 4"),
            (None, None, "names `vcpus`"),
        ];
        for (count, memory_mib, word) in refusals {
            let refused = control.resize(count, memory_mib).unwrap_err().to_string();
            assert!(refused.contains(word), "{refused}");
        }
        let status = control.resize(Some(2), Some(32)).unwrap();
        let amounts = status.amounts.unwrap();
        assert_eq!(
            (status.vcpus, amounts.vcpus_asked, amounts.memory_asked_mib),
            (2, 2, 32)
        );
        // Nor where a thread can't move to its cgroup, because the VMM is in another.
        let (other, _) = TestCgroup::new(mount, "elsewhere");
        other.0.take(guest.child.id()).unwrap();
        let refused = control.resize(Some(4), None).unwrap_err().to_string();
        assert!(refused.contains("not a threaded cgroup below"), "{refused}");
        let status = control.query().unwrap();
        assert_eq!((status.vcpus, status.amounts.unwrap().vcpus_asked), (2, 2));
        cgroup.0.take(guest.child.id()).unwrap();
        assert_eq!(control.resize(Some(4), None).unwrap().vcpus, 4);
        assert_eq!(vcpu_threads(&guest, &vcpus), ["vcpu2", "vcpu3"]);
        control.stop().unwrap();
        assert_eq!(guest.end().reason, Reason::Stopped);
    });
}

/// A guest that gives back whatever it can, whether or not anybody asked for it.
#[test]
fn a_guest_that_gives_back_what_it_should_keep_is_told_of() {
    if !runnable() {
        return;
    }
    let give_back = |number| {
        [
            &[0xba, 0xd8, 0x0c, 0, 0, 0xb8, number, 0, 0, 0, 0xef][..],
            &out(0xcdc, 0xff),
        ]
        .concat()
    };
    let round: Vec<u8> = (0..6).flat_map(give_back).collect();
    let back = -i32::try_from(round.len() + 5).unwrap();
    let code = [&round[..], &[0xe9], &back.to_le_bytes()].concat();
    let guest = Guest::start_with(&code, |config| config.max_vcpus = Some(4));
    let mut control = guest.control();
    wait_until(&mut control, |status| status.vcpus == 1);
    for asked in [2, 4, 3, 2, 4] {
        let status = control.resize(Some(asked), None).unwrap();
        assert_eq!(status.amounts.unwrap().vcpus_asked, asked);
        wait_until(&mut control, |status| {
            let amounts = status.amounts.as_ref().unwrap();
            let told = amounts.vcpus_refused.contains("which nobody asked for");
            told && (status.vcpus, amounts.vcpus_taken) == (1, 1)
        });
    }
    for _ in 0..10 {
        control.pause().unwrap();
        control.resume().unwrap();
    }
    control.stop().unwrap();
    assert_eq!(guest.end().reason, Reason::Stopped);
}
