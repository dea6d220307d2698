//! Checks what callers ask for, and fills in the defaults that the API documents.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::time::Duration;

use stoker_policy::Amount;
use stoker_proto::scratch::container_scratch_mib;
use stoker_proto::{limits, runtimes, v1};

use super::errors::Violations;
use super::resizing;
use crate::catalog::FunctionSpec;
use crate::names::RUNTIMES;

/// Where a function names none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(3);

/// The least and the most.
const MIN_TIMEOUT: Duration = Duration::from_secs(1);
const MAX_TIMEOUT: Duration = limits::TIMEOUT;

/// Where a function names none.
const DEFAULT_AMOUNT: v1::Amount = v1::Amount {
    cpu_millis: 250,
    memory_mib: 128,
};

/// Bytes of all environment variables of a function, names and values.
const MAX_ENVIRONMENT: usize = limits::ENVIRONMENT_BYTES;

/// Characters of a handler.
const MAX_HANDLER: usize = 128;

/// Characters of a request id.
const MAX_REQUEST_ID: usize = 64;

/// Environment variables that the runtime sets itself, from Lambda's documentation ("Defined runtime environment
/// variables", the reserved ones).
const RESERVED: [&str; 22] = [
    "_HANDLER",
    "_X_AMZN_TRACE_ID",
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_DEFAULT_REGION",
    "AWS_EXECUTION_ENV",
    "AWS_LAMBDA_FUNCTION_MEMORY_SIZE",
    "AWS_LAMBDA_FUNCTION_NAME",
    "AWS_LAMBDA_FUNCTION_VERSION",
    "AWS_LAMBDA_INITIALIZATION_TYPE",
    "AWS_LAMBDA_LOG_GROUP_NAME",
    "AWS_LAMBDA_LOG_STREAM_NAME",
    "AWS_LAMBDA_MAX_CONCURRENCY",
    "AWS_LAMBDA_METADATA_API",
    "AWS_LAMBDA_METADATA_TOKEN",
    "AWS_LAMBDA_RUNTIME_API",
    "AWS_REGION",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "LAMBDA_RUNTIME_DIR",
    "LAMBDA_TASK_ROOT",
];

/// Checks the header of a CreateFunction call; adds everything that is wrong to `violations`. Output-only fields are ignored.
pub fn function(
    header: &v1::CreateFunctionHeader,
    largest: Amount,
    violations: &mut Violations,
) -> Option<FunctionSpec> {
    if header.request_id.chars().count() > MAX_REQUEST_ID || header.request_id.chars().any(char::is_control) {
        violations.add(
            "request_id",
            format!("must be at most {MAX_REQUEST_ID} characters and no control characters"),
        );
    }
    let Some(function) = &header.function else {
        violations.add("function", "is missing");
        return None;
    };
    let name = function
        .name
        .parse()
        .map_err(|error: crate::names::NameError| violations.add("function.name", error.to_string()))
        .ok();
    if RUNTIMES.contains(&function.runtime.as_str()) {
        handler(&function.runtime, &function.handler, violations);
    } else {
        violations.add(
            "function.runtime",
            format!(
                "{:?} is unknown; there are {}",
                clip(&function.runtime),
                RUNTIMES.join(", ")
            ),
        );
    }
    let environment = function.environment.clone().into_iter().collect();
    check_environment(&environment, violations);
    let timeout = timeout(function.timeout.as_ref(), violations);
    let wanted = function.amount.unwrap_or(DEFAULT_AMOUNT);
    amount("function.amount", wanted, largest, violations);
    let ephemeral_storage_mib = ephemeral_storage(function.ephemeral_storage_mib, largest, violations);
    let resizing = function.resizing.as_ref();
    let resizing =
        resizing.and_then(|given| resizing::checked("function.resizing", given, wanted, largest, violations));
    Some(FunctionSpec {
        name: name?,
        runtime: function.runtime.clone(),
        handler: function.handler.clone(),
        environment,
        timeout: timeout?,
        amount: wanted,
        freeze: function.freeze.unwrap_or(true),
        ephemeral_storage_mib,
        resizing,
    })
}

/// Checks an amount against the API's ranges and what one machine of this host can hold.
pub fn amount(field: &str, amount: v1::Amount, largest: Amount, violations: &mut Violations) {
    let mut part = |name: &str, value: u32, range: RangeInclusive<u32>, unit: &str, most: u32| {
        if !range.contains(&value) {
            violations.add(
                format!("{field}.{name}"),
                format!("{value} is not {} to {} ({unit})", range.start(), range.end()),
            );
        } else if value > most {
            violations.add(
                format!("{field}.{name}"),
                format!("{value} is more than a machine of this host can hold ({most} {unit})"),
            );
        }
    };
    part(
        "cpu_millis",
        amount.cpu_millis,
        limits::CPU_MILLIS,
        "millicores",
        largest.cpu_millis,
    );
    part(
        "memory_mib",
        amount.memory_mib,
        limits::MEMORY_MIB,
        "MiB",
        largest.memory_mib,
    );
}

