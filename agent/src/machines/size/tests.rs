//! Machines whose VMM is a few numbers, in cgroups that are plain files: what is set when.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Mutex as StdMutex, MutexGuard};
use std::time::Instant;

use stoker_linux::CPU_PERIOD_US;
use stoker_policy::Shape;
use stoker_proto::vmm;
use stoker_proto::vmm::Amounts as Told;
use ulid::Ulid;

use super::taking::LOOK;
use super::*;
use crate::machines::cgroup::ThreadCgroups;
use crate::machines::cpu::Schedulers;
use crate::machines::record::Record;
use crate::owner::Owner;

const SHAPE: Shape = Shape {
    vcpus: 2,
    memory_mib: 256,
    drive_mib: 0,
    baseline_millis: 200,
};
const CEILING: Ceiling = Ceiling {
    vcpus: 8,
    memory_mib: 512,
};

/// A guest here has no need of longer ones.
const SOON: Pauses = Pauses {
    first: Duration::from_millis(20),
    last: Duration::from_millis(40),
};

/// What stands for a VMM and its guest.
struct Vmm {
    asked: (u32, u32),
    plugged: u32,
    taken: (u32, u32),
    /// What it refuses all of.
    refuses: bool,
    /// How often it was asked for a size, and what the machine's cgroup let it have then.
    calls: Vec<(Size, Bounds)>,
}

/// A VMM and its guest as other tests play them.
#[derive(Debug, Default)]
pub(crate) struct Played {
    /// What it was asked for last.
    pub(crate) asked: (u32, u32),
    /// What its guest has.
    pub(crate) taken: (u32, u32),
    /// Its guest takes nothing more, and gives nothing back.
    pub(crate) refuses: bool,
    /// How often it was asked for a size.
    pub(crate) calls: u32,
    /// What its balloon is to have, in MiB: it has that at once.
    pub(crate) balloon_mib: u32,
    /// What its guest uses, in MiB; nothing where it does not say.
    pub(crate) used_mib: Option<u32>,
}

impl Played {
    /// What changes the size of one that starts by this record, in a cgroup of plain files in that folder.
    pub(crate) fn resizer(this: &Arc<StdMutex<Self>>, folder: &Path, record: &RecordFile) -> Resizer {
        let cgroup = in_plain_files(folder);
        let Record { shape, ceiling, .. } = record.get();
        {
            let mut played = this.lock().unwrap();
            if played.asked == (0, 0) {
                played.asked = (shape.vcpus, shape.memory_mib);
                played.taken = played.asked;
            }
        }
        let played = this.clone();
        let call = move |ask| Ok(played.lock().unwrap().answer(ask));
        let limits = Limits {
            controllers: &[],
            cpu: Cpu::new(
                Schedulers::default(),
                Ulid::generate(),
                1,
                &cgroup,
                Vcpus::of(Size::whole(shape.vcpus, shape.memory_mib)),
            ),
            cgroup,
            ceiling: ceiling.unwrap_or(Ceiling::fixed(shape)),
        };
        Resizer::new(Box::new(call), limits, record.clone(), SOON)
    }

    fn answer(&mut self, ask: Ask) -> Status {
        match ask {
            Ask::Status => {}
            Ask::Size(asked) => {
                self.calls += 1;
                self.asked = (asked.vcpus, asked.memory_mib);
            }
            Ask::Balloon(mib) => self.balloon_mib = mib,
        }
        if !self.refuses {
            self.taken = self.asked;
        }
        Status {
            vcpus: self.asked.0.max(self.taken.0),
            memory_mib: self.taken.1,
            amounts: Some(Told {
                vcpus_asked: self.asked.0,
                vcpus_taken: self.taken.0,
                memory_asked_mib: self.asked.1,
                memory_taken_mib: self.taken.1,
                vcpus_refused: String::new(),
            }),
            balloon: Some(self.balloon()),
            ..Status::default()
        }
    }

    fn balloon(&self) -> vmm::Balloon {
        let bytes = |mib: u32| Some(u64::from(mib) << 20);
        let statistics = self.used_mib.map(|used_mib| vmm::balloon::Statistics {
            total_bytes: bytes(self.taken.1),
            available_bytes: bytes(self.taken.1.saturating_sub(used_mib + self.balloon_mib)),
            taken_bytes: bytes(self.balloon_mib),
            ..Default::default()
        });
        vmm::Balloon {
            asked_mib: self.balloon_mib,
            taken_mib: self.balloon_mib,
            told_mib: self.balloon_mib,
            statistics,
        }
    }
}

