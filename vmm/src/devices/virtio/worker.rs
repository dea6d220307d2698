//! A thread for a device: it waits for the driver's doorbell, the device's own descriptors, and the transport's
//! commands.
//!
//! Plain epoll from `vmm-sys-util`: with one doorbell and a few descriptors a thread, there is nothing that an event
//! manager's subscriber lists would make simpler.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, Backend, Progress, VirtioDevice};
use crate::memory::Turn;

/// Bytes of stack of a device's thread; the deepest path seen takes a fifth of it.
const STACK_BYTES: usize = 128 * 1024;
/// `data` of the doorbell in a worker's epoll.
const DOORBELL: u64 = u64::MAX;
/// `data` of the command eventfd in a worker's epoll.
const COMMAND: u64 = u64::MAX - 1;

enum Command {
    Activate(Activation),
    /// Answered when it is done.
    Reset(Sender<()>),
}

/// The transport's end of a device that runs in a thread of its own.
pub struct Worker {
    commands: Sender<Command>,
    command: EventFd,
    doorbell: EventFd,
}

struct Thread {
    device: Box<dyn VirtioDevice>,
    commands: Receiver<Command>,
    command: EventFd,
    doorbell: EventFd,
    epoll: Arc<Epoll>,
    /// Where guest memory may be unplugged, by another device's thread.
    turn: Option<Turn>,
    active: bool,
}

// === impl Worker ===

impl Worker {
    /// Starts the device's thread. It lives as long as the process. Where there is a `turn`, the device does all that it does within one.
    ///
    /// # Errors
    /// Where descriptors or a thread cannot be had.
    pub fn spawn(name: &str, mut device: Box<dyn VirtioDevice>, turn: Option<Turn>) -> io::Result<Self> {
        let flags = libc::EFD_NONBLOCK | libc::EFD_CLOEXEC;
        let (command, doorbell) = (EventFd::new(flags)?, EventFd::new(flags)?);
        let epoll = Arc::new(Epoll::new()?);
        for (fd, data) in [(&doorbell, DOORBELL), (&command, COMMAND)] {
            let event = EpollEvent::new(EventSet::IN, data);
            epoll.ctl(ControlOperation::Add, std::os::fd::AsRawFd::as_raw_fd(fd), event)?;
        }
        device.watch(&epoll)?;
        let (commands, receiver) = mpsc::channel();
        let worker = Self {
            commands,
            command: command.try_clone()?,
            doorbell: doorbell.try_clone()?,
        };
        let thread = Thread {
            device,
            commands: receiver,
            command,
            doorbell,
            epoll,
            turn,
            active: false,
        };
        thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || thread.run())?;
        Ok(worker)
    }

    /// What the driver's notifications write, by an ioeventfd.
    pub fn doorbell(&self) -> &EventFd {
        &self.doorbell
    }
}

impl Backend for Worker {
    fn activate(&mut self, activation: Activation) {
        // A thread that is gone took the process with it.
        let _ = self.commands.send(Command::Activate(activation));
        let _ = self.command.write(1);
    }

    fn notify(&mut self) {
        let _ = self.doorbell.write(1);
    }

    fn reset(&mut self) {
        let (done, wait) = mpsc::channel();
        let _ = self.commands.send(Command::Reset(done));
        let _ = self.command.write(1);
        let _ = wait.recv();
    }
}

// === impl Thread ===

impl Thread {
    fn run(mut self) {
        let mut events = [EpollEvent::default(); 16];
        let turn = self.turn.take();
        loop {
            let ready = match self.epoll.wait(-1, &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                #[expect(clippy::panic, reason = "a machine without this device is none: it ends the VMM")]
                Err(error) => panic!("cannot wait for events: {error}"),
            };
            for event in events.iter().take(ready) {
                let _turn = turn.as_ref().map(Turn::begin);
                let progress = match event.data() {
                    COMMAND => self.obey(),
                    DOORBELL => {
                        let _ = self.doorbell.read();
                        self.process()
                    }
                    data => self.device.ready(data, event.event_set()),
                };
                if progress == Progress::More {
                    let _ = self.doorbell.write(1);
                }
            }
        }
    }

    fn process(&mut self) -> Progress {
        if self.active {
            self.device.process()
        } else {
            Progress::Idle
        }
    }

    fn obey(&mut self) -> Progress {
        let _ = self.command.read();
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Activate(activation) => {
                    self.device.activate(activation);
                    self.active = true;
                }
                Command::Reset(done) => {
                    self.device.reset();
                    self.active = false;
                    let _ = done.send(());
                }
            }
        }
        // The driver may have filled its queues and notified before they were handed over.
        self.process()
    }
}