/// What `/tmp` is to hold, in MiB. What else a container takes of the disk is known once its code is there.
fn ephemeral_storage(given: u32, largest: Amount, violations: &mut Violations) -> u32 {
    const RANGE: RangeInclusive<u32> = limits::SCRATCH_MIB;
    let wanted = if given == 0 { *RANGE.start() } else { given };
    if !RANGE.contains(&wanted) {
        violations.add(
            "function.ephemeral_storage_mib",
            format!("{wanted} is not {} to {} (MiB)", RANGE.start(), RANGE.end()),
        );
    } else if container_scratch_mib(wanted, 0, 0) > largest.scratch_mib {
        violations.add(
            "function.ephemeral_storage_mib",
            format!(
                "{wanted} is more than a machine of this host can hold: it has {} MiB of scratch disk for containers \
                 (pool.scratch_gib, machines.scratch_dir)",
                largest.scratch_mib
            ),
        );
    }
    wanted
}

fn handler(runtime: &str, handler: &str, violations: &mut Violations) {
    const FIELD: &str = "function.handler";
    if handler.chars().count() > MAX_HANDLER {
        violations.add(FIELD, format!("must be at most {MAX_HANDLER} characters"));
        return;
    }
    if handler.chars().any(|c| c.is_whitespace() || c.is_control()) {
        violations.add(FIELD, "must not have spaces or control characters");
        return;
    }
    if runtime == runtimes::PROVIDED {
        // `bootstrap` is started whatever it says; it may read `_HANDLER` or not.
        return;
    }
    let good = handler.rsplit_once('.').is_some_and(|(module, function)| {
        !function.is_empty() && module.split(['.', '/']).all(|part| !part.is_empty())
    });
    if !good {
        violations.add(
            FIELD,
            format!("{handler:?} must be of the form `module.function`, as `app.handler` for `def handler` in app.py"),
        );
    }
}

fn check_environment(environment: &BTreeMap<String, String>, violations: &mut Violations) {
    const FIELD: &str = "function.environment";
    let bytes: usize = environment.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > MAX_ENVIRONMENT {
        violations.add(
            FIELD,
            format!("has {bytes} bytes of names and values; at most {MAX_ENVIRONMENT} are allowed"),
        );
        return;
    }
    for (name, value) in environment {
        // Lambda's own rule: `[a-zA-Z]([a-zA-Z0-9_])+`.
        let good = name.len() >= 2
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        if RESERVED.contains(&name.as_str()) {
            violations.add(format!("{FIELD}[{name:?}]"), "is reserved: the runtime sets it");
        } else if !good {
            violations.add(
                format!("{FIELD}[{:?}]", clip(name)),
                "a name must be two or more of A-Z, a-z, 0-9 and `_`, beginning with a letter",
            );
        }
        if value.contains('\0') {
            violations.add(
                format!("{FIELD}[{:?}]", clip(name)),
                "a value must not have a NUL character",
            );
        }
    }
}

fn timeout(given: Option<&prost_types::Duration>, violations: &mut Violations) -> Option<Duration> {
    let Some(given) = given else {
        return Some(DEFAULT_TIMEOUT);
    };
    let timeout = Duration::try_from(*given).ok();
    let good = timeout.filter(|t| (MIN_TIMEOUT..=MAX_TIMEOUT).contains(t));
    if good.is_none() {
        violations.add(
            "function.timeout",
            format!(
                "{} s is not 1 s to 900 s",
                given.seconds as f64 + f64::from(given.nanos) / 1e9
            ),
        );
    }
    // As the database keeps it, so that the first answer is the same as later ones.
    good.map(|timeout| Duration::from_millis(u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)))
}

