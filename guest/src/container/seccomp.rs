//! Which system calls a container may make. What is not listed does not exist for it (ENOSYS), as if the kernel had
//! been built without: libraries know how to fall back (glibc from `clone3`, whose flags a filter cannot see, to `clone`).
//!
//! Not listed, on purpose: `bpf`, `perf_event_open`, `userfaultfd`, `io_uring_*`, `ptrace`, `process_vm_*`, `pidfd_getfd`,
//! `kexec_*`, modules, keys, mounts, `unshare`, `setns`, `pivot_root`, clocks, quotas, swap, accounting, `reboot`.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// Namespaces that `clone` may not make.
const NAMESPACES: u64 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u64;

/// Whose calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Of {
    Function,
    /// What an image may run: servers that confine their own workers, and what has a drive of its own to write to.
    Image,
}

const FILES: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_chdir,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_creat,
    libc::SYS_dup,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fchdir,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_fcntl,
    libc::SYS_fdatasync,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_flock,
    libc::SYS_fremovexattr,
    libc::SYS_fsetxattr,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_futimesat,
    libc::SYS_getcwd,
    libc::SYS_getdents,
    libc::SYS_getdents64,
    libc::SYS_getxattr,
    libc::SYS_inotify_add_watch,
    libc::SYS_inotify_init,
    libc::SYS_inotify_init1,
    libc::SYS_inotify_rm_watch,
    libc::SYS_ioctl,
    libc::SYS_lchown,
    libc::SYS_lgetxattr,
    libc::SYS_link,
    libc::SYS_linkat,
    libc::SYS_listxattr,
    libc::SYS_llistxattr,
    libc::SYS_lremovexattr,
    libc::SYS_lseek,
    libc::SYS_lsetxattr,
    libc::SYS_lstat,
    libc::SYS_mkdir,
    libc::SYS_mkdirat,
    libc::SYS_mknod,
    libc::SYS_mknodat,
    libc::SYS_newfstatat,
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_pipe,
    libc::SYS_pipe2,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_read,
    libc::SYS_readahead,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_removexattr,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_rmdir,
    libc::SYS_sendfile,
    libc::SYS_setxattr,
    libc::SYS_splice,
    libc::SYS_stat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_symlink,
    libc::SYS_symlinkat,
    libc::SYS_sync_file_range,
    libc::SYS_tee,
    libc::SYS_truncate,
    libc::SYS_umask,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
    libc::SYS_utime,
    libc::SYS_utimensat,
    libc::SYS_utimes,
    libc::SYS_vmsplice,
    libc::SYS_write,
    libc::SYS_writev,
];

const EVENTS_AND_TIME: &[c_long] = &[
    libc::SYS_alarm,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd,
    libc::SYS_eventfd2,
    libc::SYS_getitimer,
    libc::SYS_gettimeofday,
    libc::SYS_nanosleep,
    libc::SYS_pause,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_select,
    libc::SYS_setitimer,
    libc::SYS_signalfd,
    libc::SYS_signalfd4,
    libc::SYS_time,
    libc::SYS_timer_create,
    libc::SYS_timer_delete,
    libc::SYS_timer_getoverrun,
    libc::SYS_timer_gettime,
    libc::SYS_timer_settime,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_times,
];

const MEMORY: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_get_mempolicy,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mlockall,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_munlockall,
    libc::SYS_munmap,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_free,
    libc::SYS_pkey_mprotect,
    libc::SYS_remap_file_pages,
];

const NETWORK: &[c_long] = &[
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_listen,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socketpair,
];

const PROCESSES: &[c_long] = &[
    libc::SYS_arch_prctl,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fork,
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_get_robust_list,
    libc::SYS_get_thread_area,
    libc::SYS_getcpu,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getgroups,
    libc::SYS_getpgid,
    libc::SYS_getpgrp,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getpriority,
    libc::SYS_getrandom,
    libc::SYS_getresgid,
    libc::SYS_getresuid,
    libc::SYS_getrlimit,
    libc::SYS_getrusage,
    libc::SYS_getsid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_ioprio_get,
    libc::SYS_ioprio_set,
    libc::SYS_kill,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_restrict_self,
    libc::SYS_pidfd_open,
    libc::SYS_pidfd_send_signal,
    libc::SYS_prctl,
    libc::SYS_prlimit64,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_sched_get_priority_max,
    libc::SYS_sched_get_priority_min,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getattr,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_sched_rr_get_interval,
    libc::SYS_sched_setaffinity,
    libc::SYS_sched_setattr,
    libc::SYS_sched_setparam,
    libc::SYS_sched_setscheduler,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_set_thread_area,
    libc::SYS_set_tid_address,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setpgid,
    libc::SYS_setpriority,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_setrlimit,
    libc::SYS_setsid,
    libc::SYS_setuid,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_tgkill,
    libc::SYS_tkill,
    libc::SYS_uname,
    libc::SYS_vfork,
    libc::SYS_wait4,
    libc::SYS_waitid,
];

const INTERPROCESS: &[c_long] = &[
    libc::SYS_mq_getsetattr,
    libc::SYS_mq_notify,
    libc::SYS_mq_open,
    libc::SYS_mq_timedreceive,
    libc::SYS_mq_timedsend,
    libc::SYS_mq_unlink,
    libc::SYS_msgctl,
    libc::SYS_msgget,
    libc::SYS_msgrcv,
    libc::SYS_msgsnd,
    libc::SYS_semctl,
    libc::SYS_semget,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_shmat,
    libc::SYS_shmctl,
    libc::SYS_shmdt,
    libc::SYS_shmget,
];

