//! What systemd is told (sd_notify(3)); nobody is where it did not start the agent.

use std::io;
use std::time::Duration;

use sd_notify::NotifyState;

/// The agent serves, also after it has read its configuration again.
pub(super) async fn ready() {
    tell(|| sd_notify::notify(&[NotifyState::Ready])).await;
}

/// The agent reads its configuration again; [`ready`] follows.
pub(super) async fn reloading() {
    tell(|| sd_notify::notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?])).await;
}

/// The agent ends.
pub(super) async fn stopping() {
    tell(|| sd_notify::notify(&[NotifyState::Stopping])).await;
}

/// The agent is alive; `status` is what `systemctl status` shows.
pub(super) async fn alive(status: String) {
    tell(move || sd_notify::notify(&[NotifyState::Watchdog, NotifyState::Status(&status)])).await;
}

/// How often systemd wants to hear that, at least; nothing where it does not watch.
pub(super) fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled()
}

/// On a thread that may wait: a socket whose reader is slow makes its writers wait.
async fn tell(send: impl FnOnce() -> io::Result<()> + Send + 'static) {
    let sent = tokio::task::spawn_blocking(send).await.map_err(io::Error::from);
    if let Err(error) = sent.flatten() {
        tracing::warn!(%error, "can't tell systemd");
    }
}
