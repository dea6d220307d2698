//! What the agent is told by signals.

use std::io;
use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::tasks::{Essential, Task};

/// What the agent is told while it runs.
#[derive(Clone, Debug, Default)]
pub(super) struct Signals {
    /// SIGTERM: it ends at once; machines and what runs in them go on, and the next agent takes them over. The process has to
    /// end then without ending its tasks first, for these hold the machines' connections.
    pub(super) leave: CancellationToken,
    /// SIGINT: it finishes what runs, within the time configured, and ends its machines. A second SIGINT is as SIGTERM.
    pub(super) drain: CancellationToken,
    /// SIGHUP: it reads its configuration again.
    pub(super) reload: Arc<Notify>,
}

// === impl Signals ===

impl Signals {
    /// Listens to this process's signals.
    ///
    /// # Errors
    ///
    /// Where the kernel does not let it.
    pub(super) fn listen(essential: &Essential) -> io::Result<Self> {
        let signals = Self::default();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut hang_up = signal(SignalKind::hangup())?;
        let Self { leave, drain, reload } = signals.clone();
        essential.spawn(Task::Signals, async move {
            loop {
                tokio::select! {
                    _ = terminate.recv() => leave.cancel(),
                    _ = interrupt.recv() => if drain.is_cancelled() {
                        tracing::warn!("interrupted twice: the machines that are left go on");
                        leave.cancel();
                    } else {
                        drain.cancel();
                    },
                    _ = hang_up.recv() => reload.notify_one(),
                }
            }
        });
        Ok(signals)
    }
}
