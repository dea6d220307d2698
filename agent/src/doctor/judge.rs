//! What the facts of a host mean.

use super::facts::{Agent, Ebpf, Facts, Folder, FolderState, Kvm, SCRATCH_DIR, SchedExt};
use super::{Finding, Verdict};
use crate::config::{Config, Scheduler};
use crate::render::bytes;

/// The oldest kernel that the programs that count load on.
const KERNEL: (u32, u32) = (6, 1);

/// The controllers that machines are limited by.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];

/// Files that an agent has open for each machine, and for all that is not a machine.
const FILES_A_MACHINE: u64 = 16;
const FILES: u64 = 1024;

/// Threads of a VMM beside its vCPUs, and processes of a host beside machines.
const THREADS_A_MACHINE: u64 = 8;
const THREADS: u64 = 4096;

/// Free space in a folder below which the agent can't work, and below which it soon can't.
const FULL: u64 = 64 << 20;
const SCARCE: u64 = 1 << 30;

/// What the facts mean for an agent with this configuration, a finding a check.
#[must_use]
pub fn judge(facts: &Facts, config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        kernel(facts),
        kvm(facts),
        cgroup(facts, config),
        ebpf(facts),
        scheduler(facts, config),
        open_files(facts, config),
        threads(facts, config),
        swap(facts),
        page_merging(facts),
        smt(facts),
        flaws(facts),
        huge_pages(facts),
        clock(facts),
    ];
    findings.extend(facts.folders.iter().map(|found| folder(found, facts)));
    findings.extend([scratch(facts, config), boot_files(facts), database(facts), agent(facts)]);
    findings
}

fn ok(check: &'static str, detail: impl Into<String>) -> Finding {
    Finding {
        check,
        verdict: Verdict::Ok,
        detail: detail.into(),
        remedy: None,
    }
}

fn bad(check: &'static str, verdict: Verdict, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding {
        check,
        verdict,
        detail: detail.into(),
        remedy: Some(remedy.into()),
    }
}

fn warn(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    bad(check, Verdict::Warn, detail, remedy)
}

fn fail(check: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    bad(check, Verdict::Fail, detail, remedy)
}

fn kernel(facts: &Facts) -> Finding {
    let mut numbers = facts
        .kernel
        .split(['.', '-'])
        .map_while(|part| part.parse::<u32>().ok());
    let release = &facts.kernel;
    match numbers.next().zip(numbers.next()) {
        Some(version) if version >= KERNEL => ok("kernel", release),
        _ => fail(
            "kernel",
            format!("{release} is older than {}.{}", KERNEL.0, KERNEL.1),
            "boot a newer kernel, as that of Debian 12",
        ),
    }
}

fn kvm(facts: &Facts) -> Finding {
    let has = |flag: &str| facts.cpu_flags.iter().any(|have| have == flag);
    let (detail, remedy) = match &facts.kvm {
        Kvm::Runs if has("hypervisor") => {
            return ok(
                "kvm",
                "runs a small machine; this host is a virtual machine too, so guests are slower than on metal",
            );
        }
        Kvm::Runs => return ok("kvm", "runs a small machine as fast as the hardware"),
        Kvm::Denied => (
            "this user may not open /dev/kvm",
            "run as root, or join the group that owns /dev/kvm",
        ),
        Kvm::Missing if has("vmx") => ("there is no /dev/kvm", "modprobe kvm_intel"),
        Kvm::Missing if has("svm") => ("there is no /dev/kvm", "modprobe kvm_amd"),
        Kvm::Missing if has("hypervisor") => (
            "there is no /dev/kvm: this host is a virtual machine that can have none itself",
            "turn nested virtualisation on in its hypervisor, or take a bare-metal host",
        ),
        Kvm::Missing => (
            "there is no /dev/kvm: the CPUs' virtualisation is off",
            "turn VT-x or AMD-V (SVM) on in the firmware",
        ),
        Kvm::Unfit(why) => (
            why.as_str(),
            "take a host whose KVM is the hardware's; `dmesg` may say more",
        ),
    };
    fail("kvm", detail, remedy)
}

