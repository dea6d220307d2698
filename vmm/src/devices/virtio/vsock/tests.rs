use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use vmm_sys_util::epoll::EpollEvent;

use super::super::testing::{Driver, Part};
use super::connection::Ports;
use super::credit::WINDOW;
use super::muxer::MAX_CONNECTIONS;
use super::packet::{HEADER_BYTES, Header, TYPE_STREAM, op, shutdown};
use super::*;

const CID: u32 = 42;
const TO_GUEST: usize = 0;
const FROM_GUEST: usize = 1;
/// Where the driver's receive buffers lie, each `BUFFER` bytes, and its sent packets.
const RECEIVE: u64 = 0x10_0000;
const BUFFER: u32 = 4096;
const SEND: u64 = 0x80_0000;
const GUEST_WINDOW: u32 = 256 * 1024;

struct Bench {
    driver: Driver,
    vsock: Vsock,
    epoll: Arc<Epoll>,
    folder: tempfile::TempDir,
    /// Receive buffers by head.
    buffers: Vec<u64>,
    free: u64,
}

fn bench() -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let mut vsock = Vsock::listen(CID, &folder.path().join("v")).unwrap();
    let epoll = Arc::new(Epoll::new().unwrap());
    vsock.watch(&epoll).unwrap();
    let driver = Driver::new(&[QUEUE_SIZE; 3]);
    vsock.activate(driver.activation(feature::COMMON));
    Bench {
        driver,
        vsock,
        epoll,
        folder,
        buffers: vec![0; usize::from(QUEUE_SIZE)],
        free: RECEIVE,
    }
}

fn header(ports: Ports, operation: u16, len: u32) -> Header {
    Header {
        src_cid: u64::from(CID),
        dst_cid: 2,
        src_port: ports.guest,
        dst_port: ports.host,
        len,
        kind: TYPE_STREAM,
        op: operation,
        buf_alloc: GUEST_WINDOW,
        ..Header::default()
    }
}

impl Bench {
    fn give_buffers(&mut self, count: usize) {
        for _ in 0..count {
            let address = self.free;
            self.free = RECEIVE + (self.free - RECEIVE + u64::from(BUFFER)) % 0x60_0000;
            let head = self.driver.send(TO_GUEST, &[Part::write(address, BUFFER)]);
            self.buffers[usize::from(head)] = address;
        }
        self.vsock.process();
    }

    /// Sends a packet from the guest.
    fn send(&mut self, header: Header, payload: &[u8]) {
        self.driver.put(SEND, &header.to_bytes());
        let mut parts = vec![Part::read(SEND, HEADER_BYTES as u32)];
        if !payload.is_empty() {
            self.driver.put(SEND + 0x100, payload);
            parts.push(Part::read(SEND + 0x100, payload.len() as u32));
        }
        self.driver.send(FROM_GUEST, &parts);
        self.vsock.process();
        assert_eq!(self.driver.used(FROM_GUEST).len(), 1);
    }

    /// Lets the device hear its descriptors until nothing is ready, and returns how many events that took.
    fn hear(&mut self) -> usize {
        let mut events = [EpollEvent::default(); 32];
        let mut all = 0;
        loop {
            let ready = self.epoll.wait(0, &mut events).unwrap();
            if ready == 0 {
                break;
            }
            all += ready;
            assert!(all < 10_000, "there is no end to it");
            for event in &events[..ready] {
                while self.vsock.ready(event.data(), event.event_set()) == Progress::More {}
            }
        }
        while self.vsock.process() == Progress::More {}
        all
    }

