//! The vsock device between a guest and a host that are simulated, with a clock of their own: every order of events can be
//! tried, without sockets and without waiting, and what the device does about nothing can be counted. Unit tests and a fuzz target
//! run it.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "only tests and fuzz targets compile it, and there a panic is a finding"
)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use vmm_sys_util::epoll::{Epoll, EventSet};

use super::connection::Ports;
use super::credit::WINDOW;
use super::muxer::{ANSWER_LIMIT, MAX_CONNECTIONS};
use super::packet::{HEADER_BYTES, Header, TYPE_STREAM, op, shutdown};
use super::{QUEUE_SIZE, Vsock};
use crate::devices::virtio::testing::{Driver, Part};
use crate::devices::virtio::{Progress, VirtioDevice as _, feature};

mod world;

use world::{ROOM, SimulatedHost, Wire, World, byte, lock};

const CID: u32 = 3;
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
/// Where packets for the guest, those from it, and their payload lie.
const RECEIVE: u64 = 0x10_0000;
const SEND: u64 = 0x1000;
const PAYLOAD: u64 = 0x2_0000;
/// Bytes of a buffer of the guest.
const BUFFER: u64 = 1024;
/// The most that one step sends.
const MOST: usize = 8 * 1024;

/// One step of a run, as four bytes: what happens, to whom, and how much.
pub type Step = [u8; 4];

/// What the guest knows of a connection.
struct Known {
    ports: Ports,
    established: bool,
    /// Bytes it says that it can hold.
    window: u32,
    received: usize,
    /// Of that, what its reader took.
    taken: usize,
    sent: usize,
    /// Of what it sent, what the device says it has passed on.
    passed_on: u32,
    /// Packets that it got, those with data apart.
    data_packets: usize,
    credit_requests: usize,
    shutdowns: usize,
}

/// Everything.
struct Simulation {
    world: Arc<Mutex<World>>,
    device: Vsock<SimulatedHost>,
    driver: Driver,
    known: Vec<Known>,
    /// Buffers that the device has, by their head, and how many there are.
    buffers: HashMap<u32, u64>,
    /// It does not answer.
    mute: bool,
    /// It gives no new buffers for those that it got back.
    stingy: bool,
    /// It takes what it receives, and so makes room for more.
    reads: bool,
    notified: bool,
    sent_packets: u64,
    given: u64,
    /// What the device was woken up for, and how often it was.
    causes: usize,
    moved: usize,
    wake_ups: usize,
}

// === impl Simulation ===

/// Runs the device through `steps`, and panics where it breaks a rule:
///
/// - it wakes up at most 8 times for each thing that happens and 4 times for each byte that moves, and not at all once nothing
///   does, however much time passes;
/// - bytes arrive in their order, none that was not sent, and in the end all that were;
/// - a direction of a stream is shut down once, the guest told of an end once, and asked for credit once for each time that it
///   had some;
/// - nobody whom the guest does not answer, or who does not say what it wants, keeps its slot.
pub fn run(steps: impl IntoIterator<Item = Step>) {
    let world = Arc::new(Mutex::new(World::default()));
    let mut device = Vsock::new(CID, SimulatedHost(world.clone()));
    let epoll = Arc::new(Epoll::new().unwrap());
    device.watch(&epoll).unwrap();
    let driver = Driver::new(&[QUEUE_SIZE; 3]);
    device.activate(driver.activation(feature::COMMON));
    let mut simulation = Simulation {
        world,
        device,
        driver,
        known: Vec::new(),
        buffers: HashMap::new(),
        mute: false,
        stingy: false,
        reads: true,
        notified: false,
        sent_packets: 0,
        given: 0,
        causes: 0,
        moved: 0,
        wake_ups: 0,
    };
    simulation.give_buffers(usize::from(QUEUE_SIZE));
    for step in steps {
        simulation.causes += 1;
        simulation.happen(step);
        simulation.settle();
    }
    simulation.finish();
}