fn cgroup(facts: &Facts, config: &Config) -> Finding {
    let below = config.machines.cgroup.display();
    let Some(mount) = &facts.cgroup_mount else {
        return fail(
            "cgroup",
            "no cgroup v2 file system is mounted",
            "mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1",
        );
    };
    let path = mount.join(&config.machines.cgroup);
    let has = |name: &str| facts.cgroup_controllers.iter().any(|have| have == name);
    let missing: Vec<_> = CONTROLLERS.into_iter().filter(|name| !has(name)).collect();
    if !missing.is_empty() {
        return fail(
            "cgroup",
            format!("{} lacks the controllers {}", path.display(), missing.join(", ")),
            "delegate them (`Delegate=yes` in a systemd unit, --cgroupns=private in a container); the kernel may need \
             cgroup_enable=memory, and cgroup v1 must not hold them",
        );
    }
    if !facts.cgroup_writable && facts.user != 0 {
        return warn(
            "cgroup",
            format!("this user may not make {}", path.display()),
            "run stokerd as root, or in a cgroup that is delegated to its user",
        );
    }
    if !facts.cgroup_writable {
        return fail(
            "cgroup",
            format!("{} can't be made: cgroups are read-only here", path.display()),
            "a container needs --privileged, or its cgroups mounted to be written",
        );
    }
    ok("cgroup", format!("{below} has {}", CONTROLLERS.join(", ")))
}

fn ebpf(facts: &Facts) -> Finding {
    match &facts.ebpf {
        Ebpf::Loads => ok("ebpf", "the programs that count load"),
        Ebpf::InUse => ok("ebpf", "an agent has loaded the programs that count"),
        Ebpf::NotRoot => warn("ebpf", "not looked at: this is not root", "run `stoker doctor` as root"),
        Ebpf::Refused(why) => fail(
            "ebpf",
            why,
            "stokerd needs root, or CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN, and a kernel that is not locked down",
        ),
    }
}

/// What schedules machines by their classes.
fn scheduler(facts: &Facts, config: &Config) -> Finding {
    const CHECK: &str = "scheduler";
    let wanted = config.machines.scheduler;
    let agent_runs = facts.agent == Agent::Runs;
    match &facts.sched_ext {
        SchedExt::Runs(name) if name == stoker_ebpf::scheduler::NAME => ok(CHECK, "sched_ext is in force"),
        SchedExt::Runs(name) if wanted != Scheduler::RealTime => warn(
            CHECK,
            format!("another sched_ext scheduler runs, {name}, and a kernel takes one alone"),
            "end it and restart stokerd, or let machines.scheduler be \"real_time\"",
        ),
        SchedExt::Absent if wanted == Scheduler::SchedExt => fail(
            CHECK,
            "machines.scheduler is \"sched_ext\", and this kernel has none",
            "let it be \"auto\", or boot Linux 6.12 or later with CONFIG_SCHED_CLASS_EXT",
        ),
        SchedExt::Idle if wanted != Scheduler::RealTime && agent_runs => warn(
            CHECK,
            "the kernel has sched_ext, and the agent does not use it: machines with credits run in real time",
            "the log of stokerd says why; restart it once that is mended, or let machines.scheduler be \"real_time\"",
        ),
        SchedExt::Idle if wanted != Scheduler::RealTime => ok(CHECK, "stokerd will use sched_ext, if it can"),
        SchedExt::Idle | SchedExt::Runs(_) => ok(CHECK, "machines with credits run in real time, as configured"),
        SchedExt::Absent => ok(
            CHECK,
            "machines with credits run in real time: this kernel has no sched_ext",
        ),
    }
}