    /// What the guest has received.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let used = self.driver.used(TO_GUEST);
        let packets = used.into_iter().map(|(head, length)| {
            let bytes = self.driver.read(self.buffers[head as usize], length as usize);
            let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
            assert_eq!((header.src_cid, header.dst_cid), (2, u64::from(CID)));
            (header, bytes[HEADER_BYTES..].to_vec())
        });
        packets.collect()
    }

    fn operations(&mut self) -> Vec<u16> {
        self.received().iter().map(|(header, _)| header.op).collect()
    }

    /// A server on the host's port, and a connection to it from the guest.
    fn dial(&mut self, host: u32) -> (UnixListener, UnixStream, Ports) {
        let ports = Ports { host, guest: 5000 };
        let listener = UnixListener::bind(self.folder.path().join(format!("v_{host}"))).unwrap();
        self.send(header(ports, op::REQUEST, 0), &[]);
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let received = self.received();
        assert_eq!(received.len(), 1);
        assert_eq!(received[0].0.op, op::RESPONSE);
        assert_eq!(received[0].0.buf_alloc, WINDOW);
        (listener, stream, ports)
    }

    /// A client of the host, and what it was told.
    fn client(&self) -> UnixStream {
        let stream = UnixStream::connect(self.folder.path().join("v")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        stream
    }
}

#[test]
fn a_guest_reaches_a_server_on_the_host() {
    let mut bench = bench();
    bench.give_buffers(16);
    let (_listener, mut stream, ports) = bench.dial(1024);
    bench.send(header(ports, op::RW, 5), b"hello");
    let mut text = [0; 5];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
    stream.write_all(b"and back").unwrap();
    bench.hear();
    let received = bench.received();
    assert_eq!(received.len(), 1);
    assert_eq!((received[0].0.op, received[0].0.fwd_cnt), (op::RW, 5));
    assert_eq!(received[0].1, b"and back");
}

#[test]
fn a_client_of_the_host_reaches_the_guest() {
    let mut bench = bench();
    bench.give_buffers(16);
    let mut client = bench.client();
    client.write_all(b"CONNECT 52\nearly").unwrap();
    bench.hear();
    let received = bench.received();
    assert_eq!(received.len(), 1);
    let request = received[0].0;
    assert_eq!((request.op, request.dst_port), (op::REQUEST, 52));
    let ports = Ports {
        host: request.src_port,
        guest: 52,
    };
    bench.send(header(ports, op::RESPONSE, 0), &[]);
    let mut answer = vec![0; format!("OK {}\n", ports.host).len()];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(answer, format!("OK {}\n", ports.host).as_bytes());
    let received = bench.received();
    assert_eq!(received.len(), 1);
    assert_eq!(received[0].1, b"early");
}

#[test]
fn refused_connections_end() {
    let mut bench = bench();
    bench.give_buffers(16);
    // Nobody listens on the host.
    let ports = Ports { host: 9, guest: 7 };
    bench.send(header(ports, op::REQUEST, 0), &[]);
    let received = bench.received();
    assert_eq!(received.len(), 1);
    let reset = received[0].0;
    assert_eq!((reset.op, reset.src_port, reset.dst_port), (op::RST, 9, 7));
    // Nobody listens in the guest.
    let mut client = bench.client();
    client.write_all(b"CONNECT 52\n").unwrap();
    bench.hear();
    let request = bench.received()[0].0;
    let ports = Ports {
        host: request.src_port,
        guest: 52,
    };
    bench.send(header(ports, op::RST, 0), &[]);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    assert!(bench.vsock.muxer.is_empty());
    // Clients that do not keep to the convention.
    for line in [
        "CONNECT x\n",
        "HELLO 1\n",
        "CONNECT 4294967296\n",
        "CONNECT 1111111111111111111111\n",
        "\n",
    ] {
        let mut client = bench.client();
        client.write_all(line.as_bytes()).unwrap();
        bench.hear();
        // Unread bytes make a reset of the close.
        assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)), "{line}");
    }
    assert!(bench.vsock.muxer.is_empty());
    assert!(bench.operations().is_empty());
}

