//! What a guest streams of an answer, from the connection that all calls of its machine share to who reads it: kept up to a
//! window, so that who reads slowly keeps nobody waiting but the function.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};
use stoker_proto::guest as proto;
use stoker_proto::limits::{STREAM_PART_BYTES, STREAM_WINDOW_BYTES, STREAMED_ANSWER_BYTES};
use tokio::sync::{Notify, mpsc};

/// The end that reads.
#[derive(Debug)]
pub(crate) struct Parts {
    shared: Arc<Shared>,
    /// The requests to the guest.
    to: mpsc::Sender<proto::InvokeRequest>,
    /// What was read, and the guest has not been granted anew.
    taken: usize,
}

/// The end where they come in. Dropped, no more come.
#[derive(Debug)]
pub(crate) struct Incoming(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    news: Notify,
}

#[derive(Debug)]
struct State {
    /// Its number; it has one once it is asked.
    call: u64,
    /// Copied together: parts may be a byte each, and cost more than they hold.
    bytes: BytesMut,
    /// How many bytes the guest may send now, and of the whole answer.
    room: usize,
    left: usize,
    over: bool,
}

// === impl Parts ===

impl Parts {
    /// Of a call of which `to` carries the requests.
    pub(super) fn new(to: mpsc::Sender<proto::InvokeRequest>) -> Self {
        let state = State {
            call: 0,
            bytes: BytesMut::new(),
            room: STREAM_WINDOW_BYTES,
            left: STREAMED_ANSWER_BYTES,
            over: false,
        };
        let shared = Shared {
            state: Mutex::new(state),
            news: Notify::new(),
        };
        Self {
            shared: Arc::new(shared),
            to,
            taken: 0,
        }
    }

    /// The other end.
    pub(crate) fn incoming(&self) -> Incoming {
        Incoming(Arc::clone(&self.shared))
    }

    /// The next bytes, at most 64 KiB; none once the call is over and all are read. Who asks for more has done with what it had.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        self.grant().await;
        loop {
            {
                let mut state = self.shared.state();
                if !state.bytes.is_empty() {
                    let length = state.bytes.len().min(STREAM_PART_BYTES);
                    self.taken += length;
                    // Not a slice, which would keep the whole buffer.
                    return Some(Bytes::copy_from_slice(&state.bytes.split_to(length)));
                }
                if state.over {
                    return None;
                }
            }
            // One who reads is told of what came before, too.
            self.shared.news.notified().await;
        }
    }

    /// Lets the guest send as much as was read: not a message for every part.
    async fn grant(&mut self) {
        if self.taken < STREAM_WINDOW_BYTES / 2 {
            return;
        }
        let call = {
            let mut state = self.shared.state();
            if state.over {
                return;
            }
            state.room += self.taken;
            state.call
        };
        let grant = proto::InvokeRequest {
            call,
            grant_bytes: u32::try_from(std::mem::take(&mut self.taken)).unwrap_or(u32::MAX),
            ..Default::default()
        };
        // Without a connection the call is over.
        let _ = self.to.send(grant).await;
    }
}

// === impl Incoming ===

impl Incoming {
    /// The call has its number.
    pub(super) fn begin(&self, call: u64) {
        self.0.state().call = call;
    }

    /// A part has come. Whether the guest was to send it.
    pub(super) fn push(&self, part: &[u8]) -> bool {
        let mut state = self.0.state();
        if part.is_empty() || part.len() > state.room.min(state.left) {
            return false;
        }
        state.room -= part.len();
        state.left -= part.len();
        state.bytes.extend_from_slice(part);
        drop(state);
        self.0.news.notify_one();
        true
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.0.state().over = true;
        self.0.news.notify_one();
    }
}

// === impl Shared ===

impl Shared {
    /// Every change leaves it whole, so a panic elsewhere does no harm.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_guest_is_granted_what_was_read() {
        let (to, mut requests) = mpsc::channel(1);
        let mut parts = Parts::new(to);
        let incoming = parts.incoming();
        incoming.begin(7);
        let part = vec![b'x'; STREAM_PART_BYTES];
        for _ in 0..STREAM_WINDOW_BYTES / STREAM_PART_BYTES {
            assert!(incoming.push(&part));
        }
        assert!(!incoming.push(b"x"), "it was not granted more");
        for _ in 0..2 {
            assert_eq!(parts.next().await.unwrap(), part);
        }
        assert!(requests.try_recv().is_err(), "the last part is not read yet");
        assert_eq!(parts.next().await.unwrap(), part);
        let granted = requests.try_recv().unwrap();
        assert_eq!((granted.call, granted.grant_bytes), (7, 128 << 10));
        assert!(incoming.push(&part) && incoming.push(&part) && !incoming.push(b"x"));
        drop(incoming);
        for _ in 0..3 {
            assert_eq!(parts.next().await.unwrap(), part);
        }
        assert_eq!(parts.next().await, None);
        assert!(requests.try_recv().is_err(), "it is over");
    }

    #[tokio::test]
    async fn an_answer_ends_at_its_limit() {
        let mut parts = Parts::new(mpsc::channel(1).0);
        let incoming = parts.incoming();
        incoming.0.state().left = 2;
        assert!(incoming.push(b"ab") && !incoming.push(b"c"));
        assert_eq!(parts.next().await.unwrap(), "ab");
    }

    #[tokio::test]
    async fn small_parts_are_read_together_and_empty_ones_are_refused() {
        let mut parts = Parts::new(mpsc::channel(1).0);
        let incoming = parts.incoming();
        assert!(!incoming.push(b""));
        let reading = tokio::spawn(async move {
            let first = parts.next().await;
            (first, parts)
        });
        tokio::task::yield_now().await;
        assert!(incoming.push(b"a"));
        let (first, mut parts) = reading.await.unwrap();
        assert_eq!(first.unwrap(), "a");
        assert!(incoming.push(b"b") && incoming.push(b"c"));
        assert_eq!(parts.next().await.unwrap(), "bc");
    }
}
