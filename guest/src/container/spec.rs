//! The OCI runtime specification of a container (opencontainers/runtime-spec, config.md and config-linux.md).

use std::path::Path;

use serde_json::{Value, json};
use stoker_proto::runtimes::TASK_ROOT;

use super::{Function, Runtime, cgroup, environment, exec_wrapper};

/// The folder in the root, and in what a container may write to, that has the function's layers.
pub(super) const OPT: &str = "opt";

/// What a function of its own runtime starts, in its own zip or in a layer.
const BOOTSTRAP: &str = "bootstrap";

/// As Lambda sets it.
const OPEN_FILES: u64 = 1024;
/// What an image's programs may have open, at first and at most.
pub(super) const IMAGE_OPEN_FILES: (u64, u64) = (65_536, 1_048_576);
/// In a machine that is out of memory as a whole what runs in containers goes before anything of ours.
pub(super) const OOM_SCORE: i32 = 500;

/// Paths of the parts that a container is made of.
pub(super) struct Parts<'a> {
    /// The function's code.
    pub(super) code: &'a Path,
    /// Whether it has layers.
    pub(super) layers: bool,
    /// Its file system in memory, with folders `tmp` and `shm`, and [`OPT`] where there are layers.
    pub(super) tmpfs: &'a Path,
    /// What is `/tmp` where that is not in memory.
    pub(super) tmp: Option<&'a Path>,
    /// The root, an overlay.
    pub(super) root: &'a Path,
    /// From the root of the cgroup hierarchy.
    pub(super) cgroup: &'a Path,
}

/// What runs in the container.
fn command(runtime: Runtime, parts: &Parts<'_>) -> &'static [&'static str] {
    match runtime {
        // The last is a script, as on Lambda: wrappers put options of Python's before it.
        Runtime::Python311 => ["/usr/bin/python3.11", "/var/runtime/bootstrap.py"].as_slice(),
        Runtime::Provided if parts.layers && !is_there(&parts.code.join(BOOTSTRAP)) => &["/opt/bootstrap"],
        Runtime::Provided => &["/var/task/bootstrap"],
    }
}

/// Whether there is something but a folder. Links are a container's to follow.
fn is_there(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|file| !file.is_dir())
}

/// The specification. `uid` is of this container alone, so that what the kernel counts by user (processes, pipe buffers,
/// keys) is not shared with another.
pub(super) fn build(function: &Function, container: &str, uid: u32, parts: &Parts<'_>) -> Value {
    let environment: Vec<String> = environment::variables(function, container)
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    let in_memory = parts.tmpfs.join("tmp");
    let tmp = parts.tmp.unwrap_or(&in_memory);
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": { "uid": uid, "gid": uid },
            "args": exec_wrapper::wrapped(function, command(function.runtime, parts)),
            "env": environment,
            "cwd": TASK_ROOT,
            "capabilities": {
                "bounding": [], "effective": [], "inheritable": [], "permitted": [], "ambient": []
            },
            "noNewPrivileges": true,
            "oomScoreAdj": OOM_SCORE,
            "rlimits": [
                limit("RLIMIT_NOFILE", OPEN_FILES, OPEN_FILES),
                limit("RLIMIT_NPROC", cgroup::PIDS_MAX.into(), cgroup::PIDS_MAX.into()),
                limit("RLIMIT_CORE", 0, 0),
                limit("RLIMIT_MEMLOCK", 64 << 10, 64 << 10),
            ],
        },
        "root": { "path": parts.root, "readonly": false },
        "hostname": container,
        "mounts": [
            mount("/proc", "proc", "proc".as_ref(), &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs".as_ref(), &["nosuid", "noexec", "mode=755", "size=64k"]),
            mount("/dev/shm", "bind", &parts.tmpfs.join("shm"), &["bind", "nosuid", "nodev", "noexec"]),
            mount("/tmp", "bind", tmp, &["bind", "nosuid", "nodev"]),
            mount(TASK_ROOT, "bind", parts.code, &["bind", "ro", "nosuid", "nodev"]),
        ],
        "linux": linux(parts.cgroup),
    });
    if parts.layers
        && let Some(Value::Array(mounts)) = spec.get_mut("mounts")
    {
        let opt = parts.tmpfs.join(OPT);
        mounts.push(mount("/opt", "bind", &opt, &["bind", "ro", "nosuid", "nodev"]));
    }
    spec
}

/// The program of an image.
pub(super) struct Program<'a> {
    pub(super) command: &'a [String],
    pub(super) environment: &'a [String],
    pub(super) hostname: &'a str,
}

/// The specification of the image that the machine was launched from. User, capabilities and working directory are not for
/// `libcontainer`: the container's first process stays root's, and confines itself and the program ([`super::launch`]). A
/// program may come to have another user (set-user-ID), and the whole of the machine.
pub(super) fn of_image(program: &Program<'_>, tmpfs: &Path, root: &Path, cgroup: &Path) -> Value {
    let (open_files, most_open_files) = IMAGE_OPEN_FILES;
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": { "uid": 0, "gid": 0 },
            "args": program.command,
            "env": program.environment,
            "cwd": "/",
            "noNewPrivileges": false,
            "oomScoreAdj": OOM_SCORE,
            "rlimits": [
                limit("RLIMIT_NOFILE", open_files, most_open_files),
                limit("RLIMIT_CORE", 0, 0),
            ],
        },
        "root": { "path": root, "readonly": false },
        "hostname": program.hostname,
        "mounts": [
            mount("/proc", "proc", "proc".as_ref(), &["nosuid", "noexec", "nodev"]),
            // For who looks for CPUs; those that come later are seen there, too.
            mount("/sys", "sysfs", "sysfs".as_ref(), &["nosuid", "noexec", "nodev", "ro"]),
            mount("/dev", "tmpfs", "tmpfs".as_ref(), &["nosuid", "noexec", "mode=755", "size=64k"]),
            mount(
                "/dev/pts",
                "devpts",
                "devpts".as_ref(),
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
            ),
            mount("/dev/shm", "bind", &tmpfs.join("shm"), &["bind", "nosuid", "nodev", "noexec"]),
        ],
        "linux": linux(cgroup),
    })
}