#[test]
fn the_host_never_sends_more_than_the_guest_can_hold() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, mut stream, ports) = bench.dial(1024);
    let small = Header {
        buf_alloc: 10_000,
        ..header(ports, op::CREDIT_UPDATE, 0)
    };
    bench.send(small, &[]);
    stream.write_all(&[7; 30_000]).unwrap();
    bench.hear();
    let received = bench.received();
    let data: usize = received.iter().map(|(_, payload)| payload.len()).sum();
    assert_eq!(data, 10_000);
    assert_eq!(received.last().unwrap().0.op, op::CREDIT_REQUEST);
    bench.hear();
    assert!(bench.received().is_empty(), "it asks once");
    let more = Header {
        fwd_cnt: 10_000,
        ..small
    };
    bench.send(more, &[]);
    let data: usize = bench.received().iter().map(|(_, data)| data.len()).sum();
    assert_eq!(data, 10_000);
    // A guest without buffers is waited for.
    bench.send(
        Header {
            fwd_cnt: 20_000,
            ..small
        },
        &[],
    );
    let data: usize = bench.received().iter().map(|(_, data)| data.len()).sum();
    assert_eq!(data, 10_000);
}

#[test]
fn data_waits_for_buffers() {
    let mut bench = bench();
    bench.give_buffers(1);
    let (_listener, mut stream, _ports) = bench.dial(1024);
    stream.write_all(&[1; 9000]).unwrap();
    bench.hear();
    assert!(bench.received().is_empty());
    bench.give_buffers(1);
    assert_eq!(bench.received()[0].1.len(), 4096 - HEADER_BYTES);
    bench.give_buffers(8);
    let data: usize = bench.received().iter().map(|(_, data)| data.len()).sum();
    assert_eq!(data, 9000 - (4096 - HEADER_BYTES));
}

#[test]
fn what_the_host_does_not_take_is_held_and_no_more() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, mut stream, ports) = bench.dial(1024);
    // Fill the socket until the device has to hold something: its credit stops coming back.
    let chunk = [3; 4096];
    let mut sent = 0u32;
    let mut forwarded = 0u32;
    while sent - forwarded < WINDOW {
        bench.send(header(ports, op::RW, 4096), &chunk);
        sent += 4096;
        for (header, _) in bench.received() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            forwarded = header.fwd_cnt;
        }
        bench.give_buffers(1);
    }
    // The host reads all of it, and the guest hears of the room.
    let mut all = vec![0; sent as usize];
    let reader = std::thread::spawn(move || {
        stream.read_exact(&mut all).unwrap();
        (stream, all)
    });
    while forwarded < sent {
        bench.hear();
        bench.send(header(ports, op::CREDIT_REQUEST, 0), &[]);
        for (header, _) in bench.received() {
            forwarded = header.fwd_cnt;
        }
        bench.give_buffers(1);
    }
    let (_stream, all) = reader.join().unwrap();
    assert!(all.iter().all(|byte| *byte == 3));
}

#[test]
fn a_guest_that_overruns_its_credit_loses_the_connection() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, mut stream, ports) = bench.dial(1024);
    let chunk = vec![3; 16384];
    // Nobody reads: sooner or later the window is full, and this guest does not care.
    let mut reset = false;
    for _ in 0..1000 {
        bench.send(header(ports, op::RW, 16384), &chunk);
        reset = bench.operations().contains(&op::RST);
        if reset {
            break;
        }
        bench.give_buffers(1);
    }
    assert!(reset);
    assert!(bench.vsock.muxer.is_empty());
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    // The next connection is served.
    drop(_listener);
    std::fs::remove_file(bench.folder.path().join("v_1024")).unwrap();
    bench.give_buffers(8);
    bench.dial(1024);
}

#[test]
fn both_sides_end_their_halves() {
    let mut bench = bench();
    bench.give_buffers(32);
    let (_listener, mut stream, ports) = bench.dial(1024);
    // The host ends its half after some data.
    stream.write_all(b"last").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    bench.hear();
    let received = bench.received();
    assert_eq!(received[0].1, b"last");
    assert_eq!((received[1].0.op, received[1].0.flags), (op::SHUTDOWN, shutdown::SEND));
    // The guest still sends, and then ends its half.
    bench.send(header(ports, op::RW, 3), b"bye");
    let end = Header {
        flags: shutdown::SEND,
        ..header(ports, op::SHUTDOWN, 0)
    };
    bench.send(end, &[]);
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "bye");
    // And its other half: now it is over, and the guest hears so.
    let end = Header {
        flags: shutdown::RECEIVE,
        ..header(ports, op::SHUTDOWN, 0)
    };
    bench.send(end, &[]);
    assert_eq!(bench.operations(), [op::RST]);
    assert!(bench.vsock.muxer.is_empty());
}

