//! How a launch is checked as it comes in.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use stoker_credits::Mode;
use stoker_policy::Launch;
use stoker_policy::scale::{Bounds, LaunchError, MOST_VCPUS, Resource, Size, SizeError, Thresholds};
use stoker_proto::limits::{MAX_SCRATCH_MIB, MEMORY_MIB};
use stoker_proto::v1;
use tonic::{Request, Status};

use super::program::{self, Given};
use super::thresholds;
use crate::api::caller::{may_change_credits, who};
use crate::api::errors::{Violations, exhausted, invalid, precondition, unavailable};
use crate::hex::hex;
use crate::host::{HostHandle, LaunchFailure, Launching, base_mib};
use crate::images::Images;
use crate::machines::LaunchRequest;
use crate::names::{AccountName, ImageName, NameError};

/// What a machine has where nothing else is asked for.
const DEFAULT: Size = Size {
    vcpus: 1,
    cpu_millis: 1000,
    memory_mib: 512,
};

/// How many times that it may come to have, where nothing else is asked for.
const GROWTH: u32 = 4;

/// The least CPU share, in millicores.
const LEAST_SHARE: u32 = 100;

/// The smallest scratch drive that is of use, in MiB.
const LEAST_SCRATCH: u32 = 64;

/// The longest request id.
const MAX_REQUEST_ID: usize = 64;

/// What was asked for, as far as it can be checked without looking anything up.
#[derive(Debug)]
struct Checked {
    account: AccountName,
    image: ImageName,
    request: Option<LaunchRequest>,
    size: Size,
    /// What is 0 is as by default.
    ceiling: v1::MachineSize,
    thresholds: Vec<v1::Threshold>,
    program: Given,
    drive_mib: u32,
    mode: Option<Mode>,
}

/// Who launches a machine. What becomes of it without credits only those say who may change them.
///
/// # Errors
/// PERMISSION_DENIED.
pub(super) fn by(request: &Request<v1::LaunchMachineRequest>) -> Result<Arc<str>, Status> {
    match request.get_ref().mode() {
        v1::machine_credits::Mode::Unspecified => Ok(who(request)),
        _ => may_change_credits(request),
    }
}

/// Launches a machine, or answers with the one that the same request has launched before, whatever became of its image since.
///
/// # Errors
/// What is wrong with the request; NOT_FOUND where the account has no such image; what stands in the machine's way.
pub(super) async fn launch(
    host: &HostHandle,
    images: &Images,
    request: v1::LaunchMachineRequest,
    by: Arc<str>,
) -> Result<v1::Machine, Status> {
    let checked = check(request)?;
    let account = checked.account.clone();
    let before = match &checked.request {
        Some(request) => host.launched_before(account.account().into(), request.clone()).await,
        None => None,
    };
    let launched = match before {
        Some(before) => before,
        None => host.launch(launching(host, images, checked, by).await?).await,
    };
    launched.map_err(|error| failed(&account.to_string(), error))
}

async fn launching(host: &HostHandle, images: &Images, checked: Checked, by: Arc<str>) -> Result<Launching, Status> {
    let image = images.open_root(checked.image.clone()).await?;
    let program = program::of(image.config, checked.program);
    let mut violations = Violations::default();
    program::check(&program, &mut violations);
    violations.check()?;
    let account: Arc<str> = checked.account.account().into();
    let bounds = host.bounds_for(account.clone()).await.ok_or_else(ending)?;
    let ceiling = ceiling(checked.size, checked.ceiling, bounds.machine);
    let base_mib = base_mib(checked.size, ceiling);
    let bounds = Bounds {
        machine: ceiling,
        base_mib,
        ..bounds
    };
    let thresholds: Thresholds = thresholds::checked(&checked.thresholds, &bounds)?;
    let digest = image.id.to_string();
    Ok(Launching {
        account,
        request: checked.request,
        image: checked.image,
        file: image.file,
        program,
        launch: Launch {
            image: digest.as_str().into(),
            size: checked.size,
            ceiling,
            base_mib,
            drive_mib: checked.drive_mib,
            thresholds,
            mode: checked.mode,
        },
        digest,
        by,
    })
}

