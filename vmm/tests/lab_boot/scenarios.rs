//! The tests.

use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use stoker_proto::vmm::status::State;
use stoker_testkit::elf::elf;
use stoker_testkit::memory::Pss;
use stoker_vmm::config::{MachineConfig, ScratchConfig};
use stoker_vmm::exit_report::Reason;

use crate::guest::{GUEST_PORT, HOST_PORT, SCRATCH_WRITTEN, STREAM_BYTES};
use crate::machine::{Kernel, Kernels, Machine, PATIENCE, drive};

mod memory;
mod resizes;
mod vcpus;

/// Clients of the guest at a time.
pub(crate) const CLIENTS: usize = 6;

type Test = fn(&Kernels);

/// Every test by its name.
pub(crate) const ALL: &[(&str, Test)] = &[
    ("every_kernel_boots_and_powers_off", every_kernel_boots_and_powers_off),
    ("every_way_to_reset_is_heard", every_way_to_reset_is_heard),
    ("a_panic_is_told_by_the_device", a_panic_is_told_by_the_device),
    (
        "a_panic_is_recognised_without_the_device",
        a_panic_is_recognised_without_the_device,
    ),
    ("devices_work_with_the_tuned_kernel", devices_work_with_the_tuned_kernel),
    ("devices_work_with_the_stock_kernel", devices_work_with_the_stock_kernel),
    (
        "a_scratch_drive_grows_under_the_tuned_kernel",
        a_scratch_drive_grows_under_the_tuned_kernel,
    ),
    (
        "a_scratch_drive_grows_under_the_stock_kernel",
        a_scratch_drive_grows_under_the_stock_kernel,
    ),
    (
        "vcpus_are_plugged_and_unplugged_under_the_tuned_kernel",
        vcpus::vcpus_are_plugged_and_unplugged_under_the_tuned_kernel,
    ),
    (
        "vcpus_are_plugged_and_unplugged_under_the_stock_kernel",
        vcpus::vcpus_are_plugged_and_unplugged_under_the_stock_kernel,
    ),
    (
        "vcpus_that_come_while_the_kernel_boots_are_used",
        vcpus::vcpus_that_come_while_the_kernel_boots_are_used,
    ),
    ("a_ceiling_costs_little_at_boot", vcpus::a_ceiling_costs_little_at_boot),
    (
        "memory_comes_and_goes_under_the_tuned_kernel",
        memory::comes_and_goes_under_the_tuned_kernel,
    ),
    (
        "memory_comes_and_goes_under_the_stock_kernel",
        memory::comes_and_goes_under_the_stock_kernel,
    ),
    (
        "a_machine_under_load_is_resized_at_random_under_the_tuned_kernel",
        resizes::at_random_under_the_tuned_kernel,
    ),
    (
        "a_machine_under_load_is_resized_at_random_under_the_stock_kernel",
        resizes::at_random_under_the_stock_kernel,
    ),
    (
        "a_guest_that_writes_to_memory_that_is_not_plugged_ends",
        memory::a_guest_that_writes_where_nothing_is_plugged_ends,
    ),
    ("a_paused_machine_stands_still", a_paused_machine_stands_still),
    (
        "a_spinning_guest_is_paused_and_stopped",
        a_spinning_guest_is_paused_and_stopped,
    ),
    (
        "a_guest_that_hangs_at_boot_is_stopped",
        a_guest_that_hangs_at_boot_is_stopped,
    ),
    ("a_triple_fault_is_a_reset", a_triple_fault_is_a_reset),
    ("a_signal_ends_a_machine_cleanly", a_signal_ends_a_machine_cleanly),
    ("a_read_only_image_is_shared", a_read_only_image_is_shared),
    ("the_vmm_is_small", the_vmm_is_small),
];

fn every_kernel_boots_and_powers_off(kernels: &Kernels) {
    for (kernel, form, vcpus) in [
        (Kernel::Tuned, "vmlinux", 1),
        (Kernel::Tuned, "bzImage", 2),
        (Kernel::Tuned, "vmlinux", 8),
        (Kernel::Stock, "vmlinux", 2),
        (Kernel::Stock, "bzImage", 1),
        (Kernel::Stock, "vmlinux", 8),
    ] {
        let start = Instant::now();
        let mut machine = Machine::start(kernels.config(kernel, form, vcpus, "off"));
        let online = match vcpus {
            1 => "cpus 0 ".to_owned(),
            count => format!("cpus 0-{} ", count - 1),
        };
        machine.wait_for(&online);
        let ready = start.elapsed();
        machine.wait_for("clock kvm-clock");
        let report = machine.end();
        assert_eq!(report.reason, Reason::GuestOff, "{report:?}");
        assert!(report.console_tail.contains("guest: off"), "{report:?}");
        println!("  {kernel:?} {form} on {vcpus} vCPUs: user space after {ready:.2?}");
    }
}

