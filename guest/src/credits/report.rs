//! What an owner reads of credits, as JSON.

use std::time::Duration;

use serde_json::{Value, json};
use stoker_credits::{Account, Class, PS_PER_CREDIT, Share};
use stoker_proto::guest::Credits;
use stoker_proto::v1::machine_credits;

use super::accounts::Standing;

/// All that is told.
#[derive(Debug)]
pub(super) struct Report<'a> {
    /// What is known of the machine, and how long ago it was so at most.
    pub(super) machine: Option<(&'a Credits, Duration)>,
    /// Nothing where it has no account.
    pub(super) container: Option<&'a Standing>,
    /// How long the container was held back so far, in ns.
    pub(super) throttled_ns: Option<u64>,
    /// By the guest's clock, since 1970.
    pub(super) now: Duration,
    /// Why something of it is missing or old.
    pub(super) error: Option<String>,
}

// === impl Report ===

impl Report<'_> {
    pub(super) fn into_json(self) -> Value {
        let mut all = json!({
            "machine": self.machine.map(|(credits, age)| machine(credits, age, self.now)),
            "container": self.container.map(|standing| container(standing, self.throttled_ns, self.now)),
            "throttle": self.throttle(),
        });
        if let (Some(error), Some(object)) = (self.error, all.as_object_mut()) {
            object.insert("error".to_owned(), error.into());
        }
        all
    }

    /// Who holds the container back, why, and until when; by whom it has less, where both do.
    fn throttle(&self) -> Option<Value> {
        let machine = self.machine.map(|(credits, _)| credits);
        let machine = machine.filter(|credits| credits.allowed_millis < credits.full_millis);
        let share = self
            .container
            .filter(|standing| standing.limit_millis < standing.amount_millis);
        match (share, machine) {
            (Some(share), machine) if machine.is_none_or(|machine| share.limit_millis <= machine.allowed_millis) => {
                Some(by_share(share))
            }
            (_, machine) => machine.map(by_machine),
        }
    }
}

fn by_share(of: &Standing) -> Value {
    let Standing { terms, account, .. } = of;
    let until = account.until_full_speed(terms, 0);
    json!({
        "by": "share",
        "reason": format!(
            "this container has {:.3} credits left of its share of its machine's ({:.1}%) and owes {:.3}: it may use {} of its {} \
             thousandths of a CPU, of which it earns {}",
            credits(account.spendable_ps()), fraction(of.share) * 100.0, credits(account.owed_ps()), of.limit_millis,
            of.amount_millis, terms.baseline_millis(),
        ),
        "allowed_millis": of.limit_millis,
        "ends_in": until.map(|ns| seconds(Duration::from_nanos(ns))),
    })
}

fn by_machine(of: &Credits) -> Value {
    json!({
        "by": "machine",
        "reason": format!(
            "this machine has {:.3} credits left and owes {:.3}: all that runs in it may use {} of its {} thousandths of a CPU, of \
             which it earns {}",
            credits(of.balance_ps.saturating_add(of.launch_ps)), credits(of.owed_ps), of.allowed_millis, of.full_millis,
            of.baseline_millis,
        ),
        "allowed_millis": of.allowed_millis,
        "ends_in": of.time_to_full_speed.and_then(told_seconds),
    })
}

fn machine(of: &Credits, age: Duration, now: Duration) -> Value {
    let class = match of.class() {
        machine_credits::Class::Unspecified => None,
        machine_credits::Class::Exhausted => Some(Class::Exhausted),
        machine_credits::Class::Normal => Some(Class::Normal),
        machine_credits::Class::High => Some(Class::High),
    };
    json!({
        "class": class.map(word),
        "level": of.level,
        "balance": credits(of.balance_ps),
        "launch": credits(of.launch_ps),
        "owed": credits(of.owed_ps),
        "cap": credits(of.cap_ps),
        "baseline_millis": of.baseline_millis,
        "full_millis": of.full_millis,
        "allowed_millis": of.allowed_millis,
        "used_millis": of.used_millis,
        "time_to_empty": of.time_to_empty.and_then(told_seconds),
        "time_to_full": of.time_to_full.and_then(told_seconds),
        "as_of": seconds(now.saturating_sub(age)),
        "age": seconds(age),
    })
}

fn container(of: &Standing, throttled_ns: Option<u64>, now: Duration) -> Value {
    let Standing { terms, account, .. } = of;
    let after = |ns: Option<u64>| ns.map(|ns| seconds(Duration::from_nanos(ns)));
    json!({
        "share": fraction(of.share),
        "class": word(account.level().class()),
        "level": account.level().number(),
        "balance": credits(account.balance_ps()),
        "launch": credits(account.launch_ps()),
        "owed": credits(account.owed_ps()),
        "cap": credits(terms.cap_ps()),
        "baseline_millis": terms.baseline_millis(),
        "amount_millis": of.amount_millis,
        "allowed_millis": of.limit_millis,
        "used_millis": of.used_millis,
        "spent": spent(account),
        "time_to_empty": after(account.until_empty(terms, of.used_millis)),
        "time_to_full": after(account.until_full(terms, of.used_millis)),
        "throttled_ns": throttled_ns,
        "as_of": seconds(now),
    })
}

