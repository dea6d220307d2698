//! Looks at the files that machines boot before any machine does, so that one that is missing or cut short is a clear
//! error when the agent starts and not a guest that never answers.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::config;

/// Why a file can't be booted.
#[derive(Debug, thiserror::Error)]
#[error("{key}: {} {problem}", path.display())]
pub struct BootFileError {
    /// The configuration key that names it.
    key: &'static str,
    path: PathBuf,
    problem: Problem,
}

#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("can't be read: {0}")]
    Read(#[source] io::Error),
    #[error("is not a regular file")]
    NotAFile,
    #[error("is empty; make it again, with `cargo xtask setup` for example")]
    Empty,
    #[error("is not {0}")]
    Kind(&'static str),
    #[error("is cut short: it has {has} bytes and needs {needs}; make it again, with `cargo xtask setup` for example")]
    Short { has: u64, needs: u64 },
    #[error("is damaged: {0}")]
    Damaged(&'static str),
    #[error("is not executable")]
    NotExecutable,
    #[error("is neither beside stokerd nor in PATH; give its path")]
    NotFound,
}

/// Checks all files that machines boot, and answers with the VMM's path. Blocks.
///
/// # Errors
///
/// [`BootFileError`] for the first file that can't be booted.
pub fn check(config: &config::Machines) -> Result<PathBuf, BootFileError> {
    let vmm = find_vmm(&config.vmm)?;
    for (key, path, check) in [
        (
            "machines.kernel",
            &config.kernel,
            kernel as fn(&Reader) -> Result<(), Problem>,
        ),
        ("machines.initramfs", &config.initramfs, initramfs),
        ("machines.image", &config.image, erofs),
    ] {
        Reader::open(path)
            .and_then(|file| check(&file))
            .map_err(|problem| BootFileError {
                key,
                path: path.clone(),
                problem,
            })?;
    }
    Ok(vmm)
}

fn find_vmm(configured: &Path) -> Result<PathBuf, BootFileError> {
    let error = |problem| BootFileError {
        key: "machines.vmm",
        path: configured.to_owned(),
        problem,
    };
    let executable = |path: &Path| {
        path.metadata()
            .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if configured.components().count() > 1 {
        let found = configured.metadata().map_err(|e| error(Problem::Read(e)))?;
        if !found.is_file() {
            return Err(error(Problem::NotAFile));
        }
        return if executable(configured) {
            Ok(configured.to_owned())
        } else {
            Err(error(Problem::NotExecutable))
        };
    }
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path))
        .map(|folder| folder.join(configured))
        .find(|path| executable(path))
        .ok_or_else(|| error(Problem::NotFound))
}

/// A file that is read at offsets that were checked against its size.
struct Reader {
    file: File,
    size: u64,
}

// === impl Reader ===

impl Reader {
    fn open(path: &Path) -> Result<Self, Problem> {
        let file = File::open(path).map_err(Problem::Read)?;
        let found = file.metadata().map_err(Problem::Read)?;
        if !found.is_file() {
            return Err(Problem::NotAFile);
        }
        match found.len() {
            0 => Err(Problem::Empty),
            size => Ok(Self { file, size }),
        }
    }

    /// Fails where the file ends before `offset + length`.
    fn needs(&self, offset: u64, length: u64) -> Result<(), Problem> {
        let needs = offset.saturating_add(length);
        if needs > self.size {
            Err(Problem::Short { has: self.size, needs })
        } else {
            Ok(())
        }
    }

    fn at<const N: usize>(&self, offset: u64) -> Result<[u8; N], Problem> {
        self.needs(offset, N as u64)?;
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, offset).map_err(Problem::Read)?;
        Ok(bytes)
    }

    fn u16(&self, offset: u64) -> Result<u64, Problem> {
        self.at(offset).map(u16::from_le_bytes).map(u64::from)
    }

    fn u32(&self, offset: u64) -> Result<u64, Problem> {
        self.at(offset).map(u32::from_le_bytes).map(u64::from)
    }

    fn u64(&self, offset: u64) -> Result<u64, Problem> {
        self.at(offset).map(u64::from_le_bytes)
    }
}

