//! External extensions of one container, as init sees them: started before the runtime, watched to their end.

use std::sync::Arc;

use super::end::Kill;
use super::launch::{Member, Report, exit_of};
use super::log::Log;
use super::pipe::Pipe;
use super::shutdown::Shutdown;
use crate::reaper::Exit;
use crate::runtime_api::{ExtensionFailure, Kind, RuntimeApi};

/// Has them started, and when they have registered the runtime; sees to it that the container ends with any of them.
pub(super) async fn attend(shutdown: Arc<Shutdown>) {
    let (control, api) = (&shutdown.control, &shutdown.api);
    control.start();
    let registered = api.extensions_registered();
    tokio::pin!(registered);
    let mut all_registered = false;
    loop {
        let report = tokio::select! {
            () = &mut registered, if !all_registered => {
                all_registered = true;
                control.start();
                continue;
            }
            report = control.next() => report,
        };
        match report {
            Some(Report::Started) => {
                shutdown.runtime_runs.send_replace(true);
            }
            Some(Report::NotExecutable(why)) => shutdown.begin(Kill::Entrypoint(why)),
            Some(Report::NotLaunched(index, why)) => {
                api.extension_has_failed(ExtensionFailure {
                    kind: "Extension.LaunchError",
                    message: format!(
                        "The extension {} could not be started: {why}",
                        api.extension_name(index)
                    ),
                });
            }
            Some(Report::Exited(Member::Runtime, status)) => {
                shutdown.runtime_runs.send_replace(false);
                shutdown.begin(Kill::RuntimeEnded(exit_of(status)));
            }
            Some(Report::Exited(Member::Extension(index), status)) => {
                // Where it has told of its end before, that counts.
                api.extension_has_failed(ExtensionFailure {
                    kind: "Extension.Crash",
                    message: crash(&api.extension_name(index), exit_of(status)),
                });
            }
            Some(report) => tracing::error!("PID 1 of a container said {report:?}"),
            None => return,
        }
    }
}

/// Ends a container of which an extension cannot go on, as Lambda does.
pub(super) async fn end_with_extension(api: RuntimeApi, shutdown: Arc<Shutdown>) {
    let failure = api.extension_failed().await;
    shutdown.begin(Kill::Extension(failure));
}

fn crash(name: &str, exit: Exit) -> String {
    match exit {
        Exit::Code(0) => format!("The extension {name} exited without providing a reason"),
        exit => format!("The extension {name} exited with error: {exit}"),
    }
}

/// Passes on what they write to the log and to those who subscribed to it, until none writes any more.
pub(super) async fn follow(output: Arc<Pipe>, log: Log, api: RuntimeApi) -> std::io::Result<()> {
    let passed_on = output.pass_on(|data| {
        log.append(data);
        api.telemetry().write(Kind::Extension, data);
    });
    passed_on.await
}
