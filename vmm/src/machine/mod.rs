//! The machine and its owner: one thread that hears everything that happens to it.
//!
//! ```text
//!              open ──► build ──► (vCPUs stand at the kernel's entry)
//!                                   │
//!                                   ▼        Pause
//!                                Running ─────────────► Paused
//!                                   │    ◄─────────────   │
//!                                   │        Resume       │
//!                                   ▼                     ▼
//!        Ended: guest off, reset, panic or broken · Stop · SIGTERM or SIGINT
//! ```
//!
//! [`state`] decides, as a pure function; this file hears the events and does what was decided. It waits in one epoll
//! for signals (a signalfd), the guest's end (an eventfd), the console (a timerfd), the control socket, and, where it may have more
//! vCPUs than it started with, for what the guest does about them (an eventfd).

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_proto::vmm::request::{GrowScratch, Resize, SetBalloon};
use stoker_proto::vmm::response::Response;
use stoker_proto::vmm::{Amounts, Request, Status, request, status};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::signal::{block_signal, create_sigset};

use crate::config::MachineConfig;
use crate::console::Console;
use crate::control::{Server, bounded};
use crate::devices::GuestEvents;
use crate::devices::virtio::block::Growth;
use crate::exit_report::Reason;
use crate::vcpu::Vcpus;

pub mod build;
mod memory;
mod plug;
pub mod state;
mod vcpu_maker;

use build::{BuildError, build, open};
use plug::Plug;
use state::{Action, End, Event, PANIC_LINE, State};

/// How long vCPUs may take to stop for a pause.
const PAUSE_PATIENCE: Duration = Duration::from_secs(5);

/// Epoll data of the owner's descriptors.
const SIGNALS: u64 = 0;
const GUEST: u64 = 1;
const CONSOLE: u64 = 2;
const PLUG: u64 = 3;
const CONTROL: u64 = 4;

/// Runs a machine from its configuration to its end. Call it once a process and before any other thread is started, for it
/// blocks the signals that it waits for.
pub fn run(config: &MachineConfig, console: &Console, started: Instant) -> End {
    match start(config, console, started) {
        Ok(mut owner) => owner.run(),
        Err(error) => End {
            reason: Reason::Error,
            detail: error.to_string(),
        },
    }
}

fn start(config: &MachineConfig, console: &Console, started: Instant) -> Result<Owner, BuildError> {
    let fail = |what| move |source| BuildError::Io { what, source };
    let signals = take_signals().map_err(fail("wait for signals"))?;
    let events = Arc::new(GuestEvents::new().map_err(fail("make an eventfd"))?);
    let mut opened = open(config)?;
    let built = build(config, &mut opened, console, &events)?;

    let epoll = Epoll::new().map_err(fail("make an epoll"))?;
    let plug = built.plug.as_ref().map(|plug| (plug.wake().as_raw_fd(), PLUG));
    let all = [(signals.as_raw_fd(), SIGNALS), (events.wake().as_raw_fd(), GUEST)];
    for (fd, data) in all.into_iter().chain(plug) {
        let event = EpollEvent::new(EventSet::IN, data);
        epoll
            .ctl(ControlOperation::Add, fd, event)
            .map_err(fail("wait for events"))?;
    }
    console.watch(&epoll, CONSOLE).map_err(fail("wait for events"))?;
    let control = opened
        .control
        .take()
        .map(|listener| Server::new(listener, &epoll, CONTROL))
        .transpose()
        .map_err(fail("serve the control socket"))?;
    Ok(Owner {
        machine: Machine {
            state: State::Running,
            built,
            console: console.clone(),
            vcpus: config.vcpus,
            memory_mib: config.memory_mib,
            max_memory_mib: config.max_memory_mib(),
            scratch: opened.scratch.take(),
            started,
        },
        epoll,
        signals,
        events,
        control,
        _opened: opened,
    })
}

/// Blocks SIGTERM and SIGINT for this thread and those it starts, and returns a descriptor that reads them.
fn take_signals() -> io::Result<OwnedFd> {
    let numbers = [libc::SIGTERM, libc::SIGINT];
    for number in numbers {
        block_signal(number).map_err(|error| io::Error::other(format!("{error:?}")))?;
    }
    let set = create_sigset(&numbers)?;
    // SAFETY: `set` is a valid signal set for the length of the call.
    let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

struct Owner {
    machine: Machine,
    epoll: Epoll,
    signals: OwnedFd,
    events: Arc<GuestEvents>,
    control: Option<Server>,
    /// Its sockets' files go when the owner goes.
    _opened: build::Opened,
}

struct Machine {
    state: State,
    built: build::Built,
    console: Console,
    /// What it started with.
    vcpus: u32,
    memory_mib: u32,
    max_memory_mib: u32,
    scratch: Option<Growth>,
    started: Instant,
}

// === impl Owner ===

impl Owner {
    fn run(&mut self) -> End {
        self.machine.vcpus().resume();
        let mut ready = [EpollEvent::default(); 8];
        loop {
            if let State::Ended(end) = &self.machine.state {
                return end.clone();
            }
            let count = match self.epoll.wait(-1, &mut ready) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    return End {
                        reason: Reason::Error,
                        detail: format!("cannot wait for events: {error}"),
                    };
                }
            };
            for event in ready.iter().take(count) {
                match event.data() {
                    SIGNALS => self.signalled(),
                    GUEST => self.guest_ended(),
                    CONSOLE => self.machine.console.write_gathered(),
                    PLUG => self.machine.guest_acted(),
                    data => {
                        let machine = &mut self.machine;
                        if let Some(control) = &mut self.control {
                            control.ready(data, &self.epoll, |request| machine.answer(&request));
                        }
                    }
                }
            }
        }
    }

    fn signalled(&mut self) {
        let mut info = mem::MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = mem::size_of_val(&info);
        // SAFETY: the pointer and size are those of `info`.
        let got = unsafe { libc::read(self.signals.as_raw_fd(), info.as_mut_ptr().cast(), size) };
        if usize::try_from(got) == Ok(size) {
            // SAFETY: the read filled all of it.
            let number = unsafe { info.assume_init() }.ssi_signo;
            let _ = self.machine.happen(Event::Signal(number as i32));
        }
    }

    fn guest_ended(&mut self) {
        if let Some(event) = self.events.take() {
            let console_panicked = self.machine.console.tail().contains(PANIC_LINE);
            let _ = self.machine.happen(Event::Guest {
                event,
                console_panicked,
            });
        }
    }
}