/// What is the same for all containers.
fn linux(cgroup: &Path) -> Value {
    json!({
        // The network namespace is the one that the process that makes the container is in already.
        "namespaces": [
            { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "cgroup" }
        ],
        "cgroupsPath": cgroup,
        "maskedPaths": [
            "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
            "/proc/sched_debug", "/proc/scsi", "/proc/kallsyms", "/proc/kmsg", "/sys/firmware"
        ],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    })
}

fn limit(kind: &str, soft: u64, hard: u64) -> Value {
    json!({ "type": kind, "soft": soft, "hard": hard })
}

fn mount(destination: &str, kind: &str, source: &Path, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::Spec;

    use super::*;
    use crate::container::tests::function;

    fn spec(runtime: Runtime) -> Spec {
        spec_with(runtime, "/run/code/ab".as_ref(), false)
    }

    fn spec_with(runtime: Runtime, code: &Path, layers: bool) -> Spec {
        let parts = Parts {
            code,
            layers,
            tmpfs: "/run/tmpfs".as_ref(),
            tmp: None,
            root: "/run/root".as_ref(),
            cgroup: "/containers/01J".as_ref(),
        };
        serde_json::from_value(build(&function(runtime), "01J", 4711, &parts)).unwrap()
    }

    #[test]
    fn is_what_libcontainer_reads() {
        let spec = spec(Runtime::Python311);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(
            process.args().as_ref().unwrap(),
            &["/usr/bin/python3.11", "/var/runtime/bootstrap.py"]
        );
        assert_eq!(process.user().uid(), 4711);
        assert_eq!(process.no_new_privileges(), Some(true));
        let capabilities = process.capabilities().as_ref().unwrap();
        assert_eq!(capabilities.bounding().as_ref().map(|set| set.len()), Some(0));
        assert_eq!(capabilities.ambient().as_ref().map(|set| set.len()), Some(0));
        let task = spec.mounts().as_ref().unwrap().last().unwrap();
        assert_eq!(task.destination(), Path::new("/var/task"));
        assert!(task.options().as_ref().unwrap().contains(&"ro".to_owned()));
    }

    #[test]
    fn an_image_is_what_libcontainer_reads() {
        let program = Program {
            command: &["nginx".to_owned(), "-g".to_owned(), "daemon off;".to_owned()],
            environment: &["B=1".to_owned(), "A=2".to_owned()],
            hostname: "web-1",
        };
        let spec = of_image(
            &program,
            "/run/tmpfs".as_ref(),
            "/run/root".as_ref(),
            "/containers/01J".as_ref(),
        );
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_deref().unwrap(), program.command);
        assert_eq!(process.env().as_deref().unwrap(), program.environment);
        assert_eq!(process.no_new_privileges(), Some(false));
        // Its first process has all of them, until it has confined itself.
        assert!(process.capabilities().is_none());
        assert_eq!((process.user().uid(), process.user().gid()), (0, 0));
        let limits = process.rlimits().as_ref().unwrap();
        assert_eq!((limits[0].soft(), limits[0].hard()), (65_536, 1_048_576));
        assert_eq!(limits.len(), 2);
        assert_eq!(spec.hostname().as_deref(), Some("web-1"));
        let mounts = spec.mounts().as_ref().unwrap();
        let on = |path: &str| mounts.iter().find(|mount| mount.destination() == Path::new(path));
        assert!(on("/tmp").is_none(), "that is the image's own");
        assert!(
            on("/sys")
                .unwrap()
                .options()
                .as_ref()
                .unwrap()
                .contains(&"ro".to_owned())
        );
        assert!(
            on("/dev/pts")
                .unwrap()
                .options()
                .as_ref()
                .unwrap()
                .contains(&"newinstance".to_owned())
        );
    }

    #[test]
    fn layers_are_in_opt_and_may_bring_the_runtime() {
        let folder = tempfile::tempdir().unwrap();
        let starts = || {
            let spec = spec_with(Runtime::Provided, folder.path(), true);
            let opt = spec.mounts().as_ref().unwrap().last().unwrap();
            assert_eq!(opt.destination(), Path::new("/opt"));
            assert!(opt.options().as_ref().unwrap().contains(&"ro".to_owned()));
            spec.process().as_ref().unwrap().args().clone().unwrap()
        };
        assert_eq!(starts(), ["/opt/bootstrap"]);
        std::os::unix::fs::symlink("bin/run", folder.path().join(BOOTSTRAP)).unwrap();
        assert_eq!(starts(), ["/var/task/bootstrap"]);
    }

    #[test]
    fn a_native_function_is_its_bootstrap() {
        let spec = spec(Runtime::Provided);
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_ref().unwrap(), &["/var/task/bootstrap"]);
        assert!(
            process
                .env()
                .as_ref()
                .unwrap()
                .contains(&"AWS_LAMBDA_RUNTIME_API=127.0.0.1:9001".to_owned())
        );
    }
}
