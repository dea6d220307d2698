//! All connections of a machine, and its Unix socket on the host, by Firecracker's convention
//! (docs/vsock.md in Firecracker): a client connects to the socket, writes `CONNECT <port>\n`, and reads
//! `OK <host port>\n`; a guest that connects to port P of the host reaches the Unix socket `{socket}_{P}`.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read as _};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EventSet};

use super::connection::{Connection, Packet, Ports};
use super::host::Host;
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use super::slots::{Slots, Token};
use crate::devices::virtio::buffers::Buffers;
use crate::memory::GuestMemory;

/// Most connections at a time. With [`super::credit::WINDOW`] bytes held for each at the most, they bound the memory that a guest can
/// make the device use.
pub const MAX_CONNECTIONS: usize = 256;
/// Most answers to packets of no connection that wait for a buffer; a guest that provokes more loses the rest.
const MAX_RESETS: usize = 64;
/// Longest line by which a client says what it wants: `CONNECT 4294967295\n`.
const MAX_GREETING: usize = 19;
/// First port given to clients on the host; lower ones are for servers.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// How long a guest may take to answer what only it can bring further, and a client to say what it wants; then the connection
/// is over. Linux gives a listener 2 s and a close 8 s (net/vmw_vsock).
pub const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// Epoll data of the listener and of the timer; connections have their token, whose lower half is less.
const LISTENER: u64 = MAX_CONNECTIONS as u64;
const TIMER: u64 = LISTENER + 1;
/// What is heard of a stream. Room to write is only worth waking up for while something is held for the host.
const WATCHED: EventSet = EventSet::IN.union(EventSet::READ_HANG_UP);

enum Slot<S> {
    /// A client that has not yet said what it wants.
    Greeting(S, Vec<u8>),
    Connection(Connection<S>),
}

/// The connections.
pub struct Muxer<H: Host> {
    guest_cid: u64,
    host: H,
    slots: Slots<Slot<H::Stream>>,
    by_ports: HashMap<Ports, Token>,
    /// Those with something for the guest, each once, served in turn.
    waiting: VecDeque<Token>,
    resets: VecDeque<Header>,
    next_port: u32,
    /// When the timer is to be told of.
    timer: Option<Duration>,
}

// === impl Muxer ===

impl<H: Host> Muxer<H> {
    /// No connections yet, for the machine whose context id is `guest_cid`.
    pub fn new(host: H, guest_cid: u32) -> Self {
        Self {
            guest_cid: u64::from(guest_cid),
            host,
            slots: Slots::new(MAX_CONNECTIONS as u32),
            by_ports: HashMap::new(),
            waiting: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
            timer: None,
        }
    }

