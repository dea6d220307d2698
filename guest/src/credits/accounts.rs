//! The accounts of containers, without I/O or clock: by the terms of their machine and what each uses, how much it may use, and
//! when it is to be looked at again.

use std::collections::BTreeMap;

use stoker_credits::{Account, Level, Mode, Share, Terms, Thresholds};
use stoker_proto::guest;
use stoker_proto::v1::machine_credits;

use crate::container::cgroup::Cgroup;

/// A container is looked at again after it has used so much CPU time, in ns, where its level may have fallen by then: not more
/// often, so that none makes work by being near a threshold.
const LEAST_LOOK_NS: u64 = 1_000_000;
/// And where its level may have risen: at least so often while it runs.
const RISE_LOOK_NS: u64 = 20_000_000;
/// What a container uses is measured for so long at least until it is said, in ns.
const RATE_NS: u64 = 500_000_000;

/// The accounts of all containers of a machine.
#[derive(Debug, Default)]
pub(super) struct Accounts {
    machine: Option<Machine>,
    containers: BTreeMap<u64, Container>,
}

/// What its agent told of the machine.
#[derive(Clone, Copy, Debug)]
struct Machine {
    terms: Terms,
    granted_ps: u64,
}

#[derive(Debug)]
struct Container {
    amount_millis: u32,
    initialises: bool,
    /// What it may use now.
    limit_millis: u32,
    /// What it had used, in ns, when it was looked at last.
    used_ns: u64,
    /// Once the machine's terms are known.
    open: Option<Open>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    share: Share,
    terms: Terms,
    account: Account,
    /// When it was looked at, and what it had spent then, in ps.
    looked: (u64, u128),
    used_millis: u32,
}

/// What is to be done about a container that was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    /// It may use so much from now on, in millicores of one CPU, where that is other than before.
    pub(super) limit_millis: Option<u32>,
    /// It is to be looked at again once it has used so much more, in ns.
    pub(super) after_ns: Option<u64>,
}

/// What a container has, for people.
#[derive(Clone, Copy, Debug)]
pub(super) struct Standing {
    pub(super) share: Share,
    pub(super) terms: Terms,
    pub(super) account: Account,
    pub(super) amount_millis: u32,
    /// What it may use now.
    pub(super) limit_millis: u32,
    pub(super) used_millis: u32,
}

// === impl Accounts ===

impl Accounts {
    /// There is a container with such an amount, which has used so much and initialises from now on. Its account is opened when the
    /// machine's is [told](Self::told) of next, with what was used until then.
    pub(super) fn begin(&mut self, id: u64, amount_millis: u32, used_ns: u64, now_ns: u64) {
        let container = Container {
            amount_millis,
            initialises: true,
            limit_millis: Cgroup::boosted_millis(amount_millis),
            used_ns,
            open: None,
        };
        self.containers.insert(id, container);
        self.share_out(now_ns);
    }

    /// A container has initialised.
    pub(super) fn initialised(&mut self, id: u64) {
        if let Some(container) = self.containers.get_mut(&id) {
            container.initialises = false;
        }
    }

    /// A container is no more.
    pub(super) fn end(&mut self, id: u64, now_ns: u64) {
        self.containers.remove(&id);
        self.share_out(now_ns);
    }

    /// What the machine has now. Says whether every container is to be looked at.
    pub(super) fn told(&mut self, told: &guest::Credits, now_ns: u64) -> bool {
        let machine = Machine {
            terms: terms(told),
            granted_ps: told.granted_ps,
        };
        let before = self.machine.replace(machine);
        let other_terms = before.is_none_or(|before| before.terms.thresholds() != machine.terms.thresholds());
        if other_terms {
            self.share_out(now_ns);
        }
        // Where it is less than before, it is of another account.
        let granted_ps = before.map_or(0, |before| machine.granted_ps.wrapping_sub(before.granted_ps));
        let granted_ps = if granted_ps > u64::MAX / 2 { 0 } else { granted_ps };
        for open in self
            .containers
            .values_mut()
            .filter_map(|container| container.open.as_mut())
        {
            open.account.grant(&open.terms, open.share.of(granted_ps));
        }
        let opened = self.open_all(told, now_ns);
        other_terms || granted_ps > 0 || opened
    }

