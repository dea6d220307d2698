use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use super::super::testing::{Driver, Part};
use super::*;

const HEADER: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STATUS: u64 = 0x1_0000;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

mod scratch;

/// A device and its driver. `file` is what the drive lies in, as far as that has to be kept.
struct Bench<F = tempfile::NamedTempFile> {
    driver: Driver,
    block: Block,
    file: F,
}

fn image(sectors: u64) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..sectors {
        file.write_all(&[sector as u8 + 1; 512]).unwrap();
    }
    file.flush().unwrap();
    file
}

fn bench(read_only: bool) -> Bench {
    bench_with(read_only, feature::COMMON | FEATURE_FLUSH)
}

fn bench_with(read_only: bool, features: u64) -> Bench {
    let file = image(8);
    let disk = Disk::open(file.path(), read_only).unwrap();
    Bench::new(Block::new(disk, "a-name-longer-than-twenty-bytes"), features, file)
}

impl<F> Bench<F> {
    fn new(mut block: Block, features: u64, file: F) -> Self {
        let driver = Driver::new(&[QUEUE_SIZE]);
        block.activate(driver.activation(features));
        Self { driver, block, file }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.driver.put(HEADER, &kind.to_le_bytes());
        self.driver.put(HEADER + 4, &[0; 4]);
        self.driver.put(HEADER + 8, &sector.to_le_bytes());
        self.driver.put(STATUS, &[0xaa]);
    }

    /// Sends a chain, and returns the status byte and the bytes reported as written.
    fn run(&mut self, parts: &[Part]) -> (u8, u32) {
        self.driver.send(0, parts);
        assert_eq!(self.block.process(), Progress::Idle);
        let used = self.driver.used(0);
        assert_eq!(used.len(), 1, "every chain comes back once");
        (self.driver.read(STATUS, 1)[0], used[0].1)
    }
}

fn request(data: &[Part]) -> Vec<Part> {
    let mut parts = vec![Part::read(HEADER, 16)];
    parts.extend_from_slice(data);
    parts.push(Part::write(STATUS, 1));
    parts
}

#[test]
fn sectors_are_read_into_any_framing() {
    let mut bench = bench(true);
    bench.header(0, 2);
    let answer = bench.run(&request(&[Part::write(DATA, 100), Part::write(DATA + 0x1000, 924)]));
    assert_eq!(answer, (OK, 1025));
    assert_eq!(bench.driver.read(DATA, 100), [3; 100]);
    assert_eq!(bench.driver.read(DATA + 0x1000, 412), [3; 412]);
    assert_eq!(bench.driver.read(DATA + 0x1000 + 412, 512), [4; 512]);

    // Header in two parts, data and status in one.
    bench.header(0, 7);
    bench.driver.send(
        0,
        &[
            Part::read(HEADER, 3),
            Part::read(HEADER + 3, 13),
            Part::write(DATA, 513),
        ],
    );
    bench.block.process();
    assert_eq!(bench.driver.used(0).last().unwrap().1, 513);
    assert_eq!(bench.driver.read(DATA, 513)[511..], [8, OK]);
}

#[test]
fn sectors_are_written_and_flushed() {
    let mut bench = bench(false);
    bench.driver.put(DATA, &[0x5a; 1024]);
    bench.header(1, 3);
    assert_eq!(bench.run(&request(&[Part::read(DATA, 1024)])), (OK, 1));
    bench.header(4, 0);
    assert_eq!(bench.run(&request(&[])), (OK, 1));
    let content = std::fs::read(bench.file.path()).unwrap();
    assert_eq!(content.len(), 4096);
    assert_eq!(content[1535..1537], [3, 0x5a]);
    assert_eq!(content[2559..2561], [0x5a, 6]);
}