/// A machine's cgroup of plain files.
fn in_plain_files(folder: &Path) -> Cgroup {
    let cgroup = Cgroup::at(folder.to_owned());
    // All values that a file gets here have as many digits.
    for file in ["memory.max", "pids.max", "cpu.max"] {
        fs::write(folder.join(file), "").unwrap();
    }
    for part in ThreadCgroups::of(&cgroup).all() {
        fs::create_dir(part.path()).unwrap();
        for file in ["cgroup.threads", "cpu.max", "cpu.max.burst"] {
            fs::write(part.path().join(file), "").unwrap();
        }
    }
    cgroup
}

struct Bench {
    folder: tempfile::TempDir,
    vmm: Arc<StdMutex<Vmm>>,
    record: RecordFile,
    resizer: Resizer,
}

/// What a cgroup of plain files lets a machine have.
fn bounds(cgroup: &Cgroup) -> Bounds {
    let vcpus = u32::try_from(cgroup.number("pids.max").unwrap()).unwrap() - 32;
    let cpu_max = fs::read_to_string(cgroup.path().join("cpu.max")).unwrap();
    let quota: u64 = cpu_max.split(' ').next().unwrap().parse().unwrap();
    assert_eq!(quota, u64::from(vcpus + 1) * CPU_PERIOD_US);
    let memory = cgroup.number("memory.max").unwrap();
    let mut mib = (1..=CEILING.memory_mib).rev();
    let most_charged = |mib: &u32| stoker_vmm::memory::most_charged(*mib, CEILING.memory_mib, CEILING.vcpus) == memory;
    Bounds {
        vcpus,
        memory_mib: mib.find(most_charged).unwrap(),
    }
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let cgroup = in_plain_files(folder.path());
        let record = RecordFile::create(folder.path(), record()).unwrap();
        let vmm = Arc::new(StdMutex::new(Vmm {
            asked: (SHAPE.vcpus, SHAPE.memory_mib),
            plugged: SHAPE.vcpus,
            taken: (SHAPE.vcpus, SHAPE.memory_mib),
            refuses: false,
            calls: Vec::new(),
        }));
        let (answers, of) = (vmm.clone(), cgroup.clone());
        let call = move |ask| answers.lock().unwrap().answer(ask, &of);
        let limits = Limits {
            controllers: &["memory", "pids", "cpu"],
            cpu: Cpu::new(
                Schedulers::default(),
                Ulid::generate(),
                1,
                &cgroup,
                Vcpus::of(Size::whole(2, 256)),
            ),
            cgroup,
            ceiling: CEILING,
        };
        let resizer = Resizer::new(Box::new(call), limits, record.clone(), SOON);
        Self {
            folder,
            vmm,
            record,
            resizer,
        }
    }

    fn vmm(&self) -> MutexGuard<'_, Vmm> {
        self.vmm.lock().unwrap()
    }

    /// What the host lets the machine have.
    fn bounds(&self) -> (u32, u32) {
        let Bounds { vcpus, memory_mib } = bounds(&Cgroup::at(self.folder.path().to_owned()));
        (vcpus, memory_mib)
    }

    /// What its vCPUs may use together, in thousandths of a CPU; nothing where that is not limited.
    fn share(&self) -> Option<u32> {
        let path = self.folder.path().join("vcpus/cpu.max");
        let text = fs::read_to_string(&path).unwrap();
        // As the kernel does it, for the next time.
        fs::write(path, "").unwrap();
        if text.starts_with("max") {
            return None;
        }
        let (quota, _) = text.split_once(' ').unwrap();
        Some(quota.parse::<u32>().unwrap() / 50)
    }
}

impl Vmm {
    fn answer(&mut self, ask: Ask, cgroup: &Cgroup) -> Result<Status, ClientError> {
        if let Ask::Size(asked) = ask {
            self.calls.push((asked, bounds(cgroup)));
            if self.refuses {
                return Err(io::Error::other("as the test wants it").into());
            }
            self.asked = (asked.vcpus, asked.memory_mib);
            self.plugged = self.plugged.max(asked.vcpus);
        }
        Ok(Status {
            vcpus: self.plugged,
            memory_mib: SHAPE.memory_mib,
            amounts: Some(Told {
                vcpus_asked: self.asked.0,
                vcpus_taken: self.taken.0,
                memory_asked_mib: self.asked.1,
                memory_taken_mib: self.taken.1,
                vcpus_refused: String::new(),
            }),
            ..Status::default()
        })
    }

