//! The guest kernels: ours, built from Debian's source with `guest/kernel/stoker.config`, and Debian's own cloud kernel.

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, bail};

use crate::{
    cache::Cache,
    setup::{
        Step, Work,
        apt::{BOOKWORM, Fetch},
    },
};

const FRAGMENT: &str = "guest/kernel/stoker.config";
const SOURCE: &str = "linux-source-6.12";
/// Raised when the way of building changes what comes out.
const RECIPE: u32 = 1;

/// Our kernel, as an ELF file with a PVH note and as a bzImage, in `kernel/tuned/`.
pub(crate) static TUNED: Step = Step {
    name: "kernel-tuned",
    says: "the tuned guest kernel, compiled from Debian's source",
    seconds: 240,
    needs: &[],
    packages: &[
        "gcc",
        "libc6-dev",
        "make",
        "flex",
        "bison",
        "bc",
        "libelf-dev",
        "lz4",
        "xz-utils",
        "perl",
    ],
    debs: &[SOURCE],
    as_root: false,
    outputs: &["kernel/tuned"],
    inputs: |cache| Ok(format!("{RECIPE}\n{}", fragment(cache)?)),
    make: tuned,
};

/// Debian's cloud kernel, unmodified: the packed kernel, the ELF file in it, and its modules, in `kernel/stock/`.
pub(crate) static STOCK: Step = Step {
    name: "kernel-stock",
    says: "the stock guest kernel, Debian's cloud kernel from backports",
    seconds: 10,
    needs: &[],
    packages: &["kmod", "xz-utils", "zstd", "gzip", "lz4"],
    debs: &["linux-image-cloud-amd64"],
    as_root: false,
    outputs: &["kernel/stock"],
    inputs: |_| Ok(RECIPE.to_string()),
    make: stock,
};

fn fragment(cache: &Cache) -> Result<String> {
    let path = cache.source(FRAGMENT);
    fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
}

fn tuned(work: &Work<'_>) -> Result<()> {
    let unpacked = work.scratch().join("package");
    BOOKWORM.unpack(work, &[SOURCE], Fetch::Alone, &unpacked)?;
    let source = work.scratch().join("source");
    fs::create_dir(&source).context("make a folder for the source")?;
    work.progress("unpacking the source");
    work.run(
        Command::new("tar")
            .arg("-xf")
            .arg(unpacked.join("usr/src").join(format!("{SOURCE}.tar.xz")))
            .args(["--strip-components=1", "-C"])
            .arg(&source),
    )?;
    let make = || {
        let mut command = Command::new("make");
        command
            .current_dir(&source)
            // The same bytes from the same inputs.
            .env("KBUILD_BUILD_TIMESTAMP", "1970-01-01")
            .env("KBUILD_BUILD_USER", "stoker")
            .env("KBUILD_BUILD_HOST", "stoker")
            .env_remove("MAKEFLAGS");
        command
    };
    let fragment_path = work.cache().source(FRAGMENT);
    work.run(make().arg("allnoconfig").env("KCONFIG_ALLCONFIG", &fragment_path))?;
    let config = fs::read_to_string(source.join(".config")).context("read the kernel's configuration")?;
    let fragment = fragment(work.cache())?;
    let refused = refused(&fragment, &config);
    if !refused.is_empty() {
        bail!(
            "the kernel's source does not take these lines of {FRAGMENT}:\n  {}",
            refused.join("\n  ")
        );
    }
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    work.run(make().arg(format!("-j{jobs}")).arg("bzImage"))?;
    let folder = work.out("kernel/tuned")?;
    fs::create_dir(&folder).context("make the kernel's folder")?;
    fs::copy(source.join("arch/x86/boot/bzImage"), folder.join("bzImage")).context("take the bzImage")?;
    fs::copy(source.join(".config"), folder.join("config")).context("take the configuration")?;
    work.run(
        Command::new("strip")
            .arg("-o")
            .arg(folder.join("vmlinux"))
            .arg(source.join("vmlinux")),
    )
}

/// The lines of the fragment that are not so in the configuration. An option that is off may be absent from it.
fn refused<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    let has = |wanted: &str| config.lines().any(|line| line == wanted);
    let is_off = |name: &str| {
        !config
            .lines()
            .any(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')))
    };
    fragment
        .lines()
        .filter(|line| {
            match line
                .strip_prefix("# CONFIG_")
                .and_then(|rest| rest.strip_suffix(" is not set"))
            {
                Some(name) => !is_off(&format!("CONFIG_{name}")),
                None => line.starts_with("CONFIG_") && !has(line),
            }
        })
        .collect()
}

