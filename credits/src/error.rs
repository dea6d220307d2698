//! What is wrong with a plan.

use core::fmt;

use crate::units::Credits;

/// One of the amounts of a [`Plan`](crate::Plan).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Amount {
    /// [`Plan::launch`](crate::Plan::launch).
    Launch,
    /// [`Plan::cap`](crate::Plan::cap).
    Cap,
    /// [`Plan::limit`](crate::Plan::limit).
    Limit,
    /// [`Plan::high_enter`](crate::Plan::high_enter).
    HighEnter,
    /// [`Plan::high_leave`](crate::Plan::high_leave).
    HighLeave,
    /// [`Plan::low`](crate::Plan::low).
    Low,
    /// [`Plan::recover`](crate::Plan::recover).
    Recover,
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Launch => "launch",
            Self::Cap => "cap",
            Self::Limit => "limit",
            Self::HighEnter => "high_enter",
            Self::HighLeave => "high_leave",
            Self::Low => "low",
            Self::Recover => "recover",
        })
    }
}

/// Why no account can be kept by a plan, and what to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TermsError {
    /// It has no vCPU.
    NoVcpus,
    /// It has more vCPUs than a machine can have.
    TooManyVcpus {
        /// So many.
        vcpus: u32,
        /// The most.
        most: u32,
    },
    /// Its baseline is 0.
    NoBaseline,
    /// Its baseline is more than all its vCPUs.
    BaselineAboveVcpus {
        /// The baseline.
        baseline_millis: u32,
        /// How many vCPUs it has.
        vcpus: u32,
        /// What they come to, in millicores.
        full_millis: u32,
    },
    /// An amount is more than an account can hold.
    TooLarge {
        /// Which.
        amount: Amount,
        /// How much it is.
        asked: Credits,
    },
    /// An amount is not below another as it should be.
    OutOfOrder {
        /// The one that should be lower,
        lower: Amount,
        /// and is so much.
        is: Credits,
        /// The one that should be higher,
        upper: Amount,
        /// and is so much.
        above: Credits,
        /// By how much they should differ at least.
        apart: Credits,
    },
    /// So little is used up so fast that the machine would change its level all the time.
    TooSmall {
        /// Which amount.
        amount: Amount,
        /// How much it is.
        asked: Credits,
        /// The least that it may be.
        least: Credits,
        /// For so many vCPUs.
        vcpus: u32,
    },
}

impl fmt::Display for TermsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoVcpus => write!(f, "a machine without vCPUs has no credits: give it at least one"),
            Self::TooManyVcpus { vcpus, most } => {
                write!(f, "a machine can't have {vcpus} vCPUs: give it at most {most}")
            }
            Self::NoBaseline => write!(
                f,
                "with a baseline of 0 a machine without credits would never run: give it at least 1 millicore"
            ),
            Self::BaselineAboveVcpus {
                baseline_millis,
                vcpus,
                full_millis,
            } => write!(
                f,
                "a baseline of {baseline_millis} millicores is more than {vcpus} vCPUs can use: give at most {full_millis}, or \
                 more vCPUs"
            ),
            Self::TooLarge { amount, asked } => write!(
                f,
                "{amount} is {asked}, and an account holds {}: give a lower {amount}",
                Credits::MAX
            ),
            Self::OutOfOrder {
                lower,
                is,
                upper,
                above,
                apart,
            } => {
                write!(f, "{lower} ({is}) must not be above {upper} ({above})")?;
                if *apart != Credits::default() {
                    write!(f, ", and lie {apart} below it")?;
                }
                write!(f, ": lower {lower}, or raise {upper}")
            }
            Self::TooSmall {
                amount,
                asked,
                least,
                vcpus,
            } => write!(
                f,
                "{amount} is {asked}, which {vcpus} vCPUs cross in no time: give at least {least}"
            ),
        }
    }
}

impl core::error::Error for TermsError {}
