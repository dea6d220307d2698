//! Containers' shares of a machine: never more than the whole, nothing is invented, and nobody starves.

use proptest::prelude::*;

use super::{check, terms};
use crate::{Account, Credits, Level, Mode, Plan, Share, Terms};

#[test]
fn a_share_is_the_same_machine_in_small() {
    let plan = Plan {
        launch: Credits::new(12),
        ..Plan::new(2, 200, Mode::Standard)
    };
    let machine = plan.terms().unwrap();
    let share = Share::new(500, 1500, machine.full_millis());
    let terms = machine.share(share, 500);
    assert_eq!((terms.baseline_millis(), terms.full_millis()), (50, 500));
    assert_eq!(terms.cap_ps(), machine.cap_ps() / 4);
    let account = Account::open_share(&terms, share, Credits::new(8).ps(), Credits::new(12).ps(), 0, 5);
    assert_eq!(account.balance_ps(), Credits::new(2).ps());
    assert_eq!(account.launch_ps(), Credits::new(3).ps());
    assert_eq!(account.settled_ns(), 5);
    check(&account, &terms);
    // It is of the level that its machine is of.
    let mut whole = Account::open(&machine, 0);
    whole.settle(&machine, Credits::new(8).ps() / 200, 0);
    assert_eq!(account.level(), whole.level());
}

#[test]
fn what_others_have_left_is_not_given_twice() {
    let machine = Plan::new(2, 200, Mode::Standard).terms().unwrap();
    let share = Share::new(1000, 2000, 2000);
    let terms = machine.share(share, 1000);
    let open = |others| Account::open_share(&terms, share, 0, 1000, others, 0).spendable_ps();
    assert_eq!(
        [open(0), open(500), open(700), open(1000), open(u64::MAX)],
        [500, 500, 300, 0, 0]
    );
}

#[test]
fn one_whose_amount_is_tiny_has_the_least_that_can_be_given() {
    let machine = Plan::new(2, 200, Mode::Standard).terms().unwrap();
    let terms = machine.share(Share::new(1, 1, 2000), 1);
    assert_eq!((terms.baseline_millis(), terms.full_millis()), (1, 1));
    assert_eq!(Account::open(&terms, 0).allowed_millis(&terms), 1);
}

#[test]
fn terms_are_the_same_as_numbers() {
    let terms = Plan::new(4, 300, Mode::Unlimited).terms().unwrap();
    let again = Terms::from(terms.thresholds());
    assert_eq!(again.thresholds(), terms.thresholds());
    assert_eq!((again.longest_ns, again.step_ps), (terms.longest_ns, terms.step_ps));
}

/// What happens in a machine.
#[derive(Clone, Debug)]
enum Op {
    Start {
        amount: u32,
    },
    End {
        which: usize,
    },
    /// Time passes, and each container uses so many thousandths of its amount.
    Run {
        ns: u64,
        permille: Vec<u64>,
    },
    /// The machine uses something itself.
    Own {
        used_ns: u64,
    },
    Grant {
        ps: u64,
    },
}

fn op() -> impl Strategy<Value = Op> {
    let span = || (0_u32..44).prop_flat_map(|bits| 0..=1_u64 << bits);
    prop_oneof![
        3 => (1_u32..3000).prop_map(|amount| Op::Start { amount }),
        2 => any::<usize>().prop_map(|which| Op::End { which }),
        6 => (span(), prop::collection::vec(0_u64..=1100, 1..5)).prop_map(|(ns, permille)| Op::Run { ns, permille }),
        1 => (0_u64..1 << 34).prop_map(|used_ns| Op::Own { used_ns }),
        1 => (0_u64..1 << 50).prop_map(|ps| Op::Grant { ps }),
    ]
}

struct Container {
    amount: u32,
    terms: Terms,
    account: Account,
}

struct Bench {
    machine: Terms,
    whole: Account,
    now: u64,
    containers: Vec<Container>,
    /// What containers that have ended were forgiven.
    forgiven: u128,
    /// What the machine used that is no container's, in ps.
    own: u128,
    /// How many ps more than its share each ns lets those earn that have a millicore at least.
    rounded_up: u128,
}

impl Bench {
    fn share(&self, amount: u32) -> Share {
        let all = self.containers.iter().map(|container| container.amount).sum();
        Share::new(amount, all, self.machine.full_millis())
    }

