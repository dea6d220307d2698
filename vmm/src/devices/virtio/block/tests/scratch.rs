//! Scratch drives: their files, how they grow, and what is given back to the host's disk.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::sync::Arc;

use proptest::prelude::*;
use stoker_proto::limits::MAX_SCRATCH_MIB;
use stoker_testkit::disk::{mount_small, with_own_mounts};

use super::*;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// Where data lies in guest memory; here there is more of it than fits before the status.
const DATA: u64 = 0x10_0000;
const MIB_SECTORS: u64 = 2048;

fn scratch_in(folder: &Path, size_mib: u32) -> Bench<()> {
    on(Disk::scratch(folder, size_mib).unwrap())
}

fn scratch(size_mib: u32) -> Bench<()> {
    scratch_in(&std::env::temp_dir(), size_mib)
}

fn on(disk: Disk) -> Bench<()> {
    let block = Block::new(disk, "scratch");
    let features = block.info().features;
    Bench::new(block, features, ())
}

impl<F> Bench<F> {
    fn read(&mut self, sector: u64, sectors: u32) -> (u8, Vec<u8>) {
        self.header(IN, sector);
        let (status, _) = self.run(&request(&[Part::write(DATA, sectors * 512)]));
        (status, self.driver.read(DATA, sectors as usize * 512))
    }

    fn write(&mut self, sector: u64, sectors: u32, value: u8) -> u8 {
        self.driver.put(DATA, &vec![value; sectors as usize * 512]);
        self.header(OUT, sector);
        self.run(&request(&[Part::read(DATA, sectors * 512)])).0
    }

    /// Asks for something to be done with ranges: sector, sectors, flags.
    fn clear(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.driver.put(DATA, &bytes);
        self.header(kind, 0);
        self.run(&request(&[Part::read(DATA, bytes.len() as u32)])).0
    }

    /// Sectors as the driver is told.
    fn capacity(&self) -> u64 {
        let mut bytes = [0; 8];
        self.block.info().config.read(0, &mut bytes);
        u64::from_le_bytes(bytes)
    }

    /// Bytes that the file takes of the host's disk.
    fn taken(&self) -> u64 {
        self.block.disk.file().metadata().unwrap().blocks() * 512
    }
}

#[test]
fn its_file_has_no_name_and_takes_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let mut bench = scratch_in(folder.path(), 2048);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let metadata = bench.block.disk.file().metadata().unwrap();
    assert_eq!((metadata.nlink(), metadata.mode() & 0o7777), (0, 0o600));
    assert_eq!(metadata.len(), 2048 << 20);
    assert_eq!(bench.capacity(), 2048 * MIB_SECTORS);
    assert_eq!(bench.taken(), 0);
    assert_eq!(bench.write(2047 * MIB_SECTORS, 64, 7), OK);
    bench.block.disk.file().sync_all().unwrap();
    let taken = bench.taken();
    assert!((32 << 10..1 << 20).contains(&taken), "{taken} bytes");
}

#[test]
fn its_configuration_has_what_its_driver_looks_for() {
    let bench = scratch(1);
    let info = bench.block.info();
    assert_eq!(
        info.features & (FEATURE_FLUSH | FEATURE_READ_ONLY | FEATURE_DISCARD | FEATURE_WRITE_ZEROES),
        FEATURE_DISCARD | FEATURE_WRITE_ZEROES
    );
    let field = |offset| {
        let mut bytes = [0; 4];
        info.config.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    };
    // seg_max; of discards sectors, ranges and alignment; of write zeroes sectors, ranges, and whether they give back.
    let offsets = [12, 36, 40, 44, 48, 52, 56];
    assert_eq!(offsets.map(field), [126, 1 << 21, 16, 8, 1 << 21, 16, 1]);
    // An image has nothing behind `seg_max`.
    let image = super::bench(false);
    let mut rest = [0; 64];
    image.block.info().config.read(16, &mut rest);
    assert_eq!(rest, [0; 64]);
    assert!(image.block.growth().is_none(), "an image does not grow");
}

