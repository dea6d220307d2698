//! Starts machines, waits for what they say, and reads their exit report.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use stoker_proto::vmm::Status;
use stoker_testkit::{BIN_DIR, CACHE, guest};
use stoker_vmm::config::{DriveConfig, MachineConfig, VsockConfig};
use stoker_vmm::control::Client;
use stoker_vmm::exit_report::ExitReport;

/// The slowest boot (a stock kernel on eight vCPUs in a busy lab) takes a tenth of it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);
const POLL: Duration = Duration::from_millis(5);

/// Modules of the stock kernel that guests load, in this order.
const MODULES: [&str; 10] = [
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio-rng",
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
    "drivers/misc/pvpanic/pvpanic",
    "drivers/misc/pvpanic/pvpanic-mmio",
    "drivers/virtio/virtio_mem",
    "drivers/virtio/virtio_balloon",
];

/// Where kernels, and initramfs made for them, lie.
pub(crate) struct Kernels {
    cache: PathBuf,
    folder: tempfile::TempDir,
}

/// One of the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    Stock,
    Tuned,
}

/// A machine that runs.
pub(crate) struct Machine {
    child: Child,
    pub(crate) folder: tempfile::TempDir,
    pub(crate) config: MachineConfig,
}

// === impl Kernels ===

impl Kernels {
    /// Finds the kernels and packs the initramfs, or says why no machine can be booted here.
    pub(crate) fn find() -> Result<Self, String> {
        let cache = std::env::var_os(CACHE)
            .map(PathBuf::from)
            .ok_or("STOKER_CACHE is not set; `cargo xtask test` sets it and finds a host that can boot kernels")?;
        let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
        let kernels = Self { cache, folder };
        for kernel in [Kernel::Stock, Kernel::Tuned] {
            let packed = kernels.pack(kernel).map_err(|error| format!("{error:#}"))?;
            fs::write(kernels.initramfs(kernel), packed).map_err(|error| error.to_string())?;
        }
        Ok(kernels)
    }

    pub(crate) fn image(&self, kernel: Kernel, form: &str) -> PathBuf {
        self.cache.join("kernel").join(kernel.folder()).join(form)
    }

    pub(crate) fn initramfs(&self, kernel: Kernel) -> PathBuf {
        self.folder.path().join(kernel.folder())
    }

    /// This program as `/init`, and the stock kernel's modules.
    fn pack(&self, kernel: Kernel) -> anyhow::Result<Vec<u8>> {
        let modules = MODULES.map(|module| self.cache.join(format!("kernel/stock/modules/kernel/{module}.ko.xz")));
        guest::initramfs(match kernel {
            Kernel::Stock => &modules,
            Kernel::Tuned => &[],
        })
    }

    /// The configuration of a machine that does `task`; `form` is `bzImage` or `vmlinux`.
    pub(crate) fn config(&self, kernel: Kernel, form: &str, vcpus: u32, task: &str) -> MachineConfig {
        MachineConfig {
            id: "test".into(),
            vcpus,
            max_vcpus: None,
            memory_mib: 256,
            max_memory_mib: None,
            balloon: false,
            kernel: self.image(kernel, form),
            initramfs: Some(self.initramfs(kernel)),
            cmdline: format!("console=ttyS0 quiet panic=-1 reboot=t task={task}"),
            drives: Vec::new(),
            scratch: None,
            vsock: None,
            control: None,
            vcpus_cgroup: None,
            console: None,
        }
    }
}

// === impl Kernel ===

impl Kernel {
    fn folder(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Tuned => "tuned",
        }
    }
}

// === impl Machine ===

impl Machine {
    /// Starts the VMM. Its console and sockets lie in a folder of its own.
    pub(crate) fn start(mut config: MachineConfig) -> Self {
        let folder = tempfile::tempdir().unwrap();
        config.console = Some(folder.path().join("console"));
        config.control = Some(folder.path().join("control"));
        config.vsock = Some(VsockConfig {
            cid: 3,
            socket: folder.path().join("vsock"),
        });
        let file = folder.path().join("machine.json");
        fs::write(&file, serde_json::to_vec(&config).unwrap()).unwrap();
        let vmm = std::env::var_os(BIN_DIR).map_or_else(
            || PathBuf::from(env!("CARGO_BIN_EXE_stoker-vmm")),
            |folder| PathBuf::from(folder).join("stoker-vmm"),
        );
        let child = Command::new(vmm)
            .arg("--config")
            .arg(file)
            .stdin(Stdio::null())
            .stdout(File::create(folder.path().join("stdout")).unwrap())
            .spawn()
            .unwrap();
        Self { child, folder, config }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub(crate) fn console(&self) -> String {
        let bytes = fs::read(self.folder.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest has said `text`.
    pub(crate) fn wait_for(&mut self, text: &str) {
        let start = Instant::now();
        while !self.console().contains(text) {
            let ended = self.child.try_wait().unwrap();
            assert!(
                ended.is_none() && start.elapsed() < PATIENCE,
                "{text:?} was never said ({ended:?}); the console: {}\n{}",
                self.console(),
                self.stdout()
            );
            std::thread::sleep(POLL);
        }
    }

    pub(crate) fn stdout(&self) -> String {
        fs::read_to_string(self.folder.path().join("stdout")).unwrap()
    }

    /// Waits for the machine's end. Its exit code is checked against its exit report, and that its sockets are gone.
    pub(crate) fn end(mut self) -> ExitReport {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(
                start.elapsed() < PATIENCE,
                "the machine does not end; the console: {}",
                self.console()
            );
            std::thread::sleep(POLL);
        };
        let text = self.stdout();
        let report = ExitReport::find(&text)
            .unwrap_or_else(|| panic!("no exit report ({status}, {:?}): {text}", status.signal()));
        assert_eq!(status.code(), Some(report.reason.exit_code().into()), "{report:?}");
        for socket in ["control", "vsock"] {
            assert!(!self.folder.path().join(socket).exists(), "{socket} is left");
        }
        report
    }

    pub(crate) fn control(&self) -> Client {
        let socket = self.folder.path().join("control");
        let start = Instant::now();
        loop {
            match Client::connect(&socket, Duration::from_secs(30)) {
                Ok(client) => return client,
                Err(error) => assert!(start.elapsed() < PATIENCE, "{error}"),
            }
            std::thread::sleep(POLL);
        }
    }

    /// Asks how it is until it is so, and says how long that took.
    pub(crate) fn until(&self, control: &mut Client, what: &str, mut is: impl FnMut(&Status) -> bool) -> Duration {
        let start = Instant::now();
        loop {
            let status = control.query().unwrap();
            if is(&status) {
                return start.elapsed();
            }
            assert!(
                start.elapsed() < PATIENCE,
                "not {what}: {status:?}; the console: {}",
                self.console()
            );
            std::thread::sleep(POLL);
        }
    }

    pub(crate) fn vsock(&self) -> PathBuf {
        self.folder.path().join("vsock")
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A drive on `path`.
pub(crate) fn drive(path: &Path, read_only: bool) -> DriveConfig {
    DriveConfig {
        path: path.to_owned(),
        read_only,
    }
}
