//! What a machine that cannot be started leaves behind: a message that says what was wrong and what to do, exit code 1,
//! and nothing else. None of it needs KVM.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "all of it is a test, its helpers too"
)]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use stoker_testkit::bzimage::bzimage;
use stoker_testkit::cgroup::with_cgroups;
use stoker_testkit::disk;
use stoker_vmm::config::{DriveConfig, MachineConfig, ScratchConfig, VsockConfig};
use stoker_vmm::exit_report::{ExitReport, Reason};

struct Bench {
    folder: tempfile::TempDir,
    config: MachineConfig,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let kernel = folder.path().join("kernel");
    fs::write(&kernel, bzimage(64 << 10)).unwrap();
    let config = MachineConfig {
        id: "test".into(),
        vcpus: 1,
        max_vcpus: None,
        memory_mib: 64,
        max_memory_mib: None,
        balloon: false,
        kernel,
        initramfs: None,
        cmdline: String::new(),
        drives: Vec::new(),
        scratch: None,
        vsock: None,
        control: None,
        vcpus_cgroup: None,
        console: Some(folder.path().join("console")),
    };
    Bench { folder, config }
}

fn run(arguments: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_stoker-vmm"))
        .args(arguments)
        .output()
        .unwrap()
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Starts the machine, which must fail with a message that has all of `words`.
    fn refuse(&self, words: &[&str]) {
        let text = serde_json::to_vec(&self.config).unwrap();
        self.refuse_text(&text, words);
    }

    fn refuse_text(&self, config: &[u8], words: &[&str]) {
        let path = self.write("machine.json", config);
        refused(&run(&[Path::new("--config"), &path]), words);
    }
}

fn refused(output: &Output, words: &[&str]) {
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    let report = ExitReport::find(&text).unwrap_or_else(|| panic!("no exit report: {text}"));
    assert_eq!(output.status.code(), Some(1), "{report:?}");
    assert_eq!(report.reason, Reason::Error);
    for part in words {
        assert!(report.detail.contains(part), "{part:?} is not in {report:?}");
    }
    assert_eq!(report.console_tail, "");
}

#[test]
fn a_wrong_command_line_is_told_how_to_do_it() {
    for arguments in [&[][..], &["--config"], &["--config", "a", "b"], &["--nonsense"]] {
        let arguments: Vec<&Path> = arguments.iter().map(Path::new).collect();
        let output = run(&arguments);
        assert_eq!(output.status.code(), Some(2));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("Usage: stoker-vmm --config FILE"), "{text}");
        assert!(output.stdout.is_empty());
    }
    let help = run(&[Path::new("--help")]);
    assert!(help.status.success());
    assert!(String::from_utf8(help.stdout).unwrap().contains("exit code"));
    assert!(run(&[Path::new("--version")]).status.success());
}

#[test]
fn bad_configurations_are_refused() {
    let bench = bench();
    let missing = bench.path("nowhere.json");
    refused(&run(&[Path::new("--config"), &missing]), &["nowhere.json", "--config"]);
    bench.refuse_text(b"", &["machine.json", "not valid"]);
    bench.refuse_text(b"{\"id\": 1}", &["line 1"]);
    bench.refuse_text(&[0xff; 100], &["not valid"]);
    let refuse = |change: fn(&mut MachineConfig), words: &[&str]| {
        let mut bench = self::bench();
        change(&mut bench.config);
        bench.refuse(words);
    };
    refuse(|config| config.vcpus = 0, &["`vcpus` is 0", "1 to 240"]);
    refuse(
        |config| config.max_vcpus = Some(0),
        &["`max_vcpus` is 0; it must be `vcpus`, 1, to 240"],
    );
    refuse(|config| config.memory_mib = 1, &["`memory_mib` is 1", "32 to"]);
    refuse(|config| config.memory_mib = u32::MAX, &["1048576"]);
    refuse(|config| config.cmdline = "x".repeat(5000), &["cmdline", "2047"]);
    refuse(
        |config| config.console = Some("/nowhere/console".into()),
        &["console", "folder exists"],
    );
}

