use std::thread;

use stoker_proto::vmm::status::State;

use super::*;
use crate::socket::listen;

fn encode(request: request::Request) -> Vec<u8> {
    Request { request: Some(request) }.encode_length_delimited_to_vec()
}

/// Serves on `socket` until a `Stop` arrives.
fn serve(socket: &Path) -> thread::JoinHandle<()> {
    let epoll = Epoll::new().unwrap();
    let mut server = Server::new(listen(socket).unwrap(), &epoll, 10).unwrap();
    thread::spawn(move || {
        let mut events = [EpollEvent::default(); 4];
        let mut stopped = false;
        while !stopped {
            let ready = epoll.wait(-1, &mut events).unwrap();
            for event in &events[..ready] {
                server.ready(event.data(), &epoll, |request| match request.request {
                    Some(request::Request::Query(_)) => response::Response::Status(Status {
                        state: State::Running.into(),
                        vcpus: 2,
                        ..Status::default()
                    }),
                    Some(request::Request::GrowScratch(request::GrowScratch { size_mib })) => {
                        response::Response::Status(Status {
                            scratch_mib: size_mib,
                            ..Status::default()
                        })
                    }
                    Some(request::Request::Resize(request::Resize { vcpus, memory_mib })) => {
                        let words = format!("{vcpus:?} {memory_mib:?}");
                        response::Response::Error(bounded(words + &"é".repeat(MAX_MESSAGE)))
                    }
                    Some(request::Request::Stop(_)) => {
                        stopped = true;
                        response::Response::Status(Status::default())
                    }
                    _ => response::Response::Error("no".into()),
                });
            }
        }
    })
}

fn client(socket: &Path) -> Client {
    Client::connect(socket, Duration::from_secs(10)).unwrap()
}

#[test]
fn messages_are_taken_one_by_one_from_any_cut() {
    let query = encode(request::Request::Query(request::Query {}));
    let all = [query.clone(), encode(request::Request::Stop(request::Stop {}))].concat();
    for cut in 0..=all.len() {
        let mut bytes = all[..cut].to_vec();
        let mut seen = Vec::new();
        while let Some(request) = take_message::<Request>(&mut bytes).unwrap() {
            seen.push(request);
        }
        bytes.extend(&all[cut..]);
        while let Some(request) = take_message::<Request>(&mut bytes).unwrap() {
            seen.push(request);
        }
        assert_eq!(seen.len(), 2, "cut at {cut}");
        assert!(bytes.is_empty());
    }
}

#[test]
fn impossible_messages_are_refused() {
    let take = |bytes: &[u8]| take_message::<Request>(&mut bytes.to_vec());
    assert_eq!(take(&[0x81, 0x88, 1]), Err(FrameError::Length));
    assert_eq!(take(&[0xff, 0xff]), Err(FrameError::Length));
    assert_eq!(take(&[0x81, 0x08]), Err(FrameError::Length));
    assert_eq!(take(&[0x80, 0x08]), Ok(None), "1024 is possible");
    assert!(matches!(take(&[2, 0xff, 0xff]), Err(FrameError::Decode(_))));
    assert_eq!(take(&[0]), Ok(Some(Request::default())));
}

#[test]
fn clients_are_answered_and_bad_ones_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock");
    let server = serve(&socket);

    let mut good = client(&socket);
    assert_eq!(good.query().unwrap().vcpus, 2);
    assert_eq!(good.grow_scratch(2048).unwrap().scratch_mib, 2048);

    let refused = good.resize(Some(3), None).unwrap_err().to_string();
    assert!(refused.contains("Some(3) None") && refused.ends_with('é'), "{refused}");

    let mut bad = UnixStream::connect(&socket).unwrap();
    bad.write_all(&[0xff; 16]).unwrap();
    let mut answer = Vec::new();
    bad.read_to_end(&mut answer).unwrap();
    let answer: Response = take_message(&mut answer).unwrap().unwrap();
    assert!(matches!(answer.response, Some(response::Response::Error(_))));

    // One that says half a message keeps nobody waiting.
    let mut slow = UnixStream::connect(&socket).unwrap();
    slow.write_all(&[9]).unwrap();

    assert!(matches!(good.pause(), Err(ClientError::Refused(_))));
    // All places taken: one more is turned away, and the others go on.
    let mut others: Vec<Client> = (0..MAX_CLIENTS - 2).map(|_| client(&socket)).collect();
    for other in &mut others {
        other.query().unwrap();
    }
    assert!(client(&socket).query().is_err());
    drop(others.pop());
    // The server hears of the free place in its own time.
    while client(&socket).query().is_err() {
        thread::yield_now();
    }
    good.stop().unwrap();
    server.join().unwrap();
    assert!(good.query().is_err());
}
