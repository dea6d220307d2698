//! A host whose executors take their time.

use std::collections::BTreeMap;
use std::time::Duration;

use super::driver::Driver;
use crate::{Completion, ContainerId, Demand, Event, MachineId, RequestId, Rules};

/// Something that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Work {
    Boot(MachineId),
    Adopt(MachineId),
    Create(ContainerId),
    Run(ContainerId, RequestId),
    Stop(ContainerId),
    Destroy(MachineId),
}

/// A caller that calls again as soon as it has its answer.
pub(super) struct Caller {
    pub(super) demand: Demand,
    pub(super) takes: Duration,
    waits_for: Option<RequestId>,
}

pub(super) struct Simulation {
    pub(super) driver: Driver,
    pub(super) boot: Duration,
    pub(super) callers: Vec<Caller>,
    due: BTreeMap<Work, Duration>,
    takes: BTreeMap<RequestId, Duration>,
    pub(super) arrived: BTreeMap<RequestId, Duration>,
    /// How long each request took that has its answer, until it began.
    pub(super) waited: BTreeMap<RequestId, Duration>,
}

impl Simulation {
    pub(super) fn new(rules: Rules) -> Self {
        Self {
            driver: Driver::new(rules),
            boot: Duration::from_secs(1),
            callers: Vec::new(),
            due: BTreeMap::new(),
            takes: BTreeMap::new(),
            arrived: BTreeMap::new(),
            waited: BTreeMap::new(),
        }
    }

    pub(super) fn caller(&mut self, demand: Demand, takes_ms: u64) {
        self.callers.push(Caller {
            demand,
            takes: Duration::from_millis(takes_ms),
            waits_for: None,
        });
    }

    pub(super) fn request(&mut self, demand: Demand, takes: Duration) -> RequestId {
        let now = self.driver.now;
        let request = self.driver.request(demand).0;
        self.takes.insert(request, takes);
        self.arrived.insert(request, now);
        request
    }

    /// Goes on until then; every caller calls.
    pub(super) fn run_until(&mut self, end: Duration) {
        while self.driver.now < end {
            self.call();
            self.begin();
            let wake = self.driver.host.next_wake().unwrap_or(end);
            let next = self.due.iter().map(|(work, at)| (*at, *work)).min();
            match next.filter(|(at, _)| *at <= wake.min(end)) {
                Some((at, work)) => {
                    self.driver.now = at;
                    self.due.remove(&work);
                    self.finish(work);
                }
                None => {
                    self.driver.now = wake.min(end);
                    self.driver.step(Event::Tick);
                }
            }
        }
        self.begin();
    }

    /// Another agent starts; who waited for the one before it is forgotten.
    pub(super) fn restart(&mut self, rules: Rules) {
        self.driver.restart(rules);
        let driver = &self.driver;
        self.arrived.retain(|id, _| driver.ended.contains_key(id));
    }

    /// Since when a request that has no answer has waited; `None` where it has one.
    pub(super) fn oldest_without_answer(&self) -> Option<Duration> {
        let waiting = self
            .arrived
            .iter()
            .filter(|(id, _)| !self.driver.ended.contains_key(id));
        waiting.map(|(_, at)| *at).min()
    }

    fn call(&mut self) {
        for at in 0..self.callers.len() {
            let caller = &self.callers[at];
            let is_over = |id| self.driver.ended.contains_key(&id) || !self.arrived.contains_key(&id);
            if caller.waits_for.is_none_or(is_over) {
                let (demand, takes) = (caller.demand.clone(), caller.takes);
                let request = self.request(demand, takes);
                self.callers[at].waits_for = Some(request);
            }
        }
    }

    /// Notes what was asked for, and forgets what is so no longer.
    fn begin(&mut self) {
        let driver = &self.driver;
        let asked: Vec<Work> = (driver.booting.iter().map(|id| Work::Boot(*id)))
            .chain(driver.found.keys().map(|id| Work::Adopt(*id)))
            .chain(driver.creating.iter().map(|id| Work::Create(*id)))
            .chain(driver.running.iter().map(|(id, of)| Work::Run(*id, *of)))
            .chain(driver.stopping.iter().map(|id| Work::Stop(*id)))
            .chain(driver.destroying.iter().map(|id| Work::Destroy(*id)))
            .collect();
        self.due.retain(|work, _| asked.contains(work));
        let now = self.driver.now;
        for work in asked {
            let takes = match work {
                Work::Boot(_) => self.boot,
                Work::Adopt(_) => Duration::from_millis(500),
                Work::Create(_) => Duration::from_millis(50),
                Work::Stop(_) => Duration::from_millis(20),
                Work::Destroy(_) => Duration::from_millis(100),
                Work::Run(_, request) => {
                    if let Some(arrived) = self.arrived.get(&request) {
                        self.waited.entry(request).or_insert(now - *arrived);
                    }
                    self.takes[&request]
                }
            };
            self.due.entry(work).or_insert(now + takes);
        }
    }

    fn finish(&mut self, work: Work) {
        let event = match work {
            Work::Adopt(machine) => {
                self.driver.adopt(machine);
                return;
            }
            Work::Boot(machine) => Event::MachineReady { machine },
            Work::Create(container) => Event::ContainerReady { container },
            Work::Stop(container) => Event::ContainerEnded { container },
            Work::Destroy(machine) => Event::MachineEnded { machine },
            Work::Run(container, request) => Event::Completed {
                container,
                request,
                completion: Completion::Answered,
            },
        };
        self.driver.step(event);
    }
}
