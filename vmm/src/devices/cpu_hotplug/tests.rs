use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;

/// A line that tells how it is, and how often that changed.
#[derive(Clone, Default)]
struct TestLine(Arc<(AtomicBool, AtomicU32)>);

impl Line for TestLine {
    fn set(&mut self, raised: bool) {
        assert_ne!(self.0.0.swap(raised, Ordering::Relaxed), raised, "set to what it is");
        self.0.1.fetch_add(1, Ordering::Relaxed);
    }
}

struct Bench {
    device: CpuHotplug,
    line: TestLine,
    wake: Arc<EventFd>,
}

impl Bench {
    fn new(plugged: u32, ceiling: u32) -> Self {
        let line = TestLine::default();
        let wake = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let device = CpuHotplug::new(plugged, ceiling, Box::new(line.clone()), wake.clone());
        Self { device, line, wake }
    }

    fn raised(&self) -> bool {
        self.line.0.0.load(Ordering::Relaxed)
    }

    fn select(&mut self, number: u32) {
        self.device.write(SELECTOR.into(), &number.to_le_bytes());
    }

    fn state(&mut self, number: u32) -> u8 {
        self.select(number);
        let mut data = [0xff];
        self.device.read(STATE.into(), &mut data);
        data[0]
    }

    fn write_state(&mut self, number: u32, value: u8) {
        self.select(number);
        self.device.write(STATE.into(), &[value]);
    }

    fn data(&mut self) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(DATA.into(), &mut data);
        u32::from_le_bytes(data)
    }

    /// As our AML scans: takes up every event, and returns what they were.
    fn scan(&mut self) -> Vec<(u32, u8)> {
        let mut seen = Vec::new();
        self.select(0);
        loop {
            self.device.write(COMMAND.into(), &[NEXT_EVENT]);
            let number = self.data();
            let event = self.state(number) & (INSERTING | REMOVING);
            if event == 0 {
                return seen;
            }
            seen.push((number, event));
            self.write_state(number, event);
        }
    }

    fn ost(&mut self, number: u32, event: u32, status: u32) {
        self.select(number);
        for (command, value) in [(OST_EVENT, event), (OST_STATUS, status)] {
            self.device.write(COMMAND.into(), &[command]);
            self.device.write(DATA.into(), &value.to_le_bytes());
        }
    }
}

#[test]
fn a_vcpu_is_plugged_and_given_back() {
    let mut bench = Bench::new(2, 4);
    assert_eq!([0, 1, 2, 3, 4].map(|number| bench.state(number)), [1, 1, 0, 0, 0]);
    assert!(!bench.raised() && bench.scan().is_empty());

    bench.device.plug(2);
    bench.device.plug(3);
    assert!(bench.raised());
    assert_eq!(bench.scan(), [(2, INSERTING), (3, INSERTING)]);
    assert!(!bench.raised());
    assert_eq!(bench.state(3), ENABLED);

    bench.device.take_back(3);
    assert_eq!(bench.scan(), [(3, REMOVING)]);
    assert_eq!(bench.state(3), ENABLED, "the guest still has it");
    assert!(bench.device.take_ejected().is_empty() && bench.wake.read().is_err());
    bench.write_state(3, EJECT);
    assert_eq!(bench.state(3), 0);
    let ejected = Ejected {
        number: 3,
        asked_for: true,
    };
    assert_eq!(bench.device.take_ejected(), [ejected]);
    assert_eq!(bench.wake.read().unwrap(), 1);

    bench.device.plug(3);
    assert_eq!(bench.scan(), [(3, INSERTING)]);
    assert_eq!(
        bench.line.0.1.load(Ordering::Relaxed),
        6,
        "it is set where it changes alone"
    );
}

#[test]
fn a_guest_that_listens_late_misses_nothing() {
    let mut bench = Bench::new(1, 8);
    bench.device.plug(7);
    bench.device.plug(4);
    bench.device.take_back(4);
    bench.device.plug(1);
    bench.device.take_back(1);
    bench.device.keep(1);
    assert!(bench.raised());
    assert_eq!(bench.scan(), [(1, INSERTING), (4, REMOVING), (7, INSERTING)]);
    // What it was told already it is not told again; it may be asked again.
    bench.device.take_back(7);
    bench.device.keep(7);
    assert!(!bench.raised());
    bench.device.keep(4);
    assert_eq!(bench.scan(), [(4, INSERTING)], "it never heard that it has it");
    bench.device.take_back(4);
    assert_eq!(bench.scan(), [(4, REMOVING)]);
}

#[test]
fn the_first_and_those_that_are_not_there_can_not_be_ejected() {
    let mut bench = Bench::new(2, 4);
    for number in [0, 2, 3, 4, 1000, u32::MAX] {
        for value in 0..=u8::MAX {
            bench.write_state(number, value);
        }
    }
    assert_eq!([0, 1, 2, 3].map(|number| bench.state(number)), [1, 1, 0, 0]);
    bench.device.take_back(0);
    assert!(!bench.raised(), "it is not asked for");
    assert!(bench.device.take_ejected().is_empty());
    // One that nobody asked for.
    bench.write_state(1, u8::MAX);
    bench.write_state(1, u8::MAX);
    let ejected = Ejected {
        number: 1,
        asked_for: false,
    };
    assert_eq!(bench.device.take_ejected(), [ejected]);
}

/// What a guest gives back: whether it was asked for.
fn eject(bench: &mut Bench, number: u32) -> Option<bool> {
    bench.write_state(number, EJECT);
    let ejected = bench.device.take_ejected();
    assert!(ejected.iter().all(|ejected| ejected.number == number));
    ejected.first().map(|ejected| ejected.asked_for)
}