#[test]
fn it_grows_and_never_shrinks() {
    let mut bench = scratch(1);
    let mut growth = bench.block.growth().unwrap();
    bench.block.info().config.connect(bench.driver.interrupt.clone());
    assert_eq!(bench.write(0, 8, 1), OK);
    assert_eq!(
        bench.write(MIB_SECTORS - 4, 8, 2),
        IO_ERROR,
        "its end lies in the middle"
    );
    growth.grow(3).unwrap();
    assert_eq!((growth.size_mib(), bench.capacity()), (3, 3 * MIB_SECTORS));
    assert_eq!(bench.driver.interrupt.config_changed_count(), 1);
    assert_eq!(bench.write(MIB_SECTORS - 4, 8, 2), OK);
    assert_eq!(bench.read(0, 8), (OK, vec![1; 4096]), "what was there is there");
    assert_eq!(bench.read(3 * MIB_SECTORS - 1, 1), (OK, vec![0; 512]));
    assert_eq!(bench.read(3 * MIB_SECTORS - 1, 2).0, IO_ERROR);
    for size_mib in [3, 2, 0] {
        growth.grow(size_mib).unwrap();
        assert_eq!((growth.size_mib(), bench.capacity()), (3, 3 * MIB_SECTORS));
    }
    let error = growth.grow(MAX_SCRATCH_MIB + 1).unwrap_err().to_string();
    assert!(
        error.contains("65537 MiB") && error.contains("65536 MiB at most"),
        "{error}"
    );
    assert_eq!((growth.size_mib(), bench.capacity()), (3, 3 * MIB_SECTORS));
    assert_eq!(
        bench.driver.interrupt.config_changed_count(),
        1,
        "told of changes alone"
    );
    growth.grow(MAX_SCRATCH_MIB).unwrap();
    assert_eq!(bench.capacity(), u64::from(MAX_SCRATCH_MIB) * MIB_SECTORS);
}

/// A file in memory that can't be made larger.
fn sealed(size: u64) -> File {
    // SAFETY: the name ends with a NUL and lives for the length of the call; the descriptor is new and nobody else's.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"sealed".as_ptr(), libc::MFD_ALLOW_SEALING)) };
    file.set_len(size).unwrap();
    // SAFETY: touches no memory of ours.
    let added = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, libc::F_SEAL_GROW) };
    assert_eq!(added, 0);
    file
}

#[test]
fn where_the_file_cannot_grow_it_is_as_it_was() {
    let mut bench = on(Disk::new(sealed(1 << 20), MIB_SECTORS, Kind::Scratch));
    let mut growth = bench.block.growth().unwrap();
    bench.block.info().config.connect(bench.driver.interrupt.clone());
    let error = growth.grow(2).unwrap_err().to_string();
    assert!(error.contains("cannot make the scratch drive 2 MiB large"), "{error}");
    assert_eq!((growth.size_mib(), bench.capacity()), (1, MIB_SECTORS));
    assert_eq!(bench.driver.interrupt.config_changed_count(), 0);
    assert_eq!(bench.read(MIB_SECTORS, 1).0, IO_ERROR);
    assert_eq!(bench.write(MIB_SECTORS - 1, 1, 3), OK);
}

#[test]
fn a_full_host_gives_errors_until_something_is_given_back() {
    let folder = tempfile::tempdir().unwrap();
    with_own_mounts(|| {
        mount_small(folder.path(), 1 << 20);
        let mut bench = scratch_in(folder.path(), 4);
        let mut statuses = (0..64u64).map(|at| bench.write(at * 128, 128, 5));
        let good = statuses.by_ref().take_while(|status| *status == OK).count();
        assert!((8..=16).contains(&good), "{good} times 64 KiB");
        assert!(statuses.all(|status| status == IO_ERROR));
        assert_eq!(bench.read(0, 128), (OK, vec![5; 128 * 512]));
        assert_eq!(bench.clear(DISCARD, &[(0, 256, 0)]), OK);
        assert_eq!(bench.write(3 * MIB_SECTORS, 128, 6), OK);
        assert_eq!(bench.read(3 * MIB_SECTORS, 128), (OK, vec![6; 128 * 512]));
    });
}

