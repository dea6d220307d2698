//! What the lab is made of: QEMU, a Debian kernel with its modules, and an initramfs that turns this machine's root file
//! system into the lab's.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use stoker_testkit::cpio::Archive;

use super::qemu_patch;
use crate::{
    process,
    setup::{
        Step, Work,
        apt::{BOOKWORM, Fetch, TRIXIE},
    },
};

/// Starts QEMU with its own libraries and firmware; works in the lab too, where it has a `/dev/kvm`.
pub(crate) const QEMU_PROGRAM: &str = "lab/qemu/qemu-system-x86_64";

/// What is kept of the unpacked packages: the program, all libraries and modules, the firmware.
const QEMU_PARTS: [&str; 4] = [
    "usr/bin/qemu-system-x86_64",
    "usr/lib/x86_64-linux-gnu",
    "usr/share/qemu",
    "usr/share/seabios",
];

/// QEMU 11.1 or later: 10.0's emulation of SVM changes `interrupt_request` without a lock, and so now and then loses an
/// interrupt and leaves a processor halted for ever; Debian 12's own 7.2 loses two nested boots in five. It is Debian 13's, so
/// it comes with Debian 13's C library and all else that it is linked with. Two faults that 11.1 has too are patched in the
/// program: see [`qemu_patch`].
pub(crate) static QEMU: Step = Step {
    name: "lab-qemu",
    says: "QEMU 11 for the lab with the libraries it takes, from Debian 13 and its backports (38 MB)",
    seconds: 20,
    needs: &[],
    packages: &["util-linux", "e2fsprogs"],
    debs: &["qemu-system-x86"],
    as_root: false,
    outputs: &["lab/qemu"],
    inputs: |_| {
        Ok(format!(
            "{QEMU_WRAPPER}{}{:?}",
            QEMU_PARTS.join(" "),
            qemu_patch::PATCHES
        ))
    },
    make: |work| {
        let unpacked = work.scratch().join("qemu");
        TRIXIE.unpack(work, &["qemu-system-x86"], Fetch::WithDependencies, &unpacked)?;
        let folder = work.out("lab/qemu")?;
        for part in QEMU_PARTS {
            let place = folder.join(part);
            let parent = place.parent().context("a part of QEMU has no folder")?;
            fs::create_dir_all(parent).context("make QEMU's folder")?;
            fs::rename(unpacked.join(part), &place).with_context(|| format!("take {part} of QEMU's packages"))?;
        }
        qemu_patch::apply(&folder.join("usr/bin/qemu-system-x86_64"))?;
        let wrapper = work.out(QEMU_PROGRAM)?;
        fs::write(&wrapper, QEMU_WRAPPER).context("write QEMU's start script")?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).context("make it executable")?;
        let version = process::output(Command::new(&wrapper).arg("--version"))?;
        let major = version
            .split_once("version ")
            .and_then(|(_, rest)| rest.split('.').next()?.parse::<u32>().ok());
        if major.is_none_or(|major| major < QEMU_MAJOR) {
            bail!("expected QEMU {QEMU_MAJOR} or later, got {version}");
        }
        Ok(())
    },
};

/// The oldest QEMU that the lab takes.
const QEMU_MAJOR: u32 = 11;

const QEMU_WRAPPER: &str = r#"#!/bin/sh
# QEMU as unpacked beside this file, with its own loader, libraries, modules and firmware.
here=$(dirname "$(readlink -f "$0")")
lib=$here/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$lib/qemu"
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" --argv0 "$0" "$here/usr/bin/qemu-system-x86_64" \
  -L "$here/usr/share/qemu" -L "$here/usr/share/seabios" "$@"
"#;

/// Debian's own kernel of the series that the guests run, with every module.
pub(crate) static KERNEL: Step = Step {
    name: "lab-kernel",
    says: "the lab's kernel and initramfs, from Debian's backports",
    seconds: 20,
    needs: &[],
    packages: &["busybox-static", "kmod", "xz-utils"],
    debs: &["linux-image-amd64", "busybox-static"],
    as_root: false,
    outputs: &["lab/kernel"],
    inputs: |_| Ok(format!("{INIT}{STAGE2}{}", LOADED.join(" "))),
    make: |work| {
        let package = BOOKWORM.real_name(work.cache(), "linux-image-amd64")?;
        let version = package.trim_start_matches("linux-image-");
        let unpacked = work.scratch().join("kernel");
        BOOKWORM.unpack(work, &[&package], Fetch::Alone, &unpacked)?;
        let vmlinuz = unpacked.join("boot").join(format!("vmlinuz-{version}"));
        kernel(work, "lab/kernel", &unpacked, &vmlinuz, version, LOADED)
    },
};

