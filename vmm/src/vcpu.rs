//! vCPU threads: the one place where KVM's exits meet the buses, and the gate at which vCPUs stop.
//!
//! To stop a vCPU, the wish is written down first and its thread is sent a signal then. The signal's handler sets
//! `immediate_exit` in the thread's own `kvm_run`, so that it does not matter whether it arrives in the guest (which it
//! interrupts), before `KVM_RUN` (which then returns at once), or before the thread looks at the wish.
//!
//! ```text
//!            add            start                dismiss
//!   absent ───────► parked ───────► running ───────────────► leaving
//!                     ▲                                          │
//!                     └──────────────────────────────────────────┘
//!                              its thread ends (`take_left`)
//! ```
//!
//! KVM can't take a vCPU back: one that is parked keeps its descriptor, has no thread, and is used again.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io;
use std::mem;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{KVM_MP_STATE_UNINITIALIZED, kvm_mp_state, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::devices::{GuestEvent, GuestEvents};

mod cgroup;
mod gate;
mod last_word;

pub use cgroup::{VcpuCgroup, VcpuCgroupError};
use gate::Gate;
pub use gate::StopTimeout;
use last_word::InternalError;

/// What the names of vCPUs' threads begin with, before their number.
pub const THREAD_NAME: &str = "vcpu";

/// Bytes of stack of a vCPU's thread; the deepest path, a device's activation, takes a fifth of it.
const STACK_BYTES: usize = 128 * 1024;

/// What a guest did of which KVM can't find the memory. Older kernels say no more, newer ones where.
const NO_MEMORY: &str = "it wrote to memory that is not plugged, or the host has none for it";

/// I/O ports and memory-mapped registers, as all vCPUs share them.
#[derive(Default)]
pub struct Buses {
    /// Ports.
    pub ports: Bus,
    /// Registers in memory.
    pub mmio: Bus,
}

/// Why there are no vCPU threads.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// A thread or the signal's handler cannot be had.
    #[error("cannot start the vCPU threads: {0}; check this process's limits (threads, open files)")]
    Thread(#[from] io::Error),
    /// They are not where they are limited and counted.
    #[error(transparent)]
    Cgroup(#[from] VcpuCgroupError),
}

/// The vCPUs of a machine, and their threads.
pub struct Vcpus {
    /// By their numbers; one that is absent is not among them.
    places: BTreeMap<u32, Place>,
    shared: Arc<Shared>,
    left: mpsc::Receiver<(u32, VcpuFd)>,
}

/// How a vCPU is.
enum Place {
    Parked(VcpuFd),
    Running(Running),
    Leaving,
}

struct Running {
    thread: JoinHandle<()>,
    flags: Arc<Flags>,
}

/// A thread that waits for its vCPU.
struct Started {
    thread: JoinHandle<()>,
    id: mpsc::Receiver<libc::pid_t>,
    give: mpsc::Sender<Vcpu>,
}

/// What a thread and its owner tell each other.
#[derive(Debug)]
struct Flags {
    /// It is to go on.
    wanted: AtomicBool,
    /// The guest has started this vCPU.
    started: AtomicBool,
}

/// What all vCPUs' threads share.
struct Shared {
    gate: Gate,
    buses: Buses,
    events: Arc<GuestEvents>,
    cgroup: Option<VcpuCgroup>,
    leave: mpsc::Sender<(u32, VcpuFd)>,
    wake: Option<Arc<EventFd>>,
}

/// A vCPU, in its thread.
struct Vcpu {
    number: u32,
    fd: VcpuFd,
    flags: Arc<Flags>,
    shared: Arc<Shared>,
}

// === impl Vcpus ===

impl Vcpus {
    /// No vCPU yet. Those that are added move to the cgroup, where there is one, before they run the guest. `wake` becomes
    /// readable when [`Self::take_left`] has something to do.
    ///
    /// # Errors
    /// Where the signal's handler cannot be had.
    pub fn new(
        buses: Buses,
        events: Arc<GuestEvents>,
        cgroup: Option<VcpuCgroup>,
        wake: Option<Arc<EventFd>>,
    ) -> Result<Self, SpawnError> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)?;
        let (leave, left) = mpsc::channel();
        let shared = Shared {
            gate: Gate::default(),
            buses,
            events,
            cgroup,
            leave,
            wake,
        };
        Ok(Self {
            places: BTreeMap::new(),
            shared: Arc::new(shared),
            left,
        })
    }

    /// Adds a vCPU, parked. One of that number must not be there.
    pub fn add(&mut self, number: u32, fd: VcpuFd) {
        self.places.insert(number, Place::Parked(fd));
    }

    /// Whether there is none of that number.
    pub fn is_absent(&self, number: u32) -> bool {
        !self.places.contains_key(&number)
    }

    /// Whether it runs the guest, where the guest wants that and the machine is not paused.
    pub fn is_running(&self, number: u32) -> bool {
        matches!(self.places.get(&number), Some(Place::Running(_)))
    }

    /// Whether its thread is on its way out.
    pub fn is_leaving(&self, number: u32) -> bool {
        matches!(self.places.get(&number), Some(Place::Leaving))
    }

    /// How many run.
    pub fn running(&self) -> u32 {
        self.count(|_| true)
    }

    /// How many run that the guest has started.
    pub fn started(&self) -> u32 {
        self.count(|running| running.flags.started.load(Ordering::Relaxed))
    }

    /// Makes a thread for each of these, which are parked, in the cgroup. They run the guest where the machine is not paused.
    ///
    /// # Errors
    /// Where a thread cannot be had or can't move to the cgroup: all of them are parked, as before.
    pub fn start(&mut self, numbers: &[u32]) -> Result<(), SpawnError> {
        let threads: Vec<_> = numbers
            .iter()
            .map(|&number| Ok((number, self.spawn(number)?)))
            .collect::<io::Result<_>>()?;
        if let Some(cgroup) = &self.shared.cgroup {
            for (_, started) in &threads {
                // By this thread: one that is there already may have to wait for its turn.
                cgroup.take(started.id.recv().map_err(io::Error::other)?)?;
            }
        }
        for (number, Started { thread, give, .. }) in threads {
            let Some(fd) = self.take_parked(number) else {
                continue;
            };
            let flags = Arc::new(Flags {
                wanted: AtomicBool::new(true),
                // The guest begins on the first, and starts the others.
                started: AtomicBool::new(number == 0),
            });
            let running = Running {
                thread,
                flags: flags.clone(),
            };
            self.places.insert(number, Place::Running(running));
            self.shared.gate.enter();
            let shared = self.shared.clone();
            // The thread waits for it.
            let _ = give.send(Vcpu {
                number,
                fd,
                flags,
                shared,
            });
        }
        Ok(())
    }

    /// A thread that tells its id and waits for its vCPU. It ends where it is given none: so nothing is lost where one of several
    /// can't be had.
    fn spawn(&self, number: u32) -> io::Result<Started> {
        let (tell, id) = mpsc::channel();
        let (give, given) = mpsc::channel::<Vcpu>();
        let thread = thread::Builder::new()
            .name(format!("{THREAD_NAME}{number}"))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                // Not libc's gettid: the standard library declares that as a symbol that may be missing, and in a static program
                // that is optimised as a whole it then is.
                // SAFETY: touches no memory of ours.
                let _ = tell.send(unsafe { libc::syscall(libc::SYS_gettid) } as libc::pid_t);
                if let Ok(vcpu) = given.recv() {
                    vcpu.run();
                }
            })?;
        Ok(Started { thread, id, give })
    }

    /// Lets the thread of a vCPU end. What the guest did on it goes no further.
    pub fn dismiss(&mut self, number: u32) {
        let Some(place) = self.places.get_mut(&number) else {
            return;
        };
        match mem::replace(place, Place::Leaving) {
            Place::Running(Running { thread, flags }) => {
                flags.wanted.store(false, Ordering::SeqCst);
                self.shared.gate.look_again();
                let _ = thread.kill(SIGRTMIN());
            }
            other => *place = other,
        }
    }

    /// Parks those whose threads have ended.
    pub fn take_left(&mut self) {
        while let Ok((number, fd)) = self.left.try_recv() {
            // Like one that has never run, it waits for the guest to start it; a KVM that refuses leaves it where it was.
            let _ = fd.set_mp_state(kvm_mp_state {
                mp_state: KVM_MP_STATE_UNINITIALIZED,
            });
            self.add(number, fd);
        }
    }

    /// Lets them run.
    pub fn resume(&self) {
        self.shared.gate.open();
    }

    /// Stops them, and returns when none runs any more.
    ///
    /// # Errors
    /// Where one does not stop within `patience`; then all run on.
    pub fn pause(&self, patience: Duration) -> Result<(), StopTimeout> {
        self.shared.gate.close(patience, || {
            for place in self.places.values() {
                if let Place::Running(running) = place {
                    // A thread that has ended stands still.
                    let _ = running.thread.kill(SIGRTMIN());
                }
            }
        })
    }

    /// Exits to user space so far.
    pub fn exits(&self) -> u64 {
        self.shared.gate.exits()
    }

    fn count(&self, which: impl Fn(&Running) -> bool) -> u32 {
        let counted = self.places.values().filter(|place| match place {
            Place::Running(running) => which(running),
            _ => false,
        });
        counted.count() as u32
    }

    fn take_parked(&mut self, number: u32) -> Option<VcpuFd> {
        match self.places.remove(&number)? {
            Place::Parked(fd) => Some(fd),
            other => {
                self.places.insert(number, other);
                None
            }
        }
    }
}

