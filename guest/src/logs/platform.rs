//! Lambda's own lines about a container and its invocations, as they stand in CloudWatch Logs (AWS Lambda Developer Guide,
//! "Monitoring and troubleshooting Lambda functions"), times in ms.

use std::fmt;
use std::time::Duration;

use crate::container::{Failure, FailureKind, Runtime};

/// What came of an invocation.
pub(crate) struct Report<'a> {
    pub(crate) request: &'a str,
    pub(crate) duration: Duration,
    /// Of a container's first invocation: how long its init took, which is billed with it.
    pub(crate) init: Option<Duration>,
    pub(crate) memory_mib: u32,
    /// The most that the container has had so far.
    pub(crate) peak_bytes: u64,
    pub(crate) failure: Option<&'a Failure>,
}

/// A container's init that failed.
pub(crate) struct InitReport<'a> {
    pub(crate) duration: Duration,
    pub(crate) failure: &'a Failure,
}

/// How something went that went wrong; nothing of what a function reported itself as an error of an invocation.
struct Status<'a>(Option<&'a Failure>);

/// The first line of a container.
pub(crate) fn init_start(runtime: Runtime) -> String {
    let version = match runtime {
        Runtime::Python311 => "python:3.11",
        Runtime::Provided => "provided",
    };
    format!("INIT_START Runtime Version: {version}")
}

/// The first line of an invocation.
pub(crate) fn start(request: &str, version: &str) -> String {
    format!("START RequestId: {request} Version: {version}")
}

/// Why the container ended in an invocation.
pub(crate) fn fault(request: &str, failure: &Failure) -> String {
    match failure.kind {
        FailureKind::TimedOut => format!("{request} {}", failure.message),
        _ => format!("RequestId: {request} Error: {}\n{}", failure.message, failure.name),
    }
}

// === impl Report ===

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request, failure, .. } = *self;
        if let Some(failure) = failure.filter(|failure| is_end(failure)) {
            writeln!(f, "{}", fault(request, failure))?;
        }
        writeln!(f, "END RequestId: {request}")?;
        let billed = self.duration + self.init.unwrap_or_default();
        write!(
            f,
            "REPORT RequestId: {request}\tDuration: {:.2} ms\tBilled Duration: {} ms\tMemory Size: {} MB\tMax Memory Used: {} MB",
            ms(self.duration),
            billed.as_micros().div_ceil(1000),
            self.memory_mib,
            self.peak_bytes.div_ceil(1 << 20),
        )?;
        if let Some(init) = self.init {
            write!(f, "\tInit Duration: {:.2} ms", ms(init))?;
        }
        write!(f, "{}", Status(failure.filter(|failure| is_end(failure))))
    }
}

// === impl InitReport ===

impl fmt::Display for InitReport<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = Status(Some(self.failure));
        write!(
            f,
            "INIT_REPORT Init Duration: {:.2} ms\tPhase: init{status}",
            ms(self.duration)
        )
    }
}

// === impl Status ===

impl fmt::Display for Status<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            None => Ok(()),
            Some(failure) if failure.kind == FailureKind::TimedOut => f.write_str("\tStatus: timeout"),
            // A function may name its error as it likes, and each of these is one line.
            Some(failure) => write!(f, "\tStatus: error\tError Type: {}", failure.name.replace('\n', " ")),
        }
    }
}

/// Whether the container has failed, and not its function alone.
fn is_end(failure: &Failure) -> bool {
    match failure.kind {
        FailureKind::Exited | FailureKind::OutOfMemory | FailureKind::TimedOut | FailureKind::Setup => true,
        FailureKind::Reported | FailureKind::ResponseTooLarge => false,
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(kind: FailureKind, name: &str, message: &str) -> Failure {
        Failure {
            kind,
            name: name.to_owned(),
            message: message.to_owned(),
            object: None,
        }
    }

    fn report(failure: Option<&Failure>) -> String {
        let report = Report {
            request: "r-1",
            duration: Duration::from_micros(1_248_310),
            init: Some(Duration::from_micros(293_050)),
            memory_mib: 128,
            peak_bytes: (93 << 20) + 1,
            failure,
        };
        report.to_string()
    }

    #[test]
    fn the_lines_are_lambdas() {
        assert_eq!(
            init_start(Runtime::Python311),
            "INIT_START Runtime Version: python:3.11"
        );
        assert_eq!(start("r-1", "$LATEST"), "START RequestId: r-1 Version: $LATEST");
        let whole = "END RequestId: r-1\nREPORT RequestId: r-1\tDuration: 1248.31 ms\tBilled Duration: 1542 ms\t\
                     Memory Size: 128 MB\tMax Memory Used: 94 MB\tInit Duration: 293.05 ms";
        assert_eq!(report(None), whole);
        // As Lambda it says nothing there of what the function itself reports.
        let reported = failure(FailureKind::Reported, "KeyError", "'a'");
        assert_eq!(report(Some(&reported)), whole);
        let warm = Report {
            request: "r-2",
            duration: Duration::from_micros(1000),
            init: None,
            memory_mib: 64,
            peak_bytes: 0,
            failure: None,
        };
        assert_eq!(
            warm.to_string().lines().last().unwrap(),
            "REPORT RequestId: r-2\tDuration: 1.00 ms\tBilled Duration: 1 ms\tMemory Size: 64 MB\tMax Memory Used: 0 MB"
        );
    }

    #[test]
    fn what_went_wrong_stands_before_the_end_and_in_the_report() {
        let late = failure(
            FailureKind::TimedOut,
            "Sandbox.Timedout",
            "Task timed out after 3.00 seconds",
        );
        let text = report(Some(&late));
        assert!(
            text.starts_with("r-1 Task timed out after 3.00 seconds\nEND "),
            "{text}"
        );
        assert!(text.ends_with("\tInit Duration: 293.05 ms\tStatus: timeout"), "{text}");
        let exited = failure(
            FailureKind::Exited,
            "Runtime.ExitError",
            "Runtime exited with error: exit status 1",
        );
        let text = report(Some(&exited));
        let first = "RequestId: r-1 Error: Runtime exited with error: exit status 1\nRuntime.ExitError\nEND ";
        assert!(text.starts_with(first), "{text}");
        assert!(
            text.ends_with("\tStatus: error\tError Type: Runtime.ExitError"),
            "{text}"
        );
        let init = InitReport {
            duration: Duration::from_micros(154_030),
            failure: &exited,
        };
        assert_eq!(
            init.to_string(),
            "INIT_REPORT Init Duration: 154.03 ms\tPhase: init\tStatus: error\tError Type: Runtime.ExitError"
        );
    }
}