    /// Has `epoll` tell of clients, of streams and of time.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn watch(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        self.host.start(epoll, LISTENER, TIMER)
    }

    /// Whether there is, or may be, a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.waiting.is_empty() || !self.resets.is_empty()
    }

    /// Connections and clients at the moment.
    pub fn len(&self) -> usize {
        self.slots.taken()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Ends every connection; for a guest whose driver is gone.
    pub fn clear(&mut self) {
        self.slots.clear();
        self.by_ports.clear();
        self.waiting.clear();
        self.resets.clear();
    }

    // --- from the host ---

    /// A descriptor is ready. Without a driver (`active` is false) clients are turned away.
    pub fn ready(&mut self, data: u64, events: EventSet, active: bool) {
        match data {
            LISTENER => {
                while let Some(stream) = self.host.accept() {
                    let client = Slot::Greeting(stream, Vec::new());
                    if active && let Some(token) = self.add(ControlOperation::Add, client) {
                        self.limit(token, true);
                    }
                }
            }
            TIMER => self.expire(),
            data => {
                let token = Token::of(data);
                match self.slots.get_mut(token) {
                    Some(Slot::Greeting(..)) => self.greet(token),
                    Some(Slot::Connection(connection)) => {
                        connection.stream_ready(events);
                        self.touched(token);
                    }
                    // It has left since.
                    None => {}
                }
            }
        }
    }

    /// Reads what a client wants, byte by byte: what follows the line is for the guest.
    fn greet(&mut self, token: Token) {
        let Some(Slot::Greeting(stream, line)) = self.slots.get_mut(token) else {
            return;
        };
        let mut byte = [0];
        let port = loop {
            match stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break parse_greeting(line),
                Ok(1) if line.len() < MAX_GREETING => line.extend(byte),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => break None,
            }
        };
        // What its stream tells from now on is for the connection that takes its place.
        let (Some(Slot::Greeting(stream, _)), Some(guest)) = (self.slots.remove(token), port) else {
            return;
        };
        let ports = Ports {
            host: self.free_port(guest),
            guest,
        };
        self.open(ControlOperation::Modify, Connection::from_host(ports, stream));
    }

    /// Ends what had to be answered, or said, by now.
    fn expire(&mut self) {
        self.timer = None;
        for token in self.slots.expired(self.host.now()) {
            if let Some(connection) = self.remove(token)
                && connection.is_known()
            {
                let Ports { host, guest } = connection.ports();
                self.reset(&Header {
                    src_cid: self.guest_cid,
                    dst_cid: HOST_CID,
                    src_port: guest,
                    dst_port: host,
                    kind: TYPE_STREAM,
                    ..Header::default()
                });
            }
        }
        self.set_timer();
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_port;
            self.next_port = host.checked_add(1).unwrap_or(FIRST_HOST_PORT);
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    // --- from the guest ---

    /// Takes a packet from the guest. Whatever is in it, the worst that comes of it is that the guest loses a
    /// connection of its own.
    pub fn guest_packet(&mut self, memory: &GuestMemory, packet: &Buffers) {
        let mut bytes = [0; HEADER_BYTES];
        if packet.read(memory, 0, &mut bytes).is_err() {
            return;
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let complete = packet.len() - HEADER_BYTES as u64 >= u64::from(header.len);
        let known = self.by_ports.get(&ports).copied();
        match (header.op, known) {
            (op::RST, known) => {
                if let Some(token) = known {
                    self.remove(token);
                }
            }
            (op::REQUEST, None) if header.kind == TYPE_STREAM => self.connect(ports, &header),
            (other, Some(token)) if other != op::REQUEST && complete && header.kind == TYPE_STREAM => {
                if let Some(Slot::Connection(connection)) = self.slots.get_mut(token) {
                    connection.guest_packet(&header, memory, packet);
                    self.touched(token);
                }
            }
            (_, known) => {
                if let Some(token) = known {
                    self.remove(token);
                }
                self.reset(&header);
            }
        }
    }

    /// The guest wants a port of the host.
    fn connect(&mut self, ports: Ports, request: &Header) {
        let opened = self
            .host
            .connect(ports.host)
            .is_some_and(|stream| self.open(ControlOperation::Add, Connection::from_guest(ports, stream, request)));
        if !opened {
            self.reset(request);
        }
    }

    fn reset(&mut self, packet: &Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(packet.reset());
        }
    }

    // --- to the guest ---

    /// Writes the next packet for the guest into `buffers`, which hold a header at least. Returns how many bytes it
    /// has; `None` where there was none after all.
    pub fn next_packet(&mut self, memory: &GuestMemory, buffers: &Buffers) -> Option<u32> {
        if let Some(header) = self.resets.pop_front() {
            return Some(write_header(header, memory, buffers));
        }
        while let Some(token) = self.waiting.pop_front() {
            let Some(Slot::Connection(connection)) = self.slots.get_mut(token) else {
                continue;
            };
            connection.queued = false;
            let packet = connection.next_packet(memory, buffers);
            let header = match packet {
                // It stands in line again when its stream or the guest has something new.
                Packet::None => continue,
                Packet::Ready(header) => header,
                Packet::Last(header) => {
                    self.remove(token);
                    let Some(header) = header else { continue };
                    header
                }
            };
            self.touched(token);
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                kind: TYPE_STREAM,
                ..header
            };
            return Some(write_header(header, memory, buffers));
        }
        None
    }

    // --- slots ---

    /// Something has happened to a connection: it stands in line where it has something for the guest, its stream is watched for
    /// what it waits for, and its time is limited where only the guest can bring it further.
    fn touched(&mut self, token: Token) {
        let Some(Slot::Connection(connection)) = self.slots.get_mut(token) else {
            return;
        };
        if !connection.queued && connection.has_packet() {
            connection.queued = true;
            self.waiting.push_back(token);
        }
        let (holds, mut events) = (connection.holds(), WATCHED);
        events.set(EventSet::OUT, holds);
        if holds != connection.watched_out
            && self
                .host
                .watch(ControlOperation::Modify, connection.stream(), events, token.data())
        {
            connection.watched_out = holds;
        }
        let limited = connection.waits_for_guest();
        self.limit(token, limited);
    }

    /// Gives one a limited time, from now on where it had all the time there is, or takes the limit away.
    fn limit(&mut self, token: Token, limited: bool) {
        let Some(deadline) = self.slots.deadline(token) else {
            return;
        };
        if limited == deadline.is_some() {
            return;
        }
        *deadline = limited.then(|| self.host.now() + ANSWER_LIMIT);
        if limited && self.timer.is_none() {
            self.set_timer();
        }
    }

    /// Has the first deadline told of. All are as far away when they are set, so a later one never comes before it.
    fn set_timer(&mut self) {
        self.timer = self.slots.first_deadline();
        if let Some(first) = self.timer {
            self.host.set_timer(first);
        }
    }

    /// Lets a connection in. False, and its stream is closed, where that cannot be.
    fn open(&mut self, operation: ControlOperation, connection: Connection<H::Stream>) -> bool {
        let ports = connection.ports();
        let Some(token) = self.add(operation, Slot::Connection(connection)) else {
            return false;
        };
        self.by_ports.insert(ports, token);
        self.touched(token);
        true
    }

    /// Puts something into a free slot and has its stream watched. `None`, and the stream is closed, where all are taken.
    fn add(&mut self, operation: ControlOperation, slot: Slot<H::Stream>) -> Option<Token> {
        let token = self.slots.insert(slot).ok()?;
        let stream = match self.slots.get_mut(token)? {
            Slot::Greeting(stream, _) => stream,
            Slot::Connection(connection) => connection.stream(),
        };
        if self.host.watch(operation, stream, WATCHED, token.data()) {
            return Some(token);
        }
        self.slots.remove(token);
        None
    }

    /// Frees a slot. Closing the stream takes it out of the epoll.
    fn remove(&mut self, token: Token) -> Option<Connection<H::Stream>> {
        let Slot::Connection(connection) = self.slots.remove(token)? else {
            return None;
        };
        self.by_ports.remove(&connection.ports());
        if connection.queued {
            self.waiting.retain(|waiting| *waiting != token);
        }
        Some(connection)
    }
}

fn write_header(header: Header, memory: &GuestMemory, buffers: &Buffers) -> u32 {
    match buffers.write(memory, 0, &header.to_bytes()) {
        Ok(()) => HEADER_BYTES as u32 + header.len,
        Err(_) => 0,
    }
}

fn parse_greeting(line: &[u8]) -> Option<u32> {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.parse().ok()
}
