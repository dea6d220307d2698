use vm_memory::{Address as _, Bytes as _};

use super::*;

#[test]
fn memory_goes_round_the_devices() {
    assert_eq!(ranges(128), [(0, 128 << 20)]);
    assert_eq!(ranges(3072), [(0, 3072 << 20)]);
    assert_eq!(ranges(4096), [(0, 3072 << 20), (1 << 32, 1024 << 20)]);
}

#[test]
fn memory_is_not_reserved_ahead() {
    let memory = allocate(8192).unwrap();
    assert_eq!(memory.num_regions(), 2);
    assert!(memory.pluggable().is_none() && memory.turn().is_none());
    let other = memory.clone();
    drop(memory);
    let last = GuestAddress(layout::ABOVE_4G + (5120 << 20) - 1);
    other.write_slice(&[1], last).unwrap();
    assert!(other.write_slice(&[1, 2], last).is_err());
}

#[test]
fn what_can_be_plugged_lies_behind_the_rest_in_blocks_of_linux() {
    const GIB: u64 = 1 << 30;
    assert_eq!(pluggable_range(256, 256), None);
    assert_eq!(pluggable_range(256, 255), None);
    assert_eq!(pluggable_range(256, 1024), Some((4 * GIB, 768 << 20)));
    assert_eq!(pluggable_range(256, 258), Some((4 * GIB, 128 << 20)));
    assert_eq!(pluggable_range(3072, 3073), Some((4 * GIB, 128 << 20)));
    // 3 GiB lie below the devices; the rest ends at 5 GiB and a half block.
    assert_eq!(
        pluggable_range(4096 + 64, 8192),
        Some((5 * GIB + (128 << 20), 32 * (128 << 20)))
    );
    assert_eq!(pluggable_range(63 << 10, 64 << 10), Some((64 * GIB, 2 * GIB)));
    assert_eq!(
        pluggable_range((63 << 10) - 1, 64 << 10),
        Some((64 * GIB, 9 * (128 << 20)))
    );
}

#[test]
fn memory_that_is_not_plugged_is_found_by_nobody() {
    let memory = allocate_up_to(32, 64).unwrap();
    let pluggable = memory.pluggable().unwrap();
    let start = pluggable.start();
    let at = |block: u64, offset: u64| GuestAddress(start + block * BLOCK + offset);
    assert!(memory.write_slice(&[1], at(0, 0)).is_err());
    pluggable.plug(1, 2).unwrap();
    memory.write_slice(&[7; 64], at(2, 0)).unwrap();
    // Up to the edges, and not across.
    memory.write_slice(&[7; 64], at(3, 0).checked_sub(64).unwrap()).unwrap();
    for refused in [
        at(1, 0).checked_sub(1).unwrap(),
        at(3, 0).checked_sub(1).unwrap(),
        at(3, 0),
    ] {
        assert!(memory.write_slice(&[7; 2], refused).is_err(), "{refused:?}");
        assert!(memory.read_slice(&mut [0; 2], refused).is_err(), "{refused:?}");
        assert!(!memory.check_range(refused, 2));
    }
    pluggable.unplug(2, 1).unwrap();
    assert!(memory.read_slice(&mut [0], at(2, 0)).is_err());
    pluggable.plug(2, 1).unwrap();
    let mut back = [1; 64];
    memory.read_slice(&mut back, at(2, 0)).unwrap();
    assert_eq!(back, [0; 64], "what it held is gone");
}

#[test]
fn pages_are_given_back_across_regions_and_only_where_they_are() {
    let memory = allocate_up_to(4096, 4224).unwrap();
    let pluggable = memory.pluggable().unwrap();
    pluggable.plug(0, 1).unwrap();
    let start = pluggable.start();
    assert_eq!(start, layout::ABOVE_4G + (1 << 30), "right behind boot memory");
    memory.write_slice(&[1; 8192], GuestAddress(start - 4096)).unwrap();
    assert!(memory.give_back(start - 4096, 8192));
    let mut back = [1; 8192];
    memory.read_slice(&mut back, GuestAddress(start - 4096)).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
    for (from, length) in [
        (start, 2 * BLOCK),
        (start + BLOCK, 4096),
        (layout::DEVICES, 4096),
        (layout::DEVICES - 4096, 8192),
        (1, 4096),
        (0, 100),
        (!4095, 4096),
        (!4095, 8192),
    ] {
        assert!(!memory.give_back(from, length), "{from:#x}+{length:#x}");
    }
}
