//! Whatever is in the files of a kernel and an initramfs, they load or are refused.
#![no_main]

use std::io::Write as _;

use libfuzzer_sys::fuzz_target;
use stoker_vmm::boot::kernel::{BootFile, load_initramfs, load_kernel};
use stoker_vmm::boot::params;
use stoker_vmm::memory::allocate;

const MEMORY_MIB: u32 = 64;

fuzz_target!(|data: &[u8]| {
    let Some((cut, data)) = data.split_first() else {
        return;
    };
    let (kernel, initramfs) = data.split_at((*cut as usize * 8).min(data.len()));
    let file = |content: &[u8]| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    };
    let (kernel, initramfs) = (file(kernel), file(initramfs));
    let memory = allocate(MEMORY_MIB).unwrap();
    let mut kernel = BootFile::kernel(kernel.path()).unwrap();
    let Ok(kernel) = load_kernel(&memory, &mut kernel) else {
        return;
    };
    let mut initramfs = BootFile::initramfs(initramfs.path()).unwrap();
    let initramfs = load_initramfs(&memory, &mut initramfs, &kernel).ok();
    params::write(&memory, MEMORY_MIB, &kernel, initramfs, "").unwrap();
});
