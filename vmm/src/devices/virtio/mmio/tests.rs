use std::sync::Mutex;

use super::super::config_space::ConfigSpace;
use super::*;
use crate::memory;

#[derive(Default)]
struct Log {
    activated: Vec<(u64, Vec<bool>)>,
    notified: usize,
    reset: usize,
}

impl Backend for Arc<Mutex<Log>> {
    fn activate(&mut self, activation: Activation) {
        let queues = activation.queues.iter().map(Option::is_some).collect();
        self.lock().unwrap().activated.push((activation.features, queues));
    }
    fn notify(&mut self) {
        self.lock().unwrap().notified += 1;
    }
    fn reset(&mut self) {
        self.lock().unwrap().reset += 1;
    }
}

struct Bench {
    config: Arc<ConfigSpace>,
    transport: MmioTransport<Arc<Mutex<Log>>>,
    log: Arc<Mutex<Log>>,
    interrupt: Arc<MmioInterrupt>,
    line: EventFd,
}

const OFFERED: u64 = feature::COMMON | 1 << 5;

fn bench() -> Bench {
    let log = Arc::new(Mutex::new(Log::default()));
    let line = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let interrupt = Arc::new(MmioInterrupt::new(line.try_clone().unwrap()));
    let config = ConfigSpace::new(vec![1, 2, 3, 4, 5]);
    let info = DeviceInfo {
        kind: 2,
        features: OFFERED,
        queue_sizes: vec![64, 16],
        config: config.clone(),
    };
    Bench {
        config,
        transport: MmioTransport::new(info, log.clone(), memory::allocate(32).unwrap(), interrupt.clone()),
        log,
        interrupt,
        line,
    }
}

