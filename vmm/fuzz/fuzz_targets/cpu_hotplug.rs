//! Any order of accesses of any width to the CPU hot-plug registers is survived, between whatever the host wants: the first vCPU stays,
//! one is given back at most as often as it was plugged, and the interrupt is raised as long as there is an event and no longer.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libfuzzer_sys::fuzz_target;
use stoker_vmm::bus::BusDevice as _;
use stoker_vmm::devices::cpu_hotplug::{CpuHotplug, Line, SELECTOR, STATE};
use vmm_sys_util::eventfd::EventFd;

const CEILING: u8 = 5;

struct Raised(Arc<AtomicBool>);

impl Line for Raised {
    fn set(&mut self, raised: bool) {
        assert_ne!(self.0.swap(raised, Ordering::Relaxed), raised);
    }
}

fuzz_target!(|data: &[u8]| {
    let raised = Arc::new(AtomicBool::new(false));
    let wake = Arc::new(EventFd::new(0x800).unwrap());
    let line = Box::new(Raised(raised.clone()));
    let mut device = CpuHotplug::new(2, CEILING.into(), line, wake.clone());
    let mut plugged = [true, true, false, false, false];
    let mut rest = data;
    while let [what, value, more @ ..] = rest {
        let number = value % CEILING;
        let index = usize::from(number);
        match what % 8 {
            0 => {
                device.plug(number.into());
                plugged[index] = true;
            }
            1 => device.take_back(number.into()),
            2 => device.keep(number.into()),
            3 => device.write(SELECTOR.into(), &[number, 0, 0, 0]),
            4 => device.write(STATE.into(), &[*value]),
            5 => {
                let mut data = vec![0xff; usize::from(*value % 70)];
                device.read(u64::from(what >> 4), &mut data);
            }
            _ => {
                let width = more.len().min(usize::from(*value % 9));
                device.write(u64::from(what >> 4), &more[..width]);
                let _ = device.refusal().map(|refusal| refusal.to_string());
            }
        }
        let ejected = device.take_ejected();
        assert_eq!(wake.read().is_ok(), !ejected.is_empty());
        for ejected in ejected {
            assert!(ejected.number > 0);
            let was_plugged = std::mem::take(&mut plugged[ejected.number as usize]);
            assert!(was_plugged, "given back twice");
        }
        rest = more;
    }
    let mut events = false;
    for (number, is_plugged) in (0u8..).zip(plugged) {
        device.write(SELECTOR.into(), &[number, 0, 0, 0]);
        let mut state = [0xff];
        device.read(STATE.into(), &mut state);
        assert_eq!(state[0] & 1 != 0, is_plugged);
        assert!(is_plugged || state[0] == 0, "an event of what is not there");
        events |= state[0] > 1;
    }
    assert_eq!(raised.load(Ordering::Relaxed), events);
});
