//! What an account may have changes. More is given at once to those that wait; where it has more than it may, nothing is taken from
//! it, and it has nothing more until it has less.

use std::sync::Arc;

use crate::host::Step;
use crate::{AccountLimits, Command, Reason};

impl Step<'_> {
    /// Somebody wants an account to have other limits.
    pub(crate) fn limits_asked(&mut self, account: Arc<str>, limits: Box<AccountLimits>, by: Arc<str>) {
        if limits.zero().is_some() {
            return;
        }
        let before = self.world.rules.limits(&account).share;
        let share = limits.share;
        let command = Command::SetLimits {
            account: account.clone(),
            limits,
        };
        if self.decide(command, Reason::Asked { by }) && share != before {
            self.weigh_all(&account);
        }
    }
}
