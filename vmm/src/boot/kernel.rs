//! Reads the kernel and the initramfs into guest memory.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{self, KernelLoader as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use crate::memory::{GuestMemory, layout};

/// Where a bzImage's 64-bit entry lies behind the start of its protected-mode code (boot.rst, "64-bit boot protocol").
const BZIMAGE_ENTRY_64: u64 = 0x200;
/// Offset of `hdr` in a bzImage, and of fields in it that `linux-loader` does not check (boot.rst, "The real-mode kernel header").
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const MAGIC: usize = 0x202;
/// `XLF_KERNEL_64`: there is a 64-bit entry.
const XLF_KERNEL_64: u16 = 1 << 0;
/// Highest address for an initramfs where the kernel does not say one.
const INITRD_MAX: u64 = 0x7fff_ffff;
const PAGE: u64 = 4096;

/// Why a kernel or initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be opened or read.
    #[error("cannot read the {what} {path}: {source}; check the path and that this user may read it")]
    Read {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: io::Error,
    },
    /// Neither a bzImage nor an ELF file.
    #[error("{0} is no kernel: it is neither an x86 bzImage nor a 64-bit ELF vmlinux")]
    NotAKernel(PathBuf),
    /// It ends before its own headers say that it does.
    #[error("the {what} {path} is cut short: it has {size} bytes and needs {needed}; copy or download it again")]
    CutShort {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Bytes it has.
        size: u64,
        /// Bytes it should have at least.
        needed: u64,
    },
    /// It is a bzImage without a 64-bit entry.
    #[error("the kernel {0} has no 64-bit entry; use an x86-64 kernel")]
    No64BitEntry(PathBuf),
    /// It does not fit.
    #[error(
        "the {what} {path} does not fit into the machine's memory: {needed} MiB are needed, `memory_mib` gives {has}"
    )]
    TooLarge {
        /// `kernel` or `initramfs`.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// MiB needed at least.
        needed: u64,
        /// MiB of low memory that the machine has.
        has: u64,
    },
    /// The loader refused it.
    #[error("cannot load the kernel {path}: {source}")]
    Loader {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: loader::Error,
    },
}

/// A file that is open and known by its path, for messages.
#[derive(Debug)]
pub struct BootFile {
    what: &'static str,
    path: PathBuf,
    file: File,
    size: u64,
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct LoadedKernel {
    /// Where the first vCPU begins.
    pub entry: u64,
    /// First address behind all that the kernel needs to unpack itself.
    pub end: u64,
    /// The header of a bzImage.
    pub header: Option<setup_header>,
}

/// An initramfs in guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadedInitramfs {
    /// Its address.
    pub address: u64,
    /// Its bytes.
    pub size: u64,
}

// === impl BootFile ===

impl BootFile {
    /// Opens a kernel.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn kernel(path: &Path) -> Result<Self, LoadError> {
        Self::open("kernel", path)
    }

    /// Opens an initramfs.
    ///
    /// # Errors
    /// Where it cannot be opened.
    pub fn initramfs(path: &Path) -> Result<Self, LoadError> {
        Self::open("initramfs", path)
    }

    fn open(what: &'static str, path: &Path) -> Result<Self, LoadError> {
        let open = || {
            let file = File::open(path)?;
            let size = file.metadata()?.len();
            Ok((file, size))
        };
        match open() {
            Ok((file, size)) => Ok(Self {
                what,
                path: path.to_owned(),
                file,
                size,
            }),
            Err(source) => Err(LoadError::Read {
                what,
                path: path.to_owned(),
                source,
            }),
        }
    }

    fn read_error(&self, source: io::Error) -> LoadError {
        LoadError::Read {
            what: self.what,
            path: self.path.clone(),
            source,
        }
    }

    fn has(&self, needed: u64) -> Result<(), LoadError> {
        if self.size >= needed {
            return Ok(());
        }
        Err(LoadError::CutShort {
            what: self.what,
            path: self.path.clone(),
            size: self.size,
            needed,
        })
    }

    fn fits(&self, end: u64, memory: &GuestMemory) -> Result<(), LoadError> {
        let low = low_memory(memory);
        if end <= low {
            return Ok(());
        }
        Err(LoadError::TooLarge {
            what: self.what,
            path: self.path.clone(),
            needed: end.div_ceil(1 << 20),
            has: low >> 20,
        })
    }

    /// The first bytes of the file, or as many as there are.
    fn head<const N: usize>(&self) -> Result<[u8; N], LoadError> {
        let mut head = [0; N];
        let length = usize::try_from(self.size).unwrap_or(N).min(N);
        if let Some(part) = head.get_mut(..length) {
            self.file
                .read_exact_at(part, 0)
                .map_err(|source| self.read_error(source))?;
        }
        Ok(head)
    }
}