/// Debian's kernel of a later series, which has `sched_ext`; that of [`KERNEL`] is built without. Made only where it is asked for, and
/// kept: which version it is of matters little, and no other step is to fail for want of it.
pub(crate) static SCHED_EXT_KERNEL: Step = Step {
    name: "lab-kernel-sched-ext",
    says: "a kernel with sched_ext for the lab, and its initramfs, from Debian 13's backports (122 MB)",
    seconds: 30,
    needs: &[],
    packages: &["busybox-static", "kmod", "xz-utils"],
    debs: &["busybox-static"],
    as_root: false,
    outputs: &["lab/kernel-sched-ext"],
    inputs: |_| Ok(format!("{INIT}{STAGE2}{}", loaded_later().join(" "))),
    make: |work| {
        let base = TRIXIE.real_name(work.cache(), "linux-base-amd64")?;
        let version = base.trim_start_matches("linux-base-");
        let packages = ["base", "binary", "modules"].map(|part| format!("linux-{part}-{version}"));
        let unpacked = work.scratch().join("kernel");
        TRIXIE.unpack(work, &packages.each_ref().map(String::as_str), Fetch::Alone, &unpacked)?;
        // depmod(8) and the lab look there, where it is the same folder on a whole system.
        fs::rename(unpacked.join("usr/lib"), unpacked.join("lib")).context("take the modules")?;
        let vmlinuz = unpacked.join("lib/modules").join(version).join("vmlinuz");
        kernel(
            work,
            "lab/kernel-sched-ext",
            &unpacked,
            &vmlinuz,
            version,
            &loaded_later(),
        )
    },
};

/// What ext4 needs, and would ask modprobe for by its name alone; later kernels have it built in.
const CHECKSUMS: &str = "crc32c_generic";

/// What the initramfs loads: the root file system's parts, those of the disk, and KVM on AMD's emulated virtualisation.
const LOADED: &[&str] = &[
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_blk",
    CHECKSUMS,
    "ext4",
    "virtio_rng",
    "ccp",
    "kvm-amd",
];

/// The same of a later kernel.
fn loaded_later() -> Vec<&'static str> {
    LOADED.iter().copied().filter(|module| *module != CHECKSUMS).collect()
}

/// Makes the folder of a kernel from its unpacked packages.
fn kernel(work: &Work<'_>, place: &str, unpacked: &Path, vmlinuz: &Path, version: &str, loaded: &[&str]) -> Result<()> {
    let folder = work.out(place)?;
    let modules = folder.join("modules");
    fs::create_dir_all(&modules).context("make the lab's folder")?;
    fs::rename(vmlinuz, folder.join("vmlinuz")).context("take the kernel")?;
    work.run(Command::new("depmod").arg("-b").arg(unpacked).arg(version))?;
    fs::rename(unpacked.join("lib/modules").join(version), modules.join(version)).context("take the modules")?;
    let archive = initramfs(work, &modules.join(version), loaded)?;
    fs::write(folder.join("initramfs.cpio"), archive).context("write the initramfs")
}

fn initramfs(work: &Work<'_>, modules: &Path, loaded: &[&str]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let busybox = fs::read("/bin/busybox").context("read /bin/busybox (Debian package busybox-static)")?;
    archive
        .folder("proc")
        .folder("sys")
        .folder("host")
        .folder("layer")
        .folder("root")
        .device("dev/console", 0o600, 5, 1)
        .file("bin/busybox", 0o755, &busybox)
        .file("init", 0o755, INIT.as_bytes())
        .file("stage2", 0o755, STAGE2.as_bytes());
    let mut list = String::new();
    for module in with_dependencies(modules, loaded)? {
        let path = modules.join(&module);
        let name = path.file_name().context("a module has no name")?.to_string_lossy();
        let name = format!("modules/{}", name.trim_end_matches(".xz"));
        work.progress(&name);
        archive.file(&name, 0o644, &decompress(&path)?);
        list += &format!("/{name}\n");
    }
    archive.file("modules.load", 0o644, list.as_bytes());
    Ok(archive.finish())
}

/// The content of a kernel module, decompressed where it is not plain.
pub(crate) fn decompress(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("read {}", path.display()));
    }
    let output = Command::new("xz")
        .arg("-dc")
        .arg(path)
        .output()
        .context("start xz (Debian package xz-utils)")?;
    if !output.status.success() {
        bail!("{} is damaged: {}", path.display(), process::tail(&output.stderr));
    }
    Ok(output.stdout)
}

/// The paths, relative to the module folder, of these modules and all they depend on, in the order to load them.
pub(crate) fn with_dependencies(modules: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let path = modules.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    load_order(&text, names).map(|paths| paths.into_iter().map(PathBuf::from).collect())
}

