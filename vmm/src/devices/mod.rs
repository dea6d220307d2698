//! Devices: registers and queues. None of them knows of KVM, nor of the bus or transport in front of it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

pub mod cpu_hotplug;
pub mod pci;
pub mod power;
pub mod pvpanic;
pub mod serial;
pub mod virtio;

/// What a guest does to its machine as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GuestEvent {
    /// It powered itself off.
    Off,
    /// It asked for a reset, or its CPU shut down after a triple fault; the text says which.
    Reset(&'static str),
    /// Its kernel panicked and told the panic device.
    Panic,
    /// A vCPU cannot go on; the text says why.
    Broken(String),
}

/// The way by which devices and vCPUs tell the machine's owner that the guest has ended. The first to speak is heard.
#[derive(Debug)]
pub struct GuestEvents {
    first: Mutex<Option<GuestEvent>>,
    told: AtomicBool,
    wake: EventFd,
}

// === impl GuestEvents ===

impl GuestEvents {
    /// Nothing has happened yet.
    ///
    /// # Errors
    /// Where no eventfd can be had.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            first: Mutex::new(None),
            told: AtomicBool::new(false),
            wake: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// Tells the owner.
    pub fn tell(&self, event: GuestEvent) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(event);
            self.told.store(true, Ordering::Release);
            // It is written once: the counter cannot be full.
            let _ = self.wake.write(1);
        }
    }

    /// Whether anything was told. Cheap enough to ask after every exit.
    pub fn told(&self) -> bool {
        self.told.load(Ordering::Acquire)
    }

    /// What was told, if anything was.
    pub fn take(&self) -> Option<GuestEvent> {
        let _ = self.wake.read();
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Becomes readable when something was told.
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }
}
