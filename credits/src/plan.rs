//! What an account is to have, and whether that is possible.

use crate::error::{Amount, TermsError};
use crate::terms::{FALL_STEPS, Mode, Terms};
use crate::units::{Credits, MAX_PS, PS_PER_CREDIT, PS_PER_NS};

/// The most vCPUs of a machine: as many as KVM has room for (`KVM_MAX_VCPUS`).
const MAX_VCPUS: u32 = 4_096;

/// What is above the baseline can be spent for so long from where the fall begins by default. As it gets less on the way, the fall
/// takes a quarter of an hour.
const FALL_NS: u64 = 6 * 60 * 1_000_000_000;

/// How far apart the balances are at which a level is entered and left: so long, all vCPUs can run of it. A machine that is held
/// to a rate by `cpu.max` uses it unevenly within a period of that, which is as long.
const APART_NS: u64 = 100_000_000;

const DAY_NS: u64 = 24 * 60 * 60 * 1_000_000_000;

/// What an account is to have, in the units of people. What is `None` is chosen by the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Plan {
    /// How many vCPUs the machine has.
    pub vcpus: u32,
    /// What the machine earns, and may always use, in millicores of one CPU: the baseline of one vCPU times their number.
    pub baseline_millis: u32,
    /// What becomes of a machine that has spent all.
    pub mode: Mode,
    /// What it has at its start: spent first, and outside the cap.
    pub launch: Credits,
    /// The most that is kept of what was earned. By default what it earns in 24 hours, as with AWS.
    pub cap: Option<Credits>,
    /// The most that it can owe. By default, in `unlimited`, what it earns in 24 hours, as with AWS; in `standard` one credit for
    /// each vCPU: more than it can use until it is held back, yet soon paid back where that failed and was not its fault.
    pub limit: Option<Credits>,
    /// At this or more, it is of the high class. By default an eighth of the cap.
    pub high_enter: Option<Credits>,
    /// Below this, no longer. By default half of the former.
    pub high_leave: Option<Credits>,
    /// Below this, its rate falls towards the baseline, step by step. By default so much that the fall takes a quarter of an hour,
    /// and no more than `high_leave`.
    pub low: Option<Credits>,
    /// An exhausted machine may use more than its baseline again where it has this or more. By default a fourteenth of `low`.
    pub recover: Option<Credits>,
}

impl Plan {
    /// With everything by default.
    #[inline]
    pub const fn new(vcpus: u32, baseline_millis: u32, mode: Mode) -> Self {
        Self {
            vcpus,
            baseline_millis,
            mode,
            launch: Credits::new(0),
            cap: None,
            limit: None,
            high_enter: None,
            high_leave: None,
            low: None,
            recover: None,
        }
    }

    /// The terms that it comes to.
    ///
    /// # Errors
    ///
    /// Where no account can be kept by it: the error says what contradicts what.
    #[inline]
    pub fn terms(&self) -> Result<Terms, TermsError> {
        let vcpus = self.vcpus;
        if vcpus == 0 {
            return Err(TermsError::NoVcpus);
        }
        if vcpus > MAX_VCPUS {
            return Err(TermsError::TooManyVcpus { vcpus, most: MAX_VCPUS });
        }
        let full_millis = vcpus.saturating_mul(1_000);
        let baseline_millis = self.baseline_millis;
        if baseline_millis == 0 {
            return Err(TermsError::NoBaseline);
        }
        if baseline_millis > full_millis {
            return Err(TermsError::BaselineAboveVcpus {
                baseline_millis,
                vcpus,
                full_millis,
            });
        }
        let day = u64::from(baseline_millis).saturating_mul(DAY_NS);
        let apart = u64::from(vcpus).saturating_mul(APART_NS * PS_PER_NS);

        let cap = amount(Amount::Cap, self.cap, day)?;
        let launch = amount(Amount::Launch, Some(self.launch), 0)?;
        let limit = match self.mode {
            Mode::Standard => u64::from(vcpus).saturating_mul(PS_PER_CREDIT),
            Mode::Unlimited => day,
        };
        let limit = amount(Amount::Limit, self.limit, limit)?;
        let high_enter = amount(Amount::HighEnter, self.high_enter, cap / 8)?;
        let high_leave = amount(Amount::HighLeave, self.high_leave, high_enter / 2)?;
        // Half a step lies between where a level of the fall is entered and left.
        let lowest = apart.saturating_mul(2 * FALL_STEPS);
        let fall = u64::from(full_millis.saturating_sub(baseline_millis)).saturating_mul(FALL_NS);
        let low = amount(Amount::Low, self.low, fall.min(high_leave).max(lowest))?;
        let recover = amount(Amount::Recover, self.recover, (low / (2 * FALL_STEPS)).max(apart))?;

        ordered(Amount::HighEnter, high_enter, Amount::Cap, cap, 0)?;
        ordered(Amount::HighLeave, high_leave, Amount::HighEnter, high_enter, apart)?;
        ordered(Amount::Low, low, Amount::HighLeave, high_leave, 0)?;
        ordered(Amount::Recover, recover, Amount::Low, low, 0)?;
        at_least(Amount::Low, low, lowest, vcpus)?;
        at_least(Amount::Recover, recover, apart, vcpus)?;

        Ok(Terms {
            baseline_millis,
            full_millis,
            unlimited: (self.mode == Mode::Unlimited).into(),
            unused: 0,
            cap_ps: cap,
            launch_ps: launch,
            limit_ps: limit,
            high_enter_ps: high_enter,
            high_leave_ps: high_leave,
            step_ps: low / FALL_STEPS,
            recover_ps: recover,
            longest_ns: u64::MAX / u64::from(baseline_millis),
        })
    }
}

/// What is asked for, or else what is by default, in ps.
fn amount(amount: Amount, asked: Option<Credits>, default: u64) -> Result<u64, TermsError> {
    let ps = asked.map_or(default, Credits::ps);
    if ps > MAX_PS {
        return Err(TermsError::TooLarge {
            amount,
            asked: asked.unwrap_or(Credits::from_ps(ps)),
        });
    }
    Ok(ps)
}

/// The one is no more than the other, by so much.
fn ordered(lower: Amount, low: u64, upper: Amount, high: u64, apart: u64) -> Result<(), TermsError> {
    if low.saturating_add(apart) > high {
        return Err(TermsError::OutOfOrder {
            lower,
            is: Credits::from_ps(low),
            upper,
            above: Credits::from_ps(high),
            apart: Credits::covering_ps(apart),
        });
    }
    Ok(())
}

/// So small a distance would be crossed to and fro.
fn at_least(amount: Amount, ps: u64, least: u64, vcpus: u32) -> Result<(), TermsError> {
    if ps < least {
        return Err(TermsError::TooSmall {
            amount,
            asked: Credits::from_ps(ps),
            least: Credits::covering_ps(least),
            vcpus,
        });
    }
    Ok(())
}