#[test]
fn one_that_is_asked_for_twice_may_be_given_back_twice() {
    let mut bench = Bench::new(2, 4);
    for _ in 0..2 {
        bench.device.take_back(1);
        assert_eq!(bench.scan(), [(1, REMOVING)]);
        bench.device.keep(1);
    }
    // The guest does the one, is plugged it again, and does the other.
    assert_eq!(eject(&mut bench, 1), Some(true));
    bench.device.plug(1);
    assert_eq!(eject(&mut bench, 1), Some(true));
    bench.device.plug(1);
    assert_eq!(bench.scan(), [(1, INSERTING)]);
    assert_eq!(eject(&mut bench, 1), Some(false), "all that was asked for is done");

    // Nobody knows whether it has seen what is asked for no more.
    bench.device.plug(1);
    bench.device.take_back(1);
    bench.device.keep(1);
    assert_eq!(bench.scan(), [(1, INSERTING)]);
    assert_eq!(eject(&mut bench, 1), Some(true));
    bench.device.plug(1);
    bench.device.take_back(1);
    assert_eq!(eject(&mut bench, 1), Some(true));
    bench.device.plug(1);
    assert_eq!(eject(&mut bench, 1), Some(false));

    // What it refused it will not do.
    bench.device.plug(1);
    bench.device.take_back(1);
    assert_eq!(bench.scan(), [(1, REMOVING)]);
    bench.ost(1, OST_EJECT_REQUEST, 0x84);
    bench.ost(1, OST_EJECT_REQUEST, 0x82);
    bench.device.keep(1);
    assert_eq!(eject(&mut bench, 1), Some(false));
}

#[test]
fn what_the_guest_refuses_is_told() {
    let mut bench = Bench::new(2, 4);
    bench.ost(1, 3, 0x84);
    bench.ost(3, 0x200, 0x80);
    bench.ost(9, 3, 0x82);
    assert_eq!(bench.device.refusal(), None, "it goes on, or there is none");
    bench.ost(1, 3, 0x82);
    let text = bench.device.refusal().unwrap().to_string();
    assert!(
        text.contains("give back vCPU 1: it is busy") && text.contains("0x82"),
        "{text}"
    );
    bench.ost(2, 1, 0);
    assert!(bench.device.refusal().is_some(), "another vCPU is well");
    bench.ost(1, 3, 0);
    assert_eq!(bench.device.refusal(), None);
    bench.ost(1, 3, 0x81);
    bench.write_state(1, EJECT);
    assert_eq!(bench.device.refusal(), None, "it gave it back after all");
    bench.ost(2, 1, 1);
    let text = bench.device.refusal().unwrap().to_string();
    assert!(text.contains("did not take vCPU 2: it failed"), "{text}");
    bench.ost(3, u32::MAX, u32::MAX);
    let text = bench.device.refusal().unwrap().to_string();
    assert!(text.contains("0xffffffff"), "{text}");
    bench.device.forget_refusal();
    assert_eq!(bench.device.refusal(), None);
}

#[test]
fn registers_have_one_width() {
    let mut bench = Bench::new(2, 4);
    bench.device.plug(3);
    bench.select(3);
    for width in [2, 3, 4, 8, 512] {
        let mut data = vec![0xff; width];
        bench.device.read(STATE.into(), &mut data);
        bench.device.write(STATE.into(), &vec![0xff; width]);
        bench.device.write(COMMAND.into(), &vec![0; width]);
        assert!(data.iter().all(|byte| *byte == 0), "{width}");
    }
    for width in [0, 1, 2, 3, 8] {
        bench.device.write(SELECTOR.into(), &vec![0; width]);
        bench.device.write(DATA.into(), &vec![0; width]);
    }
    assert_eq!(bench.data(), 3);
    assert_eq!(bench.state(3), ENABLED | INSERTING);
}

proptest! {
    /// Whatever host and guest do in any order: the first vCPU stays, the line is raised while there is an event, and a vCPU is given
    /// back once at most for each time that it was plugged.
    #[test]
    fn nothing_the_guest_does_is_more_than_the_host_allows(
        steps in prop::collection::vec((0u8..8, 0u32..6, any::<u8>(), any::<u32>()), 0..200)
    ) {
        let mut bench = Bench::new(2, 5);
        let mut plugged = [true, true, false, false, false];
        for (what, number, byte, word) in steps {
            let index = number as usize;
            match what {
                0 if plugged.get(index) == Some(&false) => {
                    bench.device.plug(number);
                    plugged[index] = true;
                }
                1 => bench.device.take_back(number),
                2 => bench.device.keep(number),
                3 => bench.device.write(COMMAND.into(), &[byte % 4]),
                4 => bench.device.write(DATA.into(), &word.to_le_bytes()),
                5 => bench.write_state(number, byte),
                6 => bench.write_state(word, byte),
                _ => {
                    let width = usize::from(byte % 9);
                    bench.device.write(u64::from(word % 14), &word.to_le_bytes().repeat(2)[..width.min(8)]);
                    bench.device.read(u64::from(word % 14), &mut vec![0; width]);
                }
            }
            for ejected in bench.device.take_ejected() {
                prop_assert!(ejected.number > 0);
                prop_assert!(std::mem::take(&mut plugged[ejected.number as usize]), "given back twice");
            }
            let mut events = false;
            for (number, is_plugged) in (0..).zip(plugged) {
                let state = bench.state(number);
                prop_assert_eq!(state & ENABLED != 0, is_plugged);
                prop_assert!(is_plugged || state == 0, "an event of what is not there");
                events |= state & !ENABLED != 0;
            }
            prop_assert_eq!(bench.raised(), events);
        }
    }
}
