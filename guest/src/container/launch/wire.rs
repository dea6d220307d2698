//! Messages with file descriptors over a socket pair that keeps their boundaries (`SOCK_SEQPACKET`).

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A specification with the largest environment fits several times.
const LIMIT: usize = 128 << 10;
/// The most descriptors that come with a message.
const DESCRIPTORS: usize = 4;

/// A message could not be sent or received.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("the other side is gone")]
    Closed,
    #[error(transparent)]
    Socket(#[from] Errno),
    #[error("not the expected message: {0}")]
    Message(#[from] serde_json::Error),
}

/// Sends a message, with at most one descriptor.
pub(super) fn send(socket: impl AsFd, message: &impl Serialize, with: Option<BorrowedFd<'_>>) -> Result<(), WireError> {
    send_all(socket, message, with.as_slice())
}

/// Sends a message, with at most [`DESCRIPTORS`] descriptors.
pub(super) fn send_all(socket: impl AsFd, message: &impl Serialize, with: &[BorrowedFd<'_>]) -> Result<(), WireError> {
    let bytes = serde_json::to_vec(message)?;
    let descriptors: Vec<RawFd> = with.iter().map(|fd| fd.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&descriptors)];
    let control = if descriptors.is_empty() {
        &[]
    } else {
        control.as_slice()
    };
    sendmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives a message, and the descriptor that came with it.
pub(super) fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Option<OwnedFd>), WireError> {
    receive_all(socket).map(|(message, mut descriptors)| (message, descriptors.pop()))
}

/// Receives a message, and the descriptors that came with it, in order.
pub(super) fn receive_all<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), WireError> {
    let mut bytes = vec![0; LIMIT];
    let mut control = cmsg_space!([RawFd; DESCRIPTORS]);
    let (length, descriptors) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket.as_fd().as_raw_fd(),
            &mut parts,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut descriptors = Vec::new();
        for control in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(received) = control {
                for raw in received {
                    // SAFETY: the kernel has just put this descriptor into our table; nobody else knows of it.
                    descriptors.push(unsafe { OwnedFd::from_raw_fd(raw) });
                }
            }
        }
        (message.bytes, descriptors)
    };
    match bytes.get(..length) {
        Some([]) | None => Err(WireError::Closed),
        Some(bytes) => Ok((serde_json::from_slice(bytes)?, descriptors)),
    }
}