#[test]
fn what_is_discarded_goes_back_to_the_host() {
    for (kind, flags) in [(DISCARD, 0), (WRITE_ZEROES, 0), (WRITE_ZEROES, UNMAP)] {
        let mut bench = scratch(4);
        for at in 0..16 {
            assert_eq!(bench.write(at * 64, 64, 9), OK);
        }
        bench.block.disk.file().sync_all().unwrap();
        let before = bench.taken();
        // The second half and a bit of the first.
        assert_eq!(
            bench.clear(kind, &[(512, 512, flags), (8, 8, flags), (3, 0, flags)]),
            OK
        );
        let after = bench.taken();
        assert!(after + (256 << 10) <= before, "{before} bytes became {after}");
        assert_eq!(bench.read(0, 8), (OK, vec![9; 4096]));
        assert_eq!(bench.read(8, 8), (OK, vec![0; 4096]));
        assert_eq!(bench.read(504, 16), (OK, [[9; 4096], [0; 4096]].concat()));
    }
}

#[test]
fn what_cannot_be_discarded_is_left() {
    let mut bench = scratch(1);
    assert_eq!(bench.write(0, 64, 9), OK);
    assert_eq!(bench.write(MIB_SECTORS - 64, 64, 9), OK);
    let end = MIB_SECTORS;
    for (kind, ranges, status) in [
        // Flags that the request does not have, wherever.
        (DISCARD, vec![(0, 8, UNMAP)], UNSUPPORTED),
        (DISCARD, vec![(0, 8, 0), (8, 8, 2)], UNSUPPORTED),
        (WRITE_ZEROES, vec![(0, 8, 0), (8, 8, 1 << 31)], UNSUPPORTED),
        // Past the end, by a little and by as much as can be.
        (DISCARD, vec![(end, 1, 0)], IO_ERROR),
        (DISCARD, vec![(end - 8, 9, 0)], IO_ERROR),
        (WRITE_ZEROES, vec![(u64::MAX, 1, UNMAP)], IO_ERROR),
        (WRITE_ZEROES, vec![(u64::MAX / 512, u32::MAX, 0)], IO_ERROR),
        (DISCARD, vec![(0, u32::MAX, 0)], IO_ERROR),
        (DISCARD, vec![(0, (1 << 21) + 1, 0)], IO_ERROR),
        // Nothing, and too much.
        (DISCARD, vec![], IO_ERROR),
        (DISCARD, vec![(0, 8, 0); 17], IO_ERROR),
    ] {
        assert_eq!(bench.clear(kind, &ranges), status, "{kind}: {ranges:?}");
    }
    // Not a whole range, no memory.
    bench.header(DISCARD, 0);
    assert_eq!(bench.run(&request(&[Part::read(DATA, 15)])), (IO_ERROR, 1));
    assert_eq!(bench.run(&request(&[Part::read(DATA, 17)])), (IO_ERROR, 1));
    assert_eq!(bench.run(&request(&[Part::read(1 << 40, 16)])), (IO_ERROR, 1));
    assert_eq!(bench.run(&request(&[Part::read(DATA, 16 << 20)])), (IO_ERROR, 1));
    assert_eq!(bench.read(0, 64), (OK, vec![9; 64 * 512]));
    assert_eq!(bench.read(MIB_SECTORS - 64, 64), (OK, vec![9; 64 * 512]));
}

#[test]
fn only_a_scratch_drive_discards() {
    for read_only in [false, true] {
        let mut bench = super::bench(read_only);
        for kind in [DISCARD, WRITE_ZEROES] {
            assert_eq!(bench.clear(kind, &[(0, 8, 0)]), UNSUPPORTED);
        }
        assert_eq!(std::fs::read(bench.file.path()).unwrap()[0], 1);
    }
}

#[test]
fn a_file_system_without_holes_is_told_apart_from_a_broken_one() {
    // It can be written to and knows nothing of holes.
    let file = File::options().read(true).write(true).open("/proc/self/comm").unwrap();
    let mut bench = on(Disk::new(file, 8, Kind::Scratch));
    assert_eq!(bench.clear(DISCARD, &[(0, 8, 0)]), UNSUPPORTED);
}