    /// Everybody's share is another.
    fn share_out(&mut self) {
        for index in 0..self.containers.len() {
            let share = self.share(self.containers[index].amount);
            let (machine, now) = (self.machine, self.now);
            let Container { amount, terms, account } = &mut self.containers[index];
            let next = machine.share(share, *amount);
            account.resize(terms, &next, now, 0);
            *terms = next;
        }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Start { amount } => {
                self.whole.settle(&self.machine, self.now, 0);
                let others = self
                    .containers
                    .iter()
                    .map(|container| container.account.spendable_ps())
                    .sum();
                let terms = Terms::default();
                self.containers.push(Container {
                    amount,
                    terms,
                    account: Account::default(),
                });
                let share = self.share(amount);
                let terms = self.machine.share(share, amount);
                let (balance, launch) = (self.whole.balance_ps(), self.whole.launch_ps());
                let account = Account::open_share(&terms, share, balance, launch, others, self.now);
                assert!(
                    u128::from(account.spendable_ps()) + u128::from(others)
                        <= u128::from(self.whole.spendable_ps().max(others))
                );
                assert!(account.spendable_ps() <= share.of(balance) + share.of(launch));
                *self.containers.last_mut().unwrap() = Container { amount, terms, account };
                self.share_out();
            }
            Op::End { which } => {
                if !self.containers.is_empty() {
                    let index = which % self.containers.len();
                    let mut ended = self.containers.swap_remove(index);
                    ended.account.close(&ended.terms, self.now, 0);
                    self.forgiven += ended.account.totals().forgiven.get();
                    self.share_out();
                }
            }
            Op::Run { ns, permille } => {
                self.now += ns;
                let exact: u128 = self
                    .containers
                    .iter()
                    .map(|container| u128::from(container.terms.baseline_millis()))
                    .sum();
                self.rounded_up += exact.saturating_sub(self.machine.baseline_millis().into()) * u128::from(ns);
                let mut all = 0;
                for (index, container) in self.containers.iter_mut().enumerate() {
                    let Container { amount, terms, account } = container;
                    let permille = permille[index % permille.len()];
                    let used =
                        u64::try_from(u128::from(ns) * u128::from(*amount) * u128::from(permille) / 1_000_000).unwrap();
                    account.settle(terms, self.now, used);
                    all += used;
                }
                self.whole.settle(&self.machine, self.now, all);
            }
            Op::Own { used_ns } => {
                self.own += u128::from(used_ns) * 1000;
                self.whole.settle(&self.machine, self.now, used_ns);
            }
            Op::Grant { ps } => {
                self.whole.grant(&self.machine, ps);
                for index in 0..self.containers.len() {
                    let share = self.share(self.containers[index].amount);
                    let Container { terms, account, .. } = &mut self.containers[index];
                    account.grant(terms, share.of(ps));
                }
            }
        }
        self.check();
    }

    fn check(&self) {
        let baselines: u64 = self
            .containers
            .iter()
            .map(|container| u64::from(container.terms.baseline_millis()))
            .sum();
        let caps: u128 = self
            .containers
            .iter()
            .map(|container| u128::from(container.terms.cap_ps()))
            .sum();
        assert!(baselines <= u64::from(self.machine.baseline_millis()) + self.containers.len() as u64);
        assert!(caps <= self.machine.cap_ps().into());
        for Container { terms, account, .. } in &self.containers {
            check(account, terms);
            let allowed = account.allowed_millis(terms);
            assert!(allowed >= terms.baseline_millis() && allowed >= 1, "it starves");
            if account.level() == Level::EXHAUSTED {
                assert!(
                    account.until_crossing(terms, 0).is_some(),
                    "it never recovers: {terms:?} {account:?}"
                );
            }
        }
        // What they have, the machine has or had, and discarded as its balance was at its cap; or they were forgiven it.
        let forgiven: u128 = self
            .containers
            .iter()
            .map(|container| container.account.totals().forgiven.get())
            .sum();
        let forgiven = self.forgiven + forgiven;
        let have: u128 = self
            .containers
            .iter()
            .map(|container| u128::from(container.account.spendable_ps()))
            .sum();
        let owe: u128 = self
            .containers
            .iter()
            .map(|container| u128::from(container.account.owed_ps()))
            .sum();
        let whole = &self.whole;
        let had = u128::from(whole.spendable_ps()) + whole.totals().discarded.get();
        assert!(
            have + u128::from(whole.owed_ps()) <= had + owe + forgiven + self.own + self.rounded_up,
            "{have} of {had}, {owe} owed, {forgiven} forgiven, {} rounded up",
            self.rounded_up
        );
    }
}

proptest! {
    #[test]
    fn shares_are_never_more_than_the_whole(
        amounts in prop::collection::vec(1_u32..64_000, 1..40), vcpus in 1_u32..64, of in any::<u64>(),
    ) {
        let all = amounts.iter().sum();
        let shares = amounts.iter().map(|&amount| Share::new(amount, all, vcpus * 1000));
        let sum: u128 = shares.map(|share| u128::from(share.of(of))).sum();
        prop_assert!(sum <= u128::from(of));
    }

    #[test]
    fn no_sequence_of_starts_and_ends_invents_credits_or_starves_one(
        machine in terms(), ops in prop::collection::vec(op(), 1..60),
    ) {
        if machine.mode() == Mode::Standard {
            let whole = Account::open(&machine, 0);
            let mut bench = Bench { machine, whole, now: 0, containers: Vec::new(), forgiven: 0, own: 0, rounded_up: 0 };
            for op in ops {
                bench.step(op);
            }
        }
    }
}
