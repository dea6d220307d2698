use vm_memory::{Bytes as _, GuestAddress};

use super::super::testing::{Driver, MEMORY_MIB, Part};
use super::*;

const PLUGGABLE_MIB: u32 = 128;
const REQUEST: u64 = 0x1000;
/// Its first page in MiB: what tests give away lies behind what they need.
const GIVEN: u32 = 2 << 8;

struct Bench {
    driver: Driver,
    balloon: Balloon,
    inflation: Inflation,
}

fn bench() -> Bench {
    let driver = Driver::with_pluggable(&[QUEUE_SIZE; queue::COUNT], PLUGGABLE_MIB);
    let mut balloon = Balloon::new(&driver.memory).unwrap();
    let inflation = balloon.inflation();
    balloon.info().config.connect(driver.interrupt.clone());
    balloon.activate(driver.activation(balloon.info().features));
    Bench {
        driver,
        balloon,
        inflation,
    }
}

impl Bench {
    fn process(&mut self) {
        while self.balloon.process() == Progress::More {}
    }

    /// Sends numbers of pages by a queue.
    fn send(&mut self, queue: usize, numbers: &[u32]) {
        let bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        self.driver.put(REQUEST, &bytes);
        let head = self.driver.send(queue, &[Part::read(REQUEST, bytes.len() as u32)]);
        self.process();
        assert_eq!(self.driver.used(queue), [(u32::from(head), 0)]);
    }

    fn taken(&self) -> u64 {
        self.balloon.pages.count()
    }

    fn fill(&self, first: u32, pages: u32) {
        self.driver
            .put(u64::from(first) * PAGE, &vec![7; pages as usize * PAGE as usize]);
    }

    fn is_zero(&self, page: u32) -> bool {
        self.driver
            .read(u64::from(page) * PAGE, PAGE as usize)
            .iter()
            .all(|byte| *byte == 0)
    }
}

#[test]
fn the_host_asks_and_the_driver_is_told() {
    let mut bench = bench();
    bench.inflation.ask(0);
    assert_eq!(bench.driver.interrupt.config_changed_count(), 0, "it is so");
    bench.inflation.ask(3);
    bench.inflation.ask(3);
    assert_eq!(bench.driver.interrupt.config_changed_count(), 2, "until it is");
    let config = bench.balloon.info().config;
    let mut fields = [0xff; 12];
    config.read(0, &mut fields);
    assert_eq!(fields, [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], "3 MiB are 768 pages");
    assert_eq!((bench.inflation.asked_mib(), bench.inflation.taken_mib()), (3, 0));
    // What it says it has given is told apart from what it gave.
    config.write(0, &[0xff; 8]);
    assert_eq!(
        (bench.inflation.asked_mib(), bench.inflation.told_mib()),
        (3, (1 << 24) - 1)
    );
    assert_eq!(bench.inflation.taken_mib(), 0);
    bench.inflation.ask(1024 * 1024);
    assert_eq!(bench.inflation.asked_mib(), 1024 * 1024);
}

#[test]
fn pages_go_to_the_host_and_come_back() {
    let mut bench = bench();
    bench.fill(GIVEN, 600);
    // Not in order, one twice, with a gap.
    let mut numbers: Vec<u32> = (GIVEN..GIVEN + 256).rev().collect();
    numbers.extend([GIVEN + 5, GIVEN + 300]);
    bench.send(queue::INFLATE, &numbers);
    assert_eq!((bench.taken(), bench.inflation.taken_mib()), (257, 1));
    for (page, zero) in [
        (0, true),
        (5, true),
        (255, true),
        (256, false),
        (299, false),
        (300, true),
        (301, false),
    ] {
        assert_eq!(bench.is_zero(GIVEN + page), zero, "{page}");
    }
    bench.send(queue::INFLATE, &[GIVEN + 5]);
    assert_eq!(bench.taken(), 257, "it had that one");
    bench.send(queue::DEFLATE, &[GIVEN + 300, GIVEN + 300, GIVEN + 400, GIVEN]);
    assert_eq!((bench.taken(), bench.inflation.taken_mib()), (255, 0));
    bench.fill(GIVEN + 300, 1);
    assert!(!bench.is_zero(GIVEN + 300));
}

