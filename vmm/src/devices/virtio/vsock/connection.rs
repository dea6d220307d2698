//! One connection between a port of the guest and a stream on the host.
//!
//! ```text
//!  host connects:   Requested ──guest: RESPONSE──► Established
//!  guest connects:  ──────────host: accepts──────► Established
//!
//!  Established ──host ends its stream──► SHUTDOWN to the guest, which answers RST in the end
//!              ──guest: SHUTDOWN both──► what is held goes to the host ──► RST to the guest ──► gone
//!  any ──guest: RST──► gone;  any ──something is wrong──► RST to the guest ──► gone
//! ```
//!
//! Where only the guest can bring it further ([`Connection::waits_for_guest`]), the device gives it a limited time.
//!
//! Nothing is done twice: an event of the stream tells all that is so, not what has changed, and many of them are made by the
//! device itself. So a direction is shut down once, the guest is told of an end once and asked for credit once each time that
//! it has none left. Else two sides that have nothing to say to each other would answer each other for ever.
//!
//! Data for the guest is read from the stream straight into the guest's buffer when there is one, and never more than
//! the guest has credit for. Data for the host is written straight from the guest's buffer; only what the host does not
//! take at once is held, at most [`WINDOW`] bytes.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;

use vmm_sys_util::epoll::EventSet;

use super::credit::{Credit, WINDOW};
use super::host::Stream;
use super::packet::{HEADER_BYTES, Header, op, shutdown};
use crate::devices::virtio::buffers::Buffers;
use crate::memory::GuestMemory;

/// Most payload bytes of a packet to the guest.
const MAX_PAYLOAD: u64 = 64 * 1024;

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ports {
    /// On the host.
    pub host: u32,
    /// In the guest.
    pub guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest was asked, or is to be asked, and has not answered.
    Requested,
    Established,
}

/// What the guest is to hear besides data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Pending {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
    /// The connection is over; nothing else is said.
    reset: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection<S> {
    ports: Ports,
    phase: Phase,
    stream: S,
    credit: Credit,
    /// Received from the guest and not yet taken by the host.
    held: VecDeque<u8>,
    /// The stream may have something to read; it is edge-triggered.
    readable: bool,
    /// The host closed both directions.
    hung_up: bool,
    /// The host will send no more.
    host_ended: bool,
    /// `SHUTDOWN` flags that the guest sent.
    guest_shut: u32,
    /// Of those, what was done to the stream.
    stream_shut: u32,
    /// `SHUTDOWN` flags that the guest was told, or is to be told.
    told_shut: u32,
    /// The guest was asked for credit since it had some. It is not asked again where its answer brings none: it tells of
    /// room that it makes later (as Linux does when its reader has taken what there was).
    asked_for_credit: bool,
    pending: Pending,
    /// It stands in the queue of those with something for the guest.
    pub queued: bool,
    /// Its stream is watched for room to write.
    pub watched_out: bool,
}

/// What the next packet to the guest is.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet {
    /// Nothing after all.
    None,
    /// So many bytes of payload are in the buffer; this header belongs in front of them.
    Ready(Header),
    /// This one, if any, and the connection is no more.
    Last(Option<Header>),
}

// === impl Connection ===

impl<S: Stream> Connection<S> {
    /// A host's client asks for a port of the guest.
    pub fn from_host(ports: Ports, stream: S) -> Self {
        let pending = Pending {
            request: true,
            ..Pending::default()
        };
        Self::new(ports, stream, Phase::Requested, pending)
    }

