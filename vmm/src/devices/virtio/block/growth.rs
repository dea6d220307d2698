//! How a scratch drive grows while its machine runs.

use std::sync::Arc;

use super::super::config_space::ConfigSpace;
use super::disk::{GrowError, Image};

/// The end of a scratch drive by which it is made larger. The device's own thread has no part in it, so that one in the
/// middle of slow I/O holds up nobody.
pub struct Growth {
    image: Arc<Image>,
    config: Arc<ConfigSpace>,
}

// === impl Growth ===

impl Growth {
    pub(super) fn new(image: Arc<Image>, config: Arc<ConfigSpace>) -> Self {
        Self { image, config }
    }

    /// What the drive holds, in MiB.
    pub fn size_mib(&self) -> u32 {
        self.image.size_mib()
    }

    /// Makes the drive at least `size_mib` MiB large: first its file, then what the device lets the driver use, then the
    /// capacity that the driver is told. One that is as large already is left as it is.
    ///
    /// # Errors
    /// Where that is more than a drive may have, or the host does not make the file larger.
    pub fn grow(&mut self, size_mib: u32) -> Result<(), GrowError> {
        if size_mib <= self.size_mib() {
            return Ok(());
        }
        self.image.grow(size_mib)?;
        self.config.replace(super::config(self.image.sectors(), true));
        Ok(())
    }
}