/// How many pages of the file are in memory and not yet on the disk (cachestat(2), since Linux 6.5).
fn dirty_pages(file: &File) -> Option<u64> {
    const SYS_CACHESTAT: libc::c_long = 451;
    // All of the file: an offset, and a length of 0.
    let range = [0u64; 2];
    // Pages in the cache, dirty ones, those being written, those evicted, and those evicted lately.
    let mut pages = [0u64; 5];
    // SAFETY: both pointers are to arrays of the size that the call takes, which live until it returns.
    let failed = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            std::os::fd::AsRawFd::as_raw_fd(file),
            range.as_ptr(),
            pages.as_mut_ptr(),
            0,
        )
    };
    (failed == 0).then_some(pages[1] + pages[2])
}

#[test]
fn a_driver_that_cannot_flush_gets_write_through() {
    let dirty_after_write = |features| {
        let mut bench = bench_with(false, features);
        bench.file.as_file().sync_all().unwrap();
        bench.driver.put(DATA, &[0x5a; 512]);
        bench.header(1, 3);
        assert_eq!(bench.run(&request(&[Part::read(DATA, 512)])), (OK, 1));
        dirty_pages(bench.file.as_file())
    };
    match dirty_after_write(feature::COMMON | FEATURE_FLUSH) {
        Some(pages) if pages > 0 => assert_eq!(dirty_after_write(feature::COMMON), Some(0)),
        _ => eprintln!("skipped: the file system of the temporary folder, or the kernel, does not tell of dirty pages"),
    }
}

#[test]
fn the_id_is_told() {
    let mut bench = bench(true);
    bench.header(8, 0);
    assert_eq!(bench.run(&request(&[Part::write(DATA, 20)])), (OK, 21));
    assert_eq!(bench.driver.read(DATA, 20), b"a-name-longer-than-t");
    bench.header(8, 0);
    assert_eq!(bench.run(&request(&[Part::write(DATA, 5)])), (OK, 6));
}

#[test]
fn what_cannot_be_done_is_answered_with_an_error() {
    let mut bench = bench(false);
    let data = [Part::write(DATA, 512)];
    for sector in [8, 9, u64::MAX / 512, u64::MAX] {
        bench.header(0, sector);
        assert_eq!(bench.run(&request(&data)), (IO_ERROR, 1), "sector {sector}");
        bench.header(1, sector);
        let out = [Part::read(DATA, 512)];
        assert_eq!(bench.run(&request(&out)), (IO_ERROR, 1), "sector {sector}");
    }
    bench.header(0, 0);
    assert_eq!(bench.run(&request(&[Part::write(DATA, 511)])), (IO_ERROR, 1));
    // Buffers outside of memory, at its very end, and one that wraps.
    for address in [1 << 40, 32 << 20, (32 << 20) - 511, u64::MAX - 100] {
        bench.header(0, 0);
        let answer = bench.run(&request(&[Part::write(address, 512)]));
        assert_eq!(answer, (IO_ERROR, 1), "{address:#x}");
    }
    bench.header(99, 0);
    assert_eq!(bench.run(&request(&data)), (UNSUPPORTED, 1));
    // The good request after all these is served.
    bench.header(0, 0);
    assert_eq!(bench.run(&request(&data)), (OK, 513));
}

#[test]
fn a_read_only_drive_refuses_writes() {
    let mut bench = bench(true);
    assert_ne!(bench.block.info().features & FEATURE_READ_ONLY, 0);
    bench.header(1, 0);
    assert_eq!(bench.run(&request(&[Part::read(DATA, 512)])), (IO_ERROR, 1));
    assert_eq!(std::fs::read(bench.file.path()).unwrap()[0], 1);
}

