use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};

use super::super::testing::{Driver, Part};
use super::*;

const MIB: u64 = 1 << 20;
/// Of the driver's memory, what can be plugged.
const PLUGGABLE_MIB: u32 = 128;
/// Where the driver has its requests and reads the answers.
const REQUEST: u64 = 0x1000;
const ANSWER: u64 = 0x2000;

struct Bench {
    driver: Driver,
    mem: Mem,
    plugging: Plugging,
    memory: Arc<Pluggable>,
}

fn bench() -> Bench {
    let driver = Driver::with_pluggable(&[QUEUE_SIZE], PLUGGABLE_MIB);
    let memory = driver.memory.pluggable().unwrap().clone();
    let mut mem = Mem::new(memory.clone());
    mem.activate(driver.activation(feature::COMMON));
    let plugging = mem.plugging();
    mem.info().config.connect(driver.interrupt.clone());
    Bench {
        driver,
        mem,
        plugging,
        memory,
    }
}

impl Bench {
    /// The first two numbers of the answer: type, and what was asked for.
    fn ask(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let mut request = [0; REQUEST_BYTES];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.driver.put(REQUEST, &request);
        self.driver.put(ANSWER, &[0xff; 10]);
        let head = self
            .driver
            .send(0, &[Part::read(REQUEST, REQUEST_BYTES as u32), Part::write(ANSWER, 10)]);
        while self.mem.process() == Progress::More {}
        assert_eq!(self.driver.used(0), [(u32::from(head), 10)]);
        let answer = self.driver.read(ANSWER, 10);
        (
            u16::from_le_bytes([answer[0], answer[1]]),
            u16::from_le_bytes([answer[8], answer[9]]),
        )
    }

    fn block(&self, index: u64) -> u64 {
        self.memory.start() + index * BLOCK
    }