fn open_files(facts: &Facts, config: &Config) -> Finding {
    let wanted = FILES + FILES_A_MACHINE * u64::from(config.pool.max_machines);
    match facts.open_files {
        Some(most) if most < wanted => warn(
            "open-files",
            format!(
                "a process may open {most}, and {} machines take up to {wanted}",
                config.pool.max_machines
            ),
            format!("LimitNOFILE={wanted} in the unit of stokerd, or `ulimit -Hn {wanted}`"),
        ),
        Some(most) => ok("open-files", format!("a process may open {most}")),
        None => ok("open-files", "unknown"),
    }
}

fn threads(facts: &Facts, config: &Config) -> Finding {
    let each = THREADS_A_MACHINE + u64::from(config.machines.vcpus);
    let wanted = THREADS + each * u64::from(config.pool.max_machines);
    match facts.threads {
        Some(most) if most < wanted => warn(
            "threads",
            format!(
                "the host may have {most}, and {} machines take up to {wanted}",
                config.pool.max_machines
            ),
            format!("sysctl kernel.pid_max=4194304 kernel.threads-max={wanted}"),
        ),
        Some(most) => ok("threads", format!("the host may have {most}")),
        None => ok("threads", "unknown"),
    }
}

fn swap(facts: &Facts) -> Finding {
    if facts.swap.is_empty() {
        return ok("swap", "off");
    }
    warn(
        "swap",
        format!("the memory of guests may be written to {}", facts.swap.join(", ")),
        "swapoff -a, and take it out of /etc/fstab; or encrypt it",
    )
}

fn page_merging(facts: &Facts) -> Finding {
    match facts.page_merging {
        false => ok("ksm", "equal pages of guests are not merged"),
        true => warn(
            "ksm",
            "equal pages of guests may be merged: one can tell what another has in memory",
            "echo 2 > /sys/kernel/mm/ksm/run, and disable ksmtuned",
        ),
    }
}

fn smt(facts: &Facts) -> Finding {
    match facts.smt {
        Some(true) => warn(
            "smt",
            "two threads share a core: accounts on one core may learn of each other through its caches",
            "where accounts do not trust each other: echo off > /sys/devices/system/cpu/smt/control, or boot with nosmt",
        ),
        Some(false) => ok("smt", "no threads share a core"),
        None => ok("smt", "unknown"),
    }
}

fn flaws(facts: &Facts) -> Finding {
    let open = facts.flaws.iter().filter(|(_, says)| says.contains("Vulnerable"));
    let open: Vec<_> = open.map(|(name, says)| format!("{name} ({says})")).collect();
    if open.is_empty() {
        return ok(
            "cpu-flaws",
            format!("all {} known are mitigated or absent", facts.flaws.len()),
        );
    }
    warn(
        "cpu-flaws",
        format!("guests may read what is not theirs: {}", open.join(", ")),
        "install the CPUs' microcode (intel-microcode, amd64-microcode), and do not boot with mitigations=off",
    )
}

fn huge_pages(facts: &Facts) -> Finding {
    let set = facts.huge_pages.as_deref().unwrap_or("not in this kernel");
    ok("huge-pages", format!("transparent huge pages: {set}"))
}

fn clock(facts: &Facts) -> Finding {
    match facts.clock_synchronised {
        Some(true) => ok("clock", "synchronised"),
        Some(false) => warn(
            "clock",
            "nothing keeps it right: times of reports, and of what several hosts do, may not fit",
            "run systemd-timesyncd or chrony",
        ),
        None => ok("clock", "unknown"),
    }
}

