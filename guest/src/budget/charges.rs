//! For whom the serving thread has worked. A plain state machine: it is told the thread's CPU time, in ns.
//!
//! Whoever begins has the time from then on, until another does. Between them the thread waits for what comes next, and what
//! the kernel and the runtime do meanwhile is nobody's in particular. It is shared out at the end of a stretch, in which the
//! thread has not rested: among the containers that were served in it, in proportion to what was done for each. The connection
//! to the agent is shared among those that were called. So nothing is lost: what the thread used is charged to somebody, or
//! there was nobody to charge it to.

use super::Id;

/// The longest stretch of a thread that does not rest, in ns.
const STRETCH_NS: u64 = 1_000_000;

/// For whom the thread works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Owner {
    /// For those that are served.
    #[default]
    Around,
    /// For a container, because of what that did.
    Served(Id),
    /// For a container, because of what the agent asked.
    Called(Id),
    /// For those that are called.
    Connection,
    /// For no container.
    Nobody,
}

/// What was done in this stretch.
#[derive(Debug, Default)]
pub(super) struct Charges {
    owner: Owner,
    /// Since when, in CPU time.
    since_ns: u64,
    /// When the stretch began.
    begun_ns: u64,
    served: Vec<(Id, u64)>,
    called: Vec<(Id, u64)>,
    around_ns: u64,
    connection_ns: u64,
}

/// What a container is charged with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Charge {
    pub(super) id: Id,
    pub(super) ns: u64,
    /// Whether it is for what was done around what it did itself.
    pub(super) around: bool,
}

// === impl Charges ===

impl Charges {
    pub(super) fn owner(&self) -> Owner {
        self.owner
    }

    /// From now on the thread works for this one. For whom it did before, and how long.
    pub(super) fn turn_to(&mut self, owner: Owner, cpu_ns: u64) -> (Owner, u64) {
        let spent = cpu_ns.saturating_sub(self.since_ns);
        let before = std::mem::replace(&mut self.owner, owner);
        self.since_ns = cpu_ns;
        match before {
            Owner::Around => self.around_ns += spent,
            Owner::Served(id) => add(&mut self.served, id, spent),
            Owner::Called(id) => add(&mut self.called, id, spent),
            Owner::Connection => self.connection_ns += spent,
            Owner::Nobody => {}
        }
        (before, spent)
    }

    /// Whether it is time to settle.
    pub(super) fn is_long(&self) -> bool {
        self.since_ns.saturating_sub(self.begun_ns) >= STRETCH_NS
    }

    /// Ends the stretch: what each is charged with.
    pub(super) fn settle(&mut self, mut charge: impl FnMut(Charge)) {
        self.begun_ns = self.since_ns;
        let around = std::mem::take(&mut self.around_ns);
        let connection = std::mem::take(&mut self.connection_ns);
        for (all, more, around) in [(&mut self.served, around, true), (&mut self.called, connection, false)] {
            for &(id, ns) in all.iter() {
                charge(Charge { id, ns, around: false });
            }
            for (id, ns) in shares(more, all) {
                charge(Charge { id, ns, around });
            }
            all.clear();
        }
    }
}

fn add(to: &mut Vec<(Id, u64)>, id: Id, ns: u64) {
    match to.last_mut() {
        Some((last, sum)) if *last == id => *sum += ns,
        _ => to.push((id, ns)),
    }
}

/// Shares a sum out in proportion; the shares are the sum to the ns. None where there is nobody.
fn shares(sum: u64, among: &[(Id, u64)]) -> impl Iterator<Item = (Id, u64)> {
    let all: u128 = among.iter().map(|(_, ns)| u128::from(*ns)).sum();
    let (mut weighed, mut given) = (0, 0);
    among.iter().map(move |&(id, ns)| {
        weighed += u128::from(ns);
        let due = (u128::from(sum) * weighed).checked_div(all).unwrap_or(0);
        let share = u64::try_from(due).unwrap_or(u64::MAX) - given;
        given += share;
        (id, share)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn settled(charges: &mut Charges) -> BTreeMap<Id, u64> {
        let mut sums = BTreeMap::new();
        charges.settle(|charge| *sums.entry(charge.id).or_default() += charge.ns);
        sums
    }

    #[test]
    fn what_is_around_is_shared_among_the_served() {
        let mut charges = Charges::default();
        for (owner, at) in [
            (Owner::Served(1), 30),
            (Owner::Around, 130),
            (Owner::Served(2), 140),
            (Owner::Around, 440),
        ] {
            charges.turn_to(owner, at);
        }
        let mut around = Vec::new();
        charges.settle(|charge| around.extend(charge.around.then_some((charge.id, charge.ns))));
        assert_eq!(around, [(1, 10), (2, 30)]);
        charges.turn_to(Owner::Around, 1000);
        assert_eq!(settled(&mut charges), BTreeMap::new(), "idle time is nobody's");
    }

    #[test]
    fn the_connection_is_shared_among_the_called() {
        let mut charges = Charges::default();
        for (owner, at) in [
            (Owner::Connection, 0),
            (Owner::Called(1), 100),
            (Owner::Nobody, 150),
            (Owner::Served(2), 10_000),
            (Owner::Connection, 10_010),
            (Owner::Around, 10_020),
        ] {
            charges.turn_to(owner, at);
        }
        assert_eq!(settled(&mut charges), BTreeMap::from([(1, 160), (2, 10)]));
    }

    #[test]
    fn a_stretch_ends_where_the_thread_does_not_rest() {
        let mut charges = Charges::default();
        charges.turn_to(Owner::Served(1), 10);
        charges.turn_to(Owner::Around, STRETCH_NS - 1);
        assert!(!charges.is_long());
        charges.turn_to(Owner::Around, STRETCH_NS);
        assert!(charges.is_long());
        settled(&mut charges);
        assert!(!charges.is_long());
    }

    fn owners() -> impl Strategy<Value = Owner> {
        prop_oneof![
            Just(Owner::Around),
            Just(Owner::Connection),
            (0..3_u64).prop_map(Owner::Served),
            (0..3_u64).prop_map(Owner::Called),
        ]
    }

    proptest! {
        #[test]
        fn nothing_is_lost(work in prop::collection::vec((owners(), 0..10_000_u64), 1..50)) {
            let mut charges = Charges::default();
            let mut now = 0;
            // Each is there at least once.
            let all = [(Owner::Served(0), 1), (Owner::Called(0), 1)].into_iter().chain(work);
            for (owner, spent) in all {
                charges.turn_to(owner, now);
                now += spent;
            }
            charges.turn_to(Owner::Around, now);
            prop_assert_eq!(settled(&mut charges).values().sum::<u64>(), now);
        }
    }
}