#[test]
fn missing_and_damaged_kernels_are_refused() {
    let mut bench = bench();
    bench.config.kernel = bench.path("no-kernel");
    bench.refuse(&["cannot read the kernel", "no-kernel", "check the path"]);
    bench.config.kernel = bench.folder.path().to_owned();
    bench.refuse(&["kernel"]);
    bench.config.initramfs = Some(bench.path("no-initramfs"));
    bench.config.kernel = bench.write("kernel", &bzimage(64 << 10));
    bench.refuse(&["cannot read the initramfs", "check the path"]);
}

#[test]
fn missing_and_damaged_drives_are_refused() {
    let mut bench = bench();
    let drive = |path: &Path| DriveConfig {
        path: path.to_owned(),
        read_only: true,
    };
    bench.config.drives = vec![drive(&bench.path("no-drive"))];
    bench.refuse(&["cannot open the drive", "no-drive", "check the path"]);
    let cut = bench.write("cut", &[0; 700]);
    bench.config.drives = vec![drive(&cut)];
    bench.refuse(&["700 bytes", "cut short"]);
    let used = bench.write("used", &[0; 512]);
    let lock = fs::OpenOptions::new().write(true).open(&used).unwrap();
    lock.lock().unwrap();
    bench.config.drives = vec![drive(&used)];
    bench.refuse(&["in use by another machine"]);
}

#[test]
fn scratch_drives_that_cannot_be_made_are_refused() {
    let mut bench = bench();
    let scratch = |folder: PathBuf| Some(ScratchConfig { folder, size_mib: 1024 });
    bench.config.scratch = scratch(bench.path("no-folder"));
    bench.refuse(&[
        "scratch drive of 1024 MiB",
        "no-folder",
        "check that the folder is there",
    ]);
    bench.config.scratch = scratch(bench.write("file", &[]));
    bench.refuse(&["scratch drive", "file"]);
    bench.config.scratch.as_mut().unwrap().size_mib = 65_537;
    bench.refuse(&["`size_mib` is 65537", "1 to 65536"]);
}

#[test]
fn a_cgroup_that_vcpus_cannot_move_to_is_refused() {
    let mut bench = bench();
    bench.config.vcpus_cgroup = Some(bench.path("no-cgroup"));
    bench.refuse(&["no-cgroup/cgroup.threads", "`vcpus_cgroup` must name"]);
    fs::create_dir(bench.path("no-file")).unwrap();
    bench.config.vcpus_cgroup = Some(bench.path("no-file"));
    bench.refuse(&["no-file/cgroup.threads", "`vcpus_cgroup` must name"]);
    with_cgroups(|mount| {
        let cgroup = mount.join(format!("stoker-test-{}", std::process::id()));
        fs::create_dir(&cgroup).unwrap();
        disk::mount_read_only(mount);
        bench.config.vcpus_cgroup = Some(cgroup.clone());
        bench.refuse(&["cgroup.threads", "Read-only file system"]);
        // What was mounted over it goes, and it can be removed.
        nix::mount::umount(mount).unwrap();
        fs::remove_dir(cgroup).unwrap();
    });
}

#[test]
fn sockets_of_others_are_left_alone() {
    let mut bench = bench();
    let control = bench.path("control");
    let listener = UnixListener::bind(&control).unwrap();
    bench.config.control = Some(control.clone());
    bench.refuse(&["in use", "control"]);
    bench.config.control = None;
    bench.config.vsock = Some(VsockConfig {
        cid: 3,
        socket: control.clone(),
    });
    bench.refuse(&["in use", "control"]);
    assert!(control.exists());
    drop(listener);
    bench.config.vsock = None;
    bench.config.control = Some(bench.path("no/such/folder"));
    bench.refuse(&["cannot listen", "folder exists"]);
}