/// Bytes of RAM from 0 up to the first hole.
fn low_memory(memory: &GuestMemory) -> u64 {
    memory
        .to_region_addr(GuestAddress(0))
        .map_or(0, |(region, _)| vm_memory::GuestMemoryRegion::len(region))
}

/// Reads a kernel, a bzImage or an ELF file, straight into guest memory.
///
/// # Errors
/// Where it is no kernel, is cut short, or does not fit.
pub fn load_kernel(memory: &GuestMemory, kernel: &mut BootFile) -> Result<LoadedKernel, LoadError> {
    let head: [u8; 1024] = kernel.head()?;
    if head.starts_with(b"\x7fELF\x02\x01") {
        load_elf(memory, kernel, &head)
    } else if field(&head, MAGIC) == *b"HdrS" {
        load_bzimage(memory, kernel, &head)
    } else {
        Err(LoadError::NotAKernel(kernel.path.clone()))
    }
}

fn load_elf(memory: &GuestMemory, kernel: &mut BootFile, head: &[u8]) -> Result<LoadedKernel, LoadError> {
    const PT_LOAD: u32 = 1;
    const HEADER_BYTES: usize = 56;
    // `e_phoff` and `e_phnum` of the header, `p_type`, `p_offset`, `p_paddr`, `p_filesz` and `p_memsz` of each segment
    // (System V ABI, chapter 5): told apart here so that a message can say what is wrong with the file.
    let at = u64::from_le_bytes(field(head, 32));
    let count = u16::from_le_bytes(field(head, 56));
    kernel.has(at.saturating_add(u64::from(count) * HEADER_BYTES as u64))?;
    for index in 0..u64::from(count) {
        let mut segment = [0; HEADER_BYTES];
        kernel
            .file
            .read_exact_at(&mut segment, at + index * HEADER_BYTES as u64)
            .map_err(|source| kernel.read_error(source))?;
        if u32::from_le_bytes(field(&segment, 0)) == PT_LOAD {
            let number = |offset| u64::from_le_bytes(field(&segment, offset));
            kernel.has(number(8).saturating_add(number(32)))?;
            kernel.fits(number(24).saturating_add(number(40)), memory)?;
        }
    }
    let loaded =
        Elf::load(&**memory, None, &mut kernel.file, Some(GuestAddress(layout::HIGH_RAM))).map_err(|source| {
            LoadError::Loader {
                path: kernel.path.clone(),
                source,
            }
        })?;
    Ok(LoadedKernel {
        entry: loaded.kernel_load.0,
        end: loaded.kernel_end,
        header: None,
    })
}

fn load_bzimage(memory: &GuestMemory, kernel: &mut BootFile, head: &[u8]) -> Result<LoadedKernel, LoadError> {
    let [sectors] = field(head, SETUP_SECTS);
    // 0 means 4; one more is the boot sector. `syssize` counts 16 bytes.
    let setup = (u64::from(if sectors == 0 { 4 } else { sectors }) + 1) * 512;
    let code = u64::from(u32::from_le_bytes(field(head, SYSSIZE))) * 16;
    kernel.has(setup + code)?;
    kernel.fits(layout::HIGH_RAM + (kernel.size - setup), memory)?;
    let loaded =
        BzImage::load(&**memory, None, &mut kernel.file, Some(GuestAddress(layout::HIGH_RAM))).map_err(|source| {
            LoadError::Loader {
                path: kernel.path.clone(),
                source,
            }
        })?;
    let header = loaded.setup_header.unwrap_or_default();
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(LoadError::No64BitEntry(kernel.path.clone()));
    }
    // It unpacks itself at its preferred address, or behind where it was loaded.
    let unpacked = header.pref_address.max(loaded.kernel_load.0) + u64::from(header.init_size);
    let end = loaded.kernel_end.max(unpacked);
    kernel.fits(end, memory)?;
    Ok(LoadedKernel {
        entry: loaded.kernel_load.0 + BZIMAGE_ENTRY_64,
        end,
        header: Some(header),
    })
}