fn check(request: v1::LaunchMachineRequest) -> Result<Checked, Status> {
    let mut violations = Violations::default();
    let account = parsed::<AccountName>("parent", &request.parent, &mut violations);
    let image = parsed::<ImageName>("image", &request.image, &mut violations);
    if let (Some(account), Some(image)) = (&account, &image)
        && account.account() != image.account()
    {
        violations.add("image", format!("must be one of {account}"));
    }
    let size = size(request.size.unwrap_or_default(), &mut violations);
    let ceiling = request.ceiling.unwrap_or_default();
    check_size("ceiling", ceiling, &mut violations);
    program::check_words("entrypoint", &request.entrypoint, &mut violations);
    program::check_words("command", &request.command, &mut violations);
    let program = request.entrypoint.iter().chain(&request.command).next();
    if program.is_some_and(String::is_empty) && !request.entrypoint.is_empty() {
        violations.add("entrypoint", "must begin with a program");
    }
    program::check_environment("environment", &request.environment, &mut violations);
    let scratch = LEAST_SCRATCH..=MAX_SCRATCH_MIB;
    if request.scratch_mib > 0 && !scratch.contains(&request.scratch_mib) {
        violations.add(
            "scratch_mib",
            format!(
                "{} is not {} to {} (MiB)",
                request.scratch_mib,
                scratch.start(),
                scratch.end()
            ),
        );
    }
    let id = &request.request_id;
    if id.len() > MAX_REQUEST_ID || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) {
        violations.add(
            "request_id",
            format!("must be at most {MAX_REQUEST_ID} of A-Z, a-z, 0-9, `_` and `-`"),
        );
    }
    let mode = match v1::machine_credits::Mode::try_from(request.mode) {
        Ok(v1::machine_credits::Mode::Unspecified) => None,
        Ok(v1::machine_credits::Mode::Standard) => Some(Mode::Standard),
        Ok(v1::machine_credits::Mode::Unlimited) => Some(Mode::Unlimited),
        Err(_) => {
            violations.add("mode", "must be STANDARD or UNLIMITED");
            None
        }
    };
    violations.check()?;
    let known_by = (!id.is_empty()).then(|| LaunchRequest {
        id: id.clone(),
        sha256: content(&request),
    });
    Ok(Checked {
        account: account.ok_or_else(|| invalid("parent", "is missing"))?,
        image: image.ok_or_else(|| invalid("image", "is missing"))?,
        request: known_by,
        size,
        ceiling,
        thresholds: request.thresholds,
        program: Given {
            entrypoint: request.entrypoint,
            command: request.command,
            environment: request.environment,
        },
        drive_mib: request.scratch_mib,
        mode,
    })
}

/// The SHA-256 of what is asked for, without what the request is called.
fn content(request: &v1::LaunchMachineRequest) -> String {
    let rest = v1::LaunchMachineRequest {
        request_id: String::new(),
        // Which has no order.
        environment: HashMap::new(),
        ..request.clone()
    };
    let environment: BTreeMap<_, _> = request.environment.iter().collect();
    let texts = environment.into_iter().flat_map(|(name, value)| [name, value]);
    let mut hash = Sha256::new();
    hash.update(rest.encode_length_delimited_to_vec());
    for text in texts {
        // Which neither may have in it.
        hash.update(text);
        hash.update([0]);
    }
    hex(&hash.finalize())
}

fn parsed<N: std::str::FromStr<Err = NameError>>(field: &str, name: &str, violations: &mut Violations) -> Option<N> {
    let parsed = name.parse();
    parsed
        .map_err(|error: NameError| violations.add(field, error.to_string()))
        .ok()
}

/// A size with what is not given as by default.
fn size(given: v1::MachineSize, violations: &mut Violations) -> Size {
    check_size("size", given, violations);
    let vcpus = if given.vcpus == 0 { DEFAULT.vcpus } else { given.vcpus };
    let memory_mib = if given.memory_mib == 0 {
        DEFAULT.memory_mib
    } else {
        given.memory_mib
    };
    let whole = Size::whole(vcpus, memory_mib);
    match given.cpu_millis {
        0 => whole,
        cpu_millis => Size { cpu_millis, ..whole },
    }
}

/// Checks what is not 0 of a size. How its parts fit each other, the host and the account is the policy's to say.
pub(super) fn check_size(field: &str, given: v1::MachineSize, violations: &mut Violations) {
    let parts = [
        ("vcpus", given.vcpus, 1..=MOST_VCPUS, "vCPUs"),
        (
            "cpu_millis",
            given.cpu_millis,
            LEAST_SHARE..=MOST_VCPUS * 1000,
            "millicores",
        ),
        ("memory_mib", given.memory_mib, MEMORY_MIB, "MiB"),
    ];
    for (part, value, range, unit) in parts {
        if value > 0 && !range.contains(&value) {
            violations.add(
                format!("{field}.{part}"),
                format!("{value} is not {} to {} ({unit})", range.start(), range.end()),
            );
        }
    }
    if !given.memory_mib.is_multiple_of(Resource::Memory.unit()) {
        violations.add(
            format!("{field}.memory_mib"),
            format!(
                "{} is not a multiple of {} (MiB)",
                given.memory_mib,
                Resource::Memory.unit()
            ),
        );
    }
}

