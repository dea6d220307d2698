//! What the agent refuses for the moment is asked for again.

use std::time::{Duration, Instant};

use tonic_types::StatusExt as _;

use super::Failure;

/// How long something is asked for again.
const TRYING: Duration = Duration::from_secs(300);

/// Tries until it is not refused any more, or for another reason than that it may be tried again, or for too long.
pub(super) async fn retried<T>(mut attempt: impl AsyncFnMut() -> Result<T, Failure>) -> Result<T, Failure> {
    let begun = Instant::now();
    loop {
        let tried = attempt().await;
        let delay = match &tried {
            Err(Failure::Refused(status)) if begun.elapsed() < TRYING => {
                let details = status.get_error_details();
                details.retry_info().and_then(|info| info.retry_delay)
            }
            _ => None,
        };
        match delay {
            Some(delay) => tokio::time::sleep(delay).await,
            None => return tried,
        }
    }
}
