//! A thread that waits in poll(2) for something to happen, and ends with its owner.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};

/// The thread; dropping this ends it, and waits until it has.
#[derive(Debug)]
pub(crate) struct Watcher {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

// === impl Watcher ===

impl Watcher {
    /// Starts a thread of this name, which is to end once what it is given is readable.
    ///
    /// # Errors
    /// Where there can be no more threads or descriptors.
    pub(crate) fn start(name: &str, run: impl FnOnce(&EventFd) + Send + 'static) -> io::Result<Self> {
        let stop = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let of_thread = stop.clone();
        let thread = thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || run(&of_thread))?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let stopped = self.stop.write(1);
        if let (Ok(_), Some(thread)) = (stopped, self.thread.take()) {
            let _ = thread.join();
        }
    }
}