/// The most that a machine may have: what is not given is some times what it begins with, as far as there is so much.
fn ceiling(size: Size, given: v1::MachineSize, most: Size) -> Size {
    let part = |given: u32, begins: u32, most: u32| match given {
        0 => begins.saturating_mul(GROWTH).min(most).max(begins),
        given => given,
    };
    let vcpus = part(given.vcpus, size.vcpus, most.vcpus);
    let whole = Size::whole(vcpus, part(given.memory_mib, size.memory_mib, most.memory_mib));
    match given.cpu_millis {
        0 => whole,
        cpu_millis => Size { cpu_millis, ..whole },
    }
}

fn ending() -> Status {
    unavailable("DRAINING", "the agent is ending; try again later")
}

/// Why a machine was not launched.
pub(super) fn failed(account: &str, error: LaunchFailure) -> Status {
    let message = error.to_string();
    match error {
        LaunchFailure::Gone | LaunchFailure::Refused(LaunchError::Draining) => unavailable("DRAINING", message),
        LaunchFailure::Refused(LaunchError::Exists) => unavailable("EXISTS", message),
        LaunchFailure::Reused => invalid("request_id", message),
        LaunchFailure::Refused(LaunchError::Size(size)) => invalid(of_size(&size), message),
        LaunchFailure::Refused(LaunchError::Account { .. }) => exhausted(account, message),
        LaunchFailure::Refused(LaunchError::Host { .. }) => exhausted("host", message),
        LaunchFailure::Refused(LaunchError::Terms(_)) => invalid("mode", message),
        LaunchFailure::Ended(machine) => {
            use v1::machine_end::Reason;
            let message = format!("{message} ({})", machine.name);
            match machine.end.unwrap_or_default().reason() {
                Reason::ProgramFailed | Reason::ProgramEnded => precondition("PROGRAM_FAILED", message),
                Reason::Stopped => precondition("MACHINE_ENDED", message),
                _ => unavailable("BOOT_FAILING", message),
            }
        }
    }
}

