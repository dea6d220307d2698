//! The two VMMs: ours, by its control socket, and QEMU's q35, by QMP. Both boot the same kernel, initramfs and command line.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::{Value, json};
use stoker_tests::binary;
use stoker_vmm::control::Client;
use tempfile::TempDir;

use super::guest;
use super::plug::{GIB, MEMORY_MIB, VCPUS};

/// What takes longer has failed: the lab emulates its processors.
const PATIENCE: Duration = Duration::from_secs(180);
/// Between two looks at what can't be waited for.
pub(super) const LOOK: Duration = Duration::from_millis(2);

/// What a guest is booted from.
pub(super) struct Boot {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) command_line: String,
}

/// A way to resize a machine that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    /// Our VMM: ACPI for vCPUs, virtio-mem, and a balloon that is told of free pages.
    Ours,
    /// QEMU with the same devices.
    VirtioMem,
    /// QEMU with memory as a module, by ACPI.
    Dimm,
}

/// A machine that can be resized.
pub(super) enum Vmm {
    Ours(Client),
    Qemu { qmp: Qmp, way: Way },
}

/// A machine and what its guest says.
pub(super) struct Machine {
    pub(super) vmm: Vmm,
    child: Child,
    lines: Receiver<(Instant, String)>,
    said: Vec<String>,
    _folder: TempDir,
}

// === impl Way ===

impl Way {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ours => "ours",
            Self::VirtioMem => "virtio-mem",
            Self::Dimm => "pc-dimm",
        }
    }

    /// Whether the guest can give memory back.
    pub(super) fn gives_back(self) -> bool {
        self != Self::Dimm
    }

    /// Starts the VMM.
    pub(super) fn start(self, boot: &Boot, qemu: &Path) -> anyhow::Result<Machine> {
        let folder = tempfile::tempdir().context("make a folder")?;
        let socket = folder.path().join("control.sock");
        let mut command = match self {
            Self::Ours => ours(boot, folder.path(), &socket)?,
            Self::VirtioMem | Self::Dimm => self.qemu(boot, qemu, &socket),
        };
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit());
        let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
        let lines = match child.stdout.take() {
            Some(console) => read(console),
            None => bail!("no standard output"),
        };
        // From here on it is ended whatever happens.
        let mut child = Killed(Some(child));
        let vmm = match self {
            Self::Ours => Vmm::Ours(until("the control socket", || {
                Ok(Client::connect(&socket, PATIENCE).ok())
            })?),
            Self::VirtioMem | Self::Dimm => Vmm::Qemu {
                qmp: Qmp::connect(&socket)?,
                way: self,
            },
        };
        Ok(Machine {
            vmm,
            child: child.0.take().context("it is there")?,
            lines,
            said: Vec::new(),
            _folder: folder,
        })
    }

    fn qemu(self, boot: &Boot, qemu: &Path, socket: &Path) -> Command {
        let mut command = Command::new(qemu);
        command
            .args([
                "-M",
                "q35",
                "-accel",
                "kvm",
                "-cpu",
                "host",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-serial", "stdio", "-no-reboot", "-smp"])
            .arg(format!("1,maxcpus={VCPUS}"))
            .args(["-m", &format!("{MEMORY_MIB}M,slots=1,maxmem=4G")])
            .args(["-append", &boot.command_line, "-qmp"])
            .arg(format!("unix:{},server=on,wait=off", socket.display()))
            .arg("-kernel")
            .arg(&boot.kernel)
            .arg("-initrd")
            .arg(&boot.initramfs);
        if self == Self::VirtioMem {
            command
                .args(["-object", &format!("memory-backend-ram,id=more,size={GIB}")])
                .args(["-device", "virtio-mem-pci,id=plug,memdev=more,requested-size=0"])
                .args(["-device", "virtio-balloon-pci,free-page-reporting=on"]);
        }
        command
    }
}

fn ours(boot: &Boot, folder: &Path, socket: &Path) -> anyhow::Result<Command> {
    let config = folder.join("machine.json");
    let text = json!({
        "id": "bench",
        "vcpus": 1,
        "max_vcpus": VCPUS,
        "memory_mib": MEMORY_MIB,
        "max_memory_mib": MEMORY_MIB + (GIB >> 20) as u32,
        "balloon": true,
        "kernel": boot.kernel,
        "initramfs": boot.initramfs,
        "cmdline": boot.command_line,
        "control": socket,
    });
    fs::write(&config, text.to_string()).context("write a machine's configuration")?;
    let mut command = Command::new(binary("stoker-vmm")?);
    command.arg("--config").arg(config);
    Ok(command)
}

/// Reads a console to its end, so that the VMM never waits for who reads it.
fn read(console: impl std::io::Read + Send + 'static) -> Receiver<(Instant, String)> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
            // Nobody may listen any more.
            let _ = sender.send((Instant::now(), String::from_utf8_lossy(&line).into_owned()));
        }
    });
    lines
}

