//! Whatever a client writes to the control socket is a message, not yet one, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use stoker_proto::vmm::{Request, Response};
use stoker_vmm::control::take_message;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    while let Ok(Some(_)) = take_message::<Request>(&mut bytes) {}
    let mut bytes = data.to_vec();
    while let Ok(Some(_)) = take_message::<Response>(&mut bytes) {}
});