#[test]
fn malformed_chains_come_back() {
    let mut bench = bench(false);
    bench.header(0, 0);
    let untouched = 0xaa;
    // No status byte, no header, a status that is not guest memory, readable after writable.
    assert_eq!(bench.run(&[Part::read(HEADER, 16)]), (untouched, 0));
    assert_eq!(
        bench.run(&[Part::read(HEADER, 15), Part::write(STATUS, 1)]),
        (IO_ERROR, 1)
    );
    bench.header(0, 0);
    assert_eq!(
        bench.run(&[Part::read(HEADER, 16), Part::write(1 << 40, 1)]),
        (untouched, 0)
    );
    assert_eq!(
        bench.run(&[Part::write(STATUS, 1), Part::read(HEADER, 16)]),
        (untouched, 0)
    );
    // A loop: descriptor 100 points at itself.
    bench.driver.descriptor(0, 100, HEADER, 16, 1, 100);
    bench.driver.offer(0, 100);
    bench.block.process();
    assert_eq!(bench.driver.used(0), [(100, 0)]);
    // An indirect table that refers to another, and one of an odd length.
    bench.driver.put(0x8000, &[0; 64]);
    bench.driver.descriptor(0, 101, 0x8000, 17, 4, 0);
    bench.driver.offer(0, 101);
    bench.driver.put(0x800c, &4u16.to_le_bytes());
    bench.driver.descriptor(0, 102, 0x8000, 32, 4, 0);
    bench.driver.offer(0, 102);
    bench.block.process();
    assert_eq!(bench.driver.used(0), [(101, 0), (102, 0)]);
    assert_eq!(bench.driver.interrupt.needs_reset_count(), 0);
}

#[test]
fn broken_rings_cost_the_guest_its_queue_alone() {
    let mut bench = bench(false);
    // More available than the queue can hold.
    bench.driver.set_available_index(0, QUEUE_SIZE + 1);
    assert_eq!(bench.block.process(), Progress::Idle);
    assert_eq!(bench.driver.interrupt.needs_reset_count(), 1);
    assert_eq!(bench.block.process(), Progress::Idle);
    assert_eq!(bench.driver.interrupt.needs_reset_count(), 1, "told once");

    bench.block.reset();
    let driver = Driver::new(&[QUEUE_SIZE]);
    bench.block.activate(driver.activation(feature::COMMON));
    bench.driver = driver;
    bench.header(0, 0);
    assert_eq!(bench.run(&request(&[Part::write(DATA, 512)])), (OK, 513));

    // A head outside of the descriptor table.
    bench.driver.offer(0, QUEUE_SIZE);
    bench.block.process();
    assert_eq!(bench.driver.interrupt.needs_reset_count(), 1);
}

#[test]
fn a_flood_of_requests_is_served_in_bounded_steps() {
    let mut bench = bench(true);
    bench.header(0, 0);
    for _ in 0..BUDGET + 1 {
        bench.driver.send(0, &request(&[Part::write(DATA, 512)]));
    }
    assert_eq!(bench.block.process(), Progress::More);
    assert_eq!(bench.driver.used(0).len(), BUDGET);
    assert_eq!(bench.block.process(), Progress::Idle);
    assert_eq!(bench.driver.used(0).len(), 1);
}

#[test]
fn an_image_cut_short_while_in_use_gives_errors() {
    let mut bench = bench(true);
    bench.file.as_file().set_len(512).unwrap();
    bench.header(0, 4);
    assert_eq!(bench.run(&request(&[Part::write(DATA, 512)])), (IO_ERROR, 1));
}

#[test]
fn an_image_is_shared_by_readers_alone() {
    let file = image(1);
    let first = Disk::open(file.path(), true).unwrap();
    let _second = Disk::open(file.path(), true).unwrap();
    let error = Disk::open(file.path(), false).unwrap_err().to_string();
    assert!(error.contains("in use by another machine"), "{error}");
    drop((first, _second));
    let _writer = Disk::open(file.path(), false).unwrap();
    assert!(matches!(Disk::open(file.path(), true), Err(DiskError::InUse(_))));
}

#[test]
fn bad_images_are_refused_with_a_reason() {
    let missing = Disk::open(Path::new("/nowhere/image"), true).unwrap_err();
    assert!(missing.to_string().contains("check the path"), "{missing}");
    let file = image(2);
    file.as_file().set_len(1000).unwrap();
    let error = Disk::open(file.path(), true).unwrap_err().to_string();
    assert!(error.contains("1000 bytes") && error.contains("cut short"), "{error}");
    file.as_file().set_len(0).unwrap();
    assert!(matches!(
        Disk::open(file.path(), true),
        Err(DiskError::Size { size: 0, .. })
    ));
}
