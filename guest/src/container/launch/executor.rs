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

use super::confine::confine;
use super::pid1::{self, Pid1};
use super::program::Program;
use super::{Image, Report, wire};
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
    /// None of a function.
    image: Option<Image>,
}

// === impl Filtered ===

impl Filtered {
    pub(super) fn new(filter: BpfProgram, control: OwnedFd, image: Option<Image>) -> Self {
        Self {
            filter: Arc::new(filter),
            control: Arc::new(control),
            image,
        }
    }

    /// Returns only where it fails.
    fn run(&self, spec: &Spec) -> anyhow::Result<Infallible> {
        match &self.image {
            Some(image) => self.run_image(spec, image),
            None => self.run_function(spec),
        }
    }

    fn run_function(&self, spec: &Spec) -> anyhow::Result<Infallible> {
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
        pid1::run(Pid1::new(self.control()?, runtime, extensions))
    }

    /// This process stays root's, who may signal whomever the program becomes.
    fn run_image(&self, spec: &Spec, image: &Image) -> anyhow::Result<Infallible> {
        work_in(Path::new(&image.working_dir))?;
        confine(&self.filter)?;
        let process = spec.process().as_ref().context("the specification has no process")?;
        let arguments = process.args().iter().flatten().map(String::as_bytes);
        // As it stands there: `libcontainer` keeps no order.
        let environment = process.env().iter().flatten().map(String::as_bytes);
        let program = Program::new(arguments, environment)?
            .with_user(&image.user)
            .found_by_path();
        pid1::run(Pid1::new(self.control()?, program, Vec::new()))
    }

    fn control(&self) -> anyhow::Result<OwnedFd> {
        self.control.try_clone().context("cannot duplicate a socket")
    }
}

/// Makes a folder where it is not there, as Docker does, and goes there. This process is in the container.
fn work_in(folder: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)
        .and_then(|()| std::env::set_current_dir(folder))
        .with_context(|| format!("cannot work in {}", folder.display()))?;
    is_inside()
}

/// That a name in `/proc` did not lead this process out of the container: then its folder has no path there (getcwd(2)).
pub(super) fn is_inside() -> anyhow::Result<()> {
    let folder = std::env::current_dir().context("cannot tell where it works")?;
    anyhow::ensure!(folder.is_absolute(), "it would work outside of the container");
    Ok(())
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
