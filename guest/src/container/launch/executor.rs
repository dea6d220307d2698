//! The last steps inside the container: the system call filter, then its PID 1.

use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context as _;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use seccompiler::BpfProgram;

use super::pid1::{self, Pid1};
use super::program::Program;
use super::{Report, wire};
use crate::container::environment::is_for_extensions;

/// Where layers put external extensions: each file is one.
const EXTENSIONS: &str = "/opt/extensions";

/// Runs the program of the specification, and external extensions, under a filter, as children of the container's PID 1. It
/// is `libcontainer`'s hook for it, since `libcontainer`'s own seccomp wants a C library.
#[derive(Clone)]
pub(super) struct Filtered {
    filter: Arc<BpfProgram>,
    /// The socket to init.
    control: Arc<OwnedFd>,
}

// === impl Filtered ===

impl Filtered {
    pub(super) fn new(filter: BpfProgram, control: OwnedFd) -> Self {
        Self {
            filter: Arc::new(filter),
            control: Arc::new(control),
        }
    }

    /// Returns only where it fails.
    fn run(&self, spec: &Spec) -> anyhow::Result<Infallible> {
        seccompiler::apply_filter(&self.filter).context("cannot filter system calls")?;
        let process = spec.process().as_ref();
        let arguments = process
            .and_then(|process| process.args().as_deref())
            .context("the specification names no program")?;
        // `libcontainer` has set it by now.
        let environment: Vec<Vec<u8>> = std::env::vars_os()
            .map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat())
            .collect();
        let extensions = extensions(Path::new(EXTENSIONS), &environment)?;
        let runtime = Program::new(arguments.iter().map(String::as_bytes), environment)?;
        let control = self.control.try_clone().context("cannot duplicate a socket")?;
        pid1::run(Pid1::new(control, runtime, extensions))
    }
}

/// The external extensions in a folder, by name.
pub(super) fn extensions(folder: &Path, environment: &[Vec<u8>]) -> anyhow::Result<Vec<(String, Program)>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", folder.display())),
    };
    let environment: Vec<&[u8]> = environment
        .iter()
        .map(Vec::as_slice)
        .filter(|variable| is_for_extensions(variable.split(|byte| *byte == b'=').next().unwrap_or_default()))
        .collect();
    let mut extensions = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot read {}", folder.display()))?;
        // What a link leads to is seen when it is run.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let program = Program::new([entry.path().as_os_str().as_bytes()], environment.iter().copied())?;
        extensions.push((entry.file_name().to_string_lossy().into_owned(), program.within(c"/")));
    }
    extensions.sort_by(|(one, _), (other, _)| one.cmp(other));
    Ok(extensions)
}

impl Executor for Filtered {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let Err(error) = self.run(spec);
        let why = format!("{error:#}");
        // If init is gone there is nobody left to tell.
        let _ = wire::send(&*self.control, &Report::Failed(why.clone()), None);
        Err(ExecutorError::Other(why))
    }

    fn validate(&self, _spec: &Spec) -> Result<(), ExecutorValidationError> {
        // The exec itself says best what is wrong with a program.
        Ok(())
    }
}
