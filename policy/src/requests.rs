//! What becomes of a request as a whole: it is placed, waits, or is refused.

use std::sync::Arc;

use ulid::Ulid;

use crate::host::Step;
use crate::world::ATTEMPTS;
use crate::{Command, ContainerState, Purpose, Reason, Refusal, RequestId, RequestState};

impl Step<'_> {
    pub(crate) fn arrived(&mut self, id: RequestId) {
        if self.world.draining {
            return self.refuse(id, Refusal::Draining);
        }
        let Some(request) = self.world.request(id) else {
            return;
        };
        let account = request.demand.account.clone();
        let first = request.first();
        let is_possible = first.is_some_and(|kind| self.world.is_possible(&account, kind.amount));
        // A machine that is there may hold it still, where its account or the host has less than it had.
        if self.placed(id) {
            return;
        }
        if !is_possible {
            let largest = self.world.most_for(&account);
            self.refuse(id, Refusal::TooLarge { largest });
        } else if self.make_way(&account, id) {
            self.wait(id);
        }
    }

    /// A request that did not begin where it was placed.
    pub(crate) fn again(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        if let Some(why) = request.withdrawn.clone() {
            self.refuse(id, why);
        } else if request.attempts >= ATTEMPTS {
            self.refuse(id, Refusal::MachineLost);
        } else if self.world.draining {
            self.refuse(id, Refusal::Draining);
        } else if !self.placed(id) {
            self.wait(id);
        }
    }

    pub(crate) fn wait(&mut self, id: RequestId) {
        let Some(request) = self.world.request(id) else {
            return;
        };
        let account = &request.demand.account;
        let reason = if self.world.awaits(account) {
            Reason::MachinesFound {
                machines: self.world.account(account).map_or(0, |account| account.found),
            }
        } else if self.world.may_run(account) {
            Reason::NoPlace {
                waiting: self.world.waiting() + 1,
                booting: self.world.booting,
            }
        } else {
            Reason::Concurrency {
                limit: self.world.rules.limits(account).concurrency,
            }
        };
        self.decide(Command::Wait { request: id }, reason);
    }

    /// Sees to it that one more of the account may wait. On a full host the account with the most waiting for its share
    /// loses its youngest.
    pub(crate) fn make_way(&mut self, account: &Arc<str>, id: RequestId) -> bool {
        let limit = self.world.rules.limits(account).waiting;
        let waiting = self.world.account(account).map_or(0, |found| found.line.len());
        if u32::try_from(waiting).unwrap_or(u32::MAX) >= limit {
            self.refuse(id, Refusal::AccountQueueFull { limit });
            return false;
        }
        // Those that come again wait beyond the limit: there may be more than one too many.
        loop {
            let waiting = self.world.waiting();
            if usize::try_from(waiting).unwrap_or(usize::MAX) < self.world.rules.queue_limit {
                return true;
            }
            let own = self.world.line_with(account, 1);
            let longest = self.world.lines.last().filter(|(weight, _)| *weight > own);
            let youngest = longest
                .and_then(|(_, other)| self.world.account(other)?.line.last_key_value())
                .map(|(_, request)| *request);
            self.refuse(youngest.unwrap_or(id), Refusal::QueueFull { waiting });
            // It was the one that came.
            if self.world.waiting() == waiting {
                return false;
            }
        }
    }

    pub(crate) fn refuse(&mut self, request: RequestId, refusal: Refusal) {
        self.decide(Command::Refuse { request, refusal }, Reason::Refused);
    }

    pub(crate) fn caller_left(&mut self, id: RequestId) {
        let state = self.world.request(id).map(|request| request.state);
        if let Some(RequestState::New | RequestState::Waiting | RequestState::Starting(_)) = state {
            self.refuse(id, Refusal::CallerLeft);
        } else {
            self.world.withdraw_request(id, Refusal::CallerLeft);
        }
    }

    pub(crate) fn function_deleted(&mut self, uid: Ulid) {
        self.world.amounts.forget_function(uid);
        for request in self.world.waiting_for(uid) {
            self.refuse(request, Refusal::FunctionDeleted);
        }
        for id in self.world.delete_function(uid) {
            let Some(container) = self.world.container(id) else {
                continue;
            };
            match container.state {
                ContainerState::Idle => {
                    let machine = container.machine;
                    let command = Command::StopContainer { machine, container: id };
                    self.decide(command, Reason::FunctionDeleted);
                }
                ContainerState::Starting(Purpose::Serve(request)) => self.refuse(request, Refusal::FunctionDeleted),
                ContainerState::Busy(request) => self.world.withdraw_request(request, Refusal::FunctionDeleted),
                ContainerState::Starting(Purpose::Ahead) | ContainerState::Stopping => {}
            }
        }
    }
}