fn every_way_to_reset_is_heard(kernels: &Kernels) {
    for (way, by) in [
        ("t", "triple fault"),
        ("k", "keyboard controller"),
        ("a", "ACPI reset register"),
    ] {
        let mut config = kernels.config(Kernel::Tuned, "vmlinux", 1, "reset");
        config.cmdline = config.cmdline.replace("reboot=t", &format!("reboot={way}"));
        let report = Machine::start(config).end();
        assert_eq!(report.reason, Reason::GuestReset, "{report:?}");
        assert!(report.detail.contains(by), "{report:?}");
    }
}

fn a_panic_is_told_by_the_device(kernels: &Kernels) {
    for kernel in [Kernel::Tuned, Kernel::Stock] {
        let mut config = kernels.config(kernel, "vmlinux", 1, "panic");
        // It would wait for ever: the device tells at once.
        config.cmdline = config.cmdline.replace("panic=-1", "panic=0");
        let report = Machine::start(config).end();
        assert_eq!(report.reason, Reason::GuestPanic, "{report:?}");
        assert!(report.detail.contains("panic device"), "{report:?}");
        assert!(report.console_tail.contains("Attempted to kill init"), "{report:?}");
    }
}

fn a_panic_is_recognised_without_the_device(kernels: &Kernels) {
    // Without an initramfs there are no modules, and nothing to start.
    let mut config = kernels.config(Kernel::Stock, "vmlinux", 1, "none");
    config.initramfs = None;
    let report = Machine::start(config).end();
    assert_eq!(report.reason, Reason::GuestPanic, "{report:?}");
    assert!(report.detail.contains("reset by"), "{report:?}");
    assert!(report.console_tail.contains("Unable to mount root"), "{report:?}");
}

fn devices_work_with_the_tuned_kernel(kernels: &Kernels) {
    devices(kernels, Kernel::Tuned);
}

fn devices_work_with_the_stock_kernel(kernels: &Kernels) {
    devices(kernels, Kernel::Stock);
}

fn devices(kernels: &Kernels, kernel: Kernel) {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (folder.path().join("first"), folder.path().join("second"));
    let content: Vec<u8> = (0..1 << 20).map(|at| (at / 512) as u8).collect();
    fs::write(&first, &content).unwrap();
    fs::write(&second, vec![0; 2 << 20]).unwrap();
    let mut config = kernels.config(kernel, "vmlinux", 2, "devices");
    config.drives = vec![drive(&first, true), drive(&second, false)];
    let mut machine = Machine::start(config);
    let vsock = machine.vsock();
    let server = {
        let listener = UnixListener::bind(format!("{}_{HOST_PORT}", vsock.display())).unwrap();
        thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            std::io::copy(&mut &stream, &mut &stream).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        })
    };
    machine.wait_for("block is good");
    machine.wait_for("rng is good");
    machine.wait_for("vsock to the host is good");
    server.join().unwrap();
    machine.wait_for("listening");
    assert!(dial(&vsock, GUEST_PORT + 1).is_none(), "nobody listens there");
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let stream = dial(&vsock, GUEST_PORT).unwrap();
            thread::spawn(move || exchange(stream, number))
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    machine.wait_for("vsock is good");
    let report = machine.end();
    assert_eq!(report.reason, Reason::GuestOff, "{report:?}");
    assert!(!report.console_tail.contains("FAILED"), "{report:?}");
    assert_eq!(fs::read(&first).unwrap(), content);
    let written = fs::read(&second).unwrap();
    assert!(written[4096..4096 + content.len()] == content);
}

/// Firecracker's way to a port of the guest. `None` where it is refused.
fn dial(socket: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\n") {
        if stream.read(&mut byte).unwrap() == 0 {
            return None;
        }
        answer.extend(byte);
    }
    assert!(answer.starts_with(b"OK "), "{answer:?}");
    Some(stream)
}