    /// Its guest does what it was asked for.
    fn obey(&mut self) {
        self.taken = self.asked;
        self.plugged = self.asked.0;
    }
}

fn record() -> Record {
    Record {
        owner: Owner {
            host: Ulid::generate(),
            store: "/store".into(),
        },
        cgroup: "m".into(),
        runtime: "provided".into(),
        shape: SHAPE,
        ceiling: Some(CEILING),
        size: None,
        created: Duration::ZERO,
        boot_duration: None,
        mode: None,
        account: None,
        containers: std::collections::BTreeMap::new(),
        launched: None,
    }
}

fn saved(folder: &Path) -> Option<Size> {
    RecordFile::find(folder).unwrap().unwrap().get().size
}

#[tokio::test]
async fn more_is_let_have_before_it_is_asked_for_and_less_once_it_is_given_back() {
    let bench = Bench::new();
    let large = Size::whole(4, 512);
    let amounts = bench.resizer.resize(large).await.unwrap();
    assert_eq!((amounts.asked, amounts.are_taken()), (large, false));
    let taken = Taken {
        vcpus: 2,
        memory_mib: 256,
    };
    assert_eq!(amounts.taken, taken);
    let enough = Bounds {
        vcpus: 4,
        memory_mib: 512,
    };
    assert_eq!(bench.vmm().calls, [(large, enough)]);
    bench.vmm().obey();
    assert!(bench.resizer.amounts().await.unwrap().are_taken());

    // It has all of it until its guest has given something back.
    let small = Size::whole(1, 256);
    bench.resizer.resize(small).await.unwrap();
    assert_eq!(bench.bounds(), (4, 512));
    bench.vmm().taken.1 = 384;
    assert!(!bench.resizer.amounts().await.unwrap().are_taken());
    assert_eq!(bench.bounds(), (4, 384));
    bench.vmm().obey();
    assert!(bench.resizer.amounts().await.unwrap().are_taken());
    assert_eq!(bench.bounds(), (1, 256));
}

#[tokio::test]
async fn vcpus_are_held_to_what_they_are_to_be_at_once() {
    let bench = Bench::new();
    bench.resizer.resize(Size::whole(4, 256)).await.unwrap();
    assert_eq!(bench.share(), None, "four are plugged, and may use all of their time");
    // Two of them are not given back.
    bench.resizer.resize(Size::whole(2, 256)).await.unwrap();
    assert_eq!(bench.share(), Some(2000));
    bench.vmm().obey();
    bench.resizer.amounts().await.unwrap();
    assert_eq!(bench.share(), None);
    // A CPU share is one of as many vCPUs as there are.
    let share = Size {
        cpu_millis: 1500,
        ..Size::whole(2, 256)
    };
    let amounts = bench.resizer.resize(share).await.unwrap();
    assert_eq!((amounts.asked, bench.share()), (share, Some(1500)));
}

#[tokio::test]
async fn what_can_not_be_is_refused_and_changes_nothing() {
    let bench = Bench::new();
    for (vcpus, memory_mib) in [(0, 256), (9, 256), (2, 254), (2, 514), (2, 257), (u32::MAX, u32::MAX)] {
        let error = bench.resizer.resize(Size::whole(vcpus, memory_mib)).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ResizeError::Impossible { .. }), "{text}");
        assert!(
            text.contains("1 to 8 vCPUs") && text.contains("256 to 512 MiB"),
            "{text}"
        );
    }
    assert!(bench.vmm().calls.is_empty() && saved(bench.folder.path()).is_none());

    bench.vmm().refuses = true;
    let error = bench.resizer.resize(Size::whole(4, 512)).await.unwrap_err();
    assert!(error.to_string().contains("as the test wants it"), "{error}");
    assert_eq!(bench.vmm().calls.len(), 1);
    assert_eq!(bench.bounds(), (2, 256), "as before");
}

#[tokio::test]
async fn the_next_agent_knows_what_was_asked_for() {
    let bench = Bench::new();
    let asked = Size {
        cpu_millis: 1500,
        ..Size::whole(3, 300)
    };
    bench.resizer.resize(asked).await.unwrap();
    assert_eq!(saved(bench.folder.path()), Some(asked));
    let Inner { limits, .. } = &*bench.resizer.0;
    let (vmm, cgroup) = (bench.vmm.clone(), limits.cgroup.clone());
    let call = move |asked| vmm.lock().unwrap().answer(asked, &cgroup);
    let next = Resizer::new(Box::new(call), limits.clone(), bench.record.clone(), SOON);
    assert_eq!(next.amounts().await.unwrap().asked, asked);
    assert_eq!((bench.bounds(), bench.share()), ((3, 300), Some(1500)));
}

