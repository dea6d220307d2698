//! The last steps inside the container: the system call filter, a process of its own for the function, its program.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use anyhow::Context as _;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::unistd::{ForkResult, execve, fork};
use seccompiler::BpfProgram;

use super::pid1;

/// Runs the program of the specification under a filter, in a child of the container's PID 1. It is `libcontainer`'s hook
/// for it, since `libcontainer`'s own seccomp wants a C library.
#[derive(Clone)]
pub(super) struct Filtered {
    filter: Arc<BpfProgram>,
    /// Says why the program could not be run; closed by the exec that succeeds.
    failure: Arc<File>,
}

// === impl Filtered ===

impl Filtered {
    pub(super) fn new(filter: BpfProgram, failure: File) -> Self {
        Self {
            filter: Arc::new(filter),
            failure: Arc::new(failure),
        }
    }

    /// Returns only where it fails.
    fn run(&self, spec: &Spec) -> anyhow::Result<Infallible> {
        seccompiler::apply_filter(&self.filter).context("cannot filter system calls")?;
        // SAFETY: this process has one thread: `libcontainer` cloned it from the launcher, which has one.
        match unsafe { fork() }.context("cannot fork")? {
            ForkResult::Parent { child } => pid1::wait_for(child),
            ForkResult::Child => {
                let Err(error) = exec(spec);
                self.tell(&error);
                pid1::exit(pid1::NOT_EXECUTABLE)
            }
        }
    }

    fn tell(&self, error: &anyhow::Error) {
        // If the launcher is gone there is nobody left to tell.
        let _ = (&*self.failure).write_all(format!("{error:#}").as_bytes());
    }
}

/// Becomes the function's program. Returns only where it fails.
fn exec(spec: &Spec) -> anyhow::Result<Infallible> {
    let process = spec.process().as_ref();
    let arguments = process
        .and_then(|process| process.args().as_deref())
        .context("the specification names no program")?;
    let arguments = terminated(arguments.iter().map(String::as_bytes))?;
    let program = arguments.first().context("the specification names no program")?;
    // `libcontainer` has set the environment by now.
    let environment =
        terminated(std::env::vars_os().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat()))?;
    // Rust programs ignore it; others do not expect that.
    // SAFETY: the default action is no handler of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) }?;
    // Not by way of a shell, as `execvp` does with what is no program.
    execve(program, &arguments, &environment).with_context(|| format!("cannot run {}", program.to_string_lossy()))
}

fn terminated(texts: impl Iterator<Item = impl Into<Vec<u8>>>) -> Result<Vec<CString>, std::ffi::NulError> {
    texts.map(CString::new).collect()
}

impl Executor for Filtered {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Err(error) = self.run(spec);
        self.tell(&error);
        Err(ExecutorError::Other(format!("{error:#}")))
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        // The exec itself says best what is wrong with a program.
        Ok(())
    }
}