/// A bzImage or an ELF file that is all there.
fn kernel(file: &Reader) -> Result<(), Problem> {
    const KIND: Problem = Problem::Kind("a Linux kernel for x86-64 (a bzImage or an ELF vmlinux)");
    if file.at::<4>(0)? == *b"\x7fELF" {
        return elf(file);
    }
    // Documentation/arch/x86/boot.rst: `boot_flag` at 0x1fe, `header` at 0x202.
    if file.size < 0x206 || file.u16(0x1fe)? != 0xaa55 || file.at::<4>(0x202)? != *b"HdrS" {
        return Err(KIND);
    }
    // `setup_sects` at 0x1f1 (0 means 4) sectors of 512 bytes beside the boot sector, then `syssize` at 0x1f4 paragraphs
    // of 16 bytes, the last of which need not be full.
    let [sectors] = file.at::<1>(0x1f1)?;
    let sectors = if sectors == 0 { 4 } else { u64::from(sectors) };
    let setup = (sectors + 1) * 512;
    let system = file.u32(0x1f4)? * 16;
    file.needs(setup, system.saturating_sub(15))
}

/// The ELF-64 object file format: the header, then tables of segments and sections at the offsets it names.
fn elf(file: &Reader) -> Result<(), Problem> {
    const X86_64: u64 = 62;
    const LOAD: u64 = 1;
    // e_ident: class at 4 (2 is 64-bit), data at 5 (1 is little-endian).
    if file.at::<2>(4)? != [2, 1] || file.u16(0x12)? != X86_64 {
        return Err(Problem::Kind("a 64-bit x86 kernel"));
    }
    let (segments, size, count) = (file.u64(0x20)?, file.u16(0x36)?, file.u16(0x38)?);
    if size < 56 || count == 0 {
        return Err(Problem::Damaged("it has no segments to load"));
    }
    file.needs(segments, size * count)?;
    for index in 0..count {
        let segment = segments + index * size;
        if file.u32(segment)? == LOAD {
            file.needs(file.u64(segment + 8)?, file.u64(segment + 32)?)?;
        }
    }
    // Usually the last thing in the file.
    let (sections, size, count) = (file.u64(0x28)?, file.u16(0x3a)?, file.u16(0x3c)?);
    file.needs(sections, size * count)
}

/// A cpio archive in the `newc` format (Documentation/driver-api/early-userspace/buffer-format.rst) up to its trailer.
fn initramfs(file: &Reader) -> Result<(), Problem> {
    const HEADER: u64 = 110;
    let mut offset = 0;
    let mut file_at = io::BufReader::new(&file.file);
    loop {
        let magic = file.at::<6>(offset)?;
        if magic != *b"070701" && magic != *b"070702" {
            return Err(if offset == 0 {
                Problem::Kind("an uncompressed cpio archive (newc)")
            } else {
                Problem::Damaged("a file in it does not begin where the one before says")
            });
        }
        // Eight hexadecimal digits each: c_filesize is the 7th, c_namesize the 12th.
        let field = |index: u64| {
            let digits = file.at::<8>(offset + 6 + index * 8)?;
            std::str::from_utf8(&digits)
                .ok()
                .and_then(|digits| u64::from_str_radix(digits, 16).ok())
                .ok_or(Problem::Damaged("a number in it is none"))
        };
        let (size, name_size) = (field(6)?, field(11)?);
        file.needs(offset + HEADER, name_size)?;
        if !(1..=4096).contains(&name_size) {
            return Err(Problem::Damaged("a name in it is longer than a path can be"));
        }
        let mut name = vec![0; usize::try_from(name_size).unwrap_or(0)];
        file_at
            .seek(SeekFrom::Start(offset + HEADER))
            .and_then(|_| file_at.read_exact(&mut name))
            .map_err(Problem::Read)?;
        if name == b"TRAILER!!!\0" {
            return Ok(());
        }
        let data = (offset + HEADER + name_size).next_multiple_of(4);
        file.needs(data, size)?;
        offset = (data + size).next_multiple_of(4);
    }
}

