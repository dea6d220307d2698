//! How amounts of functions are fitted to their use: checked as it comes in, and as it is shown.

use std::time::Duration;

use stoker_policy::resize::Thresholds;
use stoker_policy::{Amount, Resize, ResizeError, ResizeMode};
use stoker_proto::v1;
use stoker_proto::v1::resizing::Mode;

use super::errors::Violations;
use super::validate;
use crate::catalog::{cpu_and_memory, settings};

/// The most is within what host and account have, whatever it says.
const ANY: Amount = Amount {
    cpu_millis: u32::MAX,
    memory_mib: u32::MAX,
    scratch_mib: u32::MAX,
};

/// Checks what a function of this amount is to go by, on a host where no container can have more than `largest`; adds all that is wrong
/// to `violations`.
pub(super) fn checked(
    field: &str,
    given: &v1::Resizing,
    first: v1::Amount,
    largest: Amount,
    violations: &mut Violations,
) -> Option<Resize> {
    let before = violations.found().len();
    let mode = match given.mode() {
        Mode::Off => ResizeMode::Off,
        Mode::Advise => ResizeMode::Advise,
        Mode::Auto => ResizeMode::Auto,
        Mode::Unspecified => {
            violations.add(format!("{field}.mode"), "must be OFF, ADVISE or AUTO");
            ResizeMode::Off
        }
    };
    for (bound, amount, limit) in [("least", given.least, largest), ("most", given.most, ANY)] {
        if let Some(amount) = amount {
            validate::amount(&format!("{field}.{bound}"), amount, limit, violations);
        }
    }
    let given_thresholds = given.thresholds.unwrap_or_default();
    let thresholds = thresholds(&format!("{field}.thresholds"), &given_thresholds, violations);
    if violations.found().len() > before {
        return None;
    }
    let settings = settings(mode, first, given.least, given.most, thresholds);
    match settings.check(cpu_and_memory(first)) {
        Ok(()) => Some(settings),
        Err(error) => {
            violations.add(at(field, &error), error.to_string());
            None
        }
    }
}

fn thresholds(field: &str, given: &v1::ResizingThresholds, violations: &mut Violations) -> Thresholds {
    let default = Thresholds::default();
    let mut time =
        |name: &str, given: Option<prost_types::Duration>, default: Duration| match given.map(Duration::try_from) {
            None => default,
            Some(Ok(time)) => time,
            Some(Err(_)) => {
                violations.add(format!("{field}.{name}"), "must not be negative");
                default
            }
        };
    Thresholds {
        cooldown_up: time("cooldown_up", given.cooldown_up, default.cooldown_up),
        cooldown_down: time("cooldown_down", given.cooldown_down, default.cooldown_down),
        quantile_permille: given.quantile_permille.unwrap_or(default.quantile_permille),
        head_room_percent: given.head_room_percent.unwrap_or(default.head_room_percent),
        tight_percent: given.tight_percent.unwrap_or(default.tight_percent),
        saves_percent: given.saves_percent.unwrap_or(default.saves_percent),
        cheaper_percent: given.cheaper_percent.unwrap_or(default.cheaper_percent),
        faster_percent: given.faster_percent.unwrap_or(default.faster_percent),
        executions_up: given.executions_up.unwrap_or(default.executions_up),
        executions_down: given.executions_down.unwrap_or(default.executions_down),
    }
}

/// The field that is wrong.
fn at(field: &str, error: &ResizeError) -> String {
    match error {
        ResizeError::Bounds { .. } | ResizeError::Nothing => format!("{field}.least"),
        ResizeError::First { .. } => field.to_owned(),
        ResizeError::Range { name, .. } => {
            let name = name.split(' ').next().unwrap_or(name);
            format!("{field}.thresholds.{name}")
        }
        ResizeError::Contradiction { .. } => format!("{field}.thresholds.head_room_percent"),
    }
}