/// Asks until there is an answer.
pub(super) fn until<T>(what: &str, mut question: impl FnMut() -> anyhow::Result<Option<T>>) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(answer) = question()? {
            return Ok(answer);
        }
        ensure!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} for {what}");
        std::thread::sleep(LOOK);
    }
}

// === impl Machine ===

impl Machine {
    /// Waits until the guest has said that, and tells when it did.
    pub(super) fn wait_for(&mut self, text: &str) -> anyhow::Result<Instant> {
        let start = Instant::now();
        loop {
            let Ok((at, line)) = self.lines.recv_timeout(PATIENCE.saturating_sub(start.elapsed())) else {
                bail!("the guest never said {text:?}; its console:\n{}", self.said.join("\n"));
            };
            let is_it = line.contains(guest::SAYS) && line.contains(text);
            let has_failed = guest::has_failed(&line);
            self.said.push(line);
            ensure!(!has_failed, "the guest failed; its console:\n{}", self.said.join("\n"));
            if is_it {
                return Ok(at);
            }
        }
    }

    /// What the VMM has of the host's memory, the guest's with it, in bytes.
    pub(super) fn resident(&self) -> anyhow::Result<u64> {
        let path = format!("/proc/{}/statm", self.child.id());
        let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let pages: u64 = text
            .split_whitespace()
            .nth(1)
            .with_context(|| format!("understand {text}"))?
            .parse()?;
        Ok(pages * 4096)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Ends the process unless somebody takes it.
struct Killed(Option<Child>);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            end(child);
        }
    }
}

fn end(child: &mut Child) {
    // Each fails only at what has ended already.
    let _ = child.kill();
    let _ = child.wait();
}

// === impl Vmm ===

impl Vmm {
    /// Asks for so many vCPUs.
    pub(super) fn set_vcpus(&mut self, vcpus: u32) -> anyhow::Result<()> {
        match self {
            Self::Ours(control) => drop(control.resize(Some(vcpus), None)?),
            Self::Qemu { qmp, .. } => qmp.set_vcpus(vcpus)?,
        }
        Ok(())
    }

    /// vCPUs that the guest has and has not given back.
    pub(super) fn vcpus(&mut self) -> anyhow::Result<u32> {
        match self {
            Self::Ours(control) => Ok(control.query()?.vcpus),
            Self::Qemu { qmp, .. } => Ok(qmp.cpus()?.into_values().filter(|cpu| cpu.is_there).count() as u32),
        }
    }

    /// Asks for a GiB more than it booted with, or for that alone.
    pub(super) fn set_memory(&mut self, more: bool) -> anyhow::Result<()> {
        let bytes = if more { GIB } else { 0 };
        match self {
            Self::Ours(control) => drop(control.resize(None, Some(MEMORY_MIB + (bytes >> 20) as u32))?),
            Self::Qemu { qmp, way: Way::Dimm } => {
                ensure!(more, "a module of memory stays where it is");
                qmp.ask(
                    "object-add",
                    json!({ "qom-type": "memory-backend-ram", "id": "module-memory", "size": GIB }),
                )?;
                let module = json!({ "driver": "pc-dimm", "id": "module", "memdev": "module-memory" });
                qmp.ask("device_add", module)?;
            }
            Self::Qemu { qmp, .. } => {
                let size = json!({ "path": PLUG, "property": "requested-size", "value": bytes });
                qmp.ask("qom-set", size)?;
            }
        }
        Ok(())
    }

