//! In whatever order a guest and a host do what they do, and whatever time passes, the vsock device wakes up no more than
//! it must, and keeps its rules. No sockets: thousands of runs a second.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_vmm::devices::virtio::vsock::simulation::run;

fuzz_target!(|data: &[u8]| {
    let (steps, _) = data.as_chunks::<4>();
    run(steps.iter().copied().take(512));
});