/// As above, from the text of `modules.dep`: `PATH: DEPENDENCY...`, where the dependencies are all of them, direct or
/// not, the first to be loaded last (depmod(8)).
fn load_order<'a>(text: &'a str, names: &[&str]) -> Result<Vec<&'a str>> {
    let mut order: Vec<&str> = Vec::new();
    for name in names {
        let wanted = name.replace('-', "_");
        let line = text.lines().find_map(|line| {
            let (path, dependencies) = line.split_once(':')?;
            let file = path.rsplit('/').next()?.split('.').next()?;
            (file.replace('-', "_") == wanted).then_some((path, dependencies))
        });
        let Some((path, dependencies)) = line else {
            bail!("the kernel has no module {name}");
        };
        for module in dependencies.split_whitespace().rev().chain([path]) {
            if !order.contains(&module) {
                order.push(module);
            }
        }
    }
    Ok(order)
}

/// Makes the root file system and hands over to stage 2 in it.
const INIT: &str = r#"#!/bin/busybox sh
set -e
/bin/busybox mkdir -p /bin && /bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
while read -r module; do insmod "$module"; done < /modules.load
mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /host
mount -t tmpfs -o size=75% layer /layer
mkdir /layer/upper /layer/work
mount -t overlay -o lowerdir=/host,upperdir=/layer/upper,workdir=/layer/work,redirect_dir=on root /root
for folder in proc sys dev run tmp; do mkdir -p "/root/$folder"; done
mount -t proc proc /root/proc
mount -t sysfs sysfs /root/sys
mount -t devtmpfs dev /root/dev
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root/run/stoker-lab /root/run/lock /root/run/user
cp /bin/busybox /stage2 /root/run/stoker-lab/
exec switch_root /root /run/stoker-lab/busybox sh /run/stoker-lab/stage2
"#;

/// Completes the host, runs the command and leaves its exit code.
const STAGE2: &str = r#"
lab=/run/stoker-lab
mkdir -p $lab/bin $lab/control $lab/out && $lab/busybox --install -s $lab/bin
export PATH=$lab/bin
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
mkdir -p /var/tmp && mount -t ext4 -o noatime,discard,noinit_itable /dev/vda /var/tmp && chmod 1777 /var/tmp
ln -sfn /proc/self/fd /dev/fd
ln -sfn fd/0 /dev/stdin
ln -sfn fd/1 /dev/stdout
ln -sfn fd/2 /dev/stderr
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for controller in $(cat /sys/fs/cgroup/cgroup.controllers); do
  echo "+$controller" > /sys/fs/cgroup/cgroup.subtree_control
done
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
mount -t bpf bpf /sys/fs/bpf
hostname stoker-lab
ip link set lo up
chmod 666 /dev/kvm
# The kernel's own modules, so that modprobe works.
modules=$(sed -n 's/.*stoker\.modules=\([^ ]*\).*/\1/p' /proc/cmdline)
mkdir -p /lib/modules && mount --bind "$modules" /lib/modules
for share in control out; do
  mount -t 9p -o trans=virtio,version=9p2000.L,cache=none,msize=512000 $share $lab/$share
done
# Pipes between the command and the ports, which only one process may hold open.
for port in /sys/class/virtio-ports/*; do
  name=$(cat "$port/name")
  mkfifo "$lab/$name"
  cat "$lab/$name" > "/dev/${port##*/}" &
  eval "$name=$!"
done
# A sign of life of each processor: a lab in which one is stuck never ends.
mkdir $lab/control/alive
processor=0
while [ $processor -lt "$(nproc)" ]; do
  taskset "$(printf %x $((1 << processor)))" sh -c "while :; do echo > $lab/control/alive/$processor; sleep 5; done" &
  processor=$((processor + 1))
done
touch $lab/control/started
(
  export STOKER_LAB_OUT=$lab/out
  exec setsid sh $lab/control/command < /dev/null > $lab/stdout 2> $lab/stderr
) &
wait $!
echo $? > $lab/control/status
# What is on its way out comes out, unless something that the command left behind holds on to it.
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  kill -0 $stdout 2> /dev/null || kill -0 $stderr 2> /dev/null || break
  usleep 50000
done
poweroff -f
"#;

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str =
        "kernel/a.ko.xz: kernel/b.ko.xz kernel/c-d.ko.xz\nkernel/b.ko.xz: kernel/c-d.ko.xz\nkernel/c-d.ko.xz:\n";

    #[test]
    fn dependencies_come_first_and_once() {
        assert_eq!(
            load_order(DEP, &["c_d", "a"]).unwrap(),
            ["kernel/c-d.ko.xz", "kernel/b.ko.xz", "kernel/a.ko.xz"]
        );
    }

    #[test]
    fn an_unknown_module_is_an_error() {
        assert!(load_order(DEP, &["e"]).unwrap_err().to_string().contains("no module e"));
    }
}