/// Sends and has echoed, with both directions busy at once.
fn exchange(stream: UnixStream, number: usize) {
    let data: Vec<u8> = (0..STREAM_BYTES / CLIENTS)
        .map(|at| (at * (number + 3) % 249) as u8)
        .collect();
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let expected = data.clone();
    let read = thread::spawn(move || {
        let mut back = Vec::new();
        reader.read_to_end(&mut back).unwrap();
        assert!(back == expected, "the echo differs");
        assert!(reader.fill_buf().unwrap().is_empty());
    });
    (&stream).write_all(&data).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    read.join().unwrap();
}

fn a_scratch_drive_grows_under_the_tuned_kernel(kernels: &Kernels) {
    a_scratch_drive_grows(kernels, Kernel::Tuned);
}

fn a_scratch_drive_grows_under_the_stock_kernel(kernels: &Kernels) {
    a_scratch_drive_grows(kernels, Kernel::Stock);
}

fn a_scratch_drive_grows(kernels: &Kernels, kernel: Kernel) {
    // On a disk: in the lab most else is in memory.
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut config = kernels.config(kernel, "vmlinux", 2, "scratch");
    config.scratch = Some(ScratchConfig {
        folder: folder.path().to_owned(),
        size_mib: 16,
    });
    let mut machine = Machine::start(config);
    machine.wait_for("scratch has 16 MiB");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "the file has a name");
    let mut control = machine.control();
    assert_eq!(control.query().unwrap().scratch_mib, 16);
    assert_eq!(control.grow_scratch(16).unwrap().scratch_mib, 16);
    let refused = control.grow_scratch(65_537).unwrap_err().to_string();
    assert!(refused.contains("65536 MiB at most"), "{refused}");
    // A machine that stands still hears of it when it runs again.
    control.pause().unwrap();
    assert_eq!(control.grow_scratch(2048).unwrap().scratch_mib, 2048);
    control.resume().unwrap();
    machine.wait_for("scratch has 2048 MiB");
    machine.wait_for("scratch is good");
    assert_eq!(control.grow_scratch(1).unwrap().scratch_mib, 2048, "it never shrinks");
    // What the guest wrote to its start it gave back; what it wrote to its end is there.
    let written = SCRATCH_WRITTEN as u64;
    let taken = deleted_files(machine.pid());
    assert!((written..2 * written).contains(&taken), "{taken} bytes");
    control.stop().unwrap();
    assert_eq!(machine.end().reason, Reason::Stopped);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);

    let machine = Machine::start(kernels.config(kernel, "vmlinux", 1, "tick"));
    let mut control = machine.control();
    assert_eq!(control.query().unwrap().scratch_mib, 0);
    let refused = control.grow_scratch(1024).unwrap_err().to_string();
    assert!(refused.contains("no scratch drive"), "{refused}");
    control.stop().unwrap();
    machine.end();
}

/// Bytes that the files without a name that a process has open take of the disk.
fn deleted_files(pid: i32) -> u64 {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    open.map(|entry| entry.unwrap().path())
        .filter(|path| fs::read_link(path).is_ok_and(|file| file.starts_with("/var/tmp")))
        .map(|path| fs::metadata(path).unwrap().blocks() * 512)
        .sum()
}

fn a_paused_machine_stands_still(kernels: &Kernels) {
    let mut machine = Machine::start(kernels.config(Kernel::Tuned, "vmlinux", 2, "tick"));
    machine.wait_for("tick 1");
    let mut control = machine.control();
    let status = control.query().unwrap();
    assert_eq!(status.state(), State::Running);
    assert_eq!((status.vcpus, status.memory_mib), (2, 256));
    assert!(status.exits > 0);
    assert_eq!(control.pause().unwrap().state(), State::Paused);
    assert_eq!(control.pause().unwrap().state(), State::Paused);
    let cpu = cpu_ticks(machine.pid());
    let exits = control.query().unwrap().exits;
    let said = machine.console();
    // Nothing can be waited for where nothing may happen: 25 ticks' worth of time.
    thread::sleep(Duration::from_millis(500));
    assert_eq!(machine.console(), said);
    assert_eq!(control.query().unwrap().exits, exits);
    let used = cpu_ticks(machine.pid()) - cpu;
    assert!(used <= 5, "a paused machine used {used} ticks");
    assert_eq!(control.resume().unwrap().state(), State::Running);
    let last = said.lines().filter(|line| line.starts_with("tick ")).count();
    machine.wait_for(&format!("tick {}", last + 3));
    assert_eq!(control.stop().unwrap().state(), State::Stopping);
    let report = machine.end();
    assert_eq!(report.reason, Reason::Stopped, "{report:?}");
}