#[test]
fn a_host_that_goes_is_told_as_gone() {
    let mut bench = bench();
    bench.give_buffers(32);
    let (_listener, stream, ports) = bench.dial(1024);
    drop(stream);
    bench.hear();
    let received = bench.received();
    assert_eq!(received.len(), 1);
    assert_eq!((received[0].0.op, received[0].0.flags), (op::SHUTDOWN, shutdown::BOTH));
    bench.send(header(ports, op::RST, 0), &[]);
    assert!(bench.vsock.muxer.is_empty());

    // Half closed first, then wholly.
    drop(_listener);
    std::fs::remove_file(bench.folder.path().join("v_1024")).unwrap();
    let (_listener, stream, _ports) = bench.dial(1024);
    stream.shutdown(Shutdown::Write).unwrap();
    bench.hear();
    assert_eq!(bench.operations(), [op::SHUTDOWN]);
    drop(stream);
    bench.hear();
    let received = bench.received();
    assert_eq!(received[0].0.flags, shutdown::BOTH);
}

#[test]
fn data_that_is_held_arrives_before_the_end() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, mut stream, ports) = bench.dial(1024);
    let mut sent = 0u32;
    let mut forwarded = 0;
    while sent - forwarded < WINDOW {
        bench.send(header(ports, op::RW, 4096), &[9; 4096]);
        sent += 4096;
        for (header, _) in bench.received() {
            forwarded = header.fwd_cnt;
        }
        bench.give_buffers(1);
    }
    let end = Header {
        flags: shutdown::BOTH,
        ..header(ports, op::SHUTDOWN, 0)
    };
    bench.send(end, &[]);
    assert!(bench.received().is_empty(), "not over yet");
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all.len()
    });
    while !bench.operations().contains(&op::RST) {
        bench.hear();
    }
    assert_eq!(reader.join().unwrap(), sent as usize);
}

#[test]
fn a_half_closed_connection_costs_nothing_while_nothing_moves() {
    for flags in [shutdown::SEND, shutdown::RECEIVE] {
        let mut bench = bench();
        bench.give_buffers(16);
        let (_listener, mut stream, ports) = bench.dial(1024);
        bench.hear();
        let end = Header {
            flags,
            ..header(ports, op::SHUTDOWN, 0)
        };
        bench.send(end, &[]);
        // The device's own shutdown is an event, once.
        assert!(bench.hear() <= 1);
        bench.send(end, &[]);
        assert_eq!(bench.hear(), 0);
        let _ = stream.write_all(b"still here");
        assert!(bench.hear() <= 1);
    }
}

#[test]
fn a_guest_without_room_is_asked_once() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, mut stream, ports) = bench.dial(1024);
    let none = Header {
        buf_alloc: 0,
        ..header(ports, op::CREDIT_UPDATE, 0)
    };
    bench.send(none, &[]);
    stream.write_all(b"for the guest").unwrap();
    bench.hear();
    assert_eq!(bench.operations(), [op::CREDIT_REQUEST]);
    for _ in 0..3 {
        bench.send(none, &[]);
        bench.hear();
        assert!(bench.operations().is_empty());
    }
    bench.send(header(ports, op::CREDIT_UPDATE, 0), &[]);
    assert_eq!(bench.received()[0].1, b"for the guest");
}

#[test]
fn an_event_for_a_connection_that_is_over_is_not_for_the_next() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (first_listener, first, ports) = bench.dial(1024);
    bench.hear();
    drop(first);
    let mut events = [EpollEvent::default(); 4];
    assert_eq!(bench.epoll.wait(0, &mut events).unwrap(), 1);
    // Before the device comes to that event, the guest ends the connection and makes another, in the same slot.
    bench.send(header(ports, op::RST, 0), &[]);
    drop(first_listener);
    std::fs::remove_file(bench.folder.path().join("v_1024")).unwrap();
    let (_listener, mut second, ports) = bench.dial(1024);
    bench.vsock.ready(events[0].data(), events[0].event_set());
    assert!(bench.operations().is_empty());
    bench.send(header(ports, op::RW, 5), b"hello");
    let mut text = [0; 5];
    second.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello");
}

