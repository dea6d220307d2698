//! What executions used, and what follows for functions' amounts: it is kept, and users are told.

use std::mem::discriminant;
use std::time::{Duration, Instant, SystemTime};

use stoker_policy::{Amount, Code, ContainerId, Event, Kept, Notice, NoticeKind, Reason, Sample};
use stoker_proto::guest as proto;
use stoker_proto::v1;

use super::{EventLoop, OwnTold};
use crate::host::container::NotMade;
use crate::host::{listing, resizing};

/// How long the same of an amount that requests name is told in answers alone.
const SAME: Duration = Duration::from_secs(60);

/// Of how many versions of functions that is known at most.
const OWN_TOLD: usize = 4096;

impl EventLoop {
    /// What a container used for what it runs; to be told before that is over. Answers with what the user is told because of it.
    pub(super) fn executed(&mut self, container: ContainerId, sample: Sample) -> Option<v1::Notification> {
        let code = self.host.world().container(container)?.kind.code;
        self.notified = None;
        self.step(Event::Executed {
            container,
            code,
            sample,
        });
        self.notified.take()
    }

    /// The same of its start, and of why that failed, if it did.
    pub(super) fn initialised(
        &mut self,
        container: ContainerId,
        execution: Option<proto::Execution>,
        failed: Option<&NotMade>,
    ) -> Option<v1::Notification> {
        let amount = self.host.world().container(container)?.kind.amount;
        let error = match failed {
            Some(NotMade::Function(error)) => Some(error),
            _ => None,
        };
        let sample = resizing::sample(execution, error, amount)?;
        self.executed(container, sample)
    }

    /// A version of a function has another amount. Whoever looks the function up knows that at once, and the journal keeps it.
    pub(super) fn set_amount(&mut self, code: Code, kept: Kept, reason: &Reason) {
        self.resized = Some((code, kept.amount));
        let Some(function) = (self.shared.find)(code.uid).filter(|function| function.version == code.version) else {
            return;
        };
        let before = function.resize().kept.filter(|before| before.first == kept.first);
        let before = before.map_or(kept.first, |before| before.amount);
        function.keep(kept);
        tracing::info!(function = %function.name, %before, after = %kept.amount, why = %reason, "another amount");
        if let Reason::Use { figures } = reason {
            let wall = listing::since_1970(SystemTime::now());
            self.journal
                .resized(resizing::resize(&function, wall, before, kept, figures));
        }
    }

    /// A user is told that an amount does not fit.
    pub(super) fn notify(&mut self, notice: &Notice) {
        let applied = self.applied(notice);
        let Some(function) = (self.shared.find)(notice.code.uid) else {
            return;
        };
        let wall = listing::since_1970(SystemTime::now());
        let told = resizing::notification(&function, self.journal.next_sequence(), wall, notice, applied);
        tracing::debug!(function = %function.name, notification = ?told.notification, "told");
        self.notified = Some(told.notification.clone());
        if !self.was_just_told(notice) {
            self.journal.notified(told);
        }
    }

    /// Whether the same was kept of another request with an amount of its own a short time ago: there may be thousands a second.
    fn was_just_told(&mut self, notice: &Notice) -> bool {
        if !notice.own_amount {
            return false;
        }
        let Notice { code, amount, kind, .. } = *notice;
        let (at, alike) = (Instant::now(), |one: &NoticeKind| {
            discriminant(one) == discriminant(&kind)
        });
        let known = self.own_told.get(&code);
        if known.is_some_and(|told| told.amount == amount && alike(&told.kind) && at - told.at < SAME) {
            return true;
        }
        if self.own_told.len() >= OWN_TOLD {
            self.own_told.clear();
        }
        self.own_told.insert(code, OwnTold { amount, kind, at });
        false
    }

    /// What later executions are given because of that, where it was decided with it.
    fn applied(&self, notice: &Notice) -> Option<Amount> {
        let (code, amount) = self.resized?;
        (code == notice.code && !notice.own_amount).then_some(amount)
    }
}
