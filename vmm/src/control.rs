//! The control socket: a Unix socket on which each message is a protobuf preceded by its length as a varint
//! (`proto/stoker/vmm/v1/control.proto`). [`Server`] is the machine's end, [`Client`] everybody else's.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use prost::Message as _;
use stoker_proto::vmm::{Request, Response, Status, request, response};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Longest message in bytes, its length not counted. Every request and response there is has fewer than 800.
pub const MAX_MESSAGE: usize = 1024;
/// Longest text in a response in bytes.
const MAX_TEXT: usize = 500;
/// Clients at a time; one more is turned away.
pub const MAX_CLIENTS: usize = 8;

/// What cannot be a message.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The length in front is no varint or larger than [`MAX_MESSAGE`].
    #[error("a message's length is not between 0 and {MAX_MESSAGE}")]
    Length,
    /// The bytes are no protobuf of the type expected.
    #[error("a message cannot be decoded: {0}")]
    Decode(#[from] prost::DecodeError),
}

/// Takes one whole message from the front of `bytes`; `None` where it is not complete yet.
///
/// # Errors
/// Where it never can be.
pub fn take_message<M: prost::Message + Default>(bytes: &mut Vec<u8>) -> Result<Option<M>, FrameError> {
    // 1024 has two bytes as a varint: three are too long already.
    let mut length = 0usize;
    let mut prefix = 0usize;
    loop {
        let Some(byte) = bytes.get(prefix) else {
            return Ok(None);
        };
        length |= usize::from(byte & 0x7f) << (7 * prefix);
        prefix += 1;
        if byte & 0x80 == 0 {
            break;
        }
        if prefix == 2 {
            return Err(FrameError::Length);
        }
    }
    if length > MAX_MESSAGE {
        return Err(FrameError::Length);
    }
    let Some(body) = bytes.get(prefix..prefix + length) else {
        return Ok(None);
    };
    let message = M::decode(body)?;
    bytes.drain(..prefix + length);
    Ok(Some(message))
}

/// A text as a response may have it: cut where it is too long, as one that names a long path.
pub fn bounded(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_TEXT));
    text
}

/// The machine's end. It never blocks, and a client that misbehaves or does not read its answers is dropped.
pub struct Server {
    listener: UnixListener,
    clients: Vec<Option<Connected>>,
    /// Epoll data of the listener; clients have the numbers behind it.
    base: u64,
}

struct Connected {
    stream: UnixStream,
    received: Vec<u8>,
}

// === impl Server ===

impl Server {
    /// Serves `listener` in `epoll`; descriptors are registered there with `base` up to `base + MAX_CLIENTS`.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn new(listener: UnixListener, epoll: &Epoll, base: u64) -> io::Result<Self> {
        let event = EpollEvent::new(EventSet::IN, base);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), event)?;
        Ok(Self {
            listener,
            clients: (0..MAX_CLIENTS).map(|_| None).collect(),
            base,
        })
    }

    /// Something is ready. Each request that is complete is given to `answer`, and what it returns is sent.
    pub fn ready(&mut self, data: u64, epoll: &Epoll, mut answer: impl FnMut(Request) -> response::Response) {
        if data == self.base {
            self.accept(epoll);
            return;
        }
        let Some(index) = data
            .checked_sub(self.base + 1)
            .and_then(|index| usize::try_from(index).ok())
        else {
            return;
        };
        if let Some(slot) = self.clients.get_mut(index)
            && let Some(client) = slot
            && !client.serve(&mut answer)
        {
            // Closing it takes it out of the epoll.
            *slot = None;
        }
    }

    fn accept(&mut self, epoll: &Epoll) {
        let Ok((stream, _)) = self.listener.accept() else {
            return;
        };
        for (slot, data) in self.clients.iter_mut().zip(self.base + 1..) {
            if slot.is_none() {
                let event = EpollEvent::new(EventSet::IN, data);
                let watched = stream.set_nonblocking(true).is_ok()
                    && epoll.ctl(ControlOperation::Add, stream.as_raw_fd(), event).is_ok();
                *slot = watched.then_some(Connected {
                    stream,
                    received: Vec::new(),
                });
                return;
            }
        }
    }
}

// === impl Connected ===

