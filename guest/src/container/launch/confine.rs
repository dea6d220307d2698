//! What a program of an image may do: system calls and capabilities. Those of functions have no capability at all, and can never
//! come to have one, which `libcontainer` and [`seccompiler`] see to; an image's may have programs with set-user-ID.

use std::collections::HashSet;
use std::io;

use anyhow::Context as _;
use caps::{CapSet, Capability};
use nix::errno::Errno;
use seccompiler::BpfProgram;

/// What root has in a container: what Docker gives it (moby, `oci/caps/defaults.go`), without what a machine has no use for (raw
/// sockets, devices, the audit log).
const CAPABILITIES: [Capability; 11] = [
    Capability::CAP_CHOWN,
    Capability::CAP_DAC_OVERRIDE,
    Capability::CAP_FSETID,
    Capability::CAP_FOWNER,
    Capability::CAP_SETGID,
    Capability::CAP_SETUID,
    Capability::CAP_SETFCAP,
    Capability::CAP_SETPCAP,
    Capability::CAP_NET_BIND_SERVICE,
    Capability::CAP_SYS_CHROOT,
    Capability::CAP_KILL,
];

/// Confines this process, which has all capabilities and one thread, and all that it will start.
pub(super) fn confine(filter: &BpfProgram) -> anyhow::Result<()> {
    install(filter).context("cannot filter system calls")?;
    let keeps: HashSet<Capability> = CAPABILITIES.into();
    let has = caps::read(None, CapSet::Bounding)?;
    for capability in has.difference(&keeps) {
        caps::drop(None, CapSet::Bounding, *capability)?;
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    // Never more than is permitted.
    caps::set(None, CapSet::Effective, &keeps)?;
    caps::set(None, CapSet::Permitted, &keeps)?;
    Ok(())
}

/// Not by [`seccompiler::apply_filter`], which takes set-user-ID its effect (`PR_SET_NO_NEW_PRIVS`): one who may administer the
/// system need not do that (seccomp(2)).
fn install(filter: &BpfProgram) -> io::Result<()> {
    let program = libc::sock_fprog {
        len: filter.len().try_into().map_err(io::Error::other)?,
        // The kernel reads it alone.
        filter: filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `program` says where the instructions of `filter` are and how many; the kernel copies them before the call is over.
    // Its instructions are laid out as the kernel's are (`sock_filter` of both).
    let done = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            0_u64,
            &raw const program,
        )
    };
    Errno::result(done)?;
    Ok(())
}
