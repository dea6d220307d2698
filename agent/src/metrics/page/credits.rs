//! What is told of machines' credits. Amounts are in s of CPU time, so that the rate of one is in CPUs, as that of the CPU time that
//! machines use; a credit is 60 s.

use prometheus_client::registry::Unit;
use stoker_credits::Class;

use super::{Page, by};
use crate::host::{Sums, Survey};

/// One of the sums of all accounts: its metric, and what it is.
type Sum = (&'static str, &'static str, fn(&Sums) -> u128);

const SUMS: [Sum; 7] = [
    ("earned", "What machines have earned by their baselines", |sums| {
        sums.earned
    }),
    ("granted", "What machines were given, launch credits among it", |sums| {
        sums.granted
    }),
    ("spent", "CPU time that machines' accounts were charged with", |sums| {
        sums.spent
    }),
    ("discarded", "What was earned with a balance at its cap", |sums| {
        sums.discarded
    }),
    ("borrowed", "What machines have spent that they did not have", |sums| {
        sums.borrowed
    }),
    (
        "billed",
        "What was borrowed and will not be earned, by machines of the mode unlimited: their owners pay for it",
        |sums| sums.billed,
    ),
    (
        "forgiven",
        "What was borrowed and will not be earned, by machines of the mode standard: nobody pays for it",
        |sums| sums.forgiven,
    ),
];

/// ps of CPU time in s.
fn seconds(ps: u128) -> f64 {
    ps as f64 / 1e12
}

impl Page {
    pub(super) fn credits(&mut self, survey: &Survey) {
        let class = |class| match class {
            Class::Exhausted => "exhausted",
            Class::Normal => "normal",
            Class::High => "high",
        };
        self.gauges(
            "stoker_credits_machines",
            "Machines by the class that they run as",
            None,
            survey.classes.iter().map(|(of, count)| by("class", class(*of), *count)),
        );
        let cpus = |millis: u64| millis as f64 / 1000.0;
        self.gauge(
            "stoker_credits_baseline_cpus",
            "CPUs that machines are promised as their baselines",
            None,
            cpus(survey.given.baseline_millis),
        );
        self.gauge(
            "stoker_credits_baseline_limit_cpus",
            "The most CPUs that machines may be promised as their baselines",
            None,
            cpus(survey.limit.baseline_millis),
        );
        let Some(credits) = &survey.credits else { return };
        for (name, help, ps) in [
            (
                "balance",
                "What machines have left of what they earned",
                credits.balance,
            ),
            (
                "launch",
                "What machines have left of what they were given",
                credits.launch,
            ),
            ("owed", "What machines have borrowed and not paid back", credits.owed),
        ] {
            let name = format!("stoker_credits_{name}_cpu");
            self.gauge(&name, help, Some(Unit::Seconds), seconds(ps));
        }
        for (name, help, sum) in SUMS {
            let name = format!("stoker_credits_{name}_cpu");
            self.counter(&name, help, Some(Unit::Seconds), seconds(sum(&credits.sums)));
        }
        self.counter(
            "stoker_credits_crossings",
            "How often accounts went from one level to another",
            None,
            credits.sums.crossings as f64,
        );
    }
}