/// Reads an initramfs straight to the top of low memory.
///
/// # Errors
/// Where it is empty, cut short, or does not fit above the kernel.
pub fn load_initramfs(
    memory: &GuestMemory,
    initramfs: &mut BootFile,
    kernel: &LoadedKernel,
) -> Result<LoadedInitramfs, LoadError> {
    initramfs.has(1)?;
    check_cpio(initramfs)?;
    let highest = kernel
        .header
        .map_or(INITRD_MAX, |header| u64::from(header.initrd_addr_max));
    let top = low_memory(memory).min(highest + 1);
    let size = initramfs.size;
    let address = top.checked_sub(size).map(|address| address & !(PAGE - 1));
    let address = match address {
        Some(address) if address >= kernel.end => address,
        _ => {
            initramfs.fits(kernel.end.saturating_add(size + PAGE).max(top + 1), memory)?;
            return Err(LoadError::TooLarge {
                what: initramfs.what,
                path: initramfs.path.clone(),
                needed: (kernel.end + size).div_ceil(1 << 20),
                has: top >> 20,
            });
        }
    };
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut initramfs.file, size as usize)
        .map_err(|error| initramfs.read_error(io::Error::other(error)))?;
    Ok(LoadedInitramfs { address, size })
}

/// Follows the entries of an uncompressed `newc` archive (Documentation/driver-api/early-userspace/buffer-format.rst in
/// Linux) to see whether it is whole. What is compressed is the guest's to check.
fn check_cpio(initramfs: &BootFile) -> Result<(), LoadError> {
    const HEADER_BYTES: usize = 110;
    const TRAILER: &[u8] = b"TRAILER!!!\0";
    let mut at = 0;
    loop {
        if at > 0 {
            initramfs.has(at + HEADER_BYTES as u64)?;
        }
        let mut header = [0; HEADER_BYTES + TRAILER.len()];
        let there = initramfs.size.saturating_sub(at).min(header.len() as u64) as usize;
        if let Some(part) = header.get_mut(..there) {
            initramfs
                .file
                .read_exact_at(part, at)
                .map_err(|source| initramfs.read_error(source))?;
        }
        if !header.starts_with(b"07070") {
            // Compressed, or (behind a whole entry) another format appended.
            return Ok(());
        }
        let number = |offset| {
            let digits: [u8; 8] = field(&header, offset);
            std::str::from_utf8(&digits)
                .ok()
                .and_then(|digits| u64::from_str_radix(digits, 16).ok())
                .unwrap_or(0)
        };
        let (file, name) = (number(54), number(94));
        let aligned = |value: u64| value.next_multiple_of(4);
        at = aligned(at + HEADER_BYTES as u64 + name) + file;
        initramfs.has(at)?;
        at = aligned(at);
        if header.ends_with(TRAILER) {
            return Ok(());
        }
    }
}

