//! vCPU threads: the one place where KVM's exits meet the buses, and the gate at which vCPUs stop.
//!
//! To stop a vCPU, the wish is written down first and its thread is sent a signal then. The signal's handler sets
//! `immediate_exit` in the thread's own `kvm_run`, so that it does not matter whether it arrives in the guest (which it
//! interrupts), before `KVM_RUN` (which then returns at once), or before the thread looks at the wish.

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::devices::{GuestEvent, GuestEvents};

mod cgroup;
mod last_word;

pub use cgroup::{VcpuCgroup, VcpuCgroupError};
use last_word::InternalError;

/// What the names of vCPUs' threads begin with, before their number.
pub const THREAD_NAME: &str = "vcpu";

/// Bytes of stack of a vCPU's thread; the deepest path, a device's activation, takes a fifth of it.
const STACK_BYTES: usize = 128 * 1024;
/// How often a vCPU that does not stop is signalled again.
const KICK_AGAIN: Duration = Duration::from_millis(10);

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

/// vCPUs that do not stop: one is in a device's access that takes long.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{running} vCPUs did not stop within {waited:?}: a device keeps them; try again")]
pub struct StopTimeout {
    running: usize,
    waited: Duration,
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

/// The vCPU threads of a machine. They start stopped.
pub struct Vcpus {
    gate: Arc<Gate>,
    threads: Vec<JoinHandle<()>>,
}

/// What the vCPUs are to do, and how many of them do it.
struct Gate {
    wish: AtomicU8,
    exits: AtomicU64,
    /// How many vCPUs stand still.
    stopped: Mutex<usize>,
    changed: Condvar,
}

const STOP: u8 = 0;
const RUN: u8 = 1;

struct Vcpu {
    fd: VcpuFd,
    buses: Arc<Buses>,
    gate: Arc<Gate>,
    events: Arc<GuestEvents>,
}

// === impl Vcpus ===

impl Vcpus {
    /// Makes a thread for each vCPU. Each moves to the cgroup, where there is one, before it runs the guest.
    ///
    /// # Errors
    /// Where a thread or the signal's handler cannot be had, or a thread can't move; the process is to end then.
    pub fn spawn(
        fds: Vec<VcpuFd>,
        buses: &Arc<Buses>,
        events: &Arc<GuestEvents>,
        cgroup: Option<VcpuCgroup>,
    ) -> Result<Self, SpawnError> {
        register_signal_handler(SIGRTMIN(), on_kick).map_err(io::Error::from)?;
        let gate = Arc::new(Gate {
            wish: AtomicU8::new(STOP),
            exits: AtomicU64::new(0),
            stopped: Mutex::new(0),
            changed: Condvar::new(),
        });
        let cgroup = cgroup.map(Arc::new);
        let (tell, moves) = mpsc::channel();
        let threads = fds.into_iter().enumerate().map(|(index, fd)| {
            let vcpu = Vcpu {
                fd,
                buses: buses.clone(),
                gate: gate.clone(),
                events: events.clone(),
            };
            let (cgroup, tell) = (cgroup.clone(), tell.clone());
            thread::Builder::new()
                .name(format!("{THREAD_NAME}{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let moved = cgroup.map_or(Ok(()), |cgroup| cgroup.enter());
                    let stays = moved.is_err();
                    // Whoever is not there to hear it has given the machine up.
                    let _ = tell.send(moved);
                    drop(tell);
                    if !stays {
                        vcpu.run();
                    }
                })
        });
        let threads = threads.collect::<io::Result<_>>()?;
        drop(tell);
        moves.iter().collect::<Result<(), _>>()?;
        Ok(Self { gate, threads })
    }

    /// Lets them run.
    pub fn resume(&self) {
        let _stopped = self.gate.lock();
        self.gate.wish.store(RUN, Ordering::SeqCst);
        self.gate.changed.notify_all();
    }

    /// Stops them, and returns when none runs any more.
    ///
    /// # Errors
    /// Where one does not stop within `patience`; then all run on.
    pub fn pause(&self, patience: Duration) -> Result<(), StopTimeout> {
        self.gate.wish.store(STOP, Ordering::SeqCst);
        let start = Instant::now();
        let mut stopped = self.gate.lock();
        while *stopped < self.threads.len() {
            if start.elapsed() >= patience {
                let running = self.threads.len() - *stopped;
                drop(stopped);
                self.resume();
                return Err(StopTimeout {
                    running,
                    waited: patience,
                });
            }
            for thread in &self.threads {
                // A thread that has ended stands still.
                let _ = thread.kill(SIGRTMIN());
            }
            stopped = self
                .gate
                .changed
                .wait_timeout(stopped, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Exits to user space so far.
    pub fn exits(&self) -> u64 {
        self.gate.exits.load(Ordering::Relaxed)
    }
}

// === impl Gate ===

impl Gate {
    fn lock(&self) -> std::sync::MutexGuard<'_, usize> {
        self.stopped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stands still until the vCPUs are to run.
    fn wait_until_wanted(&self) {
        let mut stopped = self.lock();
        if self.wish.load(Ordering::SeqCst) == RUN {
            return;
        }
        *stopped += 1;
        self.changed.notify_all();
        while self.wish.load(Ordering::SeqCst) != RUN {
            stopped = self.changed.wait(stopped).unwrap_or_else(PoisonError::into_inner);
        }
        *stopped -= 1;
    }

    /// Counts a vCPU that will never run again.
    fn leave(&self) {
        *self.lock() += 1;
        self.changed.notify_all();
    }
}

// === impl Vcpu ===

impl Vcpu {
    fn run(mut self) {
        KVM_RUN.set(ptr::from_mut(self.fd.get_kvm_run()));
        loop {
            self.fd.set_kvm_immediate_exit(0);
            if self.gate.wish.load(Ordering::SeqCst) != RUN {
                self.gate.wait_until_wanted();
                // Tells the guest that it was stopped, so that its watchdogs do not bark. A guest without kvmclock
                // cannot be told.
                let _ = self.fd.kvmclock_ctrl();
                continue;
            }
            if let Some(end) = self.step() {
                self.events.tell(end);
            }
            // A guest that has ended must not go on, be it only to poll whether it is off yet.
            if self.events.told() {
                break;
            }
        }
        KVM_RUN.set(ptr::null_mut());
        self.gate.leave();
    }

    /// Runs the guest up to its next exit, and serves that. Returns what ends this vCPU.
    fn step(&mut self) -> Option<GuestEvent> {
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return None,
            Err(error) if error.errno() == libc::EFAULT => {
                return Some(self.broken(&format!("KVM_RUN failed: {error}; {NO_MEMORY}")));
            }
            Err(error) => return Some(self.broken(&format!("KVM_RUN failed: {error}"))),
        };
        self.gate.exits.fetch_add(1, Ordering::Relaxed);
        match exit {
            VcpuExit::IoOut(port, data) => self.buses.ports.write(u64::from(port), data),
            VcpuExit::IoIn(port, data) => self.buses.ports.read(u64::from(port), data),
            VcpuExit::MmioWrite(address, data) => self.buses.mmio.write(address, data),
            VcpuExit::MmioRead(address, data) => self.buses.mmio.read(address, data),
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

    /// The end of a guest that KVM cannot run on.
    fn broken(&self, why: &str) -> GuestEvent {
        let registers = last_word::registers(&self.fd);
        GuestEvent::Broken(format!("KVM cannot run the guest on: {why}; {registers}"))
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
