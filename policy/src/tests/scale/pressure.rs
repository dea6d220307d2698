//! A host that is short of memory, and machines whose guests give of theirs, second by second.

use std::time::Duration;

use proptest::prelude::*;

use super::super::SECOND;
use super::super::driver::Driver;
use super::{grow, host, launch, minutes, of_memory};
use crate::pressure::{BalloonMeasures, GuestMemory, HostMemory};
use crate::scale::{GuestMeasures, Measures, Resource, Size, Taken, Use, needed};
use crate::{Command, Event, Launched, MachineId, Reason, Rules};

const RESERVE_MIB: u64 = 1000;

/// What guests' kernels keep of the memory of their machines for themselves, and leave out of all that they say, in MiB.
const HIDDEN_MIB: u32 = 250;

/// What a guest says of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    Truth,
    /// What was so that long ago, and what it used then.
    Old(Duration),
    Nothing,
    /// That it uses so many MiB.
    Uses(u32),
    /// Its VMM does not answer.
    NoAnswer,
}

#[derive(Clone, Debug)]
struct Guest {
    machine: MachineId,
    /// What its kernel does not hide of its machine's memory.
    has: u32,
    uses: u32,
    asked: u32,
    taken: u32,
    /// How many MiB it gives in a second.
    gives: u32,
    /// What it gives whatever it is asked for.
    unasked: u32,
    says: Says,
    /// What it said a second ago.
    said: Option<GuestMemory>,
}

struct Bench {
    driver: Driver,
    guests: Vec<Guest>,
    /// What the host has available without any balloon, in MiB.
    available: u64,
    /// In percent, how long something waits for memory; where less than the reserve is available, if nothing else is said.
    waits: Option<u32>,
    /// What was decided: when, of which guest, from, to, and why.
    told: Vec<(Duration, usize, u32, u32, String)>,
}

impl Bench {
    /// Machines whose guests have and use so much.
    fn new(machines: &[(u32, u32)]) -> Self {
        let mut driver = Driver::new(Rules {
            host_reserve_mib: RESERVE_MIB,
            ..host()
        });
        let guests = machines.iter().map(|(has, uses)| {
            let machine = driver.launch("a", launch(1, *has + HIDDEN_MIB)).unwrap();
            Guest {
                machine,
                has: *has,
                uses: *uses,
                asked: 0,
                taken: 0,
                gives: 10_000,
                unasked: 0,
                says: Says::Truth,
                said: None,
            }
        });
        let guests: Vec<Guest> = guests.collect();
        driver.boot_all();
        for guest in &guests {
            // They have been given the rest of their memory.
            driver.step(Event::MachineResized {
                machine: guest.machine,
                number: 0,
                taken: Taken {
                    vcpus: 1,
                    memory_mib: guest.has + HIDDEN_MIB,
                },
            });
        }
        Self {
            driver,
            guests,
            available: 4000,
            waits: None,
            told: Vec::new(),
        }
    }

    fn launched(&self, guest: usize) -> &Launched {
        let machine = self.driver.world().machine(self.guests[guest].machine).unwrap();
        machine.launched.as_deref().unwrap()
    }

    fn asked(&self) -> Vec<u32> {
        self.guests.iter().map(|guest| guest.asked).collect()
    }

    fn host_available(&self) -> u64 {
        let taken: u64 = self.guests.iter().map(|guest| u64::from(guest.taken)).sum();
        self.available + taken
    }