#[test]
fn pages_that_are_not_there_are_not_taken() {
    let mut bench = bench();
    let plugged = (bench.driver.memory.pluggable().unwrap().start() / PAGE) as u32;
    let end = MEMORY_MIB << 8;
    bench.send(queue::INFLATE, &[end, plugged, plugged - 1, u32::MAX, u32::MAX - 1]);
    assert_eq!(bench.taken(), 0);
    bench.driver.memory.pluggable().unwrap().plug(0, 1).unwrap();
    // A run of which the second half is not plugged is no range of memory.
    bench.send(queue::INFLATE, &[plugged + 511, plugged + 512]);
    assert_eq!(bench.taken(), 0);
    bench.send(queue::INFLATE, &[plugged, plugged + 511]);
    assert_eq!(bench.taken(), 2);
    bench.send(queue::DEFLATE, &[end, plugged + 512, u32::MAX, plugged]);
    assert_eq!(bench.taken(), 1);
}

#[test]
fn a_request_has_a_bounded_number_of_pages() {
    let mut bench = bench();
    let numbers: Vec<u32> = (GIVEN..GIVEN + 2000).collect();
    bench.send(queue::INFLATE, &numbers);
    assert_eq!(bench.taken(), MAX_PAGES as u64);
    // A number that is cut, none, and buffers that the driver was to write: all given back.
    bench.driver.put(REQUEST, &(GIVEN + 1500).to_le_bytes());
    for part in [
        Part::read(REQUEST, 3),
        Part::read(REQUEST, 0),
        Part::write(REQUEST, 4),
        Part::read(u64::MAX - 8, 64),
    ] {
        bench.driver.send(queue::INFLATE, &[part]);
    }
    bench.process();
    assert_eq!(bench.driver.used(queue::INFLATE).len(), 4);
    assert_eq!(bench.taken(), MAX_PAGES as u64);
}

#[test]
fn free_pages_are_given_back_whichever_queue_reports_them() {
    let mut bench = bench();
    for reporting in [3, 4] {
        bench.fill(GIVEN, 1024);
        let start = u64::from(GIVEN) * PAGE;
        let parts = [
            Part::write(start, 512 * PAGE as u32),
            // Whole pages alone.
            Part::write(start + 600 * PAGE + 1, 3 * PAGE as u32),
            Part::write(start + 700 * PAGE, PAGE as u32 - 1),
            Part::write(start + 701 * PAGE + 1, 100),
            // Not memory, or not plugged.
            Part::write(u64::MAX - 4096, 8192),
            Part::write(u64::MAX, 4096),
            Part::write(bench.driver.memory.pluggable().unwrap().start(), 4096),
        ];
        let head = bench.driver.send(reporting, &parts);
        bench
            .driver
            .send(reporting, &[Part::read(start + 800 * PAGE, PAGE as u32)]);
        bench.process();
        assert_eq!(
            bench.driver.used(reporting),
            [(u32::from(head), 0), (u32::from(head) + 7, 0)]
        );
        for (page, zero) in [
            (0, true),
            (511, true),
            (512, false),
            (600, false),
            (601, true),
            (602, true),
            (603, false),
            (700, false),
            (701, false),
            (800, false),
        ] {
            assert_eq!(bench.is_zero(GIVEN + page), zero, "{page}");
        }
        assert_eq!(bench.taken(), 0, "they are the guest's");
    }
}

#[test]
fn a_report_has_a_bounded_number_of_ranges() {
    const TABLE: u64 = 0x4000;
    const WRITE: u16 = 2;
    let mut bench = bench();
    let ranges = MAX_RANGES as u32 + 1;
    bench.fill(GIVEN, ranges);
    for index in 0..ranges {
        let start = u64::from(GIVEN + index) * PAGE;
        let has_next = u16::from(index + 1 < ranges);
        let next = index as u16 + 1;
        bench.driver.put_descriptor(
            TABLE + u64::from(index) * 16,
            start,
            PAGE as u32,
            WRITE | has_next,
            next,
        );
    }
    let head = bench.driver.send(4, &[Part::indirect(TABLE, ranges * 16)]);
    bench.process();
    assert_eq!(bench.driver.used(4), [(u32::from(head), 0)]);
    let last = GIVEN + ranges - 1;
    assert_eq!((bench.is_zero(last - 1), bench.is_zero(last)), (true, false));
}

