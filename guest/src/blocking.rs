//! Work that blocks, beside the one thread that serves.

use tokio::sync::oneshot;

use crate::boot::precedence;

/// Runs it on a thread of its own, to its end even where nobody waits for that any more. Tokio's own way panics where there
/// can be no more threads, which would end the machine.
///
/// # Errors
///
/// There can be no thread.
pub(crate) async fn on_a_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> std::io::Result<T> {
    let (sender, done) = oneshot::channel();
    std::thread::Builder::new().name(name.to_owned()).spawn(move || {
        precedence::ordinary();
        let _ = sender.send(work());
    })?;
    done.await.map_err(std::io::Error::other)
}