impl Bench {
    fn get(&mut self, offset: u32) -> u32 {
        let mut data = [0; 4];
        self.transport.read(u64::from(offset), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u32, value: u32) {
        self.transport.write(u64::from(offset), &value.to_le_bytes());
    }

    fn negotiate(&mut self, features: u64) -> bool {
        self.set(0x70, 1);
        self.set(0x70, 3);
        self.set(0x24, 0);
        self.set(0x20, features as u32);
        self.set(0x24, 1);
        self.set(0x20, (features >> 32) as u32);
        self.set(0x70, 11);
        self.get(0x70) & 8 != 0
    }

    fn set_up_queue(&mut self, index: u32, size: u32, address: u32) {
        self.set(0x30, index);
        self.set(0x38, size);
        self.set(0x80, address);
        self.set(0x90, address + 0x1000);
        self.set(0xa0, address + 0x2000);
        self.set(0x44, 1);
    }
}

#[test]
fn a_driver_finds_and_starts_the_device() {
    let mut bench = bench();
    assert_eq!(bench.get(0x0), 0x7472_6976);
    assert_eq!((bench.get(0x4), bench.get(0x8)), (2, 2));
    bench.set(0x14, 1);
    assert_eq!(bench.get(0x10), (OFFERED >> 32) as u32);
    bench.set(0x14, 0);
    assert_eq!(bench.get(0x10), OFFERED as u32);
    assert!(bench.negotiate(OFFERED));
    assert_eq!(bench.get(0x34), 64);
    bench.set_up_queue(0, 32, 0x1_0000);
    bench.set(0x50, 0);
    assert_eq!(bench.log.lock().unwrap().notified, 0, "not before it is ready");
    bench.set(0x70, 15);
    assert_eq!(bench.log.lock().unwrap().activated, [(OFFERED, vec![true, false])]);
    bench.set(0x50, 0);
    assert_eq!(bench.log.lock().unwrap().notified, 1);
    assert_eq!(bench.get(0x70), 15);

    let mut config = [0xff; 8];
    bench.transport.read(0x102, &mut config);
    assert_eq!(config, [3, 4, 5, 0, 0, 0, 0, 0]);
}

#[test]
fn interrupts_are_raised_shown_and_acknowledged() {
    let mut bench = bench();
    bench.interrupt.queue_used(0);
    assert_eq!(bench.line.read().unwrap(), 1);
    assert_eq!(bench.get(0x60), 1);
    bench.interrupt.needs_reset();
    assert_eq!(bench.get(0x60), 3);
    assert_eq!(bench.get(0x70) & 64, 64);
    bench.set(0x64, 1);
    assert_eq!(bench.get(0x60), 2);
    bench.set(0x70, 0);
    assert_eq!((bench.get(0x60), bench.get(0x70)), (0, 0));
}

#[test]
fn a_change_of_the_configuration_is_told_and_numbered() {
    let mut bench = bench();
    assert_eq!(bench.get(0x60), 0);
    let before = bench.get(0xfc);
    bench.config.replace(vec![9, 8, 7, 6]);
    assert_eq!(bench.line.read().unwrap(), 1);
    assert_eq!(bench.get(0x60), 2);
    assert_eq!(bench.get(0x70) & 64, 0, "it can go on");
    assert_ne!(bench.get(0xfc), before);
    assert_eq!(bench.get(0x100), 0x0607_0809);
    bench.set(0x64, 2);
    assert_eq!(bench.get(0x60), 0);
}

#[test]
fn features_that_were_not_offered_or_not_virtio_1_are_refused() {
    assert!(!bench().negotiate(OFFERED | 1 << 6));
    assert!(!bench().negotiate(1 << 5));
    let mut bench = bench();
    // FEATURES_OK before DRIVER.
    bench.set(0x70, 8);
    assert_eq!(bench.get(0x70), 0);
    // DRIVER_OK before FEATURES_OK.
    bench.set(0x70, 7);
    assert_eq!(bench.get(0x70), 3);
    assert!(bench.log.lock().unwrap().activated.is_empty());
    // Accepted features stay as they are.
    bench.set(0x70, 0);
    assert!(bench.negotiate(feature::VERSION_1));
    bench.set(0x24, 0);
    bench.set(0x20, u32::MAX);
    bench.set_up_queue(0, 64, 0x1_0000);
    bench.set(0x70, 15);
    assert_eq!(
        bench.log.lock().unwrap().activated,
        [(feature::VERSION_1, vec![true, false])]
    );
}

#[test]
fn queues_that_cannot_work_are_not_handed_over() {
    let cases: [(u32, u32, u32); 3] = [
        (0, 64, 0xffff_f000),     // outside of memory
        (1, 16, 32 << 20),        // just past its end
        (0, 64, (32 << 20) - 16), // its end inside the table
    ];
    for (index, size, address) in cases {
        let mut bench = bench();
        assert!(bench.negotiate(feature::VERSION_1));
        bench.set(0x30, index);
        bench.set(0x38, size);
        bench.set(0x80, address);
        bench.set(0x44, 1);
        bench.set(0x70, 15);
        assert!(bench.log.lock().unwrap().activated.is_empty(), "{address:#x}");
        assert_eq!(bench.get(0x70) & 64, 64);
        // A reset makes it usable again.
        bench.set(0x70, 0);
        assert!(bench.negotiate(feature::VERSION_1));
        bench.set_up_queue(0, 64, 0x1_0000);
        bench.set(0x70, 15);
        assert_eq!(bench.log.lock().unwrap().activated.len(), 1);
    }
    // No queue at all.
    let mut bench = bench();
    assert!(bench.negotiate(feature::VERSION_1));
    bench.set(0x70, 15);
    assert!(bench.log.lock().unwrap().activated.is_empty());
}

#[test]
fn bad_queue_numbers_and_sizes_are_ignored() {
    let mut bench = bench();
    assert!(bench.negotiate(feature::VERSION_1));
    for select in [2, 3, 0x1_0000, u32::MAX] {
        bench.set(0x30, select);
        assert_eq!((bench.get(0x34), bench.get(0x44)), (0, 0));
        bench.set(0x38, 1);
        bench.set(0x44, 1);
    }
    bench.set(0x30, 0);
    for size in [0, 3, 65, 128, 0x1_0040, u32::MAX] {
        bench.set(0x38, size);
    }
    bench.set(0x80, 0x1_0000);
    bench.set(0x90, 0x1_1000);
    bench.set(0xa0, 0x1_2000);
    bench.set(0x44, 1);
    // Once ready it is fixed.
    bench.set(0x80, 0xffff_f000);
    bench.set(0x70, 15);
    assert_eq!(bench.log.lock().unwrap().activated.len(), 1);
}

#[test]
fn a_reset_takes_the_queues_back() {
    let mut bench = bench();
    for round in 1..3 {
        assert!(bench.negotiate(feature::VERSION_1));
        bench.set_up_queue(1, 16, 0x1_0000);
        bench.set(0x70, 15);
        bench.set(0x70, 15);
        assert_eq!(bench.log.lock().unwrap().activated.len(), round);
        bench.set(0x70, 0);
        bench.set(0x70, 0);
        assert_eq!(bench.log.lock().unwrap().reset, round);
        bench.set(0x50, 0);
        assert_eq!(bench.log.lock().unwrap().notified, 0);
        bench.set(0x30, 1);
        assert_eq!(bench.get(0x44), 0);
    }
}

#[test]
fn any_offset_and_width_is_survived() {
    let mut bench = bench();
    for offset in (0..0x120).chain([0xfff, 0x1000, u64::MAX - 1, u64::MAX]) {
        for width in [0, 1, 2, 3, 4, 5, 8, 64] {
            bench.transport.read(offset, &mut vec![0xff; width]);
            bench.transport.write(offset, &vec![0xff; width]);
            bench.transport.write(offset, &vec![0; width]);
        }
    }
    // Narrow and misaligned reads of registers say nothing.
    let mut data = [0xff; 2];
    bench.transport.read(0, &mut data);
    assert_eq!(data, [0, 0]);
}
