//! The scratch drive of a machine, which its VMM makes larger while the machine runs.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use stoker_vmm::control::{Client, ClientError};
use tokio::sync::Mutex;

/// How long a VMM may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// The drive; clones are the same.
#[derive(Clone)]
pub struct ScratchDrive(Arc<Inner>);

/// Makes the drive hold so much, in MiB, or more. Blocks.
type Grow = dyn Fn(u32) -> Result<(), ClientError> + Send + Sync;

struct Inner {
    grow: Box<Grow>,
    /// What it holds at least, in MiB. Locked while it is made larger.
    mib: Mutex<u32>,
}

/// Why a drive was not made larger. It is as it was, or larger.
#[derive(Debug, thiserror::Error)]
#[error("the machine's scratch disk can't be made {mib} MiB large: {source}")]
pub struct DriveError {
    /// What it was to hold.
    mib: u32,
    source: GrowError,
}

#[derive(Debug, thiserror::Error)]
enum GrowError {
    #[error(transparent)]
    Vmm(#[from] ClientError),
    #[error("the VMM did not answer within {ANSWER:?}")]
    Late,
    #[error("the agent's task for it panicked")]
    Panicked,
}

// === impl ScratchDrive ===

impl ScratchDrive {
    /// The drive of the machine whose VMM listens on that socket; `mib` is what it is known to hold, 0 where nothing is known.
    pub(super) fn of_vmm(control: PathBuf, mib: u32) -> Self {
        Self::new(mib, move |mib| {
            Client::connect(&control, ANSWER)?.grow_scratch(mib)?;
            Ok(())
        })
    }

    /// A drive that is made larger by that.
    pub(crate) fn new(mib: u32, grow: impl Fn(u32) -> Result<(), ClientError> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Inner {
            grow: Box::new(grow),
            mib: Mutex::new(mib),
        }))
    }

    /// Resolves once it holds so much, in MiB, or more. At once where it is known to.
    ///
    /// # Errors
    /// [`DriveError`].
    pub async fn hold(&self, mib: u32) -> Result<(), DriveError> {
        let mut has = self.0.mib.lock().await;
        if *has >= mib {
            return Ok(());
        }
        let this = self.clone();
        let growing = tokio::task::spawn_blocking(move || (this.0.grow)(mib));
        let grown = match tokio::time::timeout(ANSWER, growing).await {
            Ok(Ok(grown)) => grown.map_err(GrowError::from),
            Ok(Err(_)) => Err(GrowError::Panicked),
            Err(_) => Err(GrowError::Late),
        };
        grown.map_err(|source| DriveError { mib, source })?;
        *has = mib;
        Ok(())
    }
}

impl fmt::Debug for ScratchDrive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScratchDrive").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use super::*;

    /// What was asked for, and whether that is to fail.
    type Notes = Arc<Mutex<(Vec<u32>, bool)>>;

    fn drive(mib: u32) -> (ScratchDrive, Notes) {
        let asked = Notes::default();
        let notes = asked.clone();
        let drive = ScratchDrive::new(mib, move |mib| {
            let mut notes = notes.lock().unwrap();
            notes.0.push(mib);
            match notes.1 {
                true => Err(io::Error::other("as the test wants it").into()),
                false => Ok(()),
            }
        });
        (drive, asked)
    }

    #[tokio::test]
    async fn it_is_asked_for_only_where_it_is_not_as_large_already() {
        let (drive, asked) = drive(1024);
        for mib in [0, 1024, 1500, 1400, 1500, 1501] {
            drive.hold(mib).await.unwrap();
        }
        assert_eq!(asked.lock().unwrap().0, [1500, 1501]);
    }

    #[tokio::test]
    async fn what_failed_is_tried_again_and_says_why() {
        let (drive, asked) = drive(1024);
        asked.lock().unwrap().1 = true;
        let error = drive.hold(2048).await.unwrap_err().to_string();
        assert!(
            error.contains("2048 MiB") && error.contains("as the test wants it"),
            "{error}"
        );
        asked.lock().unwrap().1 = false;
        drive.hold(2048).await.unwrap();
        assert_eq!(asked.lock().unwrap().0, [2048, 2048]);
    }

    #[tokio::test]
    async fn a_vmm_that_is_not_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let drive = ScratchDrive::of_vmm(dir.path().join("control.sock"), 0);
        let error = drive.hold(600).await.unwrap_err().to_string();
        assert!(error.contains("control socket"), "{error}");
    }
}