// === impl Flags ===

impl Flags {
    fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    fn set_started(&self) {
        if !self.started.load(Ordering::Relaxed) {
            self.started.store(true, Ordering::Relaxed);
        }
    }
}

// === impl Vcpu ===

impl Vcpu {
    fn run(mut self) {
        let shared = self.shared.clone();
        let gate = &shared.gate;
        KVM_RUN.set(ptr::from_mut(self.fd.get_kvm_run()));
        loop {
            self.fd.set_kvm_immediate_exit(0);
            if !self.flags.wanted() {
                break;
            }
            if !gate.is_open() {
                gate.wait(|| self.flags.wanted());
                // Tells the guest that it was stopped, so that its watchdogs do not bark. A guest without kvmclock
                // cannot be told.
                let _ = self.fd.kvmclock_ctrl();
                continue;
            }
            if let Some(end) = self.step() {
                shared.events.tell(end);
            }
            // A guest that has ended must not go on, be it only to poll whether it is off yet.
            if shared.events.told() {
                break;
            }
        }
        KVM_RUN.set(ptr::null_mut());
        gate.leave();
        if !self.flags.wanted() {
            // Whoever is not there to hear it has given the machine up.
            let _ = shared.leave.send((self.number, self.fd));
            if let Some(wake) = &shared.wake {
                let _ = wake.write(1);
            }
        }
    }

