//! Builds a machine out of its configuration, in steps that each need only those before them: open every file, map
//! memory, make the VM, put the devices on the buses, load the guest, set up the vCPUs.
//!
//! The order is the quick one (measured on a host where it made 1 ms of 11): memory slots before the interrupt controllers
//! and the first ioeventfd, for each of those makes a later change of slots wait for a grace period. There is no
//! PIT: with kvmclock for the TSC's frequency and the TSC deadline timer, no guest of ours calibrates by it.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VcpuFd, VmFd};
use virtio_bindings::virtio_ids;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryError, GuestMemoryRegion as _};
use vmm_sys_util::eventfd::EventFd;

use super::plug::Plug;
use super::vcpu_maker::VcpuMaker;
use crate::boot::acpi::VirtioMmio;
use crate::boot::kernel::{self, BootFile, LoadError, LoadedKernel};
use crate::boot::{acpi, params, registers};
use crate::bus::{Overlap, SharedDevice};
use crate::config::{MAX_DRIVES, MachineConfig};
use crate::console::Console;
use crate::devices::GuestEvents;
use crate::devices::cpu_hotplug;
use crate::devices::pci::{self, HostBridge};
use crate::devices::power::{self, I8042, Power};
use crate::devices::pvpanic::{self, Pvpanic};
use crate::devices::serial::{self, Serial};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::balloon::{Balloon, Inflation};
use crate::devices::virtio::block::{Block, Disk, DiskError, Growth};
use crate::devices::virtio::mem::{Mem, Plugging};
use crate::devices::virtio::mmio::{MmioInterrupt, MmioTransport, QUEUE_NOTIFY};
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::Vsock;
use crate::devices::virtio::worker::Worker;
use crate::memory::{self, AllocateError, GuestMemory, layout};
use crate::socket::{ListenError, SocketFile, listen};
use crate::vcpu::{Buses, SpawnError, VcpuCgroup, VcpuCgroupError, Vcpus};

/// The first interrupt of virtio devices: behind COM1's.
const FIRST_VIRTIO_GSI: u32 = serial::GSI + 1;
// All that a machine may have, the scratch drive, vsock, rng, memory and balloon beside its drives, fits on the 24 pins of one I/O APIC,
// of which CPU hot-plug has the last.
const _: () = assert!(FIRST_VIRTIO_GSI as usize + MAX_DRIVES + 5 <= cpu_hotplug::GSI as usize);