impl Simulation {
    fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }

    fn happen(&mut self, [what, whom, much, more]: Step) {
        let amount = (usize::from(much) << (more % 8)).min(MOST);
        match what % 20 {
            0 => self.give_buffers(1 + usize::from(much % 64)),
            1 => self.stingy = much % 2 == 0,
            // The guest.
            2 => self.guest_asks(u32::from(whom % 4), u32::from(much % 4)),
            3..=5 => self.guest_sends(whom, amount, true),
            6 => self.guest_says(whom, op::CREDIT_REQUEST, 0),
            7 => self.guest_says(whom, op::SHUTDOWN, u32::from(much % 4)),
            8 => self.guest_says(whom, op::RST, 0),
            9 => match more % 8 {
                0 => self.guest_sends(whom, amount, false),
                1 => self.guest_says(whom, u16::from(much), u32::from(more)),
                2 => self.guest_says(whom, op::REQUEST, 0),
                _ => self.guest_says(whom, op::CREDIT_UPDATE, 0),
            },
            10 => {
                if let Some(known) = pick(&mut self.known, whom) {
                    known.window = [0, 1, 100, 4096, 1 << 17][usize::from(much % 5)];
                }
                self.guest_says(whom, op::CREDIT_UPDATE, 0);
            }
            11 => self.mute = much % 4 == 0,
            12 => self.reads = much % 2 == 0,
            // The host.
            13 => self.client_comes(whom, much),
            14 | 15 => self.host_acts(whom, |wire, moved| {
                if wire.host_shut & shutdown::SEND == 0 && wire.to_device.len() < MOST && wire.unanswered.is_none() {
                    let from = wire.written;
                    wire.to_device.extend((from..from + amount).map(byte));
                    wire.written += amount;
                    *moved += amount;
                    wire.change(EventSet::IN);
                }
            }),
            16 | 17 => self.host_acts(whom, |wire, moved| {
                *moved += wire.host_reads(amount);
                wire.change(EventSet::OUT);
            }),
            18 => self.host_acts(whom, |wire, _| {
                wire.host_shut |= match more % 4 {
                    0 => shutdown::BOTH,
                    1 => shutdown::RECEIVE,
                    _ => shutdown::SEND,
                };
                wire.change(EventSet::all());
            }),
            _ => {
                let mut world = self.world();
                world.now += Duration::from_millis(u64::from(much) << (more % 8));
            }
        }
    }

    fn host_acts(&mut self, whom: u8, act: impl FnOnce(&mut Wire, &mut usize)) {
        let mut moved = 0;
        let mut world = lock(&self.world);
        let mut wires: Vec<_> = world.wires.iter_mut().filter(|wire| !wire.is_closed()).collect();
        if let Some(wire) = pick(&mut wires, whom) {
            act(wire, &mut moved);
        }
        self.moved += moved;
    }

    fn client_comes(&mut self, whom: u8, how: u8) {
        let mut world = self.world();
        if world.backlog.len() >= 8 {
            return;
        }
        let greeting = match how % 8 {
            0 => "CONNECT 1".to_owned(),
            1 => "HELLO\n".to_owned(),
            _ => format!("CONNECT {}\n", whom % 8),
        };
        let wire = Wire {
            to_device: greeting.into_bytes().into(),
            unanswered: Some(Vec::new()),
            ..Wire::default()
        };
        world.wires.push(wire);
        let index = world.wires.len() - 1;
        world.backlog.push_back(index);
        world.knocked = true;
    }

    // --- the guest ---

    fn give_buffers(&mut self, count: usize) {
        for _ in 0..count.min(usize::from(QUEUE_SIZE) - self.buffers.len()) {
            let address = RECEIVE + self.given % u64::from(QUEUE_SIZE) * BUFFER;
            self.given += 1;
            let head = self.driver.send(TO_GUEST, &[Part::write(address, BUFFER as u32)]);
            self.buffers.insert(u32::from(head), address);
        }
        self.notified = true;
    }

    fn send(&mut self, header: Header, payload: u32) {
        let at = SEND + self.sent_packets % u64::from(QUEUE_SIZE) * 64;
        self.sent_packets += 1;
        self.driver.put(at, &header.to_bytes());
        let mut parts = vec![Part::read(at, HEADER_BYTES as u32)];
        if payload > 0 {
            parts.push(Part::read(PAYLOAD, payload));
        }
        self.driver.send(FROM_GUEST, &parts);
        self.notified = true;
    }

    fn guest_asks(&mut self, host: u32, guest: u32) {
        let ports = Ports { host, guest };
        if self.known.iter().all(|known| known.ports != ports) {
            let known = Known::new(ports);
            self.send(known.header(op::REQUEST), 0);
            self.known.push(known);
        }
    }

    fn guest_says(&mut self, whom: u8, operation: u16, flags: u32) {
        let Some(known) = pick(&mut self.known, whom) else {
            return;
        };
        let header = Header {
            flags,
            ..known.header(operation)
        };
        if operation == op::RST {
            let ports = known.ports;
            self.known.retain(|known| known.ports != ports);
        }
        self.send(header, 0);
    }

    fn guest_sends(&mut self, whom: u8, amount: usize, honest: bool) {
        let Some(known) = pick(&mut self.known, whom) else {
            return;
        };
        let free = WINDOW - (known.sent as u32).wrapping_sub(known.passed_on).min(WINDOW);
        let amount = if honest { amount.min(free as usize) } else { amount };
        if honest && (!known.established || amount == 0) {
            return;
        }
        let bytes: Vec<u8> = (known.sent..known.sent + amount).map(byte).collect();
        self.driver.put(PAYLOAD, &bytes);
        known.sent += amount;
        self.moved += amount;
        let header = Header {
            len: amount as u32,
            ..known.header(op::RW)
        };
        self.send(header, amount as u32);
    }

    /// Takes what the device has put into the guest's buffers, and answers as a guest should, unless it is mute.
    fn guest_hears(&mut self) {
        self.driver.used(FROM_GUEST);
        for (head, length) in self.driver.used(TO_GUEST) {
            let address = self.buffers.remove(&head).unwrap();
            let bytes = self.driver.read(address, length as usize);
            let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
            self.guest_hears_one(&header, &bytes[HEADER_BYTES..]);
            if !self.stingy {
                self.give_buffers(1);
            }
        }
    }

    fn guest_hears_one(&mut self, header: &Header, payload: &[u8]) {
        let ports = Ports {
            host: header.src_port,
            guest: header.dst_port,
        };
        let answers = !self.mute;
        let Some(known) = self.known.iter_mut().find(|known| known.ports == ports) else {
            if header.op == op::REQUEST && answers && ports.guest != 0 {
                let mut known = Known::new(ports);
                known.established = true;
                known.passed_on = header.fwd_cnt;
                self.send(known.header(op::RESPONSE), 0);
                self.known.push(known);
            } else if header.op != op::RST && answers {
                self.send(Known::new(ports).header(op::RST), 0);
            }
            return;
        };
        known.passed_on = header.fwd_cnt;
        match header.op {
            op::RESPONSE => known.established = true,
            op::RST => self.known.retain(|known| known.ports != ports),
            op::SHUTDOWN if header.flags == shutdown::BOTH && answers => {
                let reset = known.header(op::RST);
                self.known.retain(|known| known.ports != ports);
                self.send(reset, 0);
            }
            op::SHUTDOWN => {
                known.shutdowns += 1;
                assert!(known.shutdowns <= 2, "{ports:?} is told of an end again");
            }
            op::CREDIT_REQUEST => {
                known.credit_requests += 1;
                assert!(
                    known.credit_requests <= known.data_packets + 1,
                    "{ports:?} is asked again"
                );
                if answers {
                    let update = known.header(op::CREDIT_UPDATE);
                    self.send(update, 0);
                }
            }
            op::RW => {
                known.data_packets += 1;
                for (at, found) in (known.received..).zip(payload) {
                    assert_eq!(*found, byte(at), "byte {at} of {ports:?}");
                }
                known.received += payload.len();
                self.moved += payload.len();
                if self.reads {
                    known.taken = known.received;
                }
            }
            _ => {}
        }
    }

    // --- the device ---

    /// Wakes the device up until there is nothing that wakes it.
    fn settle(&mut self) {
        loop {
            let events = self.world().events();
            if events.is_empty() && !self.notified {
                break;
            }
            let mut more = false;
            for (data, events) in events {
                self.count();
                more |= self.device.ready(data, events) == Progress::More;
            }
            if std::mem::take(&mut self.notified) {
                self.count();
                more |= self.device.process() == Progress::More;
            }
            self.guest_hears();
            self.notified |= more;
        }
        assert!(self.device.connections() <= MAX_CONNECTIONS);
    }

    fn count(&mut self) {
        self.wake_ups += 1;
        let most = 8 * self.causes + 4 * self.moved;
        assert!(
            self.wake_ups <= most,
            "more than {most} wake-ups for {} events and {} bytes",
            self.causes,
            self.moved
        );
    }

    /// Lets time pass and looks at what is left; then lets both sides take what there is for them.
    fn finish(&mut self) {
        for _ in 0..4 {
            self.causes += 1;
            self.give_buffers(usize::from(QUEUE_SIZE));
            self.settle();
        }
        // Each connection may have had an answer to wait for.
        self.causes += self.device.connections();
        self.world().now += ANSWER_LIMIT;
        self.settle();
        let wake_ups = self.wake_ups;
        self.world().now += Duration::from_secs(3600);
        self.settle();
        assert_eq!(self.wake_ups, wake_ups, "woken up though nothing happened");
        for (index, wire) in self.world().wires.iter().enumerate() {
            let kept = !wire.device_gone;
            let answered = wire.unanswered.is_none() || !wire.to_host.is_empty();
            assert!(!kept || answered, "{index}: a client without an answer");
            let over = wire.is_closed() && wire.to_device.is_empty();
            assert!(!kept || !over, "{index}: a host that is gone keeps a slot");
        }
        (self.mute, self.stingy, self.reads) = (false, false, true);
        self.give_buffers(usize::from(QUEUE_SIZE));
        for operation in [op::CREDIT_UPDATE, op::CREDIT_REQUEST] {
            let headers: Vec<_> = self
                .known
                .iter_mut()
                .map(|known| {
                    (known.window, known.taken) = (1 << 17, known.received);
                    known.header(operation)
                })
                .collect();
            for header in headers {
                self.send(header, 0);
                self.causes += 1;
            }
            self.settle_and_read();
        }
        for (index, wire) in self.world().wires.iter().enumerate() {
            let takes = !wire.device_gone && wire.device_shut & shutdown::RECEIVE == 0;
            assert!(
                !takes || wire.to_device.is_empty(),
                "{index}: the guest did not get all"
            );
        }
        for known in self.known.iter().filter(|known| known.established) {
            let Ports { host, guest } = known.ports;
            assert_eq!(
                known.passed_on, known.sent as u32,
                "{host} to {guest}: the host did not get all"
            );
        }
    }

    /// Settles again and again, while the programs of the host read all that there is.
    fn settle_and_read(&mut self) {
        loop {
            self.settle();
            let mut read = 0;
            for wire in self.world().wires.iter_mut().filter(|wire| !wire.is_closed()) {
                read += wire.host_reads(ROOM);
                wire.change(EventSet::OUT);
            }
            if read == 0 {
                break;
            }
            self.moved += read;
            self.causes += 1;
        }
    }
}

// === impl Known ===

impl Known {
    fn new(ports: Ports) -> Self {
        Self {
            ports,
            established: false,
            window: 4096,
            received: 0,
            taken: 0,
            sent: 0,
            passed_on: 0,
            data_packets: 0,
            credit_requests: 0,
            shutdowns: 0,
        }
    }

    fn header(&self, operation: u16) -> Header {
        Header {
            src_cid: u64::from(CID),
            dst_cid: 2,
            src_port: self.ports.guest,
            dst_port: self.ports.host,
            kind: TYPE_STREAM,
            op: operation,
            buf_alloc: self.window,
            fwd_cnt: self.taken as u32,
            ..Header::default()
        }
    }
}

fn pick<T>(all: &mut [T], whom: u8) -> Option<&mut T> {
    let index = usize::from(whom).checked_rem(all.len())?;
    all.get_mut(index)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn whatever_happens_the_device_does_no_more_than_it_must(steps in prop::collection::vec(any::<Step>(), 1..100)) {
            run(steps);
        }
    }
}
