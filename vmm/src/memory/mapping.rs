//! A range of the process's memory for a guest: aligned so that the kernel can use huge pages, and left out of core dumps.

use std::io;
use std::ptr;

/// Bytes of a huge page on x86-64.
pub(super) const HUGE_PAGE: usize = 2 << 20;

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
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own, and its owner says that nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

#[cfg(test)]
mod tests {
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
}
