//! A guest that sends what packets it likes, and a host that comes and goes, cannot hurt the vsock device.
#![no_main]

use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::testing::{Driver, Part};
use stoker_vmm::devices::virtio::vsock::Vsock;
use stoker_vmm::devices::virtio::vsock::packet::{HEADER_BYTES, Header};
use stoker_vmm::devices::virtio::{VirtioDevice as _, feature};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::signal::block_signal;

const SEND: u64 = 0x1000;
const RECEIVE: u64 = 0x10_0000;
const PORT: u32 = 80;

/// signal(7).
const SIGPIPE: i32 = 13;

// A Rust program has an error where the other end is gone, as the VMM has; libFuzzer's `main` leaves the signal to end it.
fuzz_target!(init: block_signal(SIGPIPE).unwrap(), |data: &[u8]| {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("v");
    let mut vsock = Vsock::listen(3, &socket).unwrap();
    let epoll = Arc::new(Epoll::new().unwrap());
    vsock.watch(&epoll).unwrap();
    let listener = UnixListener::bind(folder.path().join(format!("v_{PORT}"))).unwrap();
    listener.set_nonblocking(true).unwrap();
    let mut driver = Driver::new(&[128; 3]);
    vsock.activate(driver.activation(feature::COMMON));
    let mut streams: Vec<UnixStream> = Vec::new();
    let mut events = [EpollEvent::default(); 16];
    for step in data.chunks_exact(8).take(256) {
        let [what, a, b, c, d, e, f, g] = <[u8; 8]>::try_from(step).unwrap();
        match what % 8 {
            0..=3 => {
                let header = Header {
                    src_cid: if a == 0xff { 9 } else { 3 },
                    dst_cid: if b == 0xff { 9 } else { 2 },
                    src_port: u32::from(a & 3),
                    dst_port: if b & 1 == 0 { PORT } else { u32::from(b) << (f % 32) },
                    len: u32::from(c) << (g % 24),
                    kind: if d & 0xf0 == 0xf0 { u16::from(d) } else { 1 },
                    op: u16::from(d & 0xf),
                    flags: u32::from(e & 3),
                    buf_alloc: u32::from(f) << (e % 28),
                    fwd_cnt: u32::from(g),
                };
                driver.put(SEND, &header.to_bytes());
                let split = u32::from(e) % HEADER_BYTES as u32;
                driver.send(
                    1,
                    &[
                        Part::read(SEND, split),
                        Part::read(
                            SEND + u64::from(split),
                            HEADER_BYTES as u32 - split + header.len.min(1 << 16),
                        ),
                    ],
                );
                vsock.process();
            }
            4 => {
                let length = if a == 0 { u32::from(b) } else { 4096 };
                driver.send(0, &[Part::write(RECEIVE + u64::from(c) * 4096, length)]);
                vsock.process();
            }
            5 => {
                let mut stream = UnixStream::connect(&socket).unwrap();
                stream.set_nonblocking(true).unwrap();
                let _ = match a % 4 {
                    0 => writeln!(stream, "CONNECT {b}"),
                    1 => stream.write_all(&step[2..]),
                    _ => writeln!(stream, "CONNECT {}", u32::from(b) << 24),
                };
                streams.push(stream);
            }
            6 => {
                if let Some(stream) = streams.get_mut(usize::from(a) % 16) {
                    let _ = match b % 3 {
                        0 => stream.write_all(&vec![c; usize::from(d) * 64]),
                        1 => stream.read(&mut vec![0; usize::from(d) * 64]).map(drop),
                        _ => stream.shutdown(std::net::Shutdown::Both),
                    };
                }
            }
            _ if a == 0 => {
                vsock.reset();
                driver = Driver::new(&[128; 3]);
                vsock.activate(driver.activation(feature::COMMON));
            }
            _ => streams.truncate(usize::from(a) % 16),
        }
        while let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(true).unwrap();
            streams.push(stream);
        }
        let ready = epoll.wait(0, &mut events).unwrap();
        for event in &events[..ready] {
            vsock.ready(event.data(), event.event_set());
        }
    }
});