/// What a function goes by, with all defaults.
pub(super) fn proto(settings: &Resize) -> v1::Resizing {
    let amount = |amount: Amount| v1::Amount {
        cpu_millis: amount.cpu_millis,
        memory_mib: amount.memory_mib,
    };
    let mode = match settings.mode {
        ResizeMode::Off => Mode::Off,
        ResizeMode::Advise => Mode::Advise,
        ResizeMode::Auto => Mode::Auto,
    };
    let thresholds = &settings.thresholds;
    v1::Resizing {
        mode: mode.into(),
        least: Some(amount(settings.least)),
        most: Some(amount(settings.most)),
        thresholds: Some(v1::ResizingThresholds {
            quantile_permille: Some(thresholds.quantile_permille),
            head_room_percent: Some(thresholds.head_room_percent),
            tight_percent: Some(thresholds.tight_percent),
            saves_percent: Some(thresholds.saves_percent),
            cheaper_percent: Some(thresholds.cheaper_percent),
            faster_percent: Some(thresholds.faster_percent),
            executions_up: Some(thresholds.executions_up),
            executions_down: Some(thresholds.executions_down),
            cooldown_up: thresholds.cooldown_up.try_into().ok(),
            cooldown_down: thresholds.cooldown_down.try_into().ok(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIRST: v1::Amount = v1::Amount {
        cpu_millis: 50,
        memory_mib: 128,
    };

    fn check(given: &v1::Resizing) -> Result<Resize, Vec<String>> {
        let largest = Amount {
            cpu_millis: 2000,
            memory_mib: 4096,
            scratch_mib: 10_500,
        };
        let mut violations = Violations::default();
        let settings = checked("resizing", given, FIRST, largest, &mut violations);
        let fields = violations.found().iter().map(|(field, _)| field.clone()).collect();
        settings.ok_or(fields)
    }

    fn auto() -> v1::Resizing {
        v1::Resizing {
            mode: Mode::Auto.into(),
            ..Default::default()
        }
    }

    fn amount(cpu_millis: u32, memory_mib: u32) -> Option<v1::Amount> {
        Some(v1::Amount { cpu_millis, memory_mib })
    }

    #[test]
    fn what_is_absent_has_its_default_and_the_functions_amount_is_within() {
        let settings = check(&auto()).unwrap();
        assert_eq!(settings.mode, ResizeMode::Auto);
        assert_eq!((settings.least.cpu_millis, settings.least.memory_mib), (50, 64));
        assert_eq!(settings.most, Resize::default().most);
        assert_eq!(settings.thresholds, Thresholds::default());
    }

    #[test]
    fn what_is_shown_can_be_given_again() {
        let given = v1::Resizing {
            least: amount(20, 32),
            most: amount(4000, 8192),
            thresholds: Some(v1::ResizingThresholds {
                executions_down: Some(50),
                cooldown_up: Duration::from_secs(3).try_into().ok(),
                ..Default::default()
            }),
            ..auto()
        };
        let settings = check(&given).unwrap();
        assert_eq!(settings.thresholds.executions_down, 50);
        assert_eq!(settings.thresholds.cooldown_up, Duration::from_secs(3));
        assert_eq!(check(&proto(&settings)), Ok(settings));
    }

    #[test]
    fn what_can_not_be_is_named() {
        let with = |change: fn(&mut v1::Resizing)| {
            let mut given = auto();
            change(&mut given);
            check(&given).unwrap_err()
        };
        assert_eq!(with(|given| given.mode = 0), ["resizing.mode"]);
        assert_eq!(with(|given| given.mode = 77), ["resizing.mode"]);
        assert_eq!(with(|given| given.least = amount(5, 64)), ["resizing.least.cpu_millis"]);
        // More than the host has.
        assert_eq!(
            with(|given| given.least = amount(2001, 64)),
            ["resizing.least.cpu_millis"]
        );
        assert_eq!(with(|given| given.most = amount(6000, 0)), ["resizing.most.memory_mib"]);
        let crossed = |given: &mut v1::Resizing| (given.least, given.most) = (amount(50, 256), amount(40, 128));
        assert_eq!(with(crossed), ["resizing.least"]);
        assert_eq!(with(|given| given.least = amount(50, 129)), ["resizing"]);
        let with = |change: fn(&mut v1::ResizingThresholds)| {
            let mut thresholds = v1::ResizingThresholds::default();
            change(&mut thresholds);
            check(&v1::Resizing {
                thresholds: Some(thresholds),
                ..auto()
            })
            .unwrap_err()
        };
        let field = |name: &str| [format!("resizing.thresholds.{name}")];
        assert_eq!(with(|t| t.quantile_permille = Some(0)), field("quantile_permille"));
        assert_eq!(with(|t| t.executions_up = Some(1)), field("executions_up"));
        assert_eq!(with(|t| t.head_room_percent = Some(2)), field("head_room_percent"));
        assert_eq!(
            with(|t| t.cooldown_up = Some(prost_types::Duration::default())),
            field("cooldown_up")
        );
        assert_eq!(
            with(|t| t.cooldown_down = Some(prost_types::Duration { seconds: -1, nanos: 0 })),
            field("cooldown_down")
        );
    }
}