/// What only an image may.
const OF_IMAGES: &[c_long] = &[libc::SYS_chroot, libc::SYS_sync, libc::SYS_syncfs];

/// The filter, ready to be installed.
pub(super) fn filter(of: Of) -> Result<BpfProgram, BackendError> {
    let more = match of {
        Of::Function => &[],
        Of::Image => OF_IMAGES,
    };
    let mut rules: BTreeMap<c_long, Vec<SeccompRule>> =
        [FILES, EVENTS_AND_TIME, MEMORY, NETWORK, PROCESSES, INTERPROCESS, more]
            .into_iter()
            .flatten()
            .map(|call| (*call, Vec::new()))
            .collect();
    // Neither AF_VSOCK, which reaches the host, nor anything else out of the ordinary; of netlink what the C library
    // asks for its list of addresses.
    rules.insert(
        libc::SYS_socket,
        vec![
            SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, libc::AF_UNIX as u64)?])?,
            SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, libc::AF_INET as u64)?])?,
            SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, libc::AF_INET6 as u64)?])?,
            SeccompRule::new(vec![
                argument(0, SeccompCmpOp::Eq, libc::AF_NETLINK as u64)?,
                argument(2, SeccompCmpOp::Eq, libc::NETLINK_ROUTE as u64)?,
            ])?,
        ],
    );
    rules.insert(
        libc::SYS_clone,
        vec![SeccompRule::new(vec![argument(
            0,
            SeccompCmpOp::MaskedEq(NAMESPACES),
            0,
        )?])?],
    );
    // To ask, or to be what one is.
    rules.insert(
        libc::SYS_personality,
        vec![
            SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, 0)?])?,
            SeccompRule::new(vec![argument(0, SeccompCmpOp::Eq, 0xffff_ffff)?])?,
        ],
    );
    SeccompFilter::new(
        rules,
        SeccompAction::Errno(libc::ENOSYS as u32),
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?
    .try_into()
}

/// Compares the low 32 bits of an argument: all of those above are an `int` to the kernel, or have no more flags than that.
fn argument(index: u8, compare: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(index, SeccompCmpArgLen::Dword, compare, value)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs `attempt` in a thread under the filter.
    fn filtered<T: Send + 'static>(attempt: impl FnOnce() -> T + Send + 'static) -> T {
        filtered_of(Of::Function, attempt)
    }

    fn filtered_of<T: Send + 'static>(of: Of, attempt: impl FnOnce() -> T + Send + 'static) -> T {
        let program = filter(of).unwrap();
        std::thread::spawn(move || {
            seccompiler::apply_filter(&program).unwrap();
            attempt()
        })
        .join()
        .unwrap()
    }

    fn socket(domain: i32, protocol: i32) -> i32 {
        filtered(move || {
            // SAFETY: plain integers go in, and a descriptor, which is left open, or -1 comes out.
            let socket = unsafe { libc::socket(domain, libc::SOCK_DGRAM, protocol) };
            if socket >= 0 {
                0
            } else {
                std::io::Error::last_os_error().raw_os_error().unwrap()
            }
        })
    }

    #[test]
    fn sockets_are_of_ordinary_families() {
        assert_eq!(socket(libc::AF_INET, 0), 0);
        assert_eq!(socket(libc::AF_UNIX, 0), 0);
        assert_eq!(socket(libc::AF_NETLINK, libc::NETLINK_ROUTE), 0);
        assert_eq!(socket(libc::AF_VSOCK, 0), libc::ENOSYS);
        assert_eq!(socket(libc::AF_ALG, 0), libc::ENOSYS);
        assert_eq!(socket(libc::AF_NETLINK, libc::NETLINK_AUDIT), libc::ENOSYS);
    }

    #[test]
    fn what_is_dangerous_does_not_exist() {
        for call in [
            libc::SYS_bpf,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_ptrace,
            libc::SYS_keyctl,
            libc::SYS_perf_event_open,
            libc::SYS_kexec_load,
            libc::SYS_finit_module,
            libc::SYS_io_uring_setup,
            libc::SYS_userfaultfd,
            libc::SYS_clone3,
            // The x32 call that would be mount.
            0x4000_0000 | libc::SYS_mount,
        ] {
            let errno = filtered(move || {
                // SAFETY: without arguments none of these does anything but fail, filter or not.
                let result = unsafe { libc::syscall(call, 0, 0, 0, 0, 0) };
                assert_eq!(result, -1);
                std::io::Error::last_os_error().raw_os_error()
            });
            assert_eq!(errno, Some(libc::ENOSYS), "system call {call}");
        }
    }

    #[test]
    fn images_may_confine_their_own() {
        let chroot = || {
            // SAFETY: there is no path at all.
            let result = unsafe { libc::syscall(libc::SYS_chroot, 0) };
            assert_eq!(result, -1);
            std::io::Error::last_os_error().raw_os_error()
        };
        assert_eq!(filtered_of(Of::Function, chroot), Some(libc::ENOSYS));
        assert_eq!(filtered_of(Of::Image, chroot), Some(libc::EFAULT));
        let ptrace = || {
            // SAFETY: no process is meant.
            let result = unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_ATTACH, 0, 0, 0) };
            assert_eq!(result, -1);
            std::io::Error::last_os_error().raw_os_error()
        };
        assert_eq!(filtered_of(Of::Image, ptrace), Some(libc::ENOSYS));
    }

    #[test]
    fn threads_and_processes_can_still_be_made() {
        let output = filtered(|| {
            std::thread::spawn(|| std::process::Command::new("/bin/true").status().unwrap())
                .join()
                .unwrap()
        });
        assert!(output.success());
    }
}
