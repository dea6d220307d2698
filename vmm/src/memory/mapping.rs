//! A range of the process's memory for a guest: aligned so that the kernel can use huge pages, and left out of core dumps.

use std::io;
use std::ptr;

/// Bytes of a huge page on x86-64.
pub(super) const HUGE_PAGE: usize = 2 << 20;
/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;

/// Anonymous, private memory that is not reserved and not populated. Unmapped when this is dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    start: *mut u8,
    length: usize,
}

// SAFETY: it is a range of addresses; nothing is accessed through it, and who frees it is its one owner.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference gives its start and length alone.
unsafe impl Sync for Mapping {}

// === impl Mapping ===

impl Mapping {
    /// Maps `length` bytes, a multiple of 4096, from a multiple of [`HUGE_PAGE`] on. So a huge page of the process can be one of the
    /// guest's, which begins at a multiple of it as well: the guest's accesses then miss the TLB less, and a fault maps 512 pages
    /// at a time.
    ///
    /// # Errors
    /// Where the host refuses the mapping.
    pub(super) fn new(length: usize) -> io::Result<Self> {
        let all = length
            .checked_add(HUGE_PAGE)
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), all, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast::<u8>();
        let before = start.align_offset(HUGE_PAGE);
        let aligned = start.wrapping_add(before);
        for (from, bytes) in [(start, before), (aligned.wrapping_add(length), HUGE_PAGE - before)] {
            if bytes > 0 {
                // SAFETY: the range is the start or the end of what was mapped above, and nobody knows of it.
                unsafe { libc::munmap(from.cast(), bytes) };
            }
        }
        // Neither is a must: a kernel without huge pages refuses the first.
        for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
            // SAFETY: the range is what is left of the mapping, and neither advice changes what is in it.
            unsafe { libc::madvise(aligned.cast(), length, advice) };
        }
        Ok(Self { start: aligned, length })
    }

    /// Its first byte.
    pub(super) fn start(&self) -> *mut u8 {
        self.start
    }

    /// Its bytes.
    pub(super) fn length(&self) -> usize {
        self.length
    }

    /// Gives the memory of a range of whole pages of 4096 bytes back to the host at once. What is read of it afterwards is zeros.
    ///
    /// # Errors
    /// Where the range is not of whole pages within the mapping, or the host refuses.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let (start, length) = self.pages(offset, length)?;
        // SAFETY: the range lies in this mapping, which stays mapped. Its bytes may change at any time as far as Rust is concerned:
        // a guest that runs has them.
        check(unsafe { libc::madvise(start.cast(), length, libc::MADV_DONTNEED) })
    }

    /// Makes a range of whole pages of 4096 bytes one that can be written, or that can be read alone. Who writes to one that can't
    /// be written ends the process, where it is not a guest: the caller sees to it that nobody does.
    ///
    /// # Errors
    /// As [`Mapping::discard`]; also where the process would have more mappings than it may.
    pub(super) fn protect(&self, offset: u64, length: u64, writable: bool) -> io::Result<()> {
        let (start, length) = self.pages(offset, length)?;
        let write = if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: the range lies in this mapping, and stays one that can be read.
        check(unsafe { libc::mprotect(start.cast(), length, libc::PROT_READ | write) })
    }

    fn pages(&self, offset: u64, length: u64) -> io::Result<(*mut u8, usize)> {
        let end = offset.checked_add(length).filter(|end| *end <= self.length as u64);
        if end.is_none() || !(offset | length).is_multiple_of(PAGE) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // Both are at most `self.length`.
        Ok((self.start.wrapping_add(offset as usize), length as usize))
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own, and its owner says that nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;

    use super::*;

    /// The line that begins with `field` in what smaps says of the mapping that begins at `start`.
    fn smaps(start: *mut u8, field: &str) -> Option<String> {
        let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mapping = text.split_once(&format!("{:x}-", start.addr()))?.1;
        let line = mapping.lines().find_map(|line| line.strip_prefix(field))?;
        Some(line.trim().to_owned())
    }

    #[test]
    fn it_is_aligned_may_be_huge_and_is_not_dumped() {
        for length in [4096, 32 << 20, (32 << 20) + 4096] {
            let mapping = Mapping::new(length).unwrap();
            assert!(mapping.start().addr().is_multiple_of(HUGE_PAGE));
            assert_eq!(smaps(mapping.start(), "Size:"), Some(format!("{} kB", length >> 10)));
            let flags = smaps(mapping.start(), "VmFlags:").unwrap();
            assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
            let huge = std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists();
            assert_eq!(flags.split(' ').any(|flag| flag == "hg"), huge, "{flags}");
        }
    }

    fn resident(mapping: &Mapping) -> u64 {
        let rss = smaps(mapping.start(), "Rss:").unwrap();
        rss.strip_suffix(" kB").unwrap().parse().unwrap()
    }

    #[test]
    fn what_is_discarded_is_the_hosts_again_and_reads_as_zeros() {
        let mapping = Mapping::new(8 << 20).unwrap();
        let byte = |at: usize| mapping.start().wrapping_add(at);
        for at in (0..mapping.length()).step_by(4096) {
            // SAFETY: within the mapping, of which nobody else knows.
            unsafe { byte(at).write_volatile(7) };
        }
        assert_eq!(resident(&mapping), 8 << 10);
        mapping.discard(2 << 20, 4 << 20).unwrap();
        assert_eq!(resident(&mapping), 4 << 10);
        let read = |at: usize| {
            // SAFETY: within the mapping, which can be read.
            unsafe { byte(at).read_volatile() }
        };
        assert_eq!(
            [read(0), read(2 << 20), read((6 << 20) - 1), read(6 << 20)],
            [7, 0, 0, 7]
        );
        for (offset, length) in [
            (1, 4096),
            (0, 4095),
            (8 << 20, 4096),
            (u64::MAX - 4095, 8192),
            (0, u64::MAX - 4095),
        ] {
            assert!(mapping.discard(offset, length).is_err(), "{offset:#x}+{length:#x}");
            assert!(
                mapping.protect(offset, length, true).is_err(),
                "{offset:#x}+{length:#x}"
            );
        }
    }

    #[test]
    fn a_part_can_be_for_reading_alone() {
        let mapping = Mapping::new(6 << 20).unwrap();
        mapping.protect(0, 6 << 20, false).unwrap();
        mapping.protect(2 << 20, 2 << 20, true).unwrap();
        // The kernel, asked to write there, says what a write by this process itself would end with.
        let pipe = |at: usize| {
            let (reader, writer) = io::pipe().unwrap();
            (&writer).write_all(&[1]).unwrap();
            // SAFETY: the kernel writes one byte of the mapping, or refuses to.
            unsafe { libc::read(reader.as_raw_fd(), mapping.start().wrapping_add(at).cast(), 1) }
        };
        assert_eq!(
            [pipe(0), pipe(2 << 20), pipe((4 << 20) - 1), pipe(4 << 20)],
            [-1, 1, 1, -1]
        );
    }
}
