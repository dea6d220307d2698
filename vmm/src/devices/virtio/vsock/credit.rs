//! Flow control by credit (virtio 1.3, 5.10.6.3): each side says how much it can hold (`buf_alloc`) and how much it has
//! passed on (`fwd_cnt`), and the other never has more under way than that. Pure arithmetic, modulo 2^32.

use std::num::Wrapping;

/// Bytes that the device holds for the host at most, per connection.
pub const WINDOW: u32 = 64 * 1024;

/// Both directions of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Credit {
    /// What the guest said last.
    guest_window: u32,
    guest_forwarded: Wrapping<u32>,
    /// Sent to the guest.
    sent: Wrapping<u32>,
    /// Received from the guest.
    received: Wrapping<u32>,
    /// Of that, passed on to the host.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest heard it last.
    told: Wrapping<u32>,
}

// === impl Credit ===

impl Credit {
    /// Hears what a packet of the guest says.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_window = buf_alloc;
        self.guest_forwarded = Wrapping(fwd_cnt);
    }

    /// Bytes that may be sent to the guest now.
    pub fn available(&self) -> u32 {
        let under_way = (self.sent - self.guest_forwarded).0;
        self.guest_window.saturating_sub(under_way)
    }

    /// `bytes` were sent to the guest.
    pub fn sent(&mut self, bytes: u32) {
        self.sent += bytes;
    }

    /// `bytes` came from the guest. False where that is more than it was allowed to send.
    #[must_use]
    pub fn received(&mut self, bytes: u32) -> bool {
        let held = (self.received - self.forwarded).0;
        if bytes > WINDOW - held.min(WINDOW) {
            return false;
        }
        self.received += bytes;
        true
    }

    /// `bytes` of what was received were passed on.
    pub fn forwarded(&mut self, bytes: u32) {
        self.forwarded += bytes;
    }

    /// What the next packet to the guest says as `fwd_cnt`; it counts as told.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded.0
    }

    /// Whether the guest thinks that less than half of the window is free while there is more.
    pub fn worth_telling(&self) -> bool {
        (self.forwarded - self.told).0 >= WINDOW / 2
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_that_lies_gets_nothing() {
        let mut credit = Credit::default();
        assert_eq!(credit.available(), 0);
        credit.hear(100, 0);
        assert_eq!(credit.available(), 100);
        credit.sent(60);
        assert_eq!(credit.available(), 40);
        // It says that it passed on what it never got.
        credit.hear(100, 61);
        assert_eq!(credit.available(), 0);
        // It shrinks its window below what is under way.
        credit.hear(10, 0);
        assert_eq!(credit.available(), 0);
        credit.hear(u32::MAX, 60);
        assert_eq!(credit.available(), u32::MAX);
    }

    #[test]
    fn counters_wrap() {
        let mut credit = Credit {
            sent: Wrapping(u32::MAX - 5),
            guest_forwarded: Wrapping(u32::MAX - 5),
            guest_window: 100,
            received: Wrapping(u32::MAX),
            forwarded: Wrapping(u32::MAX),
            told: Wrapping(u32::MAX),
        };
        credit.sent(20);
        assert_eq!(credit.available(), 80);
        assert!(credit.received(WINDOW));
        assert!(!credit.received(1));
        credit.forwarded(WINDOW / 2);
        assert!(credit.worth_telling());
        assert_eq!(credit.tell(), WINDOW / 2 - 1);
        assert!(!credit.worth_telling());
    }

    proptest! {
        /// Whatever happens, no more than a window is ever held, and an honest pair never stalls: once all is passed
        /// on, either the guest knows of at least half a window or there is something worth telling.
        #[test]
        fn honest_traffic_is_bounded_and_never_stalls(steps in prop::collection::vec((0u32..3 * WINDOW, 0u32..3 * WINDOW), 1..200)) {
            let mut credit = Credit::default();
            let (mut held, mut guest_free) = (0u32, WINDOW);
            let mut told = 0u32;
            for (send, pass) in steps {
                let send = send.min(guest_free);
                prop_assert!(credit.received(send));
                held += send;
                guest_free -= send;
                let pass = pass.min(held);
                credit.forwarded(pass);
                held -= pass;
                prop_assert!(held <= WINDOW);
                if credit.worth_telling() {
                    let now = credit.tell();
                    guest_free += now.wrapping_sub(told);
                    told = now;
                }
                if held == 0 {
                    prop_assert!(guest_free > WINDOW / 2);
                }
            }
        }
    }
}
