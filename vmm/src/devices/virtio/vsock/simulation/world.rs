//! The host of a simulation: programs with their ends of streams, what an epoll would tell of them, and a clock.
//!
//! The streams are as Unix sockets under an edge-triggered epoll are: an event comes for each change, also for one that the device
//! has made itself, and tells all that is so at the moment.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EventSet};

use super::super::host::{Host, Stream};
use super::super::packet::shutdown;
use crate::devices::virtio::buffers::Buffers;
use crate::memory::GuestMemory;

/// Bytes that a stream holds for a program of the host which does not read.
pub(super) const ROOM: usize = 3000;

/// A stream, seen from both of its ends.
#[derive(Default)]
pub(super) struct Wire {
    pub(super) to_device: VecDeque<u8>,
    pub(super) to_host: VecDeque<u8>,
    /// Which directions either side has ended: `shutdown` flags.
    pub(super) device_shut: u32,
    pub(super) host_shut: u32,
    pub(super) device_gone: bool,
    pub(super) watched: Option<(EventSet, u64)>,
    pub(super) changed: bool,
    /// Bytes that the host has written and read, a greeting and its answer not counted.
    pub(super) written: usize,
    pub(super) read: usize,
    /// A client that has not been answered; what it has read of the answer.
    pub(super) unanswered: Option<Vec<u8>>,
}

#[derive(Default)]
pub(super) struct World {
    pub(super) now: Duration,
    pub(super) clients: u64,
    pub(super) timer: u64,
    pub(super) timer_at: Option<Duration>,
    pub(super) wires: Vec<Wire>,
    /// Those that wait to be let in.
    pub(super) backlog: VecDeque<usize>,
    pub(super) knocked: bool,
}

#[derive(Clone)]
pub(super) struct SimulatedHost(pub(super) Arc<Mutex<World>>);

pub(super) struct SimulatedStream {
    world: Arc<Mutex<World>>,
    wire: usize,
}

/// Byte number `at` of any stream.
pub(super) fn byte(at: usize) -> u8 {
    (at % 251) as u8
}

fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

/// A run that fails lets go of its streams, and must not fail again there.
pub(super) fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

// === impl Wire ===

impl Wire {
    /// Nothing more comes from the host.
    fn ended(&self) -> bool {
        self.host_shut & shutdown::SEND != 0 || self.device_shut & shutdown::RECEIVE != 0
    }

    /// The host takes nothing more.
    fn refuses(&self) -> bool {
        self.host_shut & shutdown::RECEIVE != 0 || self.device_shut & shutdown::SEND != 0
    }

    fn events(&self) -> EventSet {
        let mut events = EventSet::empty();
        events.set(EventSet::IN, !self.to_device.is_empty() || self.ended());
        events.set(EventSet::READ_HANG_UP, self.ended());
        events.set(EventSet::OUT, self.to_host.len() < ROOM);
        events.set(EventSet::HANG_UP, self.ended() && self.refuses());
        events
    }

    /// Something about the stream changes; all who watch it for that are told.
    pub(super) fn change(&mut self, what: EventSet) {
        let watched = self.watched.map_or(EventSet::empty(), |(events, _)| events);
        self.changed |= (watched | EventSet::HANG_UP).intersects(what);
    }

    pub(super) fn is_closed(&self) -> bool {
        self.host_shut == shutdown::BOTH
    }

    /// The program on the host reads, and checks what it gets. Returns how many bytes.
    pub(super) fn host_reads(&mut self, amount: usize) -> usize {
        let amount = amount.min(self.to_host.len());
        let mut bytes = self.to_host.drain(..amount);
        while let Some(answer) = &mut self.unanswered {
            let Some(byte) = bytes.next() else { break };
            answer.push(byte);
            if byte == b'\n' {
                assert!(answer.starts_with(b"OK "), "{answer:?}");
                self.unanswered = None;
            }
        }
        for found in bytes {
            assert_eq!(found, byte(self.read), "byte {} for the host", self.read);
            self.read += 1;
        }
        amount
    }
}

// === impl World ===

