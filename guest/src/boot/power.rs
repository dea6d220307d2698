//! The end of a machine.

use nix::sys::reboot::{RebootMode, reboot};

/// Powers the machine off, without writing back what is not yet on a drive: it ends with the machine. Returns only where the
/// kernel refuses, which it tells.
pub(crate) fn off() -> nix::Error {
    match reboot(RebootMode::RB_POWER_OFF) {
        Err(error) => error,
    }
}

/// Makes a panic of PID 1 power the machine off with a word on the console: a machine that hangs costs its host, one
/// that is gone is replaced.
pub(super) fn off_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("stoker-init: {panic}; powering off");
        eprintln!("stoker-init: the kernel refuses to power off: {}", off());
        std::process::abort();
    }));
}
