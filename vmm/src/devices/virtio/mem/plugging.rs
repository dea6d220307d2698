//! How the host asks for more or less memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::super::config_space::ConfigSpace;
use super::field;
use crate::memory::{BLOCK, Pluggable};

/// The device's end by which memory is asked for. The device's own thread has no part in it.
pub struct Plugging {
    memory: Arc<Pluggable>,
    requested: Arc<AtomicU64>,
    config: Arc<ConfigSpace>,
}

/// What cannot be asked for; nothing has changed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum AskError {
    /// Blocks are whole.
    #[error("{0} MiB cannot be plugged: memory comes in blocks of {block} MiB", block = BLOCK >> 20)]
    Block(u32),
    /// There is no room for it.
    #[error("{asked} MiB cannot be plugged: {most} MiB at most")]
    TooMuch {
        /// What was asked for.
        asked: u32,
        /// What is possible.
        most: u64,
    },
}

// === impl Plugging ===

impl Plugging {
    pub(super) fn new(memory: Arc<Pluggable>, requested: Arc<AtomicU64>, config: Arc<ConfigSpace>) -> Self {
        Self {
            memory,
            requested,
            config,
        }
    }

    /// What was asked for last, in MiB.
    pub fn asked_mib(&self) -> u32 {
        mib(self.requested.load(Ordering::SeqCst))
    }

    /// What the driver has plugged, in MiB.
    pub fn taken_mib(&self) -> u32 {
        mib(self.memory.plugged() * BLOCK)
    }

    /// Asks the driver to have `mib` MiB plugged. It does so in its own time, or not: one that could not go on, as Linux where
    /// memory is in use, tries again when it is asked again, and else after a minute or more.
    ///
    /// # Errors
    /// Where that is not of whole blocks, or more than there is room for.
    pub fn ask(&mut self, mib: u32) -> Result<(), AskError> {
        let bytes = u64::from(mib) << 20;
        if !bytes.is_multiple_of(BLOCK) {
            return Err(AskError::Block(mib));
        }
        if bytes > self.memory.length() {
            return Err(AskError::TooMuch {
                asked: mib,
                most: self.memory.length() >> 20,
            });
        }
        // First what the device allows, then what the driver is told.
        let before = self.requested.swap(bytes, Ordering::SeqCst);
        if before != bytes {
            self.config.set(field::REQUESTED_SIZE, &bytes.to_le_bytes());
        }
        if before != bytes || self.memory.plugged() * BLOCK != bytes {
            self.config.tell();
        }
        Ok(())
    }
}

/// A machine has at most [`crate::config::MAX_MEMORY_MIB`].
fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}