#[test]
fn a_guest_without_room_hears_of_a_host_that_goes() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, stream, ports) = bench.dial(1024);
    let none = Header {
        buf_alloc: 0,
        ..header(ports, op::CREDIT_UPDATE, 0)
    };
    bench.send(none, &[]);
    bench.operations();
    drop(stream);
    bench.hear();
    let received = bench.received();
    let last = received.last().unwrap().0;
    assert_eq!((last.op, last.flags), (op::SHUTDOWN, shutdown::BOTH));
}

#[test]
fn the_timer_is_told_of_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut host = host::UnixHost::listen(&folder.path().join("v")).unwrap();
    let epoll = Arc::new(Epoll::new().unwrap());
    host.start(&epoll, 1, 2).unwrap();
    let mut events = [EpollEvent::default(); 4];
    for _ in 0..2 {
        let when = host.now() + Duration::from_millis(1);
        host.set_timer(when);
        assert_eq!(epoll.wait(10_000, &mut events).unwrap(), 1);
        assert_eq!(events[0].data(), 2);
        assert!(host.now() >= when);
        assert_eq!(epoll.wait(0, &mut events).unwrap(), 0);
    }
}

#[test]
fn nonsense_from_the_guest_is_survived() {
    let mut bench = bench();
    bench.give_buffers(64);
    let (_listener, mut stream, ports) = bench.dial(1024);
    let good = header(ports, op::RW, 0);
    let stranger = Ports { host: 1, guest: 1 };
    // Foreign addresses are not answered, packets of no connection are reset, as are other types.
    bench.send(Header { src_cid: 43, ..good }, &[]);
    bench.send(Header { dst_cid: 1, ..good }, &[]);
    assert!(bench.operations().is_empty());
    bench.send(header(stranger, op::RW, 0), &[]);
    bench.send(header(stranger, 0, 0), &[]);
    bench.send(header(stranger, 99, 0), &[]);
    bench.send(
        Header {
            kind: 2,
            ..header(stranger, op::REQUEST, 0)
        },
        &[],
    );
    assert_eq!(bench.operations(), [op::RST; 4]);
    bench.send(header(stranger, op::RST, 0), &[]);
    assert!(bench.operations().is_empty(), "a reset is never answered");
    // Headers cut short, no header at all, buffers that are no memory.
    for parts in [
        vec![Part::read(SEND, 43)],
        vec![Part::write(SEND, 100)],
        vec![Part::read(1 << 40, 44)],
        vec![Part::read(u64::MAX, 44)],
        vec![Part::read(SEND, 0)],
    ] {
        bench.driver.send(FROM_GUEST, &parts);
        bench.vsock.process();
        assert_eq!(bench.driver.used(FROM_GUEST).len(), 1);
    }
    // Payload that is not there costs the connection.
    bench.send(header(ports, op::RW, 100), b"short");
    assert_eq!(bench.operations(), [op::RST]);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_packet_may_be_cut_anywhere() {
    let mut bench = bench();
    bench.give_buffers(8);
    let (_listener, mut stream, ports) = bench.dial(1024);
    let mut packet = header(ports, op::RW, 10).to_bytes().to_vec();
    packet.extend(b"0123456789");
    bench.driver.put(SEND, &packet);
    let mut parts: Vec<_> = (0..40).map(|at| Part::read(SEND + at, 1)).collect();
    parts.push(Part::read(SEND + 40, 7));
    parts.push(Part::read(SEND + 47, 7));
    bench.driver.send(FROM_GUEST, &parts);
    bench.vsock.process();
    let mut text = [0; 10];
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"0123456789");
}