#[tokio::test]
async fn a_guest_that_takes_its_time_is_followed_and_asked_again() {
    let bench = Bench::new();
    let asked = Size::whole(3, 512);
    bench.resizer.resize(asked).await.unwrap();
    let mut told = Vec::new();
    let vmm = bench.vmm.clone();
    let last = bench.resizer.until_taken(|amounts| {
        told.push(amounts.taken);
        if told.len() == 1 {
            vmm.lock().unwrap().taken = (3, 300);
        }
    });
    let first = async {
        while bench.vmm().calls.len() < 4 {
            tokio::time::sleep(LOOK.first).await;
        }
        // Somebody wants something else meanwhile: that is what is asked for from now on.
        bench.resizer.resize(Size::whole(2, 400)).await.unwrap();
        while bench.vmm().calls.len() < 6 {
            tokio::time::sleep(LOOK.first).await;
        }
        bench.vmm().obey();
    };
    let (last, ()) = tokio::join!(last, first);
    assert!(last.unwrap().are_taken());
    let taken = |vcpus, memory_mib| Taken { vcpus, memory_mib };
    assert_eq!(told, [taken(2, 256), taken(3, 300), taken(2, 400)]);
    let sizes: Vec<_> = bench.vmm().calls.iter().map(|(size, _)| *size).collect();
    assert_eq!(sizes[..4], [asked; 4]);
    assert_eq!(sizes[4..], [Size::whole(2, 400); 2]);
    assert_eq!(bench.bounds(), (2, 400));
}

#[tokio::test]
async fn a_guest_that_comes_nearer_is_not_asked_again() {
    let bench = Bench::new();
    bench.resizer.resize(Size::whole(4, 512)).await.unwrap();
    let mut taking = bench.resizer.taking();
    taking.look().await.unwrap();
    let long_ago = Instant::now().checked_sub(Duration::from_secs(10)).unwrap();
    for (taken, is_nearer) in [
        ((2, 300), true),
        ((3, 300), true),
        ((3, 400), true),
        ((3, 400), false),
        // To and fro, and the one for the other.
        ((3, 398), false),
        ((3, 400), false),
        ((2, 402), true),
        ((3, 402), false),
        ((4, 402), true),
        // Further than it is to.
        ((5, 622), false),
        ((4, 620), true),
    ] {
        let (asked, before) = (bench.vmm().calls.len(), taking.seen);
        bench.vmm().taken = taken;
        (taking.asked, taking.pause) = (long_ago, LOOK.last);
        let (amounts, is_news) = taking.look().await.unwrap();
        assert_eq!(is_news, before != Some(amounts.taken), "{taken:?}");
        assert!(taking.asked > long_ago, "{taken:?}");
        let told = (bench.vmm().calls.len() == asked, taking.pause == LOOK.first);
        assert_eq!(told, (is_nearer, is_nearer), "{taken:?}");
    }
    // Of what is asked for anew nothing is old.
    bench.resizer.resize(Size::whole(4, 256)).await.unwrap();
    let asked = bench.vmm().calls.len();
    taking.asked = long_ago;
    taking.look().await.unwrap();
    assert_eq!(bench.vmm().calls.len(), asked);
}

#[tokio::test]
async fn a_vmm_that_tells_of_more_than_can_be_is_let_have_no_more() {
    let bench = Bench::new();
    {
        let mut vmm = bench.vmm();
        (vmm.asked, vmm.taken, vmm.plugged) = ((u32::MAX, u32::MAX), (u32::MAX, u32::MAX), u32::MAX);
    }
    bench.resizer.amounts().await.unwrap();
    assert_eq!(bench.bounds(), (CEILING.vcpus, CEILING.memory_mib));
}

#[tokio::test]
async fn a_vmm_that_tells_nothing_is_too_old() {
    let bench = Bench::new();
    let Inner { limits, .. } = &*bench.resizer.0;
    let old = Resizer::new(
        Box::new(|_| Ok(Status::default())),
        limits.clone(),
        bench.record.clone(),
        SOON,
    );
    assert!(matches!(old.amounts().await, Err(ResizeError::TooOld)));
    let asked = old.resize(Size::whole(2, 256)).await;
    assert!(matches!(asked, Err(ResizeError::TooOld)), "{asked:?}");
}
