//! A panic in one thread of the VMM ends all of it, with an exit report.

#![allow(clippy::unwrap_used, clippy::panic, reason = "all of it is a test, its helpers too")]

use std::io::Write as _;
use std::process::Command;
use std::time::Instant;

use stoker_vmm::console::Console;
use stoker_vmm::crash::end_on_panic;
use stoker_vmm::devices::virtio::worker::Worker;
use stoker_vmm::devices::virtio::{Activation, Backend as _, DeviceInfo, Progress, VirtioDevice};
use stoker_vmm::exit_report::{ExitReport, Reason};

/// Set where this program is to be the VMM.
const VMM: &str = "STOKER_TEST_PANICKING_VMM";

/// A device with a fault.
struct Faulty;

impl VirtioDevice for Faulty {
    fn info(&self) -> DeviceInfo {
        panic!("not asked for")
    }

    fn activate(&mut self, _: Activation) {
        panic!("the queue is {}", "on fire")
    }

    fn process(&mut self) -> Progress {
        Progress::Idle
    }

    fn reset(&mut self) {}
}

#[test]
fn a_panic_in_a_devices_thread_ends_the_vmm() {
    if std::env::var_os(VMM).is_some() {
        // What the test harness has written has no end of line.
        println!();
        let mut console = Console::nowhere();
        console.write_all(b"the guest's last words").unwrap();
        end_on_panic(console, Instant::now());
        let mut worker = Worker::spawn("drive0", Box::new(Faulty), None).unwrap();
        let activation = Activation {
            features: 0,
            queues: Vec::new(),
        };
        worker.activate(activation);
        // The machine's owner waits for events, and none will come.
        loop {
            std::thread::park();
        }
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "a_panic_in_a_devices_thread_ends_the_vmm"])
        .env(VMM, "1")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let report = ExitReport::find(&text).unwrap_or_else(|| panic!("no exit report: {text}"));
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(report.reason, Reason::Error);
    for word in ["thread drive0", "tests/panic.rs", "on fire", "please report it"] {
        assert!(report.detail.contains(word), "{word}: {report:?}");
    }
    assert_eq!(report.console_tail, "the guest's last words");
    assert!(String::from_utf8(output.stderr).unwrap().contains("on fire"));
}