#[test]
fn nothing_waits_for_the_hosts_disk() {
    let mut image = super::bench(false);
    image.block.disk.file().sync_all().unwrap();
    assert_eq!(image.write(0, 8, 1), OK);
    if dirty_pages(image.block.disk.file()).is_none_or(|pages| pages == 0) {
        eprintln!("skipped: the file system of the temporary folder, or the kernel, does not tell of dirty pages");
        return;
    }
    let mut bench = scratch(1);
    assert_eq!(bench.write(0, 8, 1), OK);
    bench.header(FLUSH, 0);
    assert_eq!(bench.run(&request(&[])), (OK, 1));
    assert!(dirty_pages(bench.block.disk.file()).is_some_and(|pages| pages > 0));
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Grow(u32),
    Write(u64, u32, u8),
    Read(u64, u32),
    Discard(u64, u32),
}

fn step() -> impl Strategy<Value = Step> {
    // Around every end that the drive may have.
    let sector = || (0u64..5, -20i64..20).prop_map(|(mib, by)| (mib * MIB_SECTORS).saturating_add_signed(by));
    prop_oneof![
        1 => (0u32..5).prop_map(Step::Grow),
        4 => (sector(), 0u32..40, 1u8..).prop_map(|(sector, sectors, value)| Step::Write(sector, sectors, value)),
        4 => (sector(), 0u32..40).prop_map(|(sector, sectors)| Step::Read(sector, sectors)),
        2 => (sector(), 0u32..40).prop_map(|(sector, sectors)| Step::Discard(sector, sectors)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn it_holds_what_was_written_up_to_its_capacity_and_no_more(steps in prop::collection::vec(step(), 1..64)) {
        let mut bench = scratch(1);
        let mut growth = bench.block.growth().unwrap();
        let mut capacity = MIB_SECTORS;
        let mut content: BTreeMap<u64, u8> = BTreeMap::new();
        for step in steps {
            let fits = |sector: u64, sectors: u32| if sector + u64::from(sectors) <= capacity { OK } else { IO_ERROR };
            let range = |sector: u64, sectors: u32| sector..sector + u64::from(sectors);
            match step {
                Step::Grow(size_mib) => {
                    growth.grow(size_mib).unwrap();
                    capacity = capacity.max(u64::from(size_mib) * MIB_SECTORS);
                }
                Step::Write(sector, sectors, value) => {
                    let status = bench.write(sector, sectors, value);
                    prop_assert_eq!(status, fits(sector, sectors));
                    if status == OK {
                        content.extend(range(sector, sectors).map(|sector| (sector, value)));
                    }
                }
                Step::Read(sector, sectors) => {
                    let (status, data) = bench.read(sector, sectors);
                    prop_assert_eq!(status, fits(sector, sectors));
                    if status == OK {
                        for (sector, bytes) in range(sector, sectors).zip(data.chunks(512)) {
                            prop_assert_eq!(bytes, [content.get(&sector).copied().unwrap_or(0); 512]);
                        }
                    }
                }
                Step::Discard(sector, sectors) => {
                    let status = bench.clear(DISCARD, &[(sector, sectors, 0)]);
                    prop_assert_eq!(status, fits(sector, sectors));
                    if status == OK {
                        content.retain(|at, _| !range(sector, sectors).contains(at));
                    }
                }
            }
            prop_assert_eq!(bench.capacity(), capacity);
            prop_assert_eq!(bench.block.disk.file().metadata().unwrap().len(), capacity * 512);
        }
    }
}

#[test]
fn it_grows_while_it_is_used() {
    let mut bench = scratch(1);
    let mut growth = bench.block.growth().unwrap();
    let config = Arc::clone(&bench.block.info().config);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for size_mib in 2..=256 {
                growth.grow(size_mib).unwrap();
            }
        });
        let mut capacity = 0;
        while capacity < 256 * MIB_SECTORS {
            let mut bytes = [0; 8];
            config.read(0, &mut bytes);
            let now = u64::from_le_bytes(bytes);
            assert!(now >= capacity, "it became smaller");
            capacity = now;
            // What the driver was told of can be used at once.
            assert_eq!(bench.write(capacity - 1, 1, 1), OK);
        }
    });
}
