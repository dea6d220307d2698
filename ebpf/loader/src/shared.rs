//! Arrays of the kernel's that are read in memory, and of which words are written there, without a system call for each element.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

use aya::Pod;
use aya::maps::{Array, Map, MapData, MapError};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An array that programs write to while it is read. One element is no snapshot: each of its words is whole.
pub(crate) struct Shared<T: Pod> {
    array: Array<MapData, T>,
    elements: Mapping<T>,
}

/// The array's elements, for as long as this lives.
struct Mapping<T> {
    start: NonNull<u64>,
    bytes: NonZeroUsize,
    length: u32,
    writable: bool,
    of: PhantomData<T>,
}

// === impl Shared ===

impl<T: Pod> Shared<T> {
    pub(crate) fn new(map: Map) -> Result<Self, MapError> {
        Self::mapped(map, ProtFlags::PROT_READ)
    }

    /// One of which words can be written.
    pub(crate) fn writable(map: Map) -> Result<Self, MapError> {
        Self::mapped(map, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)
    }

    fn mapped(map: Map, protection: ProtFlags) -> Result<Self, MapError> {
        let length = Array::<_, T>::try_from(&map)?.len();
        let elements = match &map {
            Map::Array(data) => Mapping::new(data.fd().as_fd(), length, protection)?,
            _ => return Err(MapError::InvalidMapType { map_type: 0 }),
        };
        Ok(Self {
            array: Array::try_from(map)?,
            elements,
        })
    }

    pub(crate) fn len(&self) -> u32 {
        self.elements.length
    }

    pub(crate) fn get(&self, index: u32) -> Option<T> {
        self.elements.read(index)
    }

    /// An element that is as it was at one moment, where its first word counts changes of the rest, and is odd while there is one;
    /// `None` where there is one now.
    pub(crate) fn get_whole(&self, index: u32) -> Option<T> {
        let before = self.elements.read_word(index, 0)?;
        fence(Ordering::Acquire);
        let value = self.elements.read(index)?;
        fence(Ordering::Acquire);
        let after = self.elements.read_word(index, 0)?;
        (before == after && before % 2 == 0).then_some(value)
    }

    /// Writes one word of an element, and leaves the rest of it to the programs; says whether there is such a word that can be
    /// written.
    pub(crate) fn write_word(&self, index: u32, word: usize, value: u64) -> bool {
        self.elements.write_word(index, word, value)
    }

    pub(crate) fn set(&mut self, index: u32, value: T) -> Result<(), MapError> {
        self.array.set(index, value, 0)
    }
}

// === impl Mapping ===

impl<T: Pod> Mapping<T> {
    /// An element is so many words: the kernel rounds its size up.
    const WORDS: usize = size_of::<T>().div_ceil(8);

    fn new(array: BorrowedFd<'_>, length: u32, protection: ProtFlags) -> Result<Self, MapError> {
        let failed = |source: io::Error| MapError::IoError(source);
        let bytes = usize::try_from(length)
            .ok()
            .and_then(|length| NonZeroUsize::new(length.checked_mul(Self::WORDS * 8)?))
            .ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        // SAFETY: a new mapping, which replaces none.
        let start = unsafe { mmap(None, bytes, protection, MapFlags::MAP_SHARED, array, 0) };
        Ok(Self {
            start: start.map_err(|errno| failed(errno.into()))?.cast(),
            bytes,
            length,
            writable: protection.contains(ProtFlags::PROT_WRITE),
            of: PhantomData,
        })
    }

    /// Where a word lies, in words from the start.
    fn place(&self, index: u32, word: usize) -> Option<usize> {
        if index >= self.length || word >= Self::WORDS {
            return None;
        }
        Some(usize::try_from(index).ok()? * Self::WORDS + word)
    }

    fn read_word(&self, index: u32, word: usize) -> Option<u64> {
        let at = self.place(index, word)?;
        // SAFETY: within the mapping, which is aligned to a page; the kernel writes to it, so it is read by volatile.
        Some(unsafe { self.start.add(at).read_volatile() })
    }

    fn write_word(&self, index: u32, word: usize, value: u64) -> bool {
        let Some(at) = self.place(index, word).filter(|_| self.writable) else {
            return false;
        };
        // SAFETY: within the mapping, which may be written and is aligned to a page; no reference to it exists, and the kernel's
        // programs, which may write the same word, do so by instructions on whole words.
        unsafe { self.start.add(at).write_volatile(value) };
        true
    }

    fn read(&self, index: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        let bytes = value.as_mut_ptr().cast::<u8>();
        for word in 0..Self::WORDS {
            let from = self.read_word(index, word)?.to_ne_bytes();
            let rest = size_of::<T>() - word * 8;
            // SAFETY: `rest` bytes are left of the value from there on.
            unsafe { bytes.add(word * 8).copy_from_nonoverlapping(from.as_ptr(), rest.min(8)) };
        }
        // SAFETY: all its bytes are written, and any are a value of a `Pod`.
        Some(unsafe { value.assume_init() })
    }
}

impl<T> Drop for Mapping<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nothing refers to it any more.
        let _ = unsafe { munmap(self.start.cast(), self.bytes.get()) };
    }
}

// SAFETY: it is memory of which whole words are read and written, and that belongs to no thread.
unsafe impl<T> Send for Mapping<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Mapping<T> {}