    /// The guest asked with `request`, and the host accepted.
    pub fn from_guest(ports: Ports, stream: S, request: &Header) -> Self {
        let pending = Pending {
            response: true,
            ..Pending::default()
        };
        let mut connection = Self::new(ports, stream, Phase::Established, pending);
        connection.credit.hear(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(ports: Ports, stream: S, phase: Phase, pending: Pending) -> Self {
        Self {
            ports,
            phase,
            stream,
            credit: Credit::default(),
            held: VecDeque::new(),
            readable: true,
            hung_up: false,
            host_ended: false,
            guest_shut: 0,
            stream_shut: 0,
            told_shut: 0,
            asked_for_credit: false,
            pending,
            queued: false,
            watched_out: false,
        }
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Its stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Whether something is held that the host has not taken, so that the device has to hear when it can.
    pub fn holds(&self) -> bool {
        !self.held.is_empty()
    }

    /// Whether only the guest can bring it further: by answering, or by taking the packet that ends it.
    pub fn waits_for_guest(&self) -> bool {
        self.phase == Phase::Requested || self.pending.reset || self.told_shut == shutdown::BOTH
    }

    /// Whether the guest has heard of it.
    pub fn is_known(&self) -> bool {
        !self.pending.request
    }

    /// Whether there is, or may be, something to say to the guest.
    pub fn has_packet(&self) -> bool {
        let Pending {
            request,
            response,
            credit_update,
            credit_request,
            shutdown,
            reset,
        } = self.pending;
        reset
            || request
            || response
            || credit_update
            || credit_request
            || shutdown
            || self.may_read() && self.credit.available() > 0
    }

    fn may_read(&self) -> bool {
        self.phase == Phase::Established
            && self.readable
            && !self.host_ended
            && self.guest_shut & shutdown::RECEIVE == 0
    }

    /// The stream is ready for something.
    pub fn stream_ready(&mut self, events: EventSet) {
        if self.pending.reset {
            return;
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::ERROR) {
            self.readable = true;
        }
        if events.contains(EventSet::HANG_UP) {
            self.readable = true;
            self.hung_up = true;
            if self.phase == Phase::Requested {
                self.end();
            } else if !self.may_read() {
                self.tell_shut(shutdown::BOTH);
            }
            self.end_if_drained();
        }
        if events.contains(EventSet::OUT) {
            self.pass_on();
        }
        self.ask_for_credit();
    }

    /// Sees that a host which is gone has left nothing to read. A guest without credit would else not hear that it is gone: the
    /// end is read like data.
    fn end_if_drained(&mut self) {
        if self.hung_up && self.may_read() && self.stream.is_drained() {
            self.host_ended = true;
            self.tell_shut(shutdown::BOTH);
        }
    }

    /// Has the guest told, once, that the host will not send, or not receive, any more.
    fn tell_shut(&mut self, flags: u32) {
        self.pending.shutdown |= flags & !self.told_shut != 0;
        self.told_shut |= flags;
    }

    /// Does to the stream, once, what the guest has said that it will not do any more.
    fn shut_stream(&mut self, flags: u32) {
        let new = flags & !self.stream_shut;
        self.stream_shut |= flags;
        let how = match (new & shutdown::RECEIVE != 0, new & shutdown::SEND != 0) {
            (true, true) => Shutdown::Both,
            (true, false) => Shutdown::Read,
            (false, true) => Shutdown::Write,
            (false, false) => return,
        };
        self.stream.shutdown(how);
    }

    /// A packet came from the guest; its payload lies in `payload` behind the header. `RST` and `REQUEST` are not for a
    /// connection to handle.
    pub fn guest_packet(&mut self, header: &Header, memory: &GuestMemory, payload: &Buffers) {
        if self.pending.reset {
            return;
        }
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        match (self.phase, header.op) {
            (Phase::Requested, op::RESPONSE) => self.accepted(),
            (Phase::Established, op::RW) => self.receive(header.len, memory, payload),
            (Phase::Established, op::CREDIT_UPDATE) => {}
            (Phase::Established, op::CREDIT_REQUEST) => self.pending.credit_update = true,
            (Phase::Established, op::SHUTDOWN) => {
                self.guest_shut |= header.flags & shutdown::BOTH;
                self.shut_stream(self.guest_shut & shutdown::RECEIVE);
                self.pass_on();
            }
            _ => self.end(),
        }
        self.ask_for_credit();
    }

    fn accepted(&mut self) {
        self.phase = Phase::Established;
        // A fresh socket takes these few bytes.
        let answer = format!("OK {}\n", self.ports.host);
        if self.stream.write(answer.as_bytes()).ok() != Some(answer.len()) {
            self.end();
        }
    }

    fn receive(&mut self, length: u32, memory: &GuestMemory, payload: &Buffers) {
        if self.guest_shut & shutdown::SEND != 0 || !self.credit.received(length) {
            return self.end();
        }
        let mut offset = HEADER_BYTES as u64;
        let end = offset + u64::from(length);
        while self.held.is_empty() && offset < end {
            match self.stream.send(payload, memory, offset, end - offset) {
                Ok(moved) if moved > 0 => {
                    self.credit.forwarded(moved as u32);
                    offset += moved as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Ok(_) | Err(_) => return self.end(),
            }
        }
        if offset < end {
            let mut rest = vec![0; (end - offset) as usize];
            if payload.read(memory, offset, &mut rest).is_err() {
                return self.end();
            }
            self.held.extend(rest);
        }
        self.pending.credit_update |= self.credit.worth_telling();
    }

    /// Writes what is held to the host, and ends what the guest has ended once nothing is left.
    fn pass_on(&mut self) {
        while !self.held.is_empty() {
            let (first, _) = self.held.as_slices();
            match self.stream.write(first) {
                Ok(moved) if moved > 0 => {
                    self.held.drain(..moved);
                    self.credit.forwarded(moved as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => return self.end(),
            }
        }
        self.pending.credit_update |= self.credit.worth_telling();
        if self.held.is_empty() {
            self.held = VecDeque::new();
            self.shut_stream(self.guest_shut & shutdown::SEND);
            if self.guest_shut == shutdown::BOTH {
                self.end();
            }
        }
    }

    /// Ends the connection for the host now, and for the guest with the next packet.
    fn end(&mut self) {
        self.shut_stream(shutdown::BOTH);
        self.held = VecDeque::new();
        self.pending.reset = true;
    }

    fn ask_for_credit(&mut self) {
        if self.may_read() && self.credit.available() == 0 && !self.asked_for_credit {
            self.pending.credit_request = true;
            self.asked_for_credit = true;
        }
    }

    /// Makes the next packet: payload goes into `buffers` behind the room for a header, which is returned.
    pub fn next_packet(&mut self, memory: &GuestMemory, buffers: &Buffers) -> Packet {
        if self.pending.reset {
            // A guest that was not asked yet need not hear that it is over.
            return match self.pending.request {
                true => Packet::Last(None),
                false => Packet::Last(Some(self.header(op::RST, 0, 0))),
            };
        }
        if std::mem::take(&mut self.pending.request) {
            return Packet::Ready(self.header(op::REQUEST, 0, 0));
        }
        if std::mem::take(&mut self.pending.response) {
            return Packet::Ready(self.header(op::RESPONSE, 0, 0));
        }
        let room = (buffers.len() - HEADER_BYTES as u64)
            .min(u64::from(self.credit.available()))
            .min(MAX_PAYLOAD);
        if self.may_read() && room > 0 {
            let offset = HEADER_BYTES as u64;
            match self.stream.receive(buffers, memory, offset, room) {
                Ok(0) => {
                    self.host_ended = true;
                    self.tell_shut(match self.hung_up {
                        true => shutdown::BOTH,
                        false => shutdown::SEND,
                    });
                }
                Ok(moved) => {
                    self.credit.sent(moved as u32);
                    self.asked_for_credit = false;
                    self.end_if_drained();
                    self.ask_for_credit();
                    return Packet::Ready(self.header(op::RW, moved as u32, 0));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
                Err(_) => {
                    self.end();
                    return Packet::Last(Some(self.header(op::RST, 0, 0)));
                }
            }
        }
        let without_credit = self.credit.available() == 0;
        if std::mem::take(&mut self.pending.shutdown) {
            Packet::Ready(self.header(op::SHUTDOWN, 0, self.told_shut))
        } else if std::mem::take(&mut self.pending.credit_request) && without_credit {
            Packet::Ready(self.header(op::CREDIT_REQUEST, 0, 0))
        } else if self.pending.credit_update {
            Packet::Ready(self.header(op::CREDIT_UPDATE, 0, 0))
        } else {
            Packet::None
        }
    }

    /// A header to the guest without its context id. It tells the credit.
    fn header(&mut self, op: u16, len: u32, flags: u32) -> Header {
        self.pending.credit_update = false;
        Header {
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len,
            op,
            flags,
            buf_alloc: WINDOW,
            fwd_cnt: self.credit.tell(),
            ..Header::default()
        }
    }
}
