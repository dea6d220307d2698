//! What a part of a machine has of its credits: a container, in the guest.
//!
//! The machine's own account is the truth for the machine. What is shared out here says who in it may spend how much, so that one
//! can't spend all: no share makes the machine earn or have more.

use crate::account::Account;
use crate::terms::{FALL_STEPS, Mode, Terms};

/// A part of a whole, in millicores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    part: u32,
    whole: u32,
}

/// Terms as numbers, to send them: see the getters of [`Terms`]. Any are terms.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thresholds {
    /// What is earned and may always be used, in millicores.
    pub baseline_millis: u32,
    /// All that may be used, in millicores.
    pub full_millis: u32,
    /// What happens once all is spent.
    pub mode: Mode,
    /// The most that is kept of what was earned, in ps, as the rest.
    pub cap_ps: u64,
    /// What there is at the start.
    pub launch_ps: u64,
    /// The most that can be owed.
    pub limit_ps: u64,
    /// The high class begins here.
    pub high_enter_ps: u64,
    /// It ends below this.
    pub high_leave_ps: u64,
    /// The gradual fall begins here.
    pub low_ps: u64,
    /// After all was spent, more than the baseline may be used again from here on.
    pub recover_ps: u64,
}

// === impl Share ===

impl Share {
    /// That of a container with an amount of CPU, in a machine whose containers have so much together and whose vCPUs are so many
    /// millicores. Shares of all containers together are never more than the whole: where amounts are more than the vCPUs, each
    /// has a part of the amounts instead.
    pub fn new(amount_millis: u32, amounts_millis: u32, full_millis: u32) -> Self {
        let whole = full_millis.max(amounts_millis).max(1);
        Self {
            part: amount_millis.min(whole),
            whole,
        }
    }

    /// Its part of an amount, rounded down.
    pub fn of(self, amount: u64) -> u64 {
        // No more than the amount.
        let part = u128::from(amount) * u128::from(self.part) / u128::from(self.whole.max(1));
        u64::try_from(part).unwrap_or(u64::MAX)
    }

    /// Whether it is all.
    pub fn is_whole(self) -> bool {
        self.part == self.whole
    }

    /// The part and the whole.
    pub fn parts(self) -> (u32, u32) {
        (self.part, self.whole)
    }
}

// === impl Terms ===

impl Terms {
    /// These terms as numbers.
    pub fn thresholds(&self) -> Thresholds {
        Thresholds {
            baseline_millis: self.baseline_millis,
            full_millis: self.full_millis,
            mode: self.mode(),
            cap_ps: self.cap_ps,
            launch_ps: self.launch_ps,
            limit_ps: self.limit_ps,
            high_enter_ps: self.high_enter_ps,
            high_leave_ps: self.high_leave_ps,
            low_ps: self.step_ps.saturating_mul(FALL_STEPS),
            recover_ps: self.recover_ps,
        }
    }

    /// What a container goes by that has such a share of the machine that goes by these, and may use so much. It has no launch
    /// credits of its own.
    ///
    /// All is rounded down, so that shares are never more than the whole; save that nobody is held to less than a millicore, which
    /// is the least that the kernel can give.
    #[must_use]
    pub fn share(&self, share: Share, amount_millis: u32) -> Self {
        let whole = self.thresholds();
        let millis = |millis: u32| u32::try_from(share.of(millis.into())).unwrap_or(u32::MAX).max(1);
        let baseline_millis = millis(whole.baseline_millis).min(amount_millis.max(1));
        Self::from(Thresholds {
            baseline_millis,
            full_millis: amount_millis.max(baseline_millis),
            mode: whole.mode,
            cap_ps: share.of(whole.cap_ps),
            launch_ps: 0,
            limit_ps: share.of(whole.limit_ps),
            high_enter_ps: share.of(whole.high_enter_ps),
            high_leave_ps: share.of(whole.high_leave_ps),
            low_ps: share.of(whole.low_ps),
            recover_ps: share.of(whole.recover_ps),
        })
    }
}

impl From<Thresholds> for Terms {
    fn from(of: Thresholds) -> Self {
        Self {
            baseline_millis: of.baseline_millis,
            full_millis: of.full_millis,
            unlimited: (of.mode == Mode::Unlimited).into(),
            unused: 0,
            cap_ps: of.cap_ps,
            launch_ps: of.launch_ps,
            limit_ps: of.limit_ps,
            high_enter_ps: of.high_enter_ps,
            high_leave_ps: of.high_leave_ps,
            step_ps: of.low_ps / FALL_STEPS,
            recover_ps: of.recover_ps,
            longest_ns: u64::MAX / u64::from(of.baseline_millis.max(1)),
        }
    }
}

// === impl Account ===

impl Account {
    /// The account of a new container, by the terms of its [share](Terms::share), at `now_ns` of the clock that it is settled by:
    /// it has its share of what its machine has, and no more than the accounts of its other containers, `others_ps` together, have
    /// left of that. What was given to one that has spent it since is not given once more.
    pub fn open_share(
        terms: &Terms,
        share: Share,
        balance_ps: u64,
        launch_ps: u64,
        others_ps: u64,
        now_ns: u64,
    ) -> Self {
        let mut left = balance_ps.saturating_add(launch_ps).saturating_sub(others_ps);
        let mut take = |ps: u64| {
            let taken = share.of(ps).min(left);
            left -= taken;
            taken
        };
        let (balance, launch) = (take(balance_ps).min(terms.cap_ps), take(launch_ps));
        let mut account = Self::open(
            &Terms {
                launch_ps: launch,
                ..*terms
            },
            now_ns,
        );
        // As it was earned by the machine it is part of the balance, and within the cap as that is.
        account.balance_ps = balance;
        account.totals.granted.add(balance);
        account.grant(terms, 0);
        account.crossings = 0;
        account
    }
}
