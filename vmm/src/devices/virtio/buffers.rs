//! The buffers of a descriptor chain, whatever their framing (virtio 1.3, 2.7.4.2: a device must not rely on how a
//! driver cuts a request into descriptors), and the one place where guest memory is handed to the host's kernel.

use std::io;
use std::os::fd::AsRawFd;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend};

use super::queue::Chain;
use crate::memory::Regions;

/// Most descriptors of one chain, those without bytes as well. Linux stays below 256; an indirect table could hold 65535.
const MAX_DESCRIPTORS: usize = 1024;

/// A range of guest memory; not checked before it is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    address: GuestAddress,
    length: u32,
}

/// The bytes that a chain offers in one direction.
#[derive(Debug, Default)]
pub struct Buffers {
    segments: Vec<Segment>,
    length: u64,
}

/// What a chain offers. Kept and filled again, so that a request costs no allocation.
#[derive(Debug, Default)]
pub struct ChainBuffers {
    /// What the device may read.
    pub readable: Buffers,
    /// What the device may write.
    pub writable: Buffers,
}

/// A chain that no device can serve.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// A readable descriptor after a writable one (virtio 1.3, 2.7.4.2 forbids it).
    #[error("a readable descriptor follows a writable one")]
    Order,
    /// Longer than any driver's chain.
    #[error("the chain has more than {MAX_DESCRIPTORS} descriptors")]
    TooMany,
    /// Not guest memory.
    #[error("a buffer lies outside of guest memory")]
    Address,
    /// Shorter than the request needs.
    #[error("the buffers are too short")]
    Short,
}

// === impl ChainBuffers ===

impl ChainBuffers {
    /// Takes the buffers of `chain`.
    ///
    /// # Errors
    /// Where the chain is out of order or too long. A chain that loops is cut by `virtio-queue` after as many
    /// descriptors as the queue has.
    pub fn fill(&mut self, chain: Chain) -> Result<(), BufferError> {
        self.readable.clear();
        self.writable.clear();
        for (count, descriptor) in chain.enumerate() {
            if count == MAX_DESCRIPTORS {
                return Err(BufferError::TooMany);
            }
            let buffers = if descriptor.is_write_only() {
                &mut self.writable
            } else if self.writable.segments.is_empty() {
                &mut self.readable
            } else {
                return Err(BufferError::Order);
            };
            buffers.push(descriptor.addr(), descriptor.len());
        }
        Ok(())
    }
}

// === impl Buffers ===

impl Buffers {
    fn clear(&mut self) {
        self.segments.clear();
        self.length = 0;
    }

    fn push(&mut self, address: GuestAddress, length: u32) {
        if length > 0 {
            self.segments.push(Segment { address, length });
            self.length += u64::from(length);
        }
    }

    /// Bytes in all.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Where they lie, as the driver said it: a start and a length in bytes for each descriptor.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u32)> {
        self.segments.iter().map(|segment| (segment.address.0, segment.length))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Reads all of `data` from `offset` bytes into the buffers.
    ///
    /// # Errors
    /// Where the buffers are too short or not guest memory.
    pub fn read(&self, memory: &Regions, offset: u64, data: &mut [u8]) -> Result<(), BufferError> {
        let mut rest = data;
        for (address, length) in self.part(offset, rest.len() as u64)? {
            let (now, later) = rest.split_at_mut_checked(length).ok_or(BufferError::Short)?;
            memory.read_slice(now, address).map_err(|_| BufferError::Address)?;
            rest = later;
        }
        Ok(())
    }

    /// Writes all of `data` from `offset` bytes into the buffers.
    ///
    /// # Errors
    /// Where the buffers are too short or not guest memory.
    pub fn write(&self, memory: &Regions, offset: u64, data: &[u8]) -> Result<(), BufferError> {
        let mut rest = data;
        for (address, length) in self.part(offset, rest.len() as u64)? {
            let (now, later) = rest.split_at_checked(length).ok_or(BufferError::Short)?;
            memory.write_slice(now, address).map_err(|_| BufferError::Address)?;
            rest = later;
        }
        Ok(())
    }