fn folder(folder: &Folder, facts: &Facts) -> Finding {
    let (key, path) = (folder.key, folder.path.display());
    let own = key != "machines.run_dir";
    match &folder.state {
        FolderState::NotAFolder => {
            return fail(
                key,
                format!("{path} is no folder"),
                format!("move it away, or set {key}"),
            );
        }
        FolderState::Unreadable(why) => {
            let remedy = "run `stoker doctor` as the user that stokerd runs as";
            return fail(key, format!("{path} can't be looked at: {why}"), remedy);
        }
        FolderState::There { owner, .. } if own && *owner != facts.user => {
            return fail(
                key,
                format!(
                    "{path} belongs to the user {owner}, and this is the user {}",
                    facts.user
                ),
                "run stokerd as that user; or see that what is in it is right, then `chown -R` it",
            );
        }
        FolderState::There { mode, .. } if own && mode & 0o022 != 0 => {
            return fail(
                key,
                format!("{path} may be written by others (mode {mode:04o})"),
                format!("see that what is in it is right, then `chmod go-w {path}`"),
            );
        }
        FolderState::Missing | FolderState::There { .. } => {}
    }
    let state = match folder.state {
        FolderState::Missing => "will be made",
        _ => "is there",
    };
    match folder.free {
        Some(free) if free < FULL => fail(key, format!("{path}: the disk is full"), "make room on it"),
        Some(free) if own && free < SCARCE => {
            warn(key, format!("{path}: only {} are free", bytes(free)), "make room on it")
        }
        Some(free) => ok(key, format!("{path} {state}, {} free", bytes(free))),
        None => ok(key, format!("{path} {state}")),
    }
}

/// Whether there is disk for as many machines as there is memory for.
fn scratch(facts: &Facts, config: &Config) -> Finding {
    const CHECK: &str = "scratch-disk";
    let free = facts.folders.iter().find(|folder| folder.key == SCRATCH_DIR);
    let Some((free, memory)) = free.and_then(|folder| folder.free).zip(facts.memory) else {
        return ok(CHECK, "unknown");
    };
    let (machines, pool) = (&config.machines, &config.pool);
    let free_mib = free >> 20;
    let all_mib = pool.scratch_gib.map_or(free_mib / 2, |gib| gib.saturating_mul(1024));
    let memory_mib = pool.memory_mib.unwrap_or((memory >> 20) / 10 * 9);
    let by_memory = (memory_mib / u64::from(machines.memory_mib.max(1))).min(pool.max_machines.into());
    let by_disk = all_mib / u64::from(machines.scratch_mib.max(1));
    let each = machines.scratch_mib;
    let remedy = "set machines.scratch_dir to a larger disk, lower machines.scratch_mib, or set pool.scratch_gib";
    let warming = pool.warming.values().map(|machines| u64::from(*machines)).sum::<u64>();
    if by_disk < warming.max(1) {
        let detail = format!("there is disk for {by_disk} machines of {each} MiB, and {warming} are to be warm");
        return fail(CHECK, detail, remedy);
    }
    if all_mib > free_mib {
        let detail = format!("machines may have {all_mib} MiB, and {free_mib} MiB are free now");
        return warn(CHECK, detail, "lower pool.scratch_gib, or make room on the disk");
    }
    if by_disk < by_memory {
        let detail = format!("there is disk for {by_disk} machines of {each} MiB, and memory for {by_memory}");
        return warn(CHECK, detail, remedy);
    }
    ok(CHECK, format!("room for {by_disk} machines of {each} MiB"))
}

fn boot_files(facts: &Facts) -> Finding {
    match &facts.boot_files {
        Ok(()) => ok("boot-files", "VMM, kernel, initramfs and image are whole"),
        Err(why) => fail("boot-files", why, "install them, or set the key to where they are"),
    }
}

fn database(facts: &Facts) -> Finding {
    match (&facts.database, &facts.agent) {
        (Some(Ok(())), _) => ok("database", "whole"),
        (Some(Err(why)), _) => fail(
            "database",
            why,
            "`stoker admin check` says all that is wrong; `stoker admin restore` puts a backup in its place",
        ),
        (None, Agent::Stopped) => ok("database", "none yet: it is made at the first start"),
        (None, _) => ok("database", "not looked at: an agent has it open"),
    }
}

fn agent(facts: &Facts) -> Finding {
    match &facts.agent {
        Agent::Runs => ok("agent", "runs"),
        Agent::Stopped => ok("agent", "does not run"),
        Agent::Unknown(why) => warn("agent", why, "run `stoker doctor` as root, or join the socket's group"),
    }
}

#[cfg(test)]
mod tests;
