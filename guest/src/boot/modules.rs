//! Kernel modules, for kernels that do not have everything built in.

use std::fs::File;
use std::io::ErrorKind;
use std::path::Path;

use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::BootError;

/// Loads the modules that `list` names, one path a line in the order of their dependencies. No list, no modules.
pub(super) fn load(list: &Path) -> Result<(), BootError> {
    let list = match std::fs::read_to_string(list) {
        Ok(list) => list,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(BootError::ModuleList(error)),
    };
    for path in list.lines().map(str::trim).filter(|path| !path.is_empty()) {
        let failed = |source| BootError::Module {
            path: path.to_owned(),
            source,
        };
        let mut flags = ModuleInitFlags::empty();
        if [".xz", ".gz", ".zst"].iter().any(|end| path.ends_with(end)) {
            // MODULE_INIT_COMPRESSED_FILE, finit_module(2).
            flags = ModuleInitFlags::from_bits_retain(4);
        }
        let file = File::open(path).map_err(failed)?;
        match finit_module(&file, c"", flags) {
            Ok(()) | Err(Errno::EEXIST) => {}
            // A driver of what this host does not offer, as ptp_kvm is where its own clock is none that can be read so.
            Err(Errno::ENODEV | Errno::EOPNOTSUPP) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        // In the initramfs a file is memory: once loaded it is of no more use.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}
