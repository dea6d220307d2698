//! What the kernel tells of devices that come and go, by messages on a socket (`lib/kobject_uevent.c` in Linux): nothing polls.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The group of those that hear its messages.
const GROUP: u32 = 1;
/// More than the kernel says at once (`UEVENT_BUFFER_SIZE` and a header).
const MESSAGE_BYTES: usize = 4096;

/// The socket.
pub(crate) struct Uevents(AsyncFd<OwnedFd>);

// === impl Uevents ===

impl Uevents {
    /// Hears of what comes and goes from now on.
    pub(crate) fn listen() -> io::Result<Self> {
        let socket = socket(
            AddressFamily::Netlink,
            SockType::Datagram,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::NetlinkKObjectUEvent,
        )?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP))?;
        // SAFETY: the descriptor is owned by what is registered and stays the same, so it is open for as long as that is.
        let socket = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        Ok(Self(socket?))
    }

    /// What `about` makes of the next message's first words, as `add@/devices/system/cpu/cpu1`. None: messages were lost.
    pub(crate) async fn next<T>(&self, about: impl Fn(&[u8]) -> T) -> io::Result<Option<T>> {
        let mut message = [0; MESSAGE_BYTES];
        let received = self
            .0
            .async_io(Interest::READABLE, |socket| {
                Ok(recv(socket.as_raw_fd(), &mut message, MsgFlags::empty())?)
            })
            .await;
        match received {
            Ok(length) => {
                let message = message.get(..length).unwrap_or_default();
                Ok(message.split(|byte| *byte == 0).next().map(about))
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