    /// A second passes, and it is looked as the agent does: at balloons only where they are watched.
    fn second(&mut self) {
        self.driver.now += SECOND;
        for guest in &mut self.guests {
            // What it takes back is there at once.
            let given = guest.asked.min(guest.taken.saturating_add(guest.gives));
            guest.taken = given.max(guest.unasked);
        }
        let available_mib = self.host_available();
        let waits = self.waits.unwrap_or(if available_mib < RESERVE_MIB { 30 } else { 0 });
        let memory = HostMemory {
            stalled: SECOND * waits / 100,
            passed: SECOND,
            available_mib,
        };
        let world = self.driver.world();
        let told = self.guests.iter_mut().filter_map(|guest| {
            let measured = guest.measure();
            (guest.says != Says::NoAnswer && world.watches_balloon(guest.machine)).then_some(measured)
        });
        let balloons: Vec<_> = told.collect();
        let event = Event::HostMemory {
            memory,
            balloons: balloons.clone(),
        };
        for decision in self.driver.step(event) {
            let (Command::SetBalloon { machine, mib }, Reason::Balloon(inflation)) =
                (&decision.command, &decision.reason)
            else {
                continue;
            };
            let index = self.guests.iter().position(|guest| guest.machine == *machine).unwrap();
            assert_eq!(
                (inflation.before_mib, inflation.after_mib),
                (self.guests[index].asked, *mib)
            );
            assert_ne!(inflation.before_mib, *mib, "{decision:?}");
            if *mib > inflation.before_mib {
                let (_, measures) = balloons.iter().find(|(of, _)| of == machine).unwrap();
                let said = measures.guest.unwrap();
                let used = said
                    .total_mib
                    .saturating_sub(said.available_mib)
                    .saturating_sub(said.taken_mib);
                assert!(*mib + head_room(used) <= said.total_mib, "{decision:?}");
            }
            self.guests[index].asked = *mib;
            self.told.push((
                self.driver.now,
                index,
                inflation.before_mib,
                *mib,
                decision.reason.to_string(),
            ));
        }
    }

    fn seconds(&mut self, n: u32) {
        for _ in 0..n {
            self.second();
        }
    }
}

impl Guest {
    fn measure(&mut self) -> (MachineId, BalloonMeasures) {
        let uses = match self.says {
            Says::Uses(uses) => uses,
            _ => self.uses,
        };
        let now = GuestMemory {
            total_mib: self.has,
            available_mib: self.has.saturating_sub(uses).saturating_sub(self.taken),
            taken_mib: self.taken,
            age: match self.says {
                Says::Old(age) => age,
                _ => SECOND,
            },
        };
        let said = self.said.replace(now);
        let measures = BalloonMeasures {
            asked_mib: self.asked,
            taken_mib: self.taken,
            guest: said.filter(|_| self.says != Says::Nothing),
        };
        (self.machine, measures)
    }
}

/// What a guest that uses so much is left with at least.
fn head_room(used_mib: u32) -> u32 {
    let used = Use {
        cpu_millis: 0,
        memory_mib: Some(used_mib),
    };
    needed(Resource::Memory, used).unwrap()
}

#[test]
fn a_host_that_has_memory_enough_or_for_which_nothing_waits_asks_for_nothing() {
    for (available, waits) in [(4000, 100), (RESERVE_MIB, 100), (0, 0), (0, 9)] {
        let mut bench = Bench::new(&[(1024, 200)]);
        (bench.available, bench.waits) = (available, Some(waits));
        bench.seconds(600);
        assert_eq!(bench.told, [], "{available} MiB, {waits}%");
        assert!(!bench.driver.world().watches_memory());
    }
}

#[test]
fn what_is_missing_is_asked_in_proportion_to_what_is_not_used() {
    let mut bench = Bench::new(&[(1024, 600), (1024, 200), (256, 200)]);
    bench.available = RESERVE_MIB - 320;
    bench.seconds(10);
    // 704 MiB are not used, and 256, and none.
    assert_eq!(bench.asked(), [96, 240, 0]);
    assert_eq!(
        bench.told[0].4,
        "the host waited for memory 30% of the time, and 680 MiB were available, 320 MiB too few; the machine can do without 704 MiB: \
         its balloon from 0 to 240 MiB"
    );
    assert_eq!(bench.told.len(), 2, "once is enough: {:?}", bench.told);
    assert_eq!(bench.launched(1).balloon.taken_mib, 240);
}

#[test]
fn guests_keep_head_room_however_short_the_host_is() {
    let mut bench = Bench::new(&[(1024, 600), (1024, 200), (512, 400)]);
    (bench.available, bench.guests[0].gives) = (0, 3);
    bench.seconds(600);
    assert_eq!(bench.asked(), [256, 704, 0]);
    for guest in &bench.guests {
        assert!(guest.taken == 0 || guest.taken + head_room(guest.uses) <= guest.has);
    }
}

