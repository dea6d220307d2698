//! Hears the guest of a machine that was launched, and measures what the machine uses: what the host's kernel counts of its vCPUs, its
//! credits, and what the guest says of itself, all at one time. Once a second, for that is how often its guest speaks; where it is
//! silent, without its word. Nothing is done for any other machine.

use std::sync::Arc;
use std::time::{Duration, Instant};

use stoker_credits::Credits;
use stoker_ebpf::CgroupId;
use stoker_policy::MachineId;
use stoker_proto::guest as proto;
use tokio::sync::{mpsc, oneshot};

use crate::host::container::{Handle, Shared, WATCH_GAP};
use crate::host::message::Message;
use crate::machines::GuestError;

/// How long a guest may be silent before the machine is measured without it.
const SILENCE: Duration = Duration::from_millis(1500);

/// A machine is not measured more often, however often its guest speaks.
const LEAST: Duration = Duration::from_millis(500);

/// What the host counts of a machine.
#[derive(Clone, Copy, Debug)]
pub(in crate::host) struct Counted {
    /// When.
    pub(in crate::host) at: Instant,
    /// CPU time of its vCPUs in ns.
    pub(in crate::host) cpu_ns: u64,
    /// Time in ns that they waited for a CPU of the host.
    pub(in crate::host) wait_ns: u64,
    /// What it can spend of its credits; nothing where it has no account.
    pub(in crate::host) credits: Option<Credits>,
}

/// Passes on what a guest says, with what the host counted then, until the machine ends.
pub(in crate::host) async fn watch(
    handle: Handle,
    machine: MachineId,
    counted_by: Option<CgroupId>,
    shared: Arc<Shared>,
    inbox: mpsc::Sender<Message>,
) {
    let watched = async {
        let mut stream = handle.guest.watch(shared.watch_interval).await?;
        let mut last: Option<Instant> = None;
        loop {
            let said = match tokio::time::timeout(SILENCE, stream.message()).await {
                Ok(said) => said?,
                Err(_) => proto::WatchResponse::default(),
            };
            let is_due = last.is_none_or(|last| last.elapsed() >= LEAST);
            let counted = match counted_by.filter(|_| is_due) {
                Some(counted_by) => count(&shared, machine, counted_by).await,
                None => None,
            };
            last = counted.as_ref().map(|counted| counted.at).or(last);
            let (taken, heard) = oneshot::channel();
            let message = Message::Said {
                machine,
                said,
                counted,
                taken,
            };
            // No guest has more than one message in the inbox, however fast it talks.
            if inbox.send(message).await.is_err() || heard.await.is_err() {
                return Ok(());
            }
            // A guest that talks without end is slowed down by flow control.
            tokio::time::sleep(WATCH_GAP).await;
        }
    };
    let watched: Result<(), GuestError> = watched.await;
    if let Err(error) = watched {
        handle.broken(&error);
    }
}

/// Nothing where it can't be read: what is not known is not guessed.
async fn count(shared: &Arc<Shared>, machine: MachineId, counted_by: CgroupId) -> Option<Counted> {
    let launcher = shared.launcher.clone();
    let counting = tokio::task::spawn_blocking(move || {
        let time = launcher.vcpu_time(counted_by)?;
        let at = Instant::now();
        let standing = launcher.account(machine);
        Some(Counted {
            at,
            cpu_ns: time.cpu_ns,
            // What it was held back for, by its share or its credits, it waited for nobody.
            wait_ns: time.wait_ns.saturating_sub(time.throttled_ns),
            credits: standing.map(|standing| Credits::from_ps(standing.account.spendable_ps())),
        })
    });
    counting.await.ok().flatten()
}
