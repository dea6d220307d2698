//! What an image's program and others beside it do in tests of images.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a program of a test may crash; its test then tells"
)]

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};

/// What the server sends by itself, in bytes.
const SENT: usize = 10 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["serve", port] => serve(port.parse().unwrap()),
        ["eat"] => eat(),
        ["chroot", folder] => std::os::unix::fs::chroot(folder).unwrap(),
        other => panic!("{other:?}"),
    }
}

/// Serves for ever: the first byte of a connection says what it does.
fn serve(port: u16) {
    let listener = TcpListener::bind(("127.0.0.1", port)).unwrap();
    println!("listening");
    for stream in listener.incoming() {
        std::thread::spawn(|| answer(stream.unwrap()));
    }
}

fn answer(mut stream: TcpStream) {
    let mut first = [0];
    stream.read_exact(&mut first).unwrap();
    match &first {
        // All comes back, and then the end does.
        b"e" => {
            let mut back = stream.try_clone().unwrap();
            std::io::copy(&mut stream, &mut back).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        }
        // Its own end comes first.
        b"s" => {
            let sent: Vec<u8> = (0..SENT).map(|at| (at ^ (at >> 8)) as u8).collect();
            stream.write_all(&sent).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            println!("got {} bytes, {} right", got.len(), got == sent);
        }
        // It says nothing, and reads nothing.
        _ => loop {
            std::thread::park();
        },
    }
}

fn eat() {
    let mut all = Vec::new();
    loop {
        all.push(vec![1_u8; 1 << 20]);
    }
}