/// CPU time of a process in clock ticks (10 ms).
fn cpu_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn a_spinning_guest_is_paused_and_stopped(kernels: &Kernels) {
    let mut machine = Machine::start(kernels.config(Kernel::Tuned, "vmlinux", 2, "spin"));
    machine.wait_for("spinning");
    let mut control = machine.control();
    for _ in 0..20 {
        assert_eq!(control.pause().unwrap().state(), State::Paused);
        assert_eq!(control.resume().unwrap().state(), State::Running);
    }
    control.pause().unwrap();
    control.stop().unwrap();
    assert_eq!(machine.end().reason, Reason::Stopped);
}

fn start_payload(kernels: &Kernels, code: &[u8]) -> (tempfile::NamedTempFile, Machine) {
    payload_machine(kernels, code, |_| {})
}

/// A machine whose kernel is this code.
pub(crate) fn payload_machine(
    kernels: &Kernels,
    code: &[u8],
    change: impl FnOnce(&mut MachineConfig),
) -> (tempfile::NamedTempFile, Machine) {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), elf(0x10_0000, code)).unwrap();
    let mut config = kernels.config(Kernel::Tuned, "vmlinux", 2, "none");
    config.kernel = file.path().to_owned();
    config.initramfs = None;
    change(&mut config);
    (file, Machine::start(config))
}

fn a_guest_that_hangs_at_boot_is_stopped(kernels: &Kernels) {
    // Interrupts off and halted for ever; then a loop of two bytes.
    for code in [&[0xfa, 0xf4, 0xeb, 0xfd][..], &[0xeb, 0xfe]] {
        let (_file, machine) = start_payload(kernels, code);
        let mut control = machine.control();
        assert_eq!(control.query().unwrap().state(), State::Running);
        assert_eq!(control.pause().unwrap().state(), State::Paused);
        assert_eq!(control.resume().unwrap().state(), State::Running);
        control.stop().unwrap();
        let report = machine.end();
        assert_eq!(report.reason, Reason::Stopped);
        assert_eq!(report.console_tail, "");
    }
}

fn a_triple_fault_is_a_reset(kernels: &Kernels) {
    // `ud2` without an interrupt table.
    let (_file, machine) = start_payload(kernels, &[0x0f, 0x0b]);
    let report = machine.end();
    assert_eq!(report.reason, Reason::GuestReset, "{report:?}");
    assert!(report.detail.contains("triple fault"), "{report:?}");
}

fn a_signal_ends_a_machine_cleanly(kernels: &Kernels) {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let mut machine = Machine::start(kernels.config(Kernel::Tuned, "vmlinux", 1, "tick"));
        machine.wait_for("tick 0");
        // SAFETY: the process is a child of ours that has not been waited for.
        unsafe { libc::kill(machine.pid(), signal) };
        let report = machine.end();
        assert_eq!(report.reason, Reason::Killed, "{report:?}");
        assert!(report.console_tail.contains("tick"), "{report:?}");
    }
}

fn a_read_only_image_is_shared(kernels: &Kernels) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let config = |read_only| {
        let mut config = kernels.config(Kernel::Tuned, "vmlinux", 1, "tick");
        config.drives = vec![drive(image.path(), read_only)];
        config
    };
    let mut first = Machine::start(config(true));
    let mut second = Machine::start(config(true));
    first.wait_for("tick 0");
    second.wait_for("tick 0");
    let report = Machine::start(config(false)).end();
    assert_eq!(report.reason, Reason::Error);
    assert!(report.detail.contains("in use by another machine"), "{report:?}");
    for machine in [first, second] {
        machine.control().stop().unwrap();
        assert_eq!(machine.end().reason, Reason::Stopped);
    }
}

fn the_vmm_is_small(kernels: &Kernels) {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 20).unwrap();
    let mut config = kernels.config(Kernel::Tuned, "vmlinux", 1, "tick");
    config.drives = vec![drive(image.path(), true)];
    let mut machine = Machine::start(config);
    machine.wait_for("tick 0");
    let pid = machine.pid().try_into().unwrap();
    let pss = Pss::of(pid, u64::from(machine.config.memory_mib) << 10).unwrap();
    println!("  PSS less guest RAM: {} KiB", pss.own_kib);
    assert!(pss.own_kib <= 5 << 10);
    machine.control().stop().unwrap();
    machine.end();
}