/// Why a machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The kernel or initramfs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A drive.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The control socket or that of vsock.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] AllocateError),
    /// `/dev/kvm`.
    #[error(
        "cannot open /dev/kvm: {0}; check that the CPU's virtualisation is on, the kvm module loaded, and that this user may write /dev/kvm"
    )]
    OpenKvm(kvm_ioctls::Error),
    /// KVM lacks something.
    #[error("this host's KVM has no {0}; Linux 5.10 or later is needed")]
    Lacks(&'static str),
    /// More vCPUs than KVM allows.
    #[error("the machine is to have up to {asked} vCPUs, but this host's KVM allows {allowed} at most")]
    TooManyVcpus {
        /// What the configuration says: `max_vcpus`, or else `vcpus`.
        asked: u32,
        /// What is possible.
        allowed: usize,
    },
    /// A call to KVM.
    #[error("KVM refused to {what}: {source}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// The underlying error.
        source: kvm_ioctls::Error,
    },
    /// Writing what the guest finds at its start.
    #[error("cannot write the boot structures into guest memory: {0}")]
    Boot(#[from] GuestMemoryError),
    /// Two devices at one address.
    #[error("cannot place a device: {0}")]
    Bus(#[from] Overlap),
    /// The vCPUs' threads.
    #[error(transparent)]
    Vcpus(#[from] SpawnError),
    /// The vCPUs' threads could not be limited.
    #[error(transparent)]
    VcpuCgroup(#[from] VcpuCgroupError),
    /// A thread or descriptor.
    #[error("cannot {what}: {source}; check this process's limits (threads, open files)")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The underlying error.
        source: io::Error,
    },
}

/// Everything outside of the process that a machine needs, open. After this step nothing is opened by path but the
/// sockets that a guest asks for.
pub struct Opened {
    kvm: Kvm,
    kernel: BootFile,
    initramfs: Option<BootFile>,
    devices: Vec<(String, Box<dyn VirtioDevice>)>,
    vcpus_cgroup: Option<VcpuCgroup>,
    /// What makes the scratch drive larger.
    pub scratch: Option<Growth>,
    /// The control socket.
    pub control: Option<UnixListener>,
    /// Removed when the machine ends.
    pub sockets: Vec<SocketFile>,
}

/// A machine whose vCPUs stand still at its kernel's entry.
pub struct Built {
    /// Its vCPUs.
    pub vcpus: Vcpus,
    /// What plugs more of them, where there may be more.
    pub plug: Option<Plug>,
    /// What asks its guest for more or less memory.
    pub plugging: Option<Plugging>,
    /// What asks its guest for a balloon.
    pub inflation: Option<Inflation>,
    /// Held for as long as the vCPUs may run.
    _vm: Arc<VmFd>,
}

/// Opens all that the configuration names.
///
/// # Errors
/// The first thing that is missing, in use or damaged.
pub fn open(config: &MachineConfig) -> Result<Opened, BuildError> {
    let kernel = BootFile::kernel(&config.kernel)?;
    let initramfs = config.initramfs.as_deref().map(BootFile::initramfs).transpose()?;
    let mut devices: Vec<(String, Box<dyn VirtioDevice>)> = Vec::new();
    for (index, drive) in config.drives.iter().enumerate() {
        let disk = Disk::open(&drive.path, drive.read_only)?;
        let name = format!("drive{index}");
        devices.push((name.clone(), Box::new(Block::new(disk, &name))));
    }
    let mut scratch = None;
    if let Some(config) = &config.scratch {
        let name = "scratch";
        let block = Block::new(Disk::scratch(&config.folder, config.size_mib)?, name);
        scratch = block.growth();
        devices.push((name.into(), Box::new(block)));
    }
    let mut sockets = Vec::new();
    let mut own = |path: &PathBuf| sockets.push(SocketFile(path.clone()));
    let control = match &config.control {
        Some(path) => {
            let listener = listen(path)?;
            own(path);
            Some(listener)
        }
        None => None,
    };
    if let Some(vsock) = &config.vsock {
        let device = Vsock::listen(vsock.cid, &vsock.socket)?;
        own(&vsock.socket);
        devices.push(("vsock".into(), Box::new(device)));
    }
    devices.push(("rng".into(), Box::new(Rng::default())));
    let vcpus_cgroup = config.vcpus_cgroup.as_deref().map(VcpuCgroup::open).transpose()?;
    let kvm = Kvm::new().map_err(BuildError::OpenKvm)?;
    Ok(Opened {
        kvm,
        kernel,
        initramfs,
        devices,
        vcpus_cgroup,
        scratch,
        control,
        sockets,
    })
}

/// Builds the machine.
///
/// # Errors
/// What the host refused, or what in the configuration does not fit together.
pub fn build(
    config: &MachineConfig,
    opened: &mut Opened,
    console: &Console,
    events: &Arc<GuestEvents>,
) -> Result<Built, BuildError> {
    let memory = memory::allocate_up_to(config.memory_mib, config.max_memory_mib())?;
    let vm = Arc::new(make_vm(&opened.kvm, &memory)?);
    let maker = VcpuMaker::new(&opened.kvm, vm.clone(), config.max_vcpus.unwrap_or(config.vcpus))?;
    let fds: Vec<_> = (0..config.vcpus)
        .map(|number| maker.make(number))
        .collect::<Result<_, _>>()?;
    let mut buses = Buses::default();
    place_legacy_devices(&mut buses, &vm, console, events)?;
    let plug = match config.max_vcpus {
        Some(ceiling) => Some(place_plug(&mut buses, config.vcpus, ceiling, maker, &vm)?),
        None => None,
    };
    let mut devices = std::mem::take(&mut opened.devices);
    let plugging = memory.pluggable().map(|pluggable| {
        let device = Mem::new(pluggable.clone());
        let plugging = device.plugging();
        devices.push(("mem".into(), Box::new(device)));
        plugging
    });
    let inflation = if config.balloon {
        let device = Balloon::new(&memory).map_err(no_eventfd)?;
        let inflation = device.inflation();
        devices.push(("balloon".into(), Box::new(device)));
        Some(inflation)
    } else {
        None
    };
    let virtio = place_virtio_devices(&mut buses, &vm, &memory, devices)?;
    let kernel = load_guest(config, opened, &memory, &virtio)?;
    if let Some(first) = fds.first() {
        enter_kernel(first, &kernel)?;
    }
    let wake = plug.as_ref().map(|plug| plug.wake().clone());
    let mut vcpus = Vcpus::new(buses, events.clone(), opened.vcpus_cgroup.take(), wake)?;
    for (number, fd) in (0..).zip(fds) {
        vcpus.add(number, fd);
    }
    vcpus.start(&(0..config.vcpus).collect::<Vec<_>>())?;
    Ok(Built {
        vcpus,
        plug,
        plugging,
        inflation,
        _vm: vm,
    })
}

pub(super) fn refused(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> BuildError {
    move |source| BuildError::Kvm { what, source }
}

fn make_vm(kvm: &Kvm, memory: &GuestMemory) -> Result<VmFd, BuildError> {
    let needed = [
        (Cap::Irqchip, "in-kernel interrupt controller"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::UserMemory, "user memory"),
        (Cap::ImmediateExit, "immediate exit"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(BuildError::Lacks(name));
        }
    }
    let vm = kvm.create_vm().map_err(refused("create a VM"))?;
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let host = memory.get_host_address(region.start_addr())?;
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is that of a mapping which guest memory owns. Devices and the vCPUs' owner hold it for as
        // long as the process lives, and the slot goes with the process.
        unsafe { vm.set_user_memory_region(slot) }.map_err(refused("map guest memory"))?;
    }
    vm.set_tss_address(layout::KVM_TSS as usize)
        .map_err(refused("set the TSS address"))?;
    vm.create_irq_chip()
        .map_err(refused("create the interrupt controllers"))?;
    Ok(vm)
}

fn eventfd() -> Result<EventFd, BuildError> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(no_eventfd)
}

fn no_eventfd(source: io::Error) -> BuildError {
    BuildError::Io {
        what: "make an eventfd",
        source,
    }
}

/// An eventfd that raises the edge-triggered interrupt `gsi`.
fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, BuildError> {
    let line = eventfd()?;
    vm.register_irqfd(&line, gsi).map_err(refused("register an irqfd"))?;
    Ok(line)
}

fn shared(device: impl crate::bus::BusDevice + 'static) -> SharedDevice {
    Arc::new(Mutex::new(device))
}

fn place_legacy_devices(
    buses: &mut Buses,
    vm: &VmFd,
    console: &Console,
    events: &Arc<GuestEvents>,
) -> Result<(), BuildError> {
    let serial = Serial::new(console.clone(), interrupt_line(vm, serial::GSI)?);
    let ports: [(u16, u16, SharedDevice); 5] = [
        (serial::PORT, serial::PORTS, shared(serial)),
        (power::PORT, power::PORTS, shared(Power::new(events.clone()))),
        (power::I8042_PORT, 1, shared(I8042::new(events.clone()))),
        (pci::PORT, pci::PORTS, shared(HostBridge::default())),
        (pvpanic::PORT, 1, shared(Pvpanic::new(events.clone()))),
    ];
    for (port, count, device) in ports {
        buses.ports.insert(u64::from(port), u64::from(count), device)?;
    }
    Ok(())
}

/// The hot-plug registers.
fn place_plug(
    buses: &mut Buses,
    vcpus: u32,
    ceiling: u32,
    maker: VcpuMaker,
    vm: &Arc<VmFd>,
) -> Result<Plug, BuildError> {
    let plug = Plug::new(vcpus, ceiling, maker, vm.clone(), eventfd()?);
    let (port, count) = (cpu_hotplug::PORT, cpu_hotplug::PORTS);
    buses.ports.insert(port.into(), count.into(), plug.device())?;
    Ok(plug)
}

fn place_virtio_devices(
    buses: &mut Buses,
    vm: &VmFd,
    memory: &GuestMemory,
    devices: Vec<(String, Box<dyn VirtioDevice>)>,
) -> Result<Vec<VirtioMmio>, BuildError> {
    let mut placed = Vec::new();
    for ((name, device), index) in devices.into_iter().zip(0u32..) {
        let at = VirtioMmio {
            address: layout::VIRTIO_MMIO + u64::from(index) * layout::VIRTIO_MMIO_SIZE,
            gsi: FIRST_VIRTIO_GSI + index,
        };
        let info = device.info();
        // Who unplugs memory waits for all others.
        let turn = memory.turn().filter(|_| info.kind != virtio_ids::VIRTIO_ID_MEM);
        let worker = Worker::spawn(&name, device, turn).map_err(|source| BuildError::Io {
            what: "start a device's thread",
            source,
        })?;
        // One doorbell for all queues of a device: which queue rang is not worth a descriptor and a look-up each.
        vm.register_ioevent(
            worker.doorbell(),
            &IoEventAddress::Mmio(at.address + QUEUE_NOTIFY),
            NoDatamatch,
        )
        .map_err(refused("register an ioeventfd"))?;
        let interrupt = Arc::new(MmioInterrupt::new(interrupt_line(vm, at.gsi)?));
        let transport = MmioTransport::new(info, worker, memory.clone(), interrupt);
        buses
            .mmio
            .insert(at.address, layout::VIRTIO_MMIO_SIZE, shared(transport))?;
        placed.push(at);
    }
    Ok(placed)
}

fn load_guest(
    config: &MachineConfig,
    opened: &mut Opened,
    memory: &GuestMemory,
    virtio: &[VirtioMmio],
) -> Result<LoadedKernel, BuildError> {
    let kernel = kernel::load_kernel(memory, &mut opened.kernel)?;
    let initramfs = opened
        .initramfs
        .as_mut()
        .map(|file| kernel::load_initramfs(memory, file, &kernel))
        .transpose()?;
    params::write(memory, config.memory_mib, &kernel, initramfs, &config.cmdline)?;
    memory.write_slice(
        &acpi::tables(config.vcpus, config.max_vcpus, virtio),
        GuestAddress(layout::ACPI),
    )?;
    registers::write_tables(memory)?;
    Ok(kernel)
}

/// Lets the first vCPU begin at the kernel's entry.
fn enter_kernel(first: &VcpuFd, kernel: &LoadedKernel) -> Result<(), BuildError> {
    let sregs = first.get_sregs().map_err(refused("read registers"))?;
    first
        .set_sregs(&registers::system(sregs))
        .map_err(refused("set system registers"))?;
    first
        .set_regs(&registers::general(kernel.entry))
        .map_err(refused("set registers"))
}
