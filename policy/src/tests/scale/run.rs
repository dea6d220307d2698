//! A machine that was launched, with a guest that wants so much and takes what it gets after a time, measured every second.

use std::time::Duration;

use super::super::SECOND;
use super::super::driver::Driver;
use crate::scale::{GuestMeasures, Launch, Measures, Size, SizeChange, Taken, ThresholdSpec};
use crate::{Command, Decision, Event, Launched, Machine, MachineId, Reason, Rules};

/// What a guest does with what it is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    After(Duration),
    Never,
}

pub(super) struct Run {
    pub(super) driver: Driver,
    pub(super) machine: MachineId,
    pub(super) wants_millis: u32,
    pub(super) wants_mib: u32,
    /// PSI of everything, in us in a second; nothing where its guest's kernel does not count it.
    pub(super) pressure_us: Option<u64>,
    pub(super) takes: Takes,
    pub(super) guest_answers: bool,
    /// What is asked of its devices, and when its guest takes it.
    asked: Option<(u64, Size, Duration)>,
    number: u64,
    pub(super) has: Taken,
    measures: Measures,
    /// All that was decided about it.
    pub(super) told: Vec<(Duration, Decision)>,
}

impl Run {
    /// A machine of account `a` that runs, on a host with these rules.
    pub(super) fn new(rules: Rules, launch: Launch, specs: &[ThresholdSpec]) -> Self {
        let mut driver = Driver::new(rules);
        let thresholds = super::checked(driver.world(), specs);
        let machine = driver
            .launch(
                "a",
                Launch {
                    thresholds,
                    ..launch.clone()
                },
            )
            .unwrap();
        driver.boot_all();
        let mut run = Self {
            driver,
            machine,
            wants_millis: 0,
            wants_mib: 100,
            pressure_us: Some(0),
            takes: Takes::After(Duration::ZERO),
            guest_answers: true,
            asked: None,
            number: 0,
            has: Taken {
                vcpus: launch.size.vcpus,
                memory_mib: launch.size.memory_mib,
            },
            measures: Measures::default(),
            told: Vec::new(),
        };
        run.report();
        run.measure_now();
        run.told.clear();
        run
    }

    pub(super) fn machine(&self) -> &Machine {
        self.driver.world().machine(self.machine).unwrap()
    }

    pub(super) fn launched(&self) -> &Launched {
        self.machine().launched.as_deref().unwrap()
    }

    pub(super) fn asked(&self) -> Size {
        self.launched().asked
    }

    /// What its devices tell.
    pub(super) fn report(&mut self) -> Vec<Decision> {
        self.step(Event::MachineResized {
            machine: self.machine,
            number: self.number,
            taken: self.has,
        })
    }

    /// Its devices have got the last request.
    pub(super) fn number_reached(&mut self) {
        self.number = self.launched().number;
    }

    pub(super) fn resize(&mut self, change: SizeChange) -> Vec<Decision> {
        self.step(Event::ResizeAsked {
            machine: self.machine,
            change,
            by: "someone".into(),
        })
    }

    pub(super) fn step(&mut self, event: Event) -> Vec<Decision> {
        let decisions = self.driver.step(event);
        for decision in &decisions {
            if decision.command.machine() != Some(self.machine) {
                continue;
            }
            self.told.push((self.driver.now, decision.clone()));
            if let Command::ResizeMachine { number, asked, .. } = decision.command
                && let Takes::After(time) = self.takes
                && number > self.number
            {
                self.asked = Some((number, asked, self.driver.now + time));
            }
        }
        decisions
    }

    pub(super) fn measure_now(&mut self) {
        let at = self.driver.now;
        let passed = at.saturating_sub(self.measures.at);
        let millis = self
            .wants_millis
            .min(self.asked().cpu_millis)
            .min(self.has.vcpus * 1000);
        self.measures.at = at;
        self.measures.cpu_ns += u64::try_from(passed.as_nanos()).unwrap() * u64::from(millis) / 1000;
        let before = self.measures.guest.unwrap_or_default();
        let more = |before: Option<u64>| Some(before.unwrap_or(0) + self.pressure_us?);
        let used_mib = self.wants_mib.min(self.has.memory_mib);
        self.measures.guest = self.guest_answers.then(|| GuestMeasures {
            memory_bytes: u64::from(used_mib) << 20,
            cpu_pressure_us: more(before.cpu_pressure_us),
            memory_pressure_us: more(before.memory_pressure_us),
            io_pressure_us: more(before.io_pressure_us),
        });
        self.measures.credits = self.machine().credits.as_ref().and_then(|balance| {
            let ps = balance.account?.spendable_ps();
            Some(stoker_credits::Credits::from_ps(ps))
        });
        self.step(Event::Measured {
            machine: self.machine,
            measures: self.measures,
        });
    }

    /// A second passes, and it is measured.
    pub(super) fn second(&mut self) {
        self.driver.now += SECOND;
        if let Some((number, asked, at)) = self.asked
            && at <= self.driver.now
        {
            self.asked = None;
            self.number = number;
            self.has = Taken {
                vcpus: asked.vcpus,
                memory_mib: asked.memory_mib,
            };
            self.report();
        }
        self.measure_now();
        self.step(Event::Tick);
    }

    pub(super) fn seconds(&mut self, n: u32) {
        for _ in 0..n {
            self.second();
        }
    }

    /// The sizes that it was asked to have, and when.
    pub(super) fn sizes(&self) -> Vec<(u64, Size)> {
        let resizes = self.told.iter().filter_map(|(at, decision)| match decision.command {
            Command::ResizeMachine { asked, .. } => Some((at.as_secs(), asked)),
            _ => None,
        });
        resizes.collect()
    }

    /// The same of its vCPUs alone.
    pub(super) fn vcpus(&self) -> Vec<(u64, u32)> {
        self.sizes().into_iter().map(|(at, size)| (at, size.vcpus)).collect()
    }

    /// Why it stayed as large as it was, each time that was told.
    pub(super) fn kept(&self) -> Vec<String> {
        self.reasons(|command| matches!(command, Command::KeepSize { .. }))
    }

    pub(super) fn reasons(&self, of: impl Fn(&Command) -> bool) -> Vec<String> {
        let told = self.told.iter().filter(|(_, decision)| of(&decision.command));
        told.map(|(_, decision)| decision.reason.to_string()).collect()
    }

    pub(super) fn last(&self, of: impl Fn(&Command) -> bool) -> Option<&Reason> {
        let mut told = self.told.iter().rev().map(|(_, decision)| decision);
        told.find(|decision| of(&decision.command))
            .map(|decision| &decision.reason)
    }
}

impl Driver {
    /// An account launches a machine.
    pub(super) fn launch(&mut self, account: &str, launch: Launch) -> Result<MachineId, crate::scale::LaunchError> {
        let machine = MachineId(self.new_id());
        let allowed = self.world().may_launch(machine, account, &launch);
        let decisions = self.step(Event::LaunchAsked {
            machine,
            account: account.into(),
            launch: Box::new(launch),
            by: "someone".into(),
        });
        let launched = decisions
            .iter()
            .any(|d| matches!(d.command, Command::LaunchMachine { .. }));
        assert_eq!(launched, allowed.is_ok(), "what is said before is what comes of it");
        allowed.map(|()| machine)
    }
}