#[test]
fn it_is_given_back_step_by_step_once_the_host_has_been_well_for_a_while() {
    let mut bench = Bench::new(&[(1024, 200)]);
    bench.available = RESERVE_MIB - 400;
    bench.seconds(5);
    assert_eq!(bench.asked(), [400]);
    let before = bench.driver.now;
    bench.available = 4000;
    bench.seconds(120);
    let back: Vec<_> = bench.told[1..]
        .iter()
        .map(|(at, _, _, to, _)| ((*at - before).as_secs(), *to))
        .collect();
    assert_eq!(back, [(28, 288), (33, 208), (38, 144), (43, 80), (48, 16), (53, 0)]);
    assert_eq!(
        bench.told[1].4,
        "the host has had memory enough for 30.0 s, and 4400 MiB are available: its balloon from 400 to 288 MiB"
    );
    assert!(!bench.driver.world().watches_memory(), "nobody looks any more");
}

#[test]
fn between_pressed_and_eased_all_stays_as_it_is() {
    let mut bench = Bench::new(&[(1024, 200)]);
    bench.available = RESERVE_MIB - 400;
    bench.seconds(5);
    bench.waits = Some(5);
    bench.seconds(3600);
    assert_eq!(bench.asked(), [400]);
    // Others wait, but not for what balloons have.
    (bench.available, bench.waits) = (RESERVE_MIB, Some(100));
    bench.seconds(120);
    assert_eq!(bench.asked(), [0]);
}

#[test]
fn a_host_that_goes_on_needing_it_takes_it_and_gives_it_back_more_and_more_seldom() {
    let mut bench = Bench::new(&[(1024, 200)]);
    bench.available = RESERVE_MIB - 400;
    bench.seconds(24 * 3600);
    let gave = bench.told.iter().filter(|(_, _, before, after, _)| after < before);
    let at: Vec<_> = gave.map(|(at, ..)| at.as_secs()).collect();
    assert!((20..=32).contains(&at.len()), "{at:?}");
    assert!(at[7] - at[6] > 1800, "{at:?}");
    // What it has no need of any more is given back soon all the same.
    assert_eq!(bench.asked(), [400]);
    bench.available = 4000;
    bench.seconds(120);
    assert_eq!(bench.asked(), [0]);
}

#[test]
fn a_guest_that_is_short_has_it_back_at_once_and_is_left_alone() {
    let mut bench = Bench::new(&[(1024, 200)]);
    bench.available = RESERVE_MIB - 700;
    bench.seconds(5);
    assert_eq!(bench.asked(), [704]);
    // A little more is no matter.
    bench.guests[0].uses = 220;
    bench.seconds(10);
    assert_eq!(bench.asked(), [704]);
    bench.guests[0].uses = 500;
    bench.seconds(2);
    assert_eq!(bench.asked(), [352]);
    assert_eq!(
        bench.told.last().unwrap().4,
        "its guest uses 320 MiB and needs 416 of the 1024 MiB that it has: its balloon from 704 to 352 MiB"
    );
    bench.guests[0].uses = 200;
    bench.seconds(58);
    assert_eq!(bench.told.len(), 2);
    bench.seconds(5);
    assert_eq!(bench.asked(), [704]);
}

#[test]
fn a_guest_that_took_pages_back_by_itself_is_not_made_to_give_them_again() {
    for (uses, available) in [(880, 0), (200, 4000)] {
        let mut bench = Bench::new(&[(1024, 200)]);
        bench.available = 0;
        bench.seconds(5);
        assert_eq!(bench.asked(), [704]);
        // Before it kills anything. Then it would give what it is asked for.
        (bench.guests[0].taken, bench.guests[0].uses, bench.guests[0].gives) = (100, uses, 0);
        bench.available = available;
        bench.seconds(40);
        assert!(bench.asked()[0] < 100, "{:?}", bench.told);
    }
}

#[test]
fn a_guest_that_says_nothing_or_what_is_old_is_not_asked() {
    for says in [Says::Nothing, Says::Old(6 * SECOND)] {
        let mut bench = Bench::new(&[(1024, 200), (1024, 200)]);
        (bench.available, bench.guests[0].says) = (0, says);
        bench.seconds(60);
        assert_eq!(bench.asked(), [0, 704]);
        // It has back what it gave before.
        bench.guests[1].says = says;
        bench.available = 4000;
        bench.seconds(120);
        assert_eq!(bench.asked(), [0, 0]);
    }
}

