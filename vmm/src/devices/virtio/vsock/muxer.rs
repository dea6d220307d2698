//! All connections of a machine, and its Unix socket on the host, by Firecracker's convention
//! (docs/vsock.md in Firecracker): a client connects to the socket, writes `CONNECT <port>\n`, and reads
//! `OK <host port>\n`; a guest that connects to port P of the host reaches the Unix socket `{socket}_{P}`.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use socket2::{Domain, SockAddr, Socket, Type};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::connection::{Connection, Packet, Ports};
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use crate::devices::virtio::buffers::Buffers;
use crate::memory::GuestMemory;
use crate::socket::{ListenError, listen};

/// Most connections at a time. With [`super::credit::WINDOW`] bytes held for each at the most, they bound the memory that a guest can
/// make the device use.
pub const MAX_CONNECTIONS: usize = 256;
/// Most answers to packets of no connection that wait for a buffer; a guest that provokes more loses the rest.
const MAX_RESETS: usize = 64;
/// Longest line by which a client says what it wants: `CONNECT 4294967295\n`.
const MAX_GREETING: usize = 19;
/// First port given to clients on the host; lower ones are for servers.
const FIRST_HOST_PORT: u32 = 1 << 30;
/// Epoll data of the listener; connections have their slot's index.
const LISTENER: u64 = MAX_CONNECTIONS as u64;

enum Slot {
    Free,
    /// A client that has not yet said what it wants.
    Greeting(UnixStream, Vec<u8>),
    Connection(Connection),
}

/// The connections.
pub struct Muxer {
    guest_cid: u64,
    socket: PathBuf,
    listener: UnixListener,
    epoll: Option<Arc<Epoll>>,
    slots: Vec<Slot>,
    by_ports: HashMap<Ports, usize>,
    /// Slots with something for the guest, each once, served in turn.
    waiting: VecDeque<usize>,
    resets: VecDeque<Header>,
    next_port: u32,
}

// === impl Muxer ===

impl Muxer {
    /// Listens on `socket` for the machine whose context id is `guest_cid`.
    ///
    /// # Errors
    /// Where the socket is in use or cannot be made.
    pub fn listen(socket: &Path, guest_cid: u32) -> Result<Self, ListenError> {
        Ok(Self {
            guest_cid: u64::from(guest_cid),
            socket: socket.to_owned(),
            listener: listen(socket)?,
            epoll: None,
            slots: Vec::new(),
            by_ports: HashMap::new(),
            waiting: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_HOST_PORT,
        })
    }