fn fraction(share: Share) -> f64 {
    let (part, whole) = share.parts();
    f64::from(part) / f64::from(whole.max(1))
}

const fn word(class: Class) -> &'static str {
    match class {
        Class::Exhausted => "exhausted",
        Class::Normal => "normal",
        Class::High => "high",
    }
}

fn credits(ps: u64) -> f64 {
    ps as f64 / PS_PER_CREDIT as f64
}

fn spent(account: &Account) -> f64 {
    account.totals().spent.get() as f64 / PS_PER_CREDIT as f64
}

/// To the ms: what is exact beyond that nobody can see.
fn seconds(of: Duration) -> f64 {
    of.as_millis() as f64 / 1000.0
}

fn told_seconds(of: prost_types::Duration) -> Option<f64> {
    Duration::try_from(of).ok().map(seconds)
}

#[cfg(test)]
mod tests {
    use stoker_credits::{Mode, Plan};

    use super::*;

    fn standing(launch_ps: u64, limit_millis: u32) -> Standing {
        let machine = Plan::new(2, 200, Mode::Standard).terms().unwrap();
        let share = Share::new(500, 500, 2000);
        let terms = machine.share(share, 500);
        Standing {
            share,
            terms,
            account: Account::open_share(&terms, share, 0, launch_ps, 0, 0),
            amount_millis: 500,
            limit_millis,
            used_millis: 250,
        }
    }

    fn machine_of(allowed_millis: u32) -> Credits {
        Credits {
            baseline_millis: 200,
            full_millis: 2000,
            allowed_millis,
            balance_ps: 3 * PS_PER_CREDIT / 2,
            class: machine_credits::Class::Normal.into(),
            time_to_full_speed: Some(prost_types::Duration {
                seconds: 90,
                nanos: 500_000_000,
            }),
            ..Default::default()
        }
    }

    fn report<'a>(machine: Option<&'a Credits>, container: Option<&'a Standing>) -> Value {
        let report = Report {
            machine: machine.map(|machine| (machine, Duration::from_millis(40))),
            container,
            throttled_ns: Some(7),
            now: Duration::from_millis(1_700_000_000_540),
            error: None,
        };
        report.into_json()
    }

    #[test]
    fn an_owner_sees_machine_and_share() {
        let told = report(Some(&machine_of(2000)), Some(&standing(12 * PS_PER_CREDIT, 500)));
        let machine = &told["machine"];
        assert_eq!(
            (&machine["class"], &machine["balance"]),
            (&json!("normal"), &json!(1.5))
        );
        assert_eq!(
            (&machine["as_of"], &machine["age"]),
            (&json!(1_700_000_000.5), &json!(0.04))
        );
        let container = &told["container"];
        assert_eq!((&container["share"], &container["launch"]), (&json!(0.25), &json!(3.0)));
        assert_eq!(
            (&container["throttled_ns"], &container["class"]),
            (&json!(7), &json!("normal"))
        );
        // 3 credits at 250 - 50 thousandths, the launch credits being spent while the balance grows.
        let empty = container["time_to_empty"].as_f64().unwrap();
        assert!((899.0..901.0).contains(&empty), "{empty}");
        assert_eq!((&told["throttle"], told.get("error")), (&Value::Null, None));
    }

    #[test]
    fn every_throttle_has_its_reason() {
        let rested = standing(12 * PS_PER_CREDIT, 500);
        let spent = standing(0, 50);
        let told = report(Some(&machine_of(2000)), Some(&spent));
        let throttle = &told["throttle"];
        assert_eq!(
            (&throttle["by"], &throttle["allowed_millis"]),
            (&json!("share"), &json!(50))
        );
        let reason = throttle["reason"].as_str().unwrap();
        assert!(
            reason.contains("(25.0%)") && reason.contains("50 of its 500"),
            "{reason}"
        );
        assert!(throttle["ends_in"].as_f64().unwrap() > 1.0);
        let told = report(Some(&machine_of(700)), Some(&rested));
        assert_eq!(
            (&told["throttle"]["by"], &told["throttle"]["ends_in"]),
            (&json!("machine"), &json!(90.5))
        );
        let reason = told["throttle"]["reason"].as_str().unwrap();
        assert!(
            reason.contains("700 of its 2000") && reason.contains("1.500 credits"),
            "{reason}"
        );
        // The one that leaves less.
        assert_eq!(report(Some(&machine_of(700)), Some(&spent))["throttle"]["by"], "share");
        assert_eq!(report(Some(&machine_of(49)), Some(&spent))["throttle"]["by"], "machine");
        assert_eq!(report(None, Some(&spent))["throttle"]["by"], "share");
        assert_eq!(report(None, None)["throttle"], Value::Null);
    }
}
