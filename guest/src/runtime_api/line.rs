//! Those who wait for the same: requests for work, or for an extension's next event.

use std::sync::{Arc, Weak};

use super::peer::Peer;

/// The requests that wait, the oldest first.
#[derive(Default)]
pub(super) struct Line(Vec<Weak<Waiter>>);

/// A request that waits as long as it is not dropped, by the connection that it came by.
pub(super) struct Waiter(Arc<Peer>);

/// What is for a request to do when something has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It is the one to have it.
    Mine,
    Another,
    /// Nothing more: its client has ended its side of the connection and asked anew.
    Given,
}

// === impl Line ===

impl Line {
    /// Lets a request wait.
    pub(super) fn join(&mut self, peer: &Arc<Peer>) -> Arc<Waiter> {
        self.0.retain(|waiter| waiter.strong_count() > 0);
        let waiter = Arc::new(Waiter(Arc::clone(peer)));
        self.0.push(Arc::downgrade(&waiter));
        waiter
    }

    /// Whose turn it is: the youngest's, for a client that has lost its connection asks by another. One whose client may be
    /// gone comes last: whether it is, or only sends no more, is seen when it is answered.
    pub(super) fn turn(&self, of: &Arc<Waiter>) -> Turn {
        let waiting = || self.0.iter().rev().filter_map(Weak::upgrade);
        let is = |waiter: &Arc<Waiter>| Arc::ptr_eq(waiter, of);
        let open = |waiter: Arc<Waiter>| !waiter.0.has_ended();
        if !of.0.has_ended() {
            let mut younger = waiting().take_while(|waiter| !is(waiter));
            return if younger.any(open) { Turn::Another } else { Turn::Mine };
        }
        if !waiting().next().is_some_and(|youngest| is(&youngest)) {
            Turn::Given
        } else if waiting().skip(1).any(open) {
            Turn::Another
        } else {
            Turn::Mine
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use tokio::sync::Semaphore;

    use super::*;

    /// A connection from both ends.
    fn connected() -> (Arc<Peer>, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, _) = listener.accept().unwrap();
        (Peer::new(stream, Arc::new(Semaphore::new(0))), client)
    }

    #[tokio::test]
    async fn the_youngest_comes_first() {
        let ((older, _a), (younger, _b)) = (connected(), connected());
        let mut line = Line::default();
        let first = line.join(&older);
        assert_eq!(line.turn(&first), Turn::Mine);
        let second = line.join(&younger);
        assert_eq!((line.turn(&first), line.turn(&second)), (Turn::Another, Turn::Mine));
        drop(second);
        assert_eq!(line.turn(&first), Turn::Mine);
    }

    #[tokio::test]
    async fn one_whose_client_sends_no_more_gives_way() {
        let ((open, _a), (ended, b)) = (connected(), connected());
        drop(b);
        while !ended.has_ended() {
            tokio::task::yield_now().await;
        }
        let mut line = Line::default();
        let first = line.join(&ended);
        assert_eq!(line.turn(&first), Turn::Mine, "it may still read");
        let second = line.join(&open);
        assert_eq!((line.turn(&first), line.turn(&second)), (Turn::Given, Turn::Mine));
        let third = line.join(&ended);
        assert_eq!((line.turn(&second), line.turn(&third)), (Turn::Mine, Turn::Another));
    }
}