    /// Whether the guest has no more memory than it booted with.
    pub(super) fn has_given_memory_back(&mut self) -> anyhow::Result<bool> {
        match self {
            Self::Ours(control) => {
                let amounts = control.query()?.amounts.context("no amounts")?;
                Ok(amounts.memory_taken_mib == MEMORY_MIB)
            }
            Self::Qemu { qmp, .. } => {
                let size = qmp.ask("qom-get", json!({ "path": PLUG, "property": "size" }))?;
                Ok(size == 0)
            }
        }
    }
}

/// QEMU's name of its virtio-mem device.
const PLUG: &str = "/machine/peripheral/plug";

/// QEMU's control socket: a JSON object a line (its manual, "QEMU Machine Protocol").
pub(super) struct Qmp {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

/// A place for a vCPU.
struct Place {
    driver: Value,
    properties: Value,
    is_there: bool,
}

// === impl Qmp ===

impl Qmp {
    fn connect(socket: &Path) -> anyhow::Result<Self> {
        let writer = until("QEMU's control socket", || Ok(UnixStream::connect(socket).ok()))?;
        writer.set_read_timeout(Some(PATIENCE))?;
        let mut qmp = Self {
            reader: BufReader::new(writer.try_clone()?),
            writer,
        };
        let greeting = qmp.read()?;
        ensure!(greeting.get("QMP").is_some(), "QEMU greets with {greeting}");
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> anyhow::Result<Value> {
        let mut line = String::new();
        ensure!(self.reader.read_line(&mut line)? > 0, "QEMU has ended");
        serde_json::from_str(&line).with_context(|| format!("understand {line}"))
    }

    /// What a command returns. Events that come before are passed over.
    fn ask(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let line = json!({ "execute": command, "arguments": arguments });
        writeln!(self.writer, "{line}").with_context(|| format!("tell QEMU {command}"))?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {line}: {error}");
            }
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
        }
    }

    /// Places for vCPUs by their number, which is the core's: there is one socket, and a core has one thread.
    fn cpus(&mut self) -> anyhow::Result<BTreeMap<u64, Place>> {
        let all = self.ask("query-hotpluggable-cpus", json!({}))?;
        let places = all.as_array().with_context(|| format!("no list in {all}"))?;
        let place = |of: &Value| {
            let core = of.pointer("/props/core-id").and_then(Value::as_u64);
            let place = Place {
                driver: of.get("type")?.clone(),
                properties: of.get("props")?.clone(),
                is_there: of.get("qom-path").is_some(),
            };
            Some((core?, place))
        };
        let places: Option<BTreeMap<_, _>> = places.iter().map(place).collect();
        let places = places.with_context(|| format!("understand {all}"))?;
        ensure!(
            places.len() == VCPUS as usize,
            "not {VCPUS} vCPUs by their cores: {all}"
        );
        Ok(places)
    }

    fn set_vcpus(&mut self, vcpus: u32) -> anyhow::Result<()> {
        for (number, place) in self.cpus()? {
            let id = format!("vcpu-{number}");
            let wanted = number < u64::from(vcpus);
            if wanted && !place.is_there {
                let mut device = place.properties;
                let object = device.as_object_mut().context("properties of a vCPU")?;
                object.insert("driver".into(), place.driver);
                object.insert("id".into(), id.into());
                self.ask("device_add", device)?;
            } else if !wanted && place.is_there {
                self.ask("device_del", json!({ "id": id }))?;
            }
        }
        Ok(())
    }
}