// === impl Machine ===

impl Machine {
    fn vcpus(&self) -> &Vcpus {
        &self.built.vcpus
    }

    /// Lets an event happen. Where what it takes cannot be done, the machine is as it was.
    fn happen(&mut self, event: Event) -> Result<(), String> {
        let (next, action) = self.state.clone().next(event);
        match action {
            Action::None => {}
            Action::PauseVcpus => {
                self.vcpus().pause(PAUSE_PATIENCE).map_err(|error| error.to_string())?;
                // Nothing of a machine that stands still moves.
                self.console.write_gathered();
            }
            Action::ResumeVcpus => self.vcpus().resume(),
        }
        self.state = next;
        Ok(())
    }

    fn answer(&mut self, request: &Request) -> Response {
        let happened = match request.request {
            Some(request::Request::Query(_)) => {
                self.refresh_statistics();
                Ok(())
            }
            Some(request::Request::Pause(_)) => self.happen(Event::Pause),
            Some(request::Request::Resume(_)) => self.happen(Event::Resume),
            Some(request::Request::Stop(_)) => self.happen(Event::Stop),
            Some(request::Request::GrowScratch(GrowScratch { size_mib })) => self.grow_scratch(size_mib),
            Some(request::Request::Resize(resize)) => self.resize(resize),
            Some(request::Request::SetBalloon(SetBalloon { mib })) => self.set_balloon(mib),
            None => Err("this machine does not know what is asked of it".into()),
        };
        match happened {
            Ok(()) => Response::Status(self.status()),
            Err(error) => Response::Error(bounded(error)),
        }
    }

    fn grow_scratch(&mut self, size_mib: u32) -> Result<(), String> {
        let scratch = self.scratch.as_mut().ok_or("this machine has no scratch drive")?;
        scratch.grow(size_mib).map_err(|error| error.to_string())
    }

    /// All of it is checked before any of it is done.
    fn resize(&mut self, asked: Resize) -> Result<(), String> {
        let Resize { vcpus, memory_mib } = asked;
        if vcpus.is_none() && memory_mib.is_none() {
            return Err("a resize names `vcpus`, `memory_mib` or both".into());
        }
        if let Some(mib) = memory_mib {
            self.check_memory(mib)?;
        }
        if let Some(vcpus) = vcpus {
            self.resize_vcpus(vcpus)?;
        }
        memory_mib.map_or(Ok(()), |mib| self.resize_memory(mib))
    }

    fn resize_vcpus(&mut self, asked: u32) -> Result<(), String> {
        let (has, built) = (self.vcpus, &mut self.built);
        match &mut built.plug {
            Some(plug) => plug.resize(&mut built.vcpus, asked),
            None if asked == has => Ok(()),
            None => Err(format!(
                "`vcpus` is {asked}; this machine has {has}, and may have no other number: it was started without `max_vcpus`"
            )),
        }
    }

    /// The guest has given vCPUs back, or threads of such have ended.
    fn guest_acted(&mut self) {
        let built = &mut self.built;
        if let Some(plug) = &mut built.plug {
            plug.settle(&mut built.vcpus);
        }
    }

    fn amounts(&self) -> Amounts {
        let (plug, vcpus) = (self.built.plug.as_ref(), self.vcpus());
        let asked = plug.map_or(self.vcpus, Plug::asked);
        let taken = vcpus.started();
        let differs = taken != asked || vcpus.running() != asked;
        let refused = plug.filter(|_| differs).map(Plug::refused);
        Amounts {
            vcpus_asked: asked,
            vcpus_taken: taken,
            memory_asked_mib: self.memory_asked(),
            memory_taken_mib: self.memory_taken(),
            vcpus_refused: refused.map(bounded).unwrap_or_default(),
        }
    }

    fn status(&self) -> Status {
        let state = match self.state {
            State::Running => status::State::Running,
            State::Paused => status::State::Paused,
            State::Ended(_) => status::State::Stopping,
        };
        Status {
            state: state.into(),
            vcpus: self.vcpus().running(),
            memory_mib: self.memory_mib,
            uptime_us: self.started.elapsed().as_micros() as u64,
            exits: self.vcpus().exits(),
            scratch_mib: self.scratch.as_ref().map_or(0, Growth::size_mib),
            amounts: Some(self.amounts()),
            balloon: self.balloon(),
        }
    }
}