#[test]
fn a_guest_that_falls_silent_has_it_back_however_short_the_host_is() {
    for says in [Says::Nothing, Says::NoAnswer] {
        let mut bench = Bench::new(&[(1024, 200)]);
        bench.available = 0;
        bench.seconds(5);
        assert_eq!(bench.asked(), [704]);
        bench.guests[0].says = says;
        bench.seconds(14);
        assert_eq!(bench.asked(), [704]);
        bench.seconds(2);
        assert_eq!(bench.asked(), [352]);
        assert_eq!(
            bench.told.last().unwrap().4,
            "its guest has said nothing of its memory for 15.0 s: its balloon from 704 to 352 MiB"
        );
        bench.seconds(60);
        assert_eq!(bench.asked(), [0]);
        bench.guests[0].says = Says::Truth;
        (bench.available, bench.waits) = (4000, Some(0));
        bench.seconds(60);
        assert!(!bench.driver.world().watches_memory(), "{says:?}");
    }
}

#[test]
fn what_a_guest_gives_unasked_is_its_own_affair() {
    let mut bench = Bench::new(&[(1024, 200), (1024, 200)]);
    bench.guests[0].unasked = 512;
    bench.available = RESERVE_MIB - 800;
    bench.seconds(5);
    assert!(bench.asked()[1] > 0);
    (bench.available, bench.waits) = (4000, Some(0));
    bench.seconds(120);
    assert_eq!(bench.asked(), [0, 0]);
    assert!(!bench.driver.world().watches_memory());
    assert_eq!(bench.launched(0).balloon.taken_mib, 0);
}

#[test]
fn a_guest_that_lies_harms_nobody_else() {
    // One that says it needs nothing, and gives nothing; and one that says it needs all.
    for says in [Says::Uses(0), Says::Uses(100_000)] {
        let mut bench = Bench::new(&[(7680, 100), (1024, 200), (1024, 200)]);
        (bench.guests[0].says, bench.guests[0].gives) = (says, 0);
        bench.available = RESERVE_MIB - 600;
        bench.seconds(60);
        assert!(bench.host_available() >= RESERVE_MIB, "{:?}", bench.asked());
        let others = &bench.asked()[1..];
        assert!(
            others.iter().all(|asked| (288..=336).contains(asked)),
            "alike: {others:?}"
        );
        bench.available = 4000;
        bench.seconds(300);
        assert_eq!(bench.asked(), [0, 0, 0]);
        assert!(!bench.driver.world().watches_memory());
    }
}

#[test]
fn what_an_earlier_agent_asked_for_is_given_back() {
    let mut bench = Bench::new(&[(1024, 200), (1024, 200)]);
    (bench.guests[0].asked, bench.guests[0].taken) = (640, 640);
    // The agent looks at balloons once where it takes machines over.
    let (machine, measures) = bench.guests[0].measure();
    let event = Event::HostMemory {
        memory: HostMemory {
            passed: SECOND,
            available_mib: 4000,
            ..HostMemory::default()
        },
        balloons: vec![(machine, measures)],
    };
    assert_eq!(bench.driver.step(event), []);
    assert!(bench.driver.world().watches_memory());
    assert_eq!(bench.launched(0).balloon.taken_mib, 640);
    bench.seconds(29);
    assert_eq!(bench.told, []);
    bench.seconds(60);
    assert_eq!(bench.asked(), [0, 0]);
}

#[test]
fn a_machine_that_has_ended_is_not_waited_for() {
    let mut bench = Bench::new(&[(1024, 200)]);
    bench.available = 0;
    bench.seconds(5);
    let machine = bench.guests.remove(0).machine;
    bench.driver.step(Event::MachineEnded { machine });
    (bench.available, bench.waits) = (4000, Some(0));
    bench.second();
    assert!(!bench.driver.world().watches_memory());
}

#[test]
fn a_machine_that_becomes_smaller_has_back_what_it_can_not_do_without() {
    let mut bench = Bench::new(&[(1024, 100)]);
    bench.available = 0;
    bench.seconds(5);
    let asked = bench.asked()[0];
    assert_eq!(asked, 816);
    bench.driver.step(Event::Measured {
        machine: bench.guests[0].machine,
        measures: Measures::default(),
    });
    bench.driver.step(Event::MachineResized {
        machine: bench.guests[0].machine,
        number: 0,
        taken: Taken {
            vcpus: 1,
            memory_mib: 600 + HIDDEN_MIB,
        },
    });
    bench.guests[0].says = Says::Nothing;
    bench.guests[0].has = 600;
    bench.available = 4000;
    bench.seconds(40);
    assert!(bench.asked()[0] <= 600, "{:?}", bench.told);
}

