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
//! Data for the guest is read from the stream straight into the guest's buffer when there is one, and never more than
//! the guest has credit for. Data for the host is written straight from the guest's buffer; only what the host does not
//! take at once is held, at most [`WINDOW`] bytes.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::EventSet;

use super::credit::{Credit, WINDOW};
use super::packet::{HEADER_BYTES, Header, op, shutdown};
use crate::devices::virtio::buffers::{Buffers, Transfer, transfer};
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
    /// Flags of a `SHUTDOWN`.
    shutdown: u32,
    /// The connection is over; nothing else is said.
    reset: bool,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    ports: Ports,
    phase: Phase,
    stream: UnixStream,
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
    /// The guest was asked for credit and has not answered.
    asked_for_credit: bool,
    pending: Pending,
    /// It stands in the queue of those with something for the guest.
    pub queued: bool,
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

impl Connection {
    /// A host's client asks for a port of the guest.
    pub fn from_host(ports: Ports, stream: UnixStream) -> Self {
        let pending = Pending {
            request: true,
            ..Pending::default()
        };
        Self::new(ports, stream, Phase::Requested, pending)
    }

    /// The guest asked with `request`, and the host accepted.
    pub fn from_guest(ports: Ports, stream: UnixStream, request: &Header) -> Self {
        let pending = Pending {
            response: true,
            ..Pending::default()
        };
        let mut connection = Self::new(ports, stream, Phase::Established, pending);
        connection.credit.hear(request.buf_alloc, request.fwd_cnt);
        connection
    }

    fn new(ports: Ports, stream: UnixStream, phase: Phase, pending: Pending) -> Self {
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
            asked_for_credit: false,
            pending,
            queued: false,
        }
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
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
            || shutdown != 0
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
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::ERROR) {
            self.readable = true;
        }
        if events.contains(EventSet::HANG_UP) {
            self.readable = true;
            self.hung_up = true;
            if self.phase == Phase::Requested {
                self.end();
            } else if !self.may_read() {
                self.pending.shutdown |= shutdown::BOTH;
            }
        }
        if events.contains(EventSet::OUT) {
            self.pass_on();
        }
        self.ask_for_credit();
    }

    /// A packet came from the guest; its payload lies in `payload` behind the header. `RST` and `REQUEST` are not for a
    /// connection to handle.
    pub fn guest_packet(&mut self, header: &Header, memory: &GuestMemory, payload: &Buffers) {
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        self.asked_for_credit = false;
        match (self.phase, header.op) {
            (Phase::Requested, op::RESPONSE) => self.accepted(),
            (Phase::Established, op::RW) => self.receive(header.len, memory, payload),
            (Phase::Established, op::CREDIT_UPDATE) => {}
            (Phase::Established, op::CREDIT_REQUEST) => self.pending.credit_update = true,
            (Phase::Established, op::SHUTDOWN) => {
                self.guest_shut |= header.flags & shutdown::BOTH;
                if self.guest_shut & shutdown::RECEIVE != 0 {
                    let _ = self.stream.shutdown(Shutdown::Read);
                }
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
            match transfer(payload, memory, offset, end - offset, &self.stream, Transfer::Send) {
                Ok(moved) => {
                    self.credit.forwarded(moved as u32);
                    offset += moved as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => return self.end(),
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
                Ok(moved) => {
                    self.held.drain(..moved);
                    self.credit.forwarded(moved as u32);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return self.end(),
            }
        }
        self.pending.credit_update |= self.credit.worth_telling();
        if self.held.is_empty() {
            self.held = VecDeque::new();
            if self.guest_shut & shutdown::SEND != 0 {
                let _ = self.stream.shutdown(Shutdown::Write);
            }
            if self.guest_shut == shutdown::BOTH {
                self.end();
            }
        }
    }

    /// Ends the connection for the host now, and for the guest with the next packet.
    fn end(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
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
            match transfer(buffers, memory, offset, room, &self.stream, Transfer::Receive) {
                Ok(0) => {
                    self.host_ended = true;
                    self.pending.shutdown |= match self.hung_up {
                        true => shutdown::BOTH,
                        false => shutdown::SEND,
                    };
                }
                Ok(moved) => {
                    self.credit.sent(moved as u32);
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
        let flags = std::mem::take(&mut self.pending.shutdown);
        if flags != 0 {
            Packet::Ready(self.header(op::SHUTDOWN, 0, flags))
        } else if std::mem::take(&mut self.pending.credit_request) {
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

impl std::os::fd::AsRawFd for Connection {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.stream.as_raw_fd()
    }
}