/// The field that no machine can have.
pub(super) fn of_size(error: &SizeError) -> &'static str {
    let of = |resource, [vcpus, share, memory]: [&'static str; 3]| match resource {
        Resource::Vcpus => vcpus,
        Resource::CpuShare => share,
        Resource::Memory => memory,
    };
    match *error {
        SizeError::Nothing(resource) | SizeError::AboveCeiling { resource, .. } => {
            of(resource, ["size.vcpus", "size.cpu_millis", "size.memory_mib"])
        }
        SizeError::AboveHost { resource, .. } => {
            of(resource, ["ceiling.vcpus", "ceiling.cpu_millis", "ceiling.memory_mib"])
        }
        SizeError::Share { .. } => "size.cpu_millis",
        SizeError::Blocks(_) | SizeError::TooSmall { .. } | SizeError::BelowBase { .. } => "size.memory_mib",
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt as _;

    use super::*;

    fn good() -> v1::LaunchMachineRequest {
        v1::LaunchMachineRequest {
            parent: "accounts/acme".into(),
            image: "accounts/acme/images/web".into(),
            ..Default::default()
        }
    }

    fn of(vcpus: u32, cpu_millis: u32, memory_mib: u32) -> v1::MachineSize {
        v1::MachineSize {
            vcpus,
            cpu_millis,
            memory_mib,
        }
    }

    #[test]
    fn what_is_not_asked_for_is_as_by_default() {
        let checked = check(good()).unwrap();
        assert_eq!(checked.size, Size::whole(1, 512));
        assert_eq!((checked.request, checked.mode, checked.drive_mib), (None, None, 0));
        let checked = check(v1::LaunchMachineRequest {
            size: Some(of(3, 0, 0)),
            request_id: "a_B-1".into(),
            mode: v1::machine_credits::Mode::Unlimited.into(),
            ..good()
        });
        let checked = checked.unwrap();
        assert_eq!(checked.size, Size::whole(3, 512));
        assert_eq!(
            (checked.request.unwrap().id.as_str(), checked.mode),
            ("a_B-1", Some(Mode::Unlimited))
        );
    }

    #[test]
    fn a_request_is_known_by_all_that_it_asks_for_and_not_by_its_id() {
        let names = ["A", "B", "C", "D", "E", "F"];
        let request = |id: &str| v1::LaunchMachineRequest {
            request_id: id.into(),
            environment: names.map(|name| (name.to_owned(), "x".to_owned())).into(),
            ..good()
        };
        let known = content(&request("mine"));
        // A map has another order each time that it is made.
        assert!((0..20).all(|_| content(&request("yours")) == known));
        let changes: [fn(&mut v1::LaunchMachineRequest); 6] = [
            |request| request.image.push('2'),
            |request| request.size = Some(of(2, 0, 0)),
            |request| request.thresholds.push(v1::Threshold::default()),
            |request| request.command.push("x".into()),
            |request| drop(request.environment.insert("A".into(), "y".into())),
            |request| drop(request.environment.remove("F")),
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut other = request("mine");
            change(&mut other);
            assert_ne!(content(&other), known, "{index}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_told_at_once() {
        let request = v1::LaunchMachineRequest {
            parent: "accounts/acme".into(),
            image: "accounts/other/images/web".into(),
            size: Some(of(65, 99, 513)),
            ceiling: Some(of(0, 64_001, 2 << 20)),
            thresholds: Vec::new(),
            entrypoint: vec![String::new()],
            command: vec!["\0".into()],
            environment: [("A=".to_owned(), String::new())].into(),
            scratch_mib: 63,
            request_id: "a b".into(),
            mode: 77,
        };
        let status = check(request).unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        let fields: Vec<_> = violations.iter().map(|violation| &*violation.field).collect();
        assert_eq!(
            fields,
            [
                "image",
                "size.vcpus",
                "size.cpu_millis",
                "size.memory_mib",
                "ceiling.cpu_millis",
                "ceiling.memory_mib",
                "command",
                "entrypoint",
                "environment[\"A=\"]",
                "scratch_mib",
                "request_id",
                "mode",
            ]
        );
        assert!(check(v1::LaunchMachineRequest::default()).is_err());
    }

    #[test]
    fn a_ceiling_is_four_times_the_size_as_far_as_there_is_so_much() {
        let most = Size::whole(6, 3000);
        let none = of(0, 0, 0);
        assert_eq!(ceiling(Size::whole(1, 512), none, most), Size::whole(4, 2048));
        assert_eq!(ceiling(Size::whole(2, 1024), none, most), Size::whole(6, 3000));
        // That it is too large is said by who decides.
        assert_eq!(ceiling(Size::whole(8, 4096), none, most), Size::whole(8, 4096));
        assert_eq!(ceiling(Size::whole(1, 512), of(2, 0, 0), most), Size::whole(2, 2048));
        let given = ceiling(Size::whole(1, 512), of(2, 1500, 600), most);
        assert_eq!((given.vcpus, given.cpu_millis, given.memory_mib), (2, 1500, 600));
    }

    #[test]
    fn why_nothing_was_launched_is_told_by_what_can_be_done() {
        use v1::machine_end::Reason;
        let ended = |reason: Reason| {
            let end = v1::MachineEnd {
                reason: reason.into(),
                detail: "it is so".into(),
                ..Default::default()
            };
            LaunchFailure::Ended(Box::new(v1::Machine {
                name: "machines/01J".into(),
                end: Some(end),
                ..Default::default()
            }))
        };
        for (error, code) in [
            (ended(Reason::ProgramFailed), Code::FailedPrecondition),
            (ended(Reason::Stopped), Code::FailedPrecondition),
            (ended(Reason::VmmError), Code::Unavailable),
            (LaunchFailure::Gone, Code::Unavailable),
            (LaunchFailure::Refused(LaunchError::Draining), Code::Unavailable),
            (
                LaunchFailure::Refused(SizeError::Blocks(513).into()),
                Code::InvalidArgument,
            ),
        ] {
            let is_end = matches!(error, LaunchFailure::Ended(_));
            let status = failed("accounts/acme", error);
            assert_eq!(status.code(), code, "{status:?}");
            let message = status.message();
            assert_eq!(message.contains("it is so (machines/01J)"), is_end, "{message}");
        }
        let full = LaunchError::Account {
            part: stoker_policy::scale::Part::Memory,
            needs: 10,
            left: 5,
        };
        let status = failed("accounts/acme", full.into());
        assert_eq!(status.code(), Code::ResourceExhausted);
        let details = status.get_error_details();
        assert_eq!(details.quota_failure().unwrap().violations[0].subject, "accounts/acme");
    }
}
