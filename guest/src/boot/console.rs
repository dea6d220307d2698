//! Standard input, output and error of PID 1.

use std::fs::OpenOptions;

use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout};

/// Takes `/dev/console` as standard input, output and error: an initramfs without that node leaves PID 1 without any.
/// A machine with no console at all is none the worse.
pub(super) fn take() {
    if let Ok(console) = OpenOptions::new().read(true).write(true).open("/dev/console") {
        let _ = dup2_stdin(&console);
        let _ = dup2_stdout(&console);
        let _ = dup2_stderr(&console);
    }
}
