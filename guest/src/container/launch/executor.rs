//! The last step inside the container: the system call filter, then the function's program.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::Arc;

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use seccompiler::BpfProgram;

/// Runs the program of the specification under a filter. It is `libcontainer`'s hook for it, since `libcontainer`'s own
/// seccomp wants a C library.
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

    /// Returns only where it fails: why.
    fn run(&self, spec: &Spec) -> String {
        let arguments = spec
            .process()
            .as_ref()
            .and_then(|process| process.args().as_deref());
        let Some([program, arguments @ ..]) = arguments else {
            return "the specification names no program".to_owned();
        };
        // The environment is set already, and privileges are dropped for good.
        if let Err(error) = seccompiler::apply_filter(&self.filter) {
            return format!("cannot filter system calls: {error}");
        }
        let error = Command::new(program).args(arguments).exec();
        format!("cannot run {program}: {error}")
    }
}

impl Executor for Filtered {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let why = self.run(spec);
        let _ = (&*self.failure).write_all(why.as_bytes());
        Err(ExecutorError::Other(why))
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        // The exec itself says best what is wrong with a program.
        Ok(())
    }
}