fn figures(figures: &[(u16, u64)]) -> Vec<u8> {
    let bytes = figures
        .iter()
        .map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat());
    bytes.collect::<Vec<_>>().concat()
}

#[test]
fn statistics_are_kept_and_asked_for() {
    let mut bench = bench();
    assert!(bench.inflation.statistics().is_none());
    // Nothing is held yet: nothing is given back.
    bench.inflation.refresh();
    bench.balloon.ready(REFRESH, EventSet::IN);
    let first = figures(&[(4, 100), (5, 200), (9, 1), (6, 150), (0xffff, 3), (2, u64::MAX)]);
    bench.driver.put(REQUEST, &first);
    let head = bench
        .driver
        .send(queue::STATS, &[Part::read(REQUEST, first.len() as u32)]);
    bench.process();
    assert_eq!(bench.driver.used(queue::STATS), [], "it is held");
    let statistics = bench.inflation.statistics().unwrap();
    let told = (
        statistics.free,
        statistics.total,
        statistics.available,
        statistics.major_faults,
    );
    assert_eq!(told, (Some(100), Some(200), Some(150), Some(u64::MAX)));
    assert_eq!(
        (statistics.oom_kills, statistics.stalls, statistics.caches),
        (None, None, None)
    );

    let interrupts = bench.driver.interrupt.used();
    bench.inflation.refresh();
    bench.balloon.ready(REFRESH, EventSet::IN);
    assert_eq!(bench.driver.used(queue::STATS), [(u32::from(head), 0)]);
    assert_eq!(bench.driver.interrupt.used(), interrupts + 1);
    let second = figures(&[(10, 1), (11, 2), (7, 3), (3, 4)]);
    bench.driver.put(REQUEST, &second);
    // The last figure is cut.
    bench
        .driver
        .send(queue::STATS, &[Part::read(REQUEST, second.len() as u32 - 1)]);
    bench.process();
    let statistics = bench.inflation.statistics().unwrap();
    let told = (
        statistics.oom_kills,
        statistics.stalls,
        statistics.caches,
        statistics.minor_faults,
    );
    assert_eq!(told, (Some(1), Some(2), Some(3), None));
    assert_eq!(statistics.free, None, "nothing of it is old");
}

#[test]
fn of_many_buffers_of_statistics_one_is_held() {
    let mut bench = bench();
    for _ in 0..20 {
        bench.driver.send(queue::STATS, &[Part::read(REQUEST, 1 << 20)]);
    }
    bench.process();
    assert_eq!(bench.driver.used(queue::STATS).len(), 19);
    bench.balloon.ready(REFRESH, EventSet::IN);
    assert_eq!(bench.driver.used(queue::STATS).len(), 1);
    bench.balloon.ready(REFRESH, EventSet::IN);
    assert_eq!(bench.driver.used(queue::STATS).len(), 0);
    bench.driver.send(queue::STATS, &[Part::read(u64::MAX - 5, 10)]);
    bench.process();
    assert!(bench.inflation.statistics().unwrap().free.is_none());
}

#[test]
fn a_driver_that_begins_anew_has_all_of_its_pages() {
    let mut bench = bench();
    bench.inflation.ask(1);
    bench.send(queue::INFLATE, &[GIVEN, GIVEN + 1]);
    bench.balloon.info().config.write(4, &[0, 1, 0, 0]);
    bench.driver.send(queue::STATS, &[Part::read(REQUEST, 10)]);
    bench.process();
    assert_eq!((bench.taken(), bench.inflation.told_mib()), (2, 1));
    assert_eq!(bench.inflation.statistics().unwrap().taken, 2 * PAGE, "as it was then");
    bench.balloon.reset();
    assert_eq!(bench.balloon.process(), Progress::Idle);
    bench.balloon.ready(REFRESH, EventSet::IN);
    let told = (
        bench.inflation.asked_mib(),
        bench.inflation.taken_mib(),
        bench.inflation.told_mib(),
    );
    assert_eq!((bench.taken(), told), (0, (1, 0, 0)));
    bench
        .driver
        .memory
        .write_slice(&[1], GuestAddress(u64::from(GIVEN) * PAGE))
        .unwrap();
}