impl Connected {
    /// Reads and answers what there is. False where the client is to be dropped.
    fn serve(&mut self, answer: &mut impl FnMut(Request) -> response::Response) -> bool {
        let mut block = [0; 256];
        let length = match self.stream.read(&mut block) {
            Ok(0) => return false,
            Ok(length) => length,
            Err(error) => {
                return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            }
        };
        self.received.extend_from_slice(block.get(..length).unwrap_or_default());
        loop {
            let response = match take_message::<Request>(&mut self.received) {
                Ok(None) => return true,
                Ok(Some(request)) => answer(request),
                Err(error) => {
                    self.send(response::Response::Error(error.to_string()));
                    return false;
                }
            };
            if !self.send(response) {
                return false;
            }
        }
    }

    fn send(&mut self, response: response::Response) -> bool {
        let message = Response {
            response: Some(response),
        };
        let bytes = message.encode_length_delimited_to_vec();
        self.stream.write(&bytes).ok() == Some(bytes.len())
    }
}

/// Why a machine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The machine is gone, or was never there.
    #[error("cannot reach the machine's control socket: {0}")]
    Io(#[from] io::Error),
    /// It answered nonsense.
    #[error("the machine answered what cannot be understood: {0}")]
    Frame(#[from] FrameError),
    /// It answered neither a status nor an error.
    #[error("the machine gave an empty answer")]
    Empty,
    /// It refused, and is as it was.
    #[error("the machine refused: {0}")]
    Refused(String),
}

/// A connection to a machine's control socket. Blocking, with a limit on how long an answer may take.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    received: Vec<u8>,
}

// === impl Client ===

impl Client {
    /// Connects; every answer must come within `patience`.
    ///
    /// # Errors
    /// Where nobody listens on `socket`.
    pub fn connect(socket: &Path, patience: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self {
            stream,
            received: Vec::new(),
        })
    }

    /// How the machine is.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn query(&mut self) -> Result<Status, ClientError> {
        self.call(request::Request::Query(request::Query {}))
    }

    /// Stops the vCPUs. Pausing a paused machine is no error.
    ///
    /// # Errors
    /// Where it does not answer, or a vCPU does not stop.
    pub fn pause(&mut self) -> Result<Status, ClientError> {
        self.call(request::Request::Pause(request::Pause {}))
    }

    /// Lets the vCPUs run on. Resuming a running machine is no error.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn resume(&mut self) -> Result<Status, ClientError> {
        self.call(request::Request::Resume(request::Resume {}))
    }

    /// Ends the machine at once.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn stop(&mut self) -> Result<Status, ClientError> {
        self.call(request::Request::Stop(request::Stop {}))
    }

    /// Makes the scratch drive at least `size_mib` MiB large. One that is already is left as it is.
    ///
    /// # Errors
    /// Where it does not answer, has no such drive, or the drive cannot be as large.
    pub fn grow_scratch(&mut self, size_mib: u32) -> Result<Status, ClientError> {
        self.call(request::Request::GrowScratch(request::GrowScratch { size_mib }))
    }

    /// Asks for so many vCPUs and so much memory; what is `None` stays as it is. `Status::amounts` tells what the guest has made of
    /// it, then and later.
    ///
    /// # Errors
    /// Where it does not answer, or refuses; nothing has changed then.
    pub fn resize(&mut self, vcpus: Option<u32>, memory_mib: Option<u32>) -> Result<Status, ClientError> {
        self.call(request::Request::Resize(request::Resize { vcpus, memory_mib }))
    }

    /// Asks the guest for a balloon of `mib` MiB. How far it has come is told in the status, now and later.
    ///
    /// # Errors
    /// Where the machine does not answer, has no balloon, or not as much memory.
    pub fn set_balloon(&mut self, mib: u32) -> Result<Status, ClientError> {
        self.call(request::Request::SetBalloon(request::SetBalloon { mib }))
    }

    fn call(&mut self, request: request::Request) -> Result<Status, ClientError> {
        let request = Request { request: Some(request) };
        self.stream.write_all(&request.encode_length_delimited_to_vec())?;
        loop {
            if let Some(Response { response }) = take_message(&mut self.received)? {
                return match response {
                    Some(response::Response::Status(status)) => Ok(status),
                    Some(response::Response::Error(error)) => Err(ClientError::Refused(error)),
                    None => Err(ClientError::Empty),
                };
            }
            let mut block = [0; 512];
            let length = self.stream.read(&mut block)?;
            if length == 0 {
                return Err(ClientError::Io(io::ErrorKind::UnexpectedEof.into()));
            }
            self.received.extend_from_slice(block.get(..length).unwrap_or_default());
        }
    }
}

#[cfg(test)]
mod tests;