/// Keeps a caller's long rubbish out of messages.
fn clip(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    const LARGEST: Amount = Amount {
        cpu_millis: 2000,
        memory_mib: 4096,
        scratch_mib: 10_500,
    };

    fn good() -> v1::Function {
        v1::Function {
            name: "accounts/acme/functions/resize".into(),
            runtime: "python3.11".into(),
            handler: "app.handler".into(),
            ..Default::default()
        }
    }

    fn check(function: v1::Function) -> Result<FunctionSpec, Vec<String>> {
        check_on(LARGEST, function)
    }

    /// On a host whose largest machine can give a container so much.
    fn check_on(largest: Amount, function: v1::Function) -> Result<FunctionSpec, Vec<String>> {
        let header = v1::CreateFunctionHeader {
            function: Some(function),
            request_id: String::new(),
        };
        let mut violations = Violations::default();
        let draft = super::function(&header, largest, &mut violations);
        if violations.found().is_empty() {
            Ok(draft.unwrap())
        } else {
            Err(violations.found().iter().map(|(field, _)| field.clone()).collect())
        }
    }

    #[test]
    fn defaults_are_filled_in() {
        let draft = check(good()).unwrap();
        assert_eq!(draft.timeout, Duration::from_secs(3));
        assert_eq!(draft.amount, DEFAULT_AMOUNT);
        assert!(draft.freeze);
        assert_eq!(draft.ephemeral_storage_mib, 512);
        assert_eq!(draft.name.function(), "resize");
    }

    #[test]
    fn everything_wrong_is_named_at_once() {
        let function = v1::Function {
            name: "acme/resize".into(),
            runtime: "cobol".into(),
            timeout: Some(prost_types::Duration { seconds: 901, nanos: 0 }),
            amount: Some(v1::Amount {
                cpu_millis: 5,
                memory_mib: 1 << 20,
            }),
            environment: HashMap::from([
                ("AWS_REGION".to_owned(), String::new()),
                ("1X".to_owned(), String::new()),
            ]),
            ephemeral_storage_mib: 511,
            ..good()
        };
        assert_eq!(
            check(function).unwrap_err(),
            [
                "function.name",
                "function.runtime",
                "function.environment[\"1X\"]",
                "function.environment[\"AWS_REGION\"]",
                "function.timeout",
                "function.amount.cpu_millis",
                "function.amount.memory_mib",
                "function.ephemeral_storage_mib",
            ]
        );
    }

    #[test]
    fn timeouts_have_a_range() {
        let with = |seconds, nanos| {
            check(v1::Function {
                timeout: Some(prost_types::Duration { seconds, nanos }),
                ..good()
            })
        };
        assert_eq!(with(1, 500_000_000).unwrap().timeout, Duration::from_millis(1500));
        assert_eq!(with(1, 1_999_999).unwrap().timeout, Duration::from_millis(1001));
        assert!(with(900, 0).is_ok());
        for (seconds, nanos) in [(0, 0), (0, 999_999_999), (900, 1), (-1, 0), (i64::MAX, 0), (1, -5)] {
            let refused = with(seconds, nanos).is_err();
            // prost normalises (1 s, -5 ns) to less than a second.
            assert!(refused, "{seconds} {nanos}");
        }
    }

    #[test]
    fn amounts_have_ranges_and_fit_the_host() {
        let with = |cpu_millis, memory_mib| {
            check(v1::Function {
                amount: Some(v1::Amount { cpu_millis, memory_mib }),
                ..good()
            })
        };
        assert!(with(10, 16).is_ok() && with(2000, 4096).is_ok());
        for (cpu, memory) in [(9, 16), (10, 15), (2001, 16), (10, 4097), (64_001, 16), (0, 0)] {
            assert!(with(cpu, memory).is_err(), "{cpu} {memory}");
        }
    }

    #[test]
    fn ephemeral_storage_has_a_range() {
        let with = |ephemeral_storage_mib| {
            check(v1::Function {
                ephemeral_storage_mib,
                ..good()
            })
        };
        for good in [512, 513, 10_240] {
            assert_eq!(with(good).unwrap().ephemeral_storage_mib, good);
        }
        for bad in [1, 511, 10_241, u32::MAX] {
            assert_eq!(with(bad).unwrap_err(), ["function.ephemeral_storage_mib"], "{bad}");
        }
        // A part of the disk is the file system's.
        let small = Amount {
            scratch_mib: 1024,
            ..LARGEST
        };
        for (ephemeral_storage_mib, fits) in [(512, true), (1007, true), (1008, false)] {
            let function = v1::Function {
                ephemeral_storage_mib,
                ..good()
            };
            assert_eq!(check_on(small, function).is_ok(), fits, "{ephemeral_storage_mib}");
        }
    }

    #[test]
    fn handlers_fit_their_runtime() {
        let with = |runtime: &str, handler: &str| {
            check(v1::Function {
                runtime: runtime.into(),
                handler: handler.into(),
                ..good()
            })
        };
        for handler in ["app.handler", "pkg.app.handler", "pkg/app.handler"] {
            assert!(with("python3.11", handler).is_ok(), "{handler}");
        }
        let long = format!("{}.handler", "a".repeat(128));
        for handler in [
            "",
            "handler",
            ".handler",
            "app.",
            "../app.handler",
            "/app.handler",
            "a b.c",
            "a..b",
            &long,
        ] {
            assert!(with("python3.11", handler).is_err(), "{handler}");
        }
        assert!(with("provided", "").is_ok());
        assert!(with("provided", "anything").is_ok());
    }

    #[test]
    fn environments_are_bounded() {
        let with = |name: &str, value: &str| {
            check(v1::Function {
                environment: HashMap::from([(name.to_owned(), value.to_owned())]),
                ..good()
            })
        };
        assert!(with("KEY", &"x".repeat(4093)).is_ok());
        assert!(with("KEY", &"x".repeat(4094)).is_err());
        assert!(with("KEY", "a\0b").is_err());
        for name in RESERVED {
            assert!(with(name, "x").is_err(), "{name}");
        }
    }
}