    fn field(&self, offset: u64) -> u64 {
        let mut bytes = [0; 8];
        self.mem.info().config.read(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

const ACK: (u16, u16) = (0, 0);
const NACK: (u16, u16) = (1, 0);
const ERROR: (u16, u16) = (3, 0);

#[test]
fn the_driver_learns_what_there_is_and_what_is_wanted() {
    let mut bench = bench();
    let fields = |bench: &Bench| [0, 8, 16, 24, 32, 40, 48].map(|offset| bench.field(offset));
    let (start, length) = (4096 * MIB, 128 * MIB);
    assert_eq!(fields(&bench), [2 * MIB, 0, start, length, length, 0, 0]);
    bench.plugging.ask(64).unwrap();
    assert_eq!(fields(&bench), [2 * MIB, 0, start, length, length, 0, 64 * MIB]);
    assert_eq!(bench.driver.interrupt.config_changed_count(), 1);
    bench.plugging.ask(64).unwrap();
    assert_eq!(bench.driver.interrupt.config_changed_count(), 2, "it is to try again");
    assert_eq!((bench.plugging.asked_mib(), bench.plugging.taken_mib()), (64, 0));
    assert_eq!(bench.ask(request::PLUG, bench.block(0), 32), ACK);
    assert_eq!(bench.field(40), 64 * MIB);
    bench.plugging.ask(64).unwrap();
    assert_eq!(bench.driver.interrupt.config_changed_count(), 2, "the driver knows");
    assert_eq!((bench.plugging.asked_mib(), bench.plugging.taken_mib()), (64, 64));
}

#[test]
fn what_cannot_be_is_not_asked_for() {
    let mut bench = bench();
    bench.plugging.ask(2).unwrap();
    assert_eq!(bench.plugging.ask(3), Err(AskError::Block(3)));
    let most = 128;
    assert_eq!(bench.plugging.ask(130), Err(AskError::TooMuch { asked: 130, most }));
    assert_eq!(bench.plugging.asked_mib(), 2);
    assert_eq!(bench.driver.interrupt.config_changed_count(), 1);
}

#[test]
fn blocks_are_plugged_used_and_unplugged() {
    let mut bench = bench();
    bench.plugging.ask(16).unwrap();
    let page = GuestAddress(bench.block(5));
    assert!(bench.driver.memory.write_slice(&[1; 4096], page).is_err());
    assert_eq!(bench.ask(request::PLUG, bench.block(4), 2), ACK);
    bench.driver.memory.write_slice(&[1; 4096], page).unwrap();
    assert_eq!(bench.ask(request::STATE, bench.block(4), 2), (0, 0));
    assert_eq!(bench.ask(request::STATE, bench.block(0), 4), (0, 1));
    assert_eq!(bench.ask(request::STATE, bench.block(3), 2), (0, 2));
    assert_eq!(bench.ask(request::UNPLUG, bench.block(5), 1), ACK);
    assert_eq!(bench.plugging.taken_mib(), 2);
    assert!(bench.driver.memory.write_slice(&[1], page).is_err());
    assert_eq!(bench.ask(request::PLUG, bench.block(0), 1), ACK);
    assert_eq!(bench.ask(request::UNPLUG_ALL, 0, 0), ACK);
    assert_eq!(
        bench.ask(request::UNPLUG_ALL, u64::MAX, 7),
        ACK,
        "its other fields mean nothing"
    );
    assert_eq!((bench.plugging.taken_mib(), bench.field(40)), (0, 0));
    // What was written is gone with the block.
    assert_eq!(bench.ask(request::PLUG, bench.block(5), 1), ACK);
    let mut back = [1; 4096];
    bench.driver.memory.read_slice(&mut back, page).unwrap();
    assert!(back.iter().all(|byte| *byte == 0));
}

#[test]
fn no_more_is_plugged_than_the_host_asks_for() {
    let mut bench = bench();
    assert_eq!(bench.ask(request::PLUG, bench.block(0), 1), NACK);
    bench.plugging.ask(8).unwrap();
    assert_eq!(bench.ask(request::PLUG, bench.block(0), 5), NACK);
    assert_eq!(bench.ask(request::PLUG, bench.block(0), 3), ACK);
    assert_eq!(bench.ask(request::PLUG, bench.block(60), 2), NACK);
    assert_eq!(bench.ask(request::PLUG, bench.block(60), 1), ACK);
    // The host wants less: nothing more is plugged, and nothing is taken from the driver either.
    bench.plugging.ask(2).unwrap();
    assert_eq!(bench.plugging.taken_mib(), 8);
    assert_eq!(bench.ask(request::UNPLUG, bench.block(60), 1), ACK);
    assert_eq!(bench.ask(request::PLUG, bench.block(60), 1), NACK);
}

/// Asks for less while the driver plugs all there is, so many times; how often the driver had it and the host did not know.
fn ask_for_less_beside_a_driver_that_plugs(rounds: u32) -> u32 {
    let Bench { mem, mut plugging, .. } = bench();
    let blocks = &mem.blocks;
    let mut plug = [0; REQUEST_BYTES];
    plug[8..16].copy_from_slice(&blocks.memory.start().to_le_bytes());
    plug[16..18].copy_from_slice(&(blocks.memory.blocks() as u16).to_le_bytes());
    // Both threads count up to each number before either goes on.
    let met = AtomicU64::new(0);
    let meet = |number: u64| {
        met.fetch_add(1, Ordering::SeqCst);
        while met.load(Ordering::SeqCst) < 2 * number {
            std::thread::yield_now();
        }
    };
    let mut unknown = 0;
    std::thread::scope(|scope| {
        let driver = scope.spawn(|| {
            let answer = |round: u32| {
                meet(2 * u64::from(round) + 1);
                let answer = blocks.execute(plug);
                meet(2 * u64::from(round) + 2);
                answer
            };
            (0..rounds).map(answer).collect::<Vec<_>>()
        });
        let mut known = Vec::new();
        for round in 0..rounds {
            plugging.ask(PLUGGABLE_MIB).unwrap();
            meet(2 * u64::from(round) + 1);
            for _ in 0..round % 512 {
                std::hint::spin_loop();
            }
            plugging.ask(0).unwrap();
            known.push(plugging.taken_mib());
            meet(2 * u64::from(round) + 2);
            blocks.unplug(0, blocks.memory.blocks());
        }
        for (answer, known) in driver.join().unwrap().into_iter().zip(known) {
            unknown += u32::from(answer == Response::Ack && known == 0);
        }
    });
    unknown
}

#[test]
fn who_asks_for_less_sees_what_the_driver_was_let_plug() {
    assert_eq!(ask_for_less_beside_a_driver_that_plugs(20_000), 0);
}

#[test]
fn blocks_that_are_not_there_or_not_so_are_refused() {
    let mut bench = bench();
    bench.plugging.ask(128).unwrap();
    assert_eq!(bench.ask(request::PLUG, bench.block(8), 8), ACK);
    let (start, all) = (bench.memory.start(), bench.memory.blocks() as u16);
    for kind in [request::PLUG, request::UNPLUG, request::STATE] {
        for (address, count) in [
            (start, 0),
            (start + 4096, 1),
            (start - BLOCK, 1),
            (0, 1),
            (start, all + 1),
            (bench.block(63), 2),
            (bench.block(64), 1),
            (u64::MAX, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
        ] {
            assert_eq!(bench.ask(kind, address, count), ERROR, "{kind}: {address:#x}+{count}");
        }
    }
    assert_eq!(bench.ask(request::PLUG, bench.block(7), 2), ERROR, "one is plugged");
    assert_eq!(bench.ask(request::UNPLUG, bench.block(15), 2), ERROR, "one is not");
    assert_eq!(bench.ask(4, bench.block(8), 1), ERROR, "no such request");
    assert_eq!(bench.ask(u16::MAX, bench.block(8), 1), ERROR);
    assert_eq!(bench.plugging.taken_mib(), 16);
}

#[test]
fn requests_without_room_change_nothing_or_are_not_answered() {
    let mut bench = bench();
    bench.plugging.ask(128).unwrap();
    let mut request = [0; REQUEST_BYTES];
    request[8..16].copy_from_slice(&bench.block(0).to_le_bytes());
    request[16] = 1;
    bench.driver.put(REQUEST, &request);
    let short = Part::read(REQUEST, REQUEST_BYTES as u32 - 1);
    bench.driver.send(0, &[short, Part::write(ANSWER, 10)]);
    bench
        .driver
        .send(0, &[Part::write(ANSWER, 10), Part::read(REQUEST, 24)]);
    bench
        .driver
        .send(0, &[Part::read(u64::MAX - 8, 24), Part::write(ANSWER, 10)]);
    assert_eq!(bench.mem.process(), Progress::Idle);
    assert_eq!(bench.plugging.taken_mib(), 0);
    // Done, though nobody can be told.
    bench.driver.send(0, &[Part::read(REQUEST, 24), Part::write(ANSWER, 9)]);
    assert_eq!(bench.mem.process(), Progress::Idle);
    assert_eq!(bench.plugging.taken_mib(), 2);
    assert!(bench.driver.used(0).iter().all(|(_, written)| *written == 0));
}

#[test]
fn a_queue_in_memory_that_is_unplugged_is_lost_and_no_more() {
    let mut bench = bench();
    bench.plugging.ask(4).unwrap();
    assert_eq!(bench.ask(request::PLUG, bench.block(0), 1), ACK);
    // The request lies in the block that it unplugs, and so does the room for the answer.
    let at = bench.block(0);
    let mut request = [0; REQUEST_BYTES];
    request[0] = request::UNPLUG as u8;
    request[8..16].copy_from_slice(&at.to_le_bytes());
    request[16] = 1;
    bench.driver.put(at, &request);
    let head = bench.driver.send(0, &[Part::read(at, 24), Part::write(at + 4096, 10)]);
    assert_eq!(bench.mem.process(), Progress::Idle);
    assert_eq!(bench.driver.used(0), [(u32::from(head), 0)]);
    assert_eq!(bench.plugging.taken_mib(), 0);
}

#[test]
fn blocks_stay_plugged_through_a_reset() {
    let mut bench = bench();
    bench.plugging.ask(4).unwrap();
    assert_eq!(bench.ask(request::PLUG, bench.block(1), 1), ACK);
    bench.mem.reset();
    assert_eq!(bench.mem.process(), Progress::Idle);
    assert_eq!((bench.plugging.taken_mib(), bench.field(40)), (2, 2 * MIB));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the driver asks for, in whatever order: what it was told is what is there, and never more than the host has asked for
    /// at the time.
    #[test]
    fn what_is_told_is_what_is_there(
        steps in proptest::collection::vec((0..5u16, 0..66u64, 0..20u16, 0..65u32), 1..60)
    ) {
        let mut bench = bench();
        let mut model = [false; 64];
        for (kind, first, count, asked) in steps {
            let count_of = |model: &[bool]| model.iter().filter(|plugged| **plugged).count() as u64;
            let after = count_of(&model) + u64::from(count);
            if kind == 4 {
                bench.plugging.ask(asked * 2).unwrap();
                continue;
            }
            let answer = bench.ask(kind, bench.block(first), count);
            let range = first as usize..first as usize + usize::from(count);
            let expected = match (kind, model.get_mut(range)) {
                (request::UNPLUG_ALL, _) => {
                    model = [false; 64];
                    ACK
                }
                (_, None | Some([])) => ERROR,
                (request::STATE, Some(blocks)) => match count_of(blocks) {
                    0 => (0, 1),
                    some if some == u64::from(count) => (0, 0),
                    _ => (0, 2),
                },
                (request::PLUG, Some(blocks)) if blocks.contains(&true) => ERROR,
                (request::UNPLUG, Some(blocks)) if blocks.contains(&false) => ERROR,
                (request::PLUG, Some(_)) if after * 2 > u64::from(bench.plugging.asked_mib()) => NACK,
                (kind, Some(blocks)) => {
                    blocks.fill(kind == request::PLUG);
                    ACK
                }
            };
            prop_assert_eq!(answer, expected);
            prop_assert_eq!(u64::from(bench.plugging.taken_mib()), count_of(&model) * 2);
            let memory = &bench.driver.memory;
            for (index, plugged) in (0u64..).zip(model) {
                let block = GuestAddress(bench.block(index));
                prop_assert_eq!(memory.check_range(block, BLOCK as usize), plugged);
                // A write takes the host a huge page: of one block alone.
                prop_assert!(index != first || memory.write_slice(&[1], block).is_ok() == plugged);
            }
        }
    }
}