    /// Runs the guest up to its next exit, and serves that. Returns what ends this vCPU.
    fn step(&mut self) -> Option<GuestEvent> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if error.errno() == libc::EINTR => return None,
            // One that waited to be started does not any more: this is how KVM tells it (`kvm_arch_vcpu_ioctl_run` in Linux).
            Err(error) if error.errno() == libc::EAGAIN => {
                self.look_whether_started();
                return None;
            }
            Err(error) if error.errno() == libc::EFAULT => {
                return Some(self.broken(&format!("KVM_RUN failed: {error}; {NO_MEMORY}")));
            }
            Err(error) => return Some(self.broken(&format!("KVM_RUN failed: {error}"))),
        };
        self.shared.gate.count_exit();
        self.flags.set_started();
        let buses = &self.shared.buses;
        match exit {
            VcpuExit::IoOut(port, data) => buses.ports.write(u64::from(port), data),
            VcpuExit::IoIn(port, data) => buses.ports.read(u64::from(port), data),
            VcpuExit::MmioWrite(address, data) => buses.mmio.write(address, data),
            VcpuExit::MmioRead(address, data) => buses.mmio.read(address, data),
            VcpuExit::Shutdown => return Some(GuestEvent::Reset("a triple fault")),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => {}
            VcpuExit::MemoryFault { gpa, .. } => {
                return Some(self.broken(&format!("a fault at {gpa:#x}; {NO_MEMORY}")));
            }
            VcpuExit::InternalError => {
                let why = InternalError::of(&mut self.fd).describe();
                return Some(self.broken(&why));
            }
            other => {
                let why = format!("{other:x?}");
                return Some(self.broken(&why));
            }
        }
        None
    }

    fn look_whether_started(&self) {
        let state = self.fd.get_mp_state();
        if state.is_ok_and(|state| state.mp_state != KVM_MP_STATE_UNINITIALIZED) {
            self.flags.set_started();
        }
    }

    /// The end of a guest that KVM cannot run on.
    fn broken(&self, why: &str) -> GuestEvent {
        let registers = last_word::registers(&self.fd);
        let number = self.number;
        GuestEvent::Broken(format!("KVM cannot run vCPU {number} on: {why}; {registers}"))
    }
}

thread_local! {
    /// This thread's `kvm_run`, null where it is no vCPU's. Constant and without a destructor, so that a signal's handler may
    /// read it at any time.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: the pointer is that of this very thread's mapping of `kvm_run`, set by `Vcpu::run` and taken back before
        // the mapping goes. The kernel expects this byte to be written at any time (KVM's api.rst, `immediate_exit`).
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}
