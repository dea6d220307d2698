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
            // In a machine that is out of memory as a whole a container goes before anything of ours.
            "oomScoreAdj": 500,
            "rlimits": [
                limit("RLIMIT_NOFILE", OPEN_FILES),
                limit("RLIMIT_NPROC", cgroup::PIDS_MAX.into()),
                limit("RLIMIT_CORE", 0),
                limit("RLIMIT_MEMLOCK", 64 << 10),
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
        "linux": {
            // The network namespace is the one that the process that makes the container is in already.
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }, { "type": "cgroup" }
            ],
            "cgroupsPath": parts.cgroup,
            "maskedPaths": [
                "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                "/proc/sched_debug", "/proc/scsi", "/proc/kallsyms", "/proc/kmsg"
            ],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    });
    if parts.layers
        && let Some(Value::Array(mounts)) = spec.get_mut("mounts")
    {
        let opt = parts.tmpfs.join(OPT);
        mounts.push(mount("/opt", "bind", &opt, &["bind", "ro", "nosuid", "nodev"]));
    }
    spec
}

fn limit(kind: &str, value: u64) -> Value {
    json!({ "type": kind, "soft": value, "hard": value })
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