    /// A container has used so much in all, in ns. What is to be done; nothing where it is gone.
    pub(super) fn look(&mut self, id: u64, used_ns: u64, now_ns: u64) -> Option<Look> {
        let container = self.containers.get_mut(&id)?;
        let after_ns = container.open.as_mut().map(|open| {
            let more_ns = used_ns.saturating_sub(container.used_ns);
            container.used_ns = container.used_ns.max(used_ns);
            open.account.settle(&open.terms, now_ns, more_ns);
            open.measure(now_ns);
            open.look_after_ns()
        });
        let limit_millis = container.due_millis();
        let before = std::mem::replace(&mut container.limit_millis, limit_millis);
        Some(Look {
            limit_millis: (limit_millis != before).then_some(limit_millis),
            after_ns,
        })
    }

    /// What a container has, as it was looked at last; nothing where it has no account.
    pub(super) fn standing(&self, id: u64) -> Option<Standing> {
        let container = self.containers.get(&id)?;
        let open = container.open?;
        Some(Standing {
            share: open.share,
            terms: open.terms,
            account: open.account,
            amount_millis: container.amount_millis,
            limit_millis: container.limit_millis,
            used_millis: open.used_millis,
        })
    }

    fn amounts_millis(&self) -> u32 {
        let amounts = self.containers.values().map(|container| container.amount_millis);
        amounts.fold(0, u32::saturating_add)
    }

    /// Each goes by its share of what the machine goes by, which may be another now. What it has used and is not charged with yet
    /// it pays at its next look.
    fn share_out(&mut self, now_ns: u64) {
        let Some(Machine { terms, .. }) = self.machine else {
            return;
        };
        let amounts_millis = self.amounts_millis();
        for Container {
            amount_millis, open, ..
        } in self.containers.values_mut()
        {
            let Some(open) = open else { continue };
            let share = Share::new(*amount_millis, amounts_millis, terms.full_millis());
            let next = terms.share(share, *amount_millis);
            if next.thresholds() != open.terms.thresholds() {
                open.account.resize(&open.terms, &next, now_ns, 0);
                open.terms = next;
            }
            open.share = share;
        }
    }

    /// Opens the accounts that are not. Whether there was one.
    fn open_all(&mut self, told: &guest::Credits, now_ns: u64) -> bool {
        let Some(Machine { terms: whole, .. }) = self.machine else {
            return false;
        };
        let amounts_millis = self.amounts_millis();
        let has = self.containers.values().filter_map(|container| container.open);
        let mut others_ps = has.fold(0_u64, |sum, open| sum.saturating_add(open.account.spendable_ps()));
        let mut opened = false;
        for container in self
            .containers
            .values_mut()
            .filter(|container| container.open.is_none())
        {
            let share = Share::new(container.amount_millis, amounts_millis, whole.full_millis());
            let terms = whole.share(share, container.amount_millis);
            let account = Account::open_share(&terms, share, told.balance_ps, told.launch_ps, others_ps, now_ns);
            others_ps = others_ps.saturating_add(account.spendable_ps());
            container.open = Some(Open {
                share,
                terms,
                account,
                looked: (now_ns, 0),
                used_millis: 0,
            });
            opened = true;
        }
        opened
    }
}

/// What a machine goes by.
fn terms(told: &guest::Credits) -> Terms {
    Terms::from(Thresholds {
        baseline_millis: told.baseline_millis,
        full_millis: told.full_millis,
        mode: match told.mode() {
            machine_credits::Mode::Unlimited => Mode::Unlimited,
            _ => Mode::Standard,
        },
        cap_ps: told.cap_ps,
        launch_ps: 0,
        limit_ps: told.limit_ps,
        high_enter_ps: told.high_enter_ps,
        high_leave_ps: told.high_leave_ps,
        low_ps: told.low_ps,
        recover_ps: told.recover_ps,
    })
}

// === impl Container ===

impl Container {
    /// What it is to be allowed.
    fn due_millis(&self) -> u32 {
        if self.initialises {
            return Cgroup::boosted_millis(self.amount_millis);
        }
        match &self.open {
            // What is left to the machine holds it back as a whole, and there is nobody to be kept from it.
            Some(open) if open.share.is_whole() => self.amount_millis,
            Some(open) => open.account.allowed_millis(&open.terms).min(self.amount_millis),
            None => self.amount_millis,
        }
    }
}

// === impl Open ===

impl Open {
    /// How much may be used until its level may be another.
    fn look_after_ns(&self) -> u64 {
        let falls = self.account.slack_ns(&self.terms).saturating_add(1).max(LEAST_LOOK_NS);
        // From there on up nobody is held back.
        if self.account.level() >= Level::FULL {
            falls
        } else {
            falls.min(RISE_LOOK_NS)
        }
    }

