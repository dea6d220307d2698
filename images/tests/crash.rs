//! What is left of a process that is killed in the middle of an import or a removal: at each system call that changes a
//! file system, one after the other.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{
    env, fs,
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Command, Stdio},
    ptr,
};

use nix::libc::{self, c_long, pid_t};
use stoker_images::{Digest, Limits, Store};
use support::{Layout, Tar, files};

mod support;

const STORE: &str = "STOKER_TEST_STORE";
const IMAGE: &str = "STOKER_TEST_IMAGE";

/// System calls that change a file system.
const CHANGES: &[c_long] = &[
    libc::SYS_copy_file_range,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_write,
];

/// Not a test: what the other test runs as a process of its own, and kills.
#[test]
#[ignore = "run by the test beside it"]
fn changes_a_store() {
    let (Some(store), Some(image)) = (env::var_os(STORE), env::var_os(IMAGE)) else {
        return;
    };
    let store = Store::open(Path::new(&store), Limits::default()).unwrap();
    if image.is_empty() {
        store.remove("name").unwrap();
    } else {
        store.import("name", Path::new(&image), None).unwrap();
    }
}

#[test]
fn a_crash_at_any_step_leaves_nothing_half_made() {
    let image = |content: &str| Layout::of(&[Tar::default().file("file", content.as_bytes()).file("etc/x", b"")]);
    let (old, new) = (image("old"), image("new"));
    let scratch = tempfile::tempdir().unwrap();
    let whole = Store::open(scratch.path(), Limits::default()).unwrap();
    let [old_id, new_id] = [&old, &new].map(|layout| {
        let image = whole.import("name", layout.path(), None).unwrap();
        (image.id, fs::read(image.path).unwrap())
    });
    for (what, before, change, after) in [
        ("import", None, Some(&new), Some(&new_id)),
        ("replace", Some(&old_id), Some(&new), Some(&new_id)),
        ("remove", Some(&old_id), None, None),
    ] {
        let mut steps = 0;
        loop {
            let folder = tempfile::tempdir().unwrap();
            let store = Store::open(folder.path(), Limits::default()).unwrap();
            if before.is_some() {
                store.import("name", old.path(), None).unwrap();
            }
            let is_done = run_and_kill(folder.path(), change.map(|layout| layout.path()), steps);
            // What somebody else finds who has had the store open all the time.
            check(&store, &[before, after], what, steps);
            let store = Store::open(folder.path(), Limits::default()).unwrap();
            let found = check(&store, &[before, after], what, steps);
            let expected: Vec<String> = found.map_or(Vec::new(), |id| {
                vec![
                    format!("images/{}", id.to_string().replace(':', "-")),
                    "names/name".to_owned(),
                ]
            });
            assert_eq!(files(folder.path()), expected, "{what} at {steps}");
            if is_done {
                assert_eq!(found, after.map(|(id, _)| *id), "{what}");
                break;
            }
            // It can be done again.
            match change {
                Some(layout) => drop(store.import("name", layout.path(), None).unwrap()),
                None => drop(store.remove("name")),
            }
            assert_eq!(check(&store, &[after], what, steps), after.map(|(id, _)| *id));
            steps += 1;
        }
        // Else nothing was killed.
        assert!(steps > 10, "{what}: {steps}");
    }
}

/// That the name leads to one of these images, whole, or to none where that may be.
fn check(store: &Store, allowed: &[Option<&(Digest, Vec<u8>)>], what: &str, step: usize) -> Option<Digest> {
    let found = store.get("name").ok();
    let id = found.as_ref().map(|image| image.id);
    let expected = allowed.iter().find(|allowed| allowed.map(|(id, _)| *id) == id);
    let expected = expected.unwrap_or_else(|| panic!("{what} at {step}: {id:?}"));
    if let (Some(image), Some((_, bytes))) = (found, expected) {
        assert_eq!(fs::read(image.path).unwrap(), *bytes, "{what} at {step}");
    }
    id
}

/// Runs the change and kills it as it begins to do its `step`th; true where it has less steps.
#[expect(
    clippy::zombie_processes,
    reason = "who traces a process waits for all its threads itself"
)]
fn run_and_kill(store: &Path, image: Option<&Path>, step: usize) -> bool {
    let mut command = Command::new(env::current_exe().unwrap());
    command
        .args(["--exact", "changes_a_store", "--ignored", "--test-threads=1"])
        .env(STORE, store)
        .env(IMAGE, image.unwrap_or(Path::new("")))
        .stdout(Stdio::null());
    // SAFETY: it only asks the kernel to be traced by its parent.
    unsafe {
        command.pre_exec(|| {
            libc::ptrace(libc::PTRACE_TRACEME, 0, ptr::null_mut::<u8>(), ptr::null_mut::<u8>());
            Ok(())
        });
    }
    let child = command.spawn().unwrap();
    let pid = pid_t::try_from(child.id()).unwrap();
    let options = libc::PTRACE_O_TRACESYSGOOD | libc::PTRACE_O_TRACECLONE | libc::PTRACE_O_EXITKILL;
    let mut seen = 0;
    let mut is_first = true;
    loop {
        let mut status = 0;
        // SAFETY: the status is ours.
        let stopped = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL) };
        assert!(stopped > 0, "{}", std::io::Error::last_os_error());
        if libc::WIFEXITED(status) || libc::WIFSIGNALED(status) {
            if stopped == pid {
                assert!(
                    libc::WIFSIGNALED(status) || libc::WEXITSTATUS(status) == 0,
                    "the change failed"
                );
                return libc::WIFEXITED(status);
            }
            continue;
        }
        if is_first {
            is_first = false;
            trace(libc::PTRACE_SETOPTIONS, stopped, usize::try_from(options).unwrap());
        }
        let signal = libc::WSTOPSIG(status);
        let is_call = signal == libc::SIGTRAP | 0x80;
        if is_call && changes(stopped) {
            if seen == step {
                // SAFETY: the process is our child, and was not waited for to its end.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                continue;
            }
            seen += 1;
        }
        // A new thread starts with SIGSTOP, and a new program with SIGTRAP: ours alone to know.
        let passed_on = if is_call || matches!(signal, libc::SIGTRAP | libc::SIGSTOP) {
            0
        } else {
            signal
        };
        trace(libc::PTRACE_SYSCALL, stopped, usize::try_from(passed_on).unwrap());
    }
}

fn trace(request: libc::c_uint, pid: pid_t, data: usize) {
    // SAFETY: none of the requests that are made has a pointer.
    let done = unsafe { libc::ptrace(request, pid, ptr::null_mut::<u8>(), data) };
    // It may be gone meanwhile.
    assert!(done == 0 || std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH));
}

/// Whether a thread is about to change a file system.
fn changes(pid: pid_t) -> bool {
    // SAFETY: all zeros is a value of it.
    let mut info: libc::ptrace_syscall_info = unsafe { std::mem::zeroed() };
    let size = size_of_val(&info);
    // SAFETY: `info` is of the size that is said.
    let got = unsafe { libc::ptrace(libc::PTRACE_GET_SYSCALL_INFO, pid, size, &raw mut info) };
    if got <= 0 || info.op != libc::PTRACE_SYSCALL_INFO_ENTRY {
        return false;
    }
    // SAFETY: `op` says that it is the entry of a system call.
    let number = unsafe { info.u.entry.nr };
    CHANGES.iter().any(|change| u64::try_from(*change) == Ok(number))
}