    /// Has `epoll` tell of clients and of streams.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn watch(&mut self, epoll: &Arc<Epoll>) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, LISTENER);
        epoll.ctl(ControlOperation::Add, self.listener.as_raw_fd(), event)?;
        self.epoll = Some(epoll.clone());
        Ok(())
    }

    /// Whether there is, or may be, a packet for the guest.
    pub fn has_packet(&self) -> bool {
        !self.waiting.is_empty() || !self.resets.is_empty()
    }

    /// Connections and clients at the moment.
    pub fn len(&self) -> usize {
        let busy = |slot: &&Slot| !matches!(slot, Slot::Free);
        self.slots.iter().filter(busy).count()
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
        if data == LISTENER {
            while let Ok((stream, _)) = self.listener.accept() {
                if active && stream.set_nonblocking(true).is_ok() {
                    self.add(|_| Slot::Greeting(stream, Vec::new()));
                }
            }
            return;
        }
        let slot = data as usize;
        match self.slots.get_mut(slot) {
            Some(Slot::Greeting(..)) => self.greet(slot),
            Some(Slot::Connection(connection)) => {
                connection.stream_ready(events);
                self.queue(slot);
            }
            // An event from before the slot was freed.
            Some(Slot::Free) | None => {}
        }
    }

    /// Reads what a client wants, byte by byte: what follows the line is for the guest.
    fn greet(&mut self, slot: usize) {
        let Some(Slot::Greeting(stream, line)) = self.slots.get_mut(slot) else {
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
        let old = self.slots.get_mut(slot).map(|s| std::mem::replace(s, Slot::Free));
        if let (Some(guest), Some(Slot::Greeting(stream, _))) = (port, old) {
            let ports = Ports {
                host: self.free_port(guest),
                guest,
            };
            if let Some(slot) = self.slots.get_mut(slot) {
                *slot = Slot::Connection(Connection::from_host(ports, stream));
            }
            self.by_ports.insert(ports, slot);
            self.queue(slot);
        }
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
        let slot = self.by_ports.get(&ports).copied();
        match (header.op, slot) {
            (op::RST, slot) => {
                if let Some(slot) = slot {
                    self.remove(slot);
                }
            }
            (op::REQUEST, None) if header.kind == TYPE_STREAM => self.connect(ports, &header),
            (other, Some(slot)) if other != op::REQUEST && complete && header.kind == TYPE_STREAM => {
                if let Some(Slot::Connection(connection)) = self.slots.get_mut(slot) {
                    connection.guest_packet(&header, memory, packet);
                    self.queue(slot);
                }
            }
            (_, slot) => {
                if let Some(slot) = slot {
                    self.remove(slot);
                }
                self.reset(&header);
            }
        }
    }

    /// The guest wants a port of the host.
    fn connect(&mut self, ports: Ports, request: &Header) {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let added = connect(Path::new(&path))
            .ok()
            .and_then(|stream| self.add(|_| Slot::Connection(Connection::from_guest(ports, stream, request))));
        match added {
            Some(slot) => {
                self.by_ports.insert(ports, slot);
                self.queue(slot);
            }
            None => self.reset(request),
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
        while let Some(slot) = self.waiting.pop_front() {
            let Some(Slot::Connection(connection)) = self.slots.get_mut(slot) else {
                continue;
            };
            connection.queued = false;
            let header = match connection.next_packet(memory, buffers) {
                // It is queued again when its stream or the guest has something new.
                Packet::None => continue,
                Packet::Ready(header) => {
                    self.queue(slot);
                    header
                }
                Packet::Last(header) => {
                    self.remove(slot);
                    let Some(header) = header else { continue };
                    header
                }
            };
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

    /// Lets a slot stand in line where it has something for the guest.
    fn queue(&mut self, slot: usize) {
        if let Some(Slot::Connection(connection)) = self.slots.get_mut(slot)
            && !connection.queued
            && connection.has_packet()
        {
            connection.queued = true;
            self.waiting.push_back(slot);
        }
    }

    /// Puts a stream into a free slot and watches it. `None`, and the stream is closed, where all are taken.
    fn add(&mut self, make: impl FnOnce(usize) -> Slot) -> Option<usize> {
        let free = |slot: &Slot| matches!(slot, Slot::Free);
        let index = match self.slots.iter().position(free) {
            Some(index) => index,
            None if self.slots.len() < MAX_CONNECTIONS => {
                self.slots.push(Slot::Free);
                self.slots.len() - 1
            }
            None => return None,
        };
        let slot = self.slots.get_mut(index)?;
        *slot = make(index);
        let fd = match slot {
            Slot::Free => return None,
            Slot::Greeting(stream, _) => stream.as_raw_fd(),
            Slot::Connection(connection) => connection.as_raw_fd(),
        };
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = self.epoll.as_ref().is_none_or(|epoll| {
            let event = EpollEvent::new(events, index as u64);
            epoll.ctl(ControlOperation::Add, fd, event).is_ok()
        });
        if !watched {
            *slot = Slot::Free;
            return None;
        }
        Some(index)
    }

    /// Frees a connection's slot; closing its stream takes it out of the epoll.
    fn remove(&mut self, index: usize) {
        if let Some(slot) = self.slots.get_mut(index) {
            if let Slot::Connection(connection) = slot {
                self.by_ports.remove(&connection.ports());
                if connection.queued {
                    self.waiting.retain(|waiting| *waiting != index);
                }
            }
            *slot = Slot::Free;
        }
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

/// Connects without waiting: a server whose backlog is full refuses.
fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    Ok(OwnedFd::from(socket).into())
}
