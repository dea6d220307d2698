//! Folders of the agent.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// Makes a folder, and those above it that are missing, that only its owner and group may enter (mode 0750). One that is
/// there already is left as it is.
///
/// # Errors
///
/// Where it can't be made.
pub fn make_private_dir(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}
