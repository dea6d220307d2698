//! The host's end of the device: its sockets and its clock. [`UnixHost`] is the real one; in a test or fuzz target a
//! simulation takes its place, so that every state of the device can be reached without sockets and without waiting.

use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;

use crate::devices::virtio::buffers::{Buffers, Transfer, transfer};
use crate::memory::GuestMemory;
use crate::socket::{ListenError, listen};

/// A stream to a program on the host. Nothing of it blocks; what can't be done now is `WouldBlock`.
pub trait Stream: io::Read + io::Write + Send {
    /// Reads up to `length` bytes into `buffers`, from `offset` bytes into them. 0 is the stream's end.
    ///
    /// # Errors
    /// What the stream says, or `InvalidInput` where the buffers are too short or not guest memory.
    fn receive(&self, buffers: &Buffers, memory: &GuestMemory, offset: u64, length: u64) -> io::Result<usize>;

    /// Writes up to `length` bytes of `buffers`, from `offset` bytes into them.
    ///
    /// # Errors
    /// As for [`Stream::receive`].
    fn send(&self, buffers: &Buffers, memory: &GuestMemory, offset: u64, length: u64) -> io::Result<usize>;

    /// Whether all that will ever come has been read. Asked once no more can come.
    fn is_drained(&self) -> bool;

    /// Ends one direction, or both. It makes an event of the stream itself, even where the direction had ended before.
    fn shutdown(&self, how: Shutdown);
}

/// Where streams come from, and who tells when something is ready.
pub trait Host: Send {
    /// What connections are made of.
    type Stream: Stream;

    /// Has `epoll` tell of clients, of streams and of the timer: of the first as `clients`, of the last as `timer`. Called once,
    /// before all else.
    ///
    /// # Errors
    /// Where the kernel refuses.
    fn start(&mut self, epoll: &Arc<Epoll>, clients: u64, timer: u64) -> io::Result<()>;

    /// The next client that waits to be let in.
    fn accept(&mut self) -> Option<Self::Stream>;

    /// A stream to the server of a port of the host; `None` where there is none, or its backlog is full.
    fn connect(&mut self, port: u32) -> Option<Self::Stream>;

    /// Has changes of a stream told as `data` (edge-triggered: once for each change). `Add` is for a new stream, `Modify` for other
    /// `events`, which tells of what is so already. False where the kernel refuses.
    fn watch(&mut self, operation: ControlOperation, stream: &Self::Stream, events: EventSet, data: u64) -> bool;

    /// The time since a moment that stays the same.
    fn now(&self) -> Duration;

    /// Has the timer told of once, at `when` of [`Host::now`]. A time set before is forgotten.
    fn set_timer(&mut self, when: Duration);
}

/// Unix sockets, by Firecracker's convention: clients connect to `{socket}`, the server of port P is `{socket}_{P}`.
pub struct UnixHost {
    socket: PathBuf,
    listener: UnixListener,
    started: Instant,
    /// Who is told, and by which timer.
    watch: Option<(Arc<Epoll>, TimerFd)>,
}

// === impl UnixHost ===

impl UnixHost {
    /// Listens on `socket`.
    ///
    /// # Errors
    /// Where the socket is in use or cannot be made.
    pub fn listen(socket: &Path) -> Result<Self, ListenError> {
        Ok(Self {
            socket: socket.to_owned(),
            listener: listen(socket)?,
            started: Instant::now(),
            watch: None,
        })
    }
}

impl Host for UnixHost {
    type Stream = UnixStream;

    fn start(&mut self, epoll: &Arc<Epoll>, clients: u64, timer: u64) -> io::Result<()> {
        // The timer's count is never read: setting it again clears it.
        let own = TimerFd::new()?;
        for (fd, data) in [(self.listener.as_raw_fd(), clients), (own.as_raw_fd(), timer)] {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, data);
            epoll.ctl(ControlOperation::Add, fd, event)?;
        }
        self.watch = Some((epoll.clone(), own));
        Ok(())
    }

    fn accept(&mut self) -> Option<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept().ok()?;
            if stream.set_nonblocking(true).is_ok() {
                return Some(stream);
            }
        }
    }

    fn connect(&mut self, port: u32) -> Option<UnixStream> {
        let mut path = self.socket.clone().into_os_string();
        path.push(format!("_{port}"));
        let connect = || -> io::Result<UnixStream> {
            let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
            socket.set_nonblocking(true)?;
            socket.connect(&SockAddr::unix(path)?)?;
            Ok(OwnedFd::from(socket).into())
        };
        connect().ok()
    }

    fn watch(&mut self, operation: ControlOperation, stream: &UnixStream, events: EventSet, data: u64) -> bool {
        self.watch.as_ref().is_some_and(|(epoll, _)| {
            let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, data);
            epoll.ctl(operation, stream.as_raw_fd(), event).is_ok()
        })
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn set_timer(&mut self, when: Duration) {
        // A wait of zero would disarm it.
        let wait = when.saturating_sub(self.now()).max(Duration::from_nanos(1));
        if let Some((_, timer)) = &mut self.watch {
            // A time that is no number of seconds and nanoseconds is all that it refuses.
            let _ = timer.reset(wait, None);
        }
    }
}

impl Stream for UnixStream {
    fn receive(&self, buffers: &Buffers, memory: &GuestMemory, offset: u64, length: u64) -> io::Result<usize> {
        transfer(buffers, memory, offset, length, self, Transfer::Receive)
    }

    fn send(&self, buffers: &Buffers, memory: &GuestMemory, offset: u64, length: u64) -> io::Result<usize> {
        transfer(buffers, memory, offset, length, self, Transfer::Send)
    }

    fn is_drained(&self) -> bool {
        match SockRef::from(self).peek(&mut [MaybeUninit::uninit()]) {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() != io::ErrorKind::WouldBlock,
        }
    }

    fn shutdown(&self, how: Shutdown) {
        // One that is not connected any more has ended.
        let _ = UnixStream::shutdown(self, how);
    }
}
