//! Makes the container that has all of the machine.

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::Pid;
use stoker_linux::CgroupError;
use stoker_proto::limits::{EXECS, FORWARDED_PORTS};
use tokio::sync::Semaphore;

use super::memory::MemoryLimit;
use super::{LaunchedFrom, Program, Running, Workload};
use crate::blocking;
use crate::boot::{self, BootError};
use crate::container::cgroup::Cgroup;
use crate::container::launch::{Contents, Image, LaunchError, Launched, Order};
use crate::container::log::Log;
use crate::container::{environment, spec};
use crate::machine;
use crate::telemetry::Telemetry;

/// What a program has where its image says nothing of it: Docker's.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why the container could not be made.
#[derive(Debug, thiserror::Error)]
pub(super) enum MakeError {
    #[error("cannot mount the image: {0}")]
    Image(#[from] BootError),
    #[error("the machine's scratch drive can't be used: {0}")]
    Drive(Arc<str>),
    #[error("cannot make the folder that the image writes to: {0}")]
    Layer(std::io::Error),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("cannot make a pipe for the log: {0}")]
    Log(std::io::Error),
    #[error(transparent)]
    Launch(#[from] LaunchError),
    #[error("cannot watch the container's first process: {0}")]
    Pidfd(Errno),
    #[error("cannot run a thread for the container: {0}")]
    Thread(std::io::Error),
}

// === impl Workload ===

impl Workload {
    pub(super) async fn make(
        &self,
        from: &LaunchedFrom,
        mut program: Program,
    ) -> Result<(Running, Launched), MakeError> {
        let containers = &self.0.containers;
        let places = containers.places();
        let layer = self.mounted(from, &program.id).await?;
        let cgroup = Cgroup::create_for_image(&places.cgroups, &program.id)?;
        let memory = MemoryLimit::set(&cgroup)?;
        let subject = Telemetry::count_with_parts(cgroup.shared());
        let feed = containers.feeds().feed(program.id.clone());
        let (log, log_end) = Log::open(program.user.uid, feed, |_| (), subject.budget()).map_err(MakeError::Log)?;
        let has_home = complete(&mut program);
        let of_spec = spec::Program {
            command: &program.command,
            environment: &program.environment,
            hostname: &program.hostname,
        };
        let order = Order {
            spec: spec::of_image(&of_spec, &places.tmpfs, &places.root, &cgroup.path_in_hierarchy()),
            id: program.id.clone(),
            root: places.root.clone(),
            tmpfs: places.tmpfs.clone(),
            // What `/dev/shm` has by default in Linux.
            tmpfs_bytes: machine::memory_bytes() / 2,
            contents: Contents::Image(Image {
                lower: from.on.clone(),
                layer,
                hostname: program.hostname.clone(),
                user: program.user.clone(),
                working_dir: program.working_dir.clone(),
            }),
        };
        let launcher = containers.take_launcher()?;
        // Its ports are all its own: nobody serves the Runtime API there.
        drop(launcher.ready().await?);
        let created = launcher.create(containers.reaper(), order, log_end).await?;
        let launched = created.start().await?;
        let running = Running {
            has_home,
            control: launched.control.clone(),
            pidfd: pidfd(launched.pid()).map_err(MakeError::Pidfd)?,
            cgroup,
            subject,
            memory,
            log,
            execs: Arc::new(Semaphore::new(EXECS)),
            ports: Arc::new(Semaphore::new(FORWARDED_PORTS)),
            program,
        };
        Ok((running, launched))
    }

    /// Has the image mounted, and a folder made that it writes to: none where that is in memory.
    async fn mounted(&self, from: &LaunchedFrom, id: &str) -> Result<Option<PathBuf>, MakeError> {
        let drive = match &from.scratch {
            Some(scratch) => Some(scratch.drive().await.map_err(MakeError::Drive)?),
            None => None,
        };
        let (device, on, id) = (from.device.clone(), from.on.clone(), id.to_owned());
        blocking::on_a_thread("image", move || {
            // Where it was tried before it is there.
            if !is_mount(&on) {
                boot::mount_image(&device, &on)?;
            }
            let layer = drive.map(|drive| drive.whole(&format!("image-{id}")));
            layer.transpose().map_err(MakeError::Layer)
        })
        .await
        .map_err(MakeError::Thread)?
    }
}

/// Adds what every program has to its environment. Whether it had `HOME`.
fn complete(program: &mut Program) -> bool {
    let Program {
        environment,
        user,
        hostname,
        ..
    } = program;
    if !environment::has(environment, "PATH") {
        environment.push(PATH.to_owned());
    }
    if !environment::has(environment, "HOSTNAME") {
        environment.push(format!("HOSTNAME={hostname}"));
    }
    let has_home = environment::has(environment, "HOME");
    if !has_home {
        environment.push(format!("HOME={}", user.home));
    }
    has_home
}

/// Whether something is mounted there.
fn is_mount(folder: &std::path::Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let device = |path: &std::path::Path| path.metadata().ok().map(|found| found.dev());
    match (device(folder), folder.parent().and_then(device)) {
        (Some(own), Some(above)) => own != above,
        _ => false,
    }
}

/// pidfd_open(2), of a process that was not reaped yet.
fn pidfd(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: integers go in, and a descriptor comes out that nobody else knows of.
    unsafe {
        let fd = Errno::result(libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0))?;
        // A descriptor is an `int`.
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

#[cfg(test)]
mod tests {
    use stoker_linux::users::User;

    use super::*;

    fn program(environment: &[&str]) -> Program {
        Program {
            id: "01J".to_owned(),
            command: vec!["nginx".to_owned()],
            environment: environment.iter().map(|&variable| variable.to_owned()).collect(),
            working_dir: "/".to_owned(),
            user: User {
                uid: 101,
                gid: 102,
                groups: vec![],
                home: "/srv".to_owned(),
            },
            hostname: "web-1".to_owned(),
        }
    }

    #[test]
    fn programs_have_what_they_expect() {
        let mut plain = program(&["A=1", "A=2"]);
        assert!(!complete(&mut plain));
        assert_eq!(plain.environment, ["A=1", "A=2", PATH, "HOSTNAME=web-1", "HOME=/srv"]);
        let own = ["PATH=/opt/bin", "HOME=", "HOSTNAME=other", "PATHS=/x"];
        let mut told = program(&own);
        assert!(complete(&mut told));
        assert_eq!(told.environment, own);
    }

    #[test]
    fn a_pidfd_is_of_a_process() {
        assert!(pidfd(nix::unistd::getpid()).is_ok());
        assert_eq!(pidfd(Pid::from_raw(0)).unwrap_err(), Errno::EINVAL);
    }

    #[test]
    fn what_is_mounted_is_seen() {
        assert!(is_mount("/proc".as_ref()) && !is_mount("/proc/sys/kernel".as_ref()));
        assert!(!is_mount("/nowhere/at/all".as_ref()));
    }
}