    /// Sees how much is used.
    fn measure(&mut self, now_ns: u64) {
        let (since_ns, spent_ps) = self.looked;
        let now_ps = self.account.totals().spent.get();
        let passed_ns = now_ns.saturating_sub(since_ns);
        if passed_ns >= RATE_NS {
            // A millicore is 1 ps in each ns.
            let millis = now_ps.saturating_sub(spent_ps) / u128::from(passed_ns);
            self.used_millis = u32::try_from(millis).unwrap_or(u32::MAX);
            self.looked = (now_ns, now_ps);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stoker_credits::{Class, Credits, Plan};

    use super::*;

    const SECOND_NS: u64 = 1_000_000_000;

    /// Two vCPUs, a tenth of each, and so many credits.
    pub(crate) fn machine(credits: u32) -> guest::Credits {
        let of = Plan::new(2, 200, Mode::Standard).terms().unwrap().thresholds();
        guest::Credits {
            baseline_millis: of.baseline_millis,
            full_millis: of.full_millis,
            mode: machine_credits::Mode::Standard.into(),
            cap_ps: of.cap_ps,
            limit_ps: of.limit_ps,
            high_enter_ps: of.high_enter_ps,
            high_leave_ps: of.high_leave_ps,
            low_ps: of.low_ps,
            recover_ps: of.recover_ps,
            launch_ps: Credits::new(credits).ps(),
            ..Default::default()
        }
    }

    fn of(accounts: &Accounts, id: u64) -> Standing {
        accounts.standing(id).unwrap()
    }

    #[test]
    fn a_container_may_use_its_amount_until_its_share_is_spent() {
        let mut accounts = Accounts::default();
        accounts.begin(1, 500, 7, 0);
        let before = accounts.look(1, 1_000, 0).unwrap();
        assert_eq!((before.limit_millis, before.after_ns), (None, None), "nobody has told");
        assert!(accounts.standing(1).is_none() && accounts.told(&machine(12), 0));
        // A quarter of 12 credits, less what it has used since it began.
        accounts.look(1, 1_007, 0).unwrap();
        assert_eq!(
            of(&accounts, 1).account.spendable_ps(),
            Credits::new(3).ps() - 1_000_000
        );
        assert_eq!(of(&accounts, 1).limit_millis, 1000, "it initialises");
        accounts.initialised(1);
        let Look { limit_millis, after_ns } = accounts.look(1, 1_007, 0).unwrap();
        assert_eq!(limit_millis, Some(500));
        // It computes as fast as it may, and is looked at when that was asked for.
        let (mut now, mut used, mut after, mut looks) = (0, 1_007, after_ns.unwrap(), 0);
        let mut limits = vec![500];
        while of(&accounts, 1).account.level() > Level::EXHAUSTED {
            now += after * 1000 / u64::from(*limits.last().unwrap());
            used += after;
            let look = accounts.look(1, used, now).unwrap();
            limits.extend(look.limit_millis);
            after = look.after_ns.unwrap();
            looks += 1;
            assert!(now < 3600 * SECOND_NS);
        }
        assert_eq!(limits.len(), 9, "{limits:?}");
        assert!(
            limits.is_sorted_by(|a, b| a > b) && limits.last() == Some(&50),
            "{limits:?}"
        );
        let borrowed = of(&accounts, 1).account.totals().borrowed.get();
        assert!(borrowed <= u128::from(LEAST_LOOK_NS) * 1000, "{borrowed}");
        // For 180 s of CPU time and more.
        assert!(looks < 15_000, "{looks}");
        // It rests, and what it does next finds it with more.
        let rests = of(&accounts, 1);
        now += rests.account.until_full_speed(&rests.terms, 0).unwrap();
        assert_eq!(accounts.look(1, used, now).unwrap().limit_millis, Some(500));
    }

    #[test]
    fn one_that_spends_all_leaves_the_other_its_share() {
        let mut accounts = Accounts::default();
        accounts.begin(1, 1000, 0, 0);
        accounts.begin(2, 1000, 0, 0);
        accounts.told(&machine(12), 0);
        let half = Credits::new(6).ps();
        assert_eq!([1, 2].map(|id| of(&accounts, id).account.spendable_ps()), [half, half]);
        accounts.look(1, 400 * SECOND_NS, 400 * SECOND_NS);
        accounts.look(2, 0, 400 * SECOND_NS);
        assert_eq!(of(&accounts, 1).account.level().class(), Class::Exhausted);
        assert!(of(&accounts, 2).account.spendable_ps() > half);
        // Nor does it get more by being made anew: the machine has what the other has.
        accounts.end(1, 400 * SECOND_NS);
        accounts.begin(3, 1000, 0, 400 * SECOND_NS);
        let left = guest::Credits {
            launch_ps: of(&accounts, 2).account.spendable_ps(),
            ..machine(0)
        };
        assert!(accounts.told(&left, 400 * SECOND_NS));
        assert_eq!(of(&accounts, 3).account.spendable_ps(), 0);
    }

    #[test]
    fn what_is_given_to_the_machine_and_other_terms_are_for_its_containers_too() {
        let mut accounts = Accounts::default();
        accounts.begin(1, 500, 0, 0);
        accounts.told(&machine(0), 0);
        accounts.initialised(1);
        assert_eq!(accounts.look(1, 0, 0).unwrap().limit_millis, Some(50));
        let given = guest::Credits {
            granted_ps: Credits::new(60).ps(),
            ..machine(60)
        };
        assert!(accounts.told(&given, 0));
        assert!(!accounts.told(&given, 0), "once");
        assert!(
            !accounts.told(&machine(60), 0) && accounts.told(&given, 0),
            "an account without it is another"
        );
        assert_eq!(of(&accounts, 1).account.spendable_ps(), Credits::new(30).ps());
        assert_eq!(accounts.look(1, 0, 0).unwrap().limit_millis, Some(500));
        let more = guest::Credits {
            baseline_millis: 400,
            ..given
        };
        assert!(accounts.told(&more, 0));
        assert_eq!(of(&accounts, 1).terms.baseline_millis(), 100);
        let unlimited = guest::Credits {
            mode: machine_credits::Mode::Unlimited.into(),
            ..more
        };
        accounts.told(&unlimited, 0);
        accounts.look(1, 3600 * SECOND_NS, SECOND_NS);
        assert_eq!(of(&accounts, 1).limit_millis, 500, "nothing holds it back");
    }

    #[test]
    fn one_that_has_all_of_the_machine_is_held_back_with_it_alone() {
        let mut accounts = Accounts::default();
        accounts.begin(1, 2000, 0, 0);
        accounts.told(&machine(0), 0);
        accounts.initialised(1);
        accounts.look(1, SECOND_NS, 0);
        assert_eq!(of(&accounts, 1).account.level(), Level::EXHAUSTED);
        assert_eq!(of(&accounts, 1).limit_millis, 2000);
        accounts.begin(2, 2000, 0, 0);
        accounts.look(1, SECOND_NS, 0);
        assert_eq!(of(&accounts, 1).limit_millis, 100, "there is another");
    }

    #[test]
    fn amounts_above_the_machine_have_less() {
        let mut accounts = Accounts::default();
        accounts.told(&machine(12), 0);
        for id in 1..=4 {
            accounts.begin(id, 1000, 0, 0);
        }
        accounts.told(&machine(12), 0);
        assert!((1..=4).all(|id| of(&accounts, id).terms.baseline_millis() == 50));
        for id in 2..=4 {
            accounts.end(id, 0);
        }
        assert_eq!(of(&accounts, 1).terms.baseline_millis(), 100);
        assert!(accounts.look(9, 0, 0).is_none() && accounts.standing(9).is_none());
    }

    proptest! {
        /// Whatever the agent says, and however containers come, go and use: none is held to nothing, none is looked at all the time,
        /// and nothing panics.
        #[test]
        fn nothing_that_is_told_starves_one(
            numbers in prop::collection::vec(any::<u64>(), 9), millis in (any::<u32>(), any::<u32>()),
            steps in prop::collection::vec((0_u8..5, 0_u64..4, any::<u32>(), any::<u64>()), 0..40),
        ) {
            let told = guest::Credits {
                baseline_millis: millis.0,
                full_millis: millis.1,
                cap_ps: numbers[0], limit_ps: numbers[1], high_enter_ps: numbers[2], high_leave_ps: numbers[3],
                low_ps: numbers[4], recover_ps: numbers[5], balance_ps: numbers[6], launch_ps: numbers[7],
                granted_ps: numbers[8],
                ..Default::default()
            };
            let mut accounts = Accounts::default();
            for (what, id, amount, ns) in steps {
                match what {
                    0 => accounts.begin(id, amount, ns, ns),
                    1 => accounts.initialised(id),
                    2 => accounts.end(id, ns),
                    3 => drop(accounts.told(&guest::Credits { granted_ps: ns, ..told }, ns)),
                    _ => {
                        let look = accounts.look(id, ns, ns);
                        prop_assert!(look.is_none_or(|look| look.after_ns.is_none_or(|after| after >= LEAST_LOOK_NS)));
                    }
                }
                for id in 0..4 {
                    accounts.look(id, 0, 0);
                    if let Some(standing) = accounts.standing(id) {
                        let least = standing.terms.baseline_millis().min(standing.amount_millis);
                        prop_assert!(standing.limit_millis >= least);
                    }
                }
            }
        }
    }
}