fn stock(work: &Work<'_>) -> Result<()> {
    let package = BOOKWORM.real_name(work.cache(), "linux-image-cloud-amd64")?;
    let version = package.trim_start_matches("linux-image-");
    let unpacked = work.scratch().join("package");
    BOOKWORM.unpack(work, &[&package], Fetch::Alone, &unpacked)?;
    let folder = work.out("kernel/stock")?;
    fs::create_dir(&folder).context("make the kernel's folder")?;
    let packed = folder.join("bzImage");
    fs::rename(unpacked.join("boot").join(format!("vmlinuz-{version}")), &packed).context("take the kernel")?;
    work.run(Command::new("depmod").arg("-b").arg(&unpacked).arg(version))?;
    fs::rename(unpacked.join("lib/modules").join(version), folder.join("modules")).context("take the modules")?;
    work.progress("unpacking vmlinux");
    extract_vmlinux(&packed, &folder.join("vmlinux"))
}

/// Unpacks the ELF file from a bzImage, by the offsets in its setup header (Documentation/arch/x86/boot.rst: `setup_sects`,
/// `payload_offset` and `payload_length`, protocol 2.08).
fn extract_vmlinux(packed: &Path, vmlinux: &Path) -> Result<()> {
    let image = fs::read(packed).with_context(|| format!("read {}", packed.display()))?;
    let payload = payload(&image).with_context(|| format!("{} is not a bzImage that we know", packed.display()))?;
    let Some(program) = unpacker(payload) else {
        bail!(
            "the kernel in {} is packed in a way that we do not know",
            packed.display()
        );
    };
    let mut unpack = Command::new(program)
        .arg("-dc")
        .stdin(Stdio::piped())
        .stdout(File::create(vmlinux).with_context(|| format!("create {}", vmlinux.display()))?)
        .spawn()
        .with_context(|| format!("start {program}"))?;
    let written = unpack
        .stdin
        .take()
        .context("no pipe to the unpacker")?
        .write_all(payload);
    let status = unpack.wait().with_context(|| format!("wait for {program}"))?;
    if !status.success() {
        bail!(
            "the kernel in {} cannot be unpacked by {program} ({status})",
            packed.display()
        );
    }
    written.with_context(|| format!("unpack the kernel by {program}"))
}

/// The program that unpacks a payload with these first bytes.
fn unpacker(payload: &[u8]) -> Option<&'static str> {
    const MAGIC: &[(&[u8], &str)] = &[
        (&[0x28, 0xb5, 0x2f, 0xfd], "zstd"),
        (&[0xfd, b'7', b'z', b'X', b'Z'], "xz"),
        (&[0x1f, 0x8b], "gzip"),
        (&[0x02, 0x21, 0x4c, 0x18], "lz4"),
    ];
    MAGIC
        .iter()
        .find(|(magic, _)| payload.starts_with(magic))
        .map(|(_, program)| *program)
}

/// The compressed kernel in a bzImage, less the four bytes of its unpacked size at the end.
fn payload(image: &[u8]) -> Option<&[u8]> {
    let field = |at: usize| Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?));
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup_sectors = match *image.get(0x1f1)? {
        0 => 4,
        count => usize::from(count),
    };
    let start = ((setup_sectors + 1) * 512).checked_add(usize::try_from(field(0x248)?).ok()?)?;
    let length = usize::try_from(field(0x24c)?).ok()?;
    image.get(start..start.checked_add(length)?.checked_sub(4)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_not_taken_is_named() {
        let config = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=y\n";
        let fragment =
            "# why\nCONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_C is not set\nCONFIG_D=y\n# CONFIG_E is not set\n";
        assert_eq!(refused(fragment, config), ["# CONFIG_C is not set", "CONFIG_D=y"]);
    }

    #[test]
    fn the_payload_lies_where_the_header_says() {
        let mut image = vec![0; 0x1000];
        image[0x1f1] = 3;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&12u32.to_le_bytes());
        image[2048 + 16..2048 + 24].copy_from_slice(b"compress");
        assert_eq!(payload(&image).unwrap(), b"compress");
        image[0x24c..0x250].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(payload(&image).is_none());
        assert!(payload(&image[..0x240]).is_none());
    }
}