#[test]
fn what_a_balloon_has_is_no_use_of_its_machine() {
    let mut bench = Bench::new(&[(1024, 200)]);
    let of_memory = of_memory(grow(50.0), 128);
    let thresholds = super::checked(bench.driver.world(), &[of_memory]);
    let machine = bench.guests[0].machine;
    bench.driver.step(Event::ThresholdsAsked {
        machine,
        thresholds,
        by: "someone".into(),
    });
    bench.available = 0;
    bench.seconds(5);
    assert_eq!(bench.launched(0).balloon.taken_mib, 704);
    for _ in 0..60 {
        bench.driver.now += SECOND;
        let measures = Measures {
            at: bench.driver.now,
            // As its guest sees it.
            guest: Some(GuestMeasures {
                memory_bytes: 904 << 20,
                ..GuestMeasures::default()
            }),
            ..Measures::default()
        };
        bench.driver.step(Event::Measured { machine, measures });
    }
    let launched = bench.launched(0);
    assert_eq!(launched.used(bench.driver.now).unwrap().memory_mib, Some(200));
    assert_eq!(launched.asked, Size::whole(1, 1024 + HIDDEN_MIB));
}

#[derive(Clone, Debug)]
enum Do {
    Uses(usize, u32),
    Says(usize, Says),
    Gives(usize, u32),
    Unasked(usize, u32),
    Host(u64, Option<u32>),
    Pass(u32),
}

fn doing() -> impl Strategy<Value = Do> {
    let says = prop_oneof![
        3 => Just(Says::Truth),
        1 => Just(Says::Nothing),
        1 => (0..10_u32).prop_map(|age| Says::Old(age * SECOND)),
        1 => prop_oneof![Just(0), 0..2000_u32, Just(u32::MAX)].prop_map(Says::Uses),
    ];
    prop_oneof![
        (0..4_usize, 0..2100_u32).prop_map(|(guest, uses)| Do::Uses(guest, uses)),
        (0..4_usize, says).prop_map(|(guest, says)| Do::Says(guest, says)),
        (0..4_usize, prop_oneof![Just(0), 0..500_u32]).prop_map(|(guest, gives)| Do::Gives(guest, gives)),
        (0..4_usize, prop_oneof![Just(0), 0..500_u32]).prop_map(|(guest, gives)| Do::Unasked(guest, gives)),
        (0..3000_u64, prop::option::of(0..=100_u32)).prop_map(|(available, waits)| Do::Host(available, waits)),
        (1..120_u32).prop_map(Do::Pass),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever guests and host do: no balloon is asked for more than leaves its guest what it says to use and head room (looked at
    /// with each decision), and once the host is well all have all of their memory, and nobody looks any more.
    #[test]
    fn bounds_hold_and_all_is_given_back_at_the_end(
        sizes in prop::collection::vec((128..1024_u32, 0..2048_u32), 1..5),
        doings in prop::collection::vec(doing(), 1..40),
    ) {
        let sizes: Vec<_> = sizes.into_iter().map(|(blocks, uses)| (blocks * 2, uses)).collect();
        let mut bench = Bench::new(&sizes);
        let guests = bench.guests.len();
        for doing in doings {
            match doing {
                Do::Uses(guest, uses) => bench.guests[guest % guests].uses = uses,
                Do::Says(guest, says) => bench.guests[guest % guests].says = says,
                Do::Gives(guest, gives) => bench.guests[guest % guests].gives = gives,
                Do::Unasked(guest, gives) => bench.guests[guest % guests].unasked = gives,
                Do::Host(available, waits) => (bench.available, bench.waits) = (available, waits),
                Do::Pass(n) => bench.seconds(n),
            }
        }
        bench.waits = Some(0);
        bench.seconds(u32::try_from(minutes(70).as_secs()).unwrap());
        prop_assert!(bench.asked().iter().all(|asked| *asked == 0), "{:?}", bench.asked());
        prop_assert!(!bench.driver.world().watches_memory());
        let unasked: u64 = bench.guests.iter().map(|guest| u64::from(guest.unasked)).sum();
        prop_assert_eq!(bench.host_available(), bench.available + unasked);
    }
}