impl World {
    /// The events that an epoll would tell of now.
    pub(super) fn events(&mut self) -> Vec<(u64, EventSet)> {
        let mut all = Vec::new();
        if std::mem::take(&mut self.knocked) {
            all.push((self.clients, EventSet::IN));
        }
        if self.timer_at.is_some_and(|at| at <= self.now) {
            self.timer_at = None;
            all.push((self.timer, EventSet::IN));
        }
        for wire in self.wires.iter_mut().filter(|wire| !wire.device_gone) {
            if let Some((watched, data)) = wire.watched
                && std::mem::take(&mut wire.changed)
            {
                let events = wire.events() & (watched | EventSet::HANG_UP | EventSet::ERROR);
                if !events.is_empty() {
                    all.push((data, events));
                }
            }
        }
        all
    }
}

// === impl SimulatedHost ===

impl SimulatedHost {
    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.0)
    }

    fn stream(&self, wire: usize) -> SimulatedStream {
        SimulatedStream {
            world: self.0.clone(),
            wire,
        }
    }
}

impl Host for SimulatedHost {
    type Stream = SimulatedStream;

    fn start(&mut self, _: &Arc<Epoll>, clients: u64, timer: u64) -> io::Result<()> {
        let mut world = self.world();
        (world.clients, world.timer) = (clients, timer);
        Ok(())
    }

    fn accept(&mut self) -> Option<SimulatedStream> {
        let wire = self.world().backlog.pop_front()?;
        Some(self.stream(wire))
    }

    fn connect(&mut self, port: u32) -> Option<SimulatedStream> {
        // Nobody listens on every fourth port.
        let wire = (!port.is_multiple_of(4)).then(|| {
            let mut world = self.world();
            world.wires.push(Wire::default());
            world.wires.len() - 1
        });
        wire.map(|wire| self.stream(wire))
    }

    fn watch(&mut self, _: ControlOperation, stream: &SimulatedStream, events: EventSet, data: u64) -> bool {
        let mut world = self.world();
        let wire = &mut world.wires[stream.wire];
        wire.watched = Some((events, data));
        wire.changed = true;
        true
    }

    fn now(&self) -> Duration {
        self.world().now
    }

    fn set_timer(&mut self, when: Duration) {
        self.world().timer_at = Some(when);
    }
}

// === impl SimulatedStream ===

impl SimulatedStream {
    fn with<T>(&self, act: impl FnOnce(&mut Wire) -> T) -> T {
        act(&mut lock(&self.world).wires[self.wire])
    }

    fn taken(&self, length: usize) -> io::Result<Vec<u8>> {
        self.with(|wire| {
            let length = length.min(wire.to_device.len());
            if length == 0 && !wire.ended() {
                return Err(would_block());
            }
            Ok(wire.to_device.drain(..length).collect())
        })
    }

    fn given(&self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|wire| {
            if wire.refuses() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let length = bytes.len().min(ROOM - wire.to_host.len());
            if length == 0 {
                return Err(would_block());
            }
            wire.to_host.extend(&bytes[..length]);
            Ok(length)
        })
    }
}

impl Stream for SimulatedStream {
    fn receive(&self, buffers: &Buffers, memory: &GuestMemory, offset: u64, length: u64) -> io::Result<usize> {
        let bytes = self.taken(length as usize)?;
        buffers.write(memory, offset, &bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn send(&self, buffers: &Buffers, memory: &GuestMemory, offset: u64, length: u64) -> io::Result<usize> {
        let mut bytes = vec![0; length as usize];
        buffers.read(memory, offset, &mut bytes).map_err(io::Error::other)?;
        self.given(&bytes)
    }

    fn is_drained(&self) -> bool {
        self.with(|wire| wire.to_device.is_empty())
    }

    fn shutdown(&self, how: Shutdown) {
        let flags = match how {
            Shutdown::Read => shutdown::RECEIVE,
            Shutdown::Write => shutdown::SEND,
            Shutdown::Both => shutdown::BOTH,
        };
        self.with(|wire| {
            assert_eq!(wire.device_shut & flags, 0, "a direction is shut down again");
            wire.device_shut |= flags;
            wire.change(EventSet::all());
        });
    }
}

impl io::Read for SimulatedStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.taken(buffer.len())?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        Ok(bytes.len())
    }
}

impl io::Write for SimulatedStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.given(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for SimulatedStream {
    fn drop(&mut self) {
        self.with(|wire| wire.device_gone = true);
    }
}