/// An erofs image as long as its superblock says (`struct erofs_super_block` in fs/erofs/erofs_fs.h).
fn erofs(file: &Reader) -> Result<(), Problem> {
    const SUPER: u64 = 1024;
    const MAGIC: u64 = 0xe0f5_e1e2;
    if file.size < SUPER + 128 || file.u32(SUPER)? != MAGIC {
        return Err(Problem::Kind("an erofs image"));
    }
    let [block_bits] = file.at::<1>(SUPER + 12)?;
    if !(9..=16).contains(&block_bits) {
        return Err(Problem::Damaged("its block size is impossible"));
    }
    file.needs(0, file.u32(SUPER + 36)? << block_bits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use stoker_testkit::bzimage::bzimage;
    use stoker_testkit::cpio::Archive;

    use super::*;

    fn reader(bytes: &[u8]) -> Result<Reader, Problem> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        Reader::open(file.path())
    }

    fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
        bytes[at..at + value.len()].copy_from_slice(value);
    }

    fn vmlinux() -> Vec<u8> {
        let mut elf = vec![0; 5000];
        put(&mut elf, 0, b"\x7fELF\x02\x01");
        put(&mut elf, 0x12, &62u16.to_le_bytes());
        put(&mut elf, 0x20, &64u64.to_le_bytes());
        put(&mut elf, 0x28, &4936u64.to_le_bytes());
        for (at, value) in [(0x36, 56u16), (0x38, 1), (0x3a, 64), (0x3c, 1)] {
            put(&mut elf, at, &value.to_le_bytes());
        }
        put(&mut elf, 64, &1u32.to_le_bytes());
        put(&mut elf, 64 + 8, &200u64.to_le_bytes());
        put(&mut elf, 64 + 32, &4000u64.to_le_bytes());
        elf
    }

    fn cpio() -> Vec<u8> {
        let mut archive = Archive::default();
        archive.file("init", 0o755, b"#!/bin/sh");
        archive.finish()
    }

    fn image() -> Vec<u8> {
        let mut image = vec![0; 3 * 4096];
        put(&mut image, 1024, &0xe0f5_e1e2u32.to_le_bytes());
        image[1024 + 12] = 12;
        put(&mut image, 1024 + 36, &3u32.to_le_bytes());
        image
    }

    type Check = fn(&Reader) -> Result<(), Problem>;

    #[test]
    fn whole_files_are_taken_and_shorter_ones_refused() {
        for (whole, check, slack) in [
            (vmlinux(), kernel as Check, 0),
            (bzimage(16_000), kernel, 15),
            // The padding behind the trailer is not needed.
            (cpio(), initramfs, 3),
            (image(), erofs, 0),
        ] {
            check(&reader(&whole).unwrap()).unwrap();
            for length in (0..whole.len() - slack).step_by(97).chain([whole.len() - slack - 1]) {
                let cut = reader(&whole[..length]).and_then(|file| check(&file));
                assert!(cut.is_err(), "{length} of {}", whole.len());
            }
        }
    }

    #[test]
    fn problems_say_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let mut config = config::Machines {
            vmm: "/bin/sh".into(),
            kernel: write("vmlinux", &vmlinux()),
            initramfs: write("initramfs", &cpio()),
            image: write("image", &image()),
            ..config::Machines::default()
        };
        assert_eq!(check(&config).unwrap(), Path::new("/bin/sh"));
        config.kernel = write("empty", b"");
        let error = check(&config).unwrap_err().to_string();
        assert!(
            error.starts_with("machines.kernel: ") && error.contains("is empty"),
            "{error}"
        );
        config.kernel = dir.path().join("none");
        let error = check(&config).unwrap_err().to_string();
        assert!(error.contains("/none can't be read: No such file"), "{error}");
        config.kernel = write("gzip", &[0x1f; 2000]);
        let error = check(&config).unwrap_err().to_string();
        assert!(error.contains("is not a Linux kernel"), "{error}");
        config.vmm = "no-such-vmm".into();
        let error = check(&config).unwrap_err().to_string();
        assert!(error.contains("nor in PATH"), "{error}");
        config.vmm = "sh".into();
        assert!(check(&config).unwrap_err().to_string().contains("machines.kernel"));
    }

    proptest! {
        #[test]
        fn damaged_files_are_no_trouble(which in 0..4usize, changes in prop::collection::vec((0..6000usize, any::<u8>()), 1..8)) {
            let (mut bytes, check) = [
                (vmlinux(), kernel as Check), (bzimage(16_000), kernel), (cpio(), initramfs), (image(), erofs),
            ][which].clone();
            for (at, value) in changes {
                let at = at % bytes.len();
                bytes[at] = value;
            }
            let _ = reader(&bytes).and_then(|file| check(&file));
        }
    }
}