#[test]
fn useless_receive_buffers_harm_nobody() {
    let mut bench = bench();
    for part in [
        Part::write(RECEIVE, 43),
        Part::write(1 << 40, 4096),
        Part::read(RECEIVE, 4096),
        Part::write(RECEIVE, 44),
    ] {
        bench.driver.send(TO_GUEST, &[part]);
    }
    let ports = Ports { host: 9, guest: 7 };
    // One reset is lost in the buffer that is no memory; then one fits exactly.
    bench.send(header(ports, op::REQUEST, 0), &[]);
    bench.send(header(ports, op::REQUEST, 0), &[]);
    let used: Vec<_> = bench
        .driver
        .used(TO_GUEST)
        .into_iter()
        .map(|(_, length)| length)
        .collect();
    assert_eq!(used, [0, 0, 0, 44]);
}

#[test]
fn connections_and_answers_are_bounded() {
    let mut bench = bench();
    let _listener = UnixListener::bind(bench.folder.path().join("v_80")).unwrap();
    let mut accepted = Vec::new();
    for guest in 0..(MAX_CONNECTIONS as u32 + 200) {
        bench.send(header(Ports { host: 80, guest }, op::REQUEST, 0), &[]);
        _listener.set_nonblocking(true).unwrap();
        if let Ok((stream, _)) = _listener.accept() {
            accepted.push(stream);
        }
    }
    assert_eq!(bench.vsock.muxer.len(), MAX_CONNECTIONS);
    bench.give_buffers(120);
    bench.give_buffers(8);
    let mut all = Vec::new();
    while let more = bench.operations()
        && !more.is_empty()
    {
        all.extend(more);
        bench.give_buffers(100);
    }
    let resets = all.iter().filter(|kind| **kind == op::RST).count();
    let responses = all.iter().filter(|kind| **kind == op::RESPONSE).count();
    assert_eq!((resets, responses), (64, MAX_CONNECTIONS));
    // A reset of the driver frees everything.
    bench.vsock.reset();
    assert!(bench.vsock.muxer.is_empty());
    for mut stream in accepted {
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)));
    }
    let driver = Driver::new(&[QUEUE_SIZE; 3]);
    bench.vsock.activate(driver.activation(feature::COMMON));
    bench.driver = driver;
    drop(_listener);
    std::fs::remove_file(bench.folder.path().join("v_80")).unwrap();
    bench.give_buffers(4);
    bench.dial(80);
}

#[test]
fn clients_before_the_driver_are_turned_away() {
    let mut bench = bench();
    bench.vsock.reset();
    let mut client = bench.client();
    let _ = client.write_all(b"CONNECT 1\n");
    bench.hear();
    assert!(matches!(client.read(&mut [0; 8]), Ok(0) | Err(_)));
    assert!(bench.vsock.muxer.is_empty());
}

#[test]
fn a_second_request_on_a_connection_ends_it() {
    let mut bench = bench();
    bench.give_buffers(8);
    let (_listener, mut stream, ports) = bench.dial(1024);
    bench.send(header(ports, op::REQUEST, 0), &[]);
    assert_eq!(bench.operations(), [op::RST]);
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    assert!(bench.vsock.muxer.is_empty());
}

#[test]
fn many_streams_share_the_queues_fairly() {
    let mut bench = bench();
    bench.give_buffers(8);
    let listener = UnixListener::bind(bench.folder.path().join("v_80")).unwrap();
    let mut streams = Vec::new();
    for guest in 0..8 {
        bench.send(header(Ports { host: 80, guest }, op::REQUEST, 0), &[]);
        let (stream, _) = listener.accept().unwrap();
        streams.push(stream);
    }
    bench.operations();
    for stream in &mut streams {
        stream.write_all(&[1; 20_000]).unwrap();
    }
    bench.hear();
    bench.give_buffers(8);
    let mut ports: Vec<u32> = bench.received().iter().map(|(header, _)| header.dst_port).collect();
    ports.sort_unstable();
    assert_eq!(ports, [0, 1, 2, 3, 4, 5, 6, 7], "each gets its turn");
}