    /// The segments that make up `length` bytes from `offset`.
    fn part(&self, offset: u64, length: u64) -> Result<impl Iterator<Item = (GuestAddress, usize)>, BufferError> {
        let end = offset.checked_add(length).ok_or(BufferError::Short)?;
        if end > self.length {
            return Err(BufferError::Short);
        }
        let mut start = 0;
        Ok(self.segments.iter().filter_map(move |segment| {
            let (from, to) = (start, start + u64::from(segment.length));
            start = to;
            let first = offset.max(from);
            let last = end.min(to);
            // An address that wraps is no guest memory: the access that follows refuses it.
            let address = GuestAddress(segment.address.0.wrapping_add(first - from));
            (first < last).then(|| (address, (last - first) as usize))
        }))
    }

    /// The same as `iovec`s for the host's kernel; each lies in guest memory.
    fn vectors(&self, memory: &Regions, offset: u64, length: u64) -> Result<Vec<libc::iovec>, BufferError> {
        let mut vectors = Vec::with_capacity(self.segments.len());
        for (address, length) in self.part(offset, length)? {
            for slice in GuestMemoryBackend::get_slices(memory, address, length) {
                let slice = slice.map_err(|_| BufferError::Address)?;
                vectors.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(vectors)
    }
}

/// What the host's kernel does with buffers.
#[derive(Clone, Copy, Debug)]
pub enum Transfer {
    /// `preadv` from this offset in bytes into the buffers.
    ReadAt(u64),
    /// `pwritev` from the buffers at this offset in bytes.
    WriteAt(u64),
    /// `readv` from a stream into the buffers.
    Receive,
    /// `writev` from the buffers to a stream.
    Send,
}

/// Moves up to `length` bytes between the buffers, from `offset` bytes into them, and a file or socket, in one system
/// call and without a copy. Returns how many were moved; fewer than asked is no error, 0 is the end of the file.
///
/// # Errors
/// What the system call says, or `InvalidInput` where the buffers are too short or not guest memory.
pub fn transfer(
    buffers: &Buffers,
    memory: &Regions,
    offset: u64,
    length: u64,
    file: &impl AsRawFd,
    transfer: Transfer,
) -> io::Result<usize> {
    let vectors = buffers
        .vectors(memory, offset, length)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
    let fd = file.as_raw_fd();
    let first = vectors.as_ptr();
    // The kernel takes 1024 (IOV_MAX) at a time and says how far it came.
    let count = vectors.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
    loop {
        // SAFETY: `first` points at `count` iovecs that live until the call returns, and each of them names a range that
        // vm-memory found inside of `memory`, which is borrowed and so stays mapped. The guest may change the bytes
        // meanwhile, which harms nobody: only the kernel's copy routines touch them, and no Rust reference to them exists.
        let moved = unsafe {
            match transfer {
                Transfer::ReadAt(at) => libc::preadv(fd, first, count, at as libc::off_t),
                Transfer::WriteAt(at) => libc::pwritev(fd, first, count, at as libc::off_t),
                Transfer::Receive => libc::readv(fd, first, count),
                Transfer::Send => libc::writev(fd, first, count),
            }
        };
        if let Ok(moved) = usize::try_from(moved) {
            return Ok(moved);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::feature;
    use super::super::testing::{Driver, Part};
    use super::*;

    /// The buffers of a chain whose indirect table has `count` descriptors of `length` bytes.
    fn fill(count: u32, length: u32) -> Result<ChainBuffers, BufferError> {
        let mut driver = Driver::new(&[16]);
        for index in 0..u64::from(count) {
            let next = u16::try_from(index + 1).unwrap();
            let flags = u16::from(index + 1 < u64::from(count));
            driver.put_descriptor(0x10_0000 + index * 16, 0x1000, length, flags, next);
        }
        driver.send(0, &[Part::indirect(0x10_0000, count * 16)]);
        let mut queue = driver.activation(feature::COMMON).queues.remove(0).unwrap();
        let mut buffers = ChainBuffers::default();
        buffers.fill(queue.pop().unwrap()).map(|()| buffers)
    }

    #[test]
    fn a_chain_has_a_bounded_number_of_descriptors_whatever_is_in_them() {
        for length in [0, 1] {
            let most = MAX_DESCRIPTORS as u32;
            let buffers = fill(most, length).unwrap();
            assert_eq!(buffers.readable.len(), u64::from(most * length));
            assert_eq!(fill(most + 1, length).unwrap_err(), BufferError::TooMany);
            assert_eq!(fill(65535, length).unwrap_err(), BufferError::TooMany);
        }
    }
}