/// `N` bytes at `offset`, zeros where there are none.
fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..offset + N)
        .and_then(|part| part.try_into().ok())
        .unwrap_or([0; N])
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use stoker_testkit::bzimage::bzimage;
    use stoker_testkit::cpio::Archive;

    use super::*;
    use crate::memory::allocate;

    fn file(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    /// A kernel with 8 KiB of memory from `physical` on, and `bytes` in it; linked to run elsewhere.
    fn elf(physical: u64, bytes: &[u8]) -> Vec<u8> {
        let mut image = stoker_testkit::elf::elf(physical, bytes);
        image[80..88].fill(0); // p_vaddr
        image[104..112].copy_from_slice(&8192_u64.to_le_bytes()); // p_memsz
        image
    }

    fn load(content: &[u8], mib: u32) -> Result<LoadedKernel, LoadError> {
        let memory = allocate(mib).unwrap();
        load_kernel(&memory, &mut BootFile::kernel(file(content).path()).unwrap())
    }

    fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut archive = Archive::default();
        for (name, content) in files {
            archive.file(name, 0o755, content);
        }
        archive.finish()
    }

    #[test]
    fn an_elf_kernel_lies_where_it_says() {
        let memory = allocate(32).unwrap();
        let image = file(&elf(0x100_0000, b"code"));
        let kernel = load_kernel(&memory, &mut BootFile::kernel(image.path()).unwrap()).unwrap();
        assert_eq!((kernel.entry, kernel.end), (0x100_0000, 0x100_2000));
        let mut code = [0; 5];
        memory.read_slice(&mut code, GuestAddress(0x100_0000)).unwrap();
        assert_eq!(&code, b"code\0");
    }

    #[test]
    fn a_bzimage_is_entered_in_64_bits() {
        let kernel = load(&bzimage(4096), 32).unwrap();
        assert_eq!((kernel.entry, kernel.end), (0x10_0200, 0x110_0000));
        assert!(kernel.header.is_some());
    }

    #[test]
    fn bad_kernels_are_named_for_what_they_are() {
        let message = |content: &[u8], mib| load(content, mib).unwrap_err().to_string();
        assert!(message(b"", 32).contains("is no kernel"));
        assert!(message(&[0x5a; 5000], 32).contains("is no kernel"));
        let elf = elf(0x100_0000, &[1; 4096]);
        assert!(message(&elf[..1000], 32).contains("cut short: it has 1000 bytes and needs 4216"));
        assert!(message(&elf[..70], 32).contains("cut short"));
        let bzimage = bzimage(1 << 20);
        assert!(message(&bzimage[..bzimage.len() - 1], 32).contains("cut short"));
        let mut no_entry = bzimage.clone();
        no_entry[0x236] = 0;
        assert!(message(&no_entry, 32).contains("64-bit"));
        let mut large = bzimage.clone();
        large[0x260..0x264].copy_from_slice(&0x200_0000u32.to_le_bytes());
        let text = message(&large, 32);
        assert!(text.contains("48 MiB are needed, `memory_mib` gives 32"), "{text}");
        let missing = BootFile::kernel(Path::new("/nowhere")).unwrap_err().to_string();
        assert!(missing.contains("check the path"), "{missing}");
    }

    #[test]
    fn any_damage_to_a_header_gives_an_error_or_a_kernel() {
        for image in [elf(0x100_0000, b"code"), bzimage(64)] {
            for at in 0..image.len().min(0x280) {
                for value in [0, 0x7f, 0xff] {
                    let mut damaged = image.clone();
                    damaged[at] = value;
                    let _ = load(&damaged, 32);
                }
            }
        }
    }

    #[test]
    fn an_initramfs_lies_at_the_top() {
        let memory = allocate(32).unwrap();
        let kernel = load(&elf(0x100_0000, b"x"), 32).unwrap();
        let archive = file(&cpio(&[("init", b"#!/bin/sh")]));
        let mut initramfs = BootFile::initramfs(archive.path()).unwrap();
        let loaded = load_initramfs(&memory, &mut initramfs, &kernel).unwrap();
        assert_eq!(loaded.address, (32 << 20) - 4096);
        let mut magic = [0; 6];
        memory.read_slice(&mut magic, GuestAddress(loaded.address)).unwrap();
        assert_eq!(&magic, b"070701");
    }

    #[test]
    fn bad_initramfs_are_refused() {
        let memory = allocate(32).unwrap();
        let kernel = load(&elf(0x100_0000, b"x"), 32).unwrap();
        let load = |content: &[u8]| {
            let archive = file(content);
            let mut initramfs = BootFile::initramfs(archive.path()).unwrap();
            load_initramfs(&memory, &mut initramfs, &kernel)
        };
        let whole = cpio(&[("init", &[7; 999]), ("second", &[8; 5])]);
        load(&whole).unwrap();
        for length in [0, 200, 1000, whole.len() - 130, whole.len() - 30] {
            let error = load(&whole[..length]).unwrap_err().to_string();
            assert!(error.contains("cut short"), "{length}: {error}");
        }
        // Compressed ones pass through.
        load(b"\x1f\x8bsomething").unwrap();
        let error = load(&vec![0x5a; 16 << 20]).unwrap_err().to_string();
        assert!(error.contains("does not fit"), "{error}");
    }
}
