//! The programs, their links and their maps in the kernel.

use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{Program, ProgramError, ProgramInfo, RawTracePoint, RawTracePointRunOptions, TestRun, TracePoint};
use aya::{Ebpf, EbpfLoader};
use stoker_ebpf_types::{KINDS, Lost, Owner, Process, Resident, RssStatFields, Running, Subject, Task, Times};

use crate::cost::ProgramCost;
use crate::error::{ENOENT, EPERM, LedgerError, LoadError, PinsError, errno};
use crate::ledger::Limits;
use crate::slots::Slot;

/// The compiled programs.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("STOKER_EBPF_OBJECT"));

/// What the kernel says when told to run something on a CPU that has gone offline.
const ENXIO: i32 = 6;

/// How many threads that run there is room for whose subject is not known, for each CPU. The kernel takes free places of a map
/// that drops what is oldest for each CPU, 128 at a time.
const UNCHARGED: u32 = 256;

/// Raw tracepoints, each the name of its program too.
const RAW: [(&str, &str); 4] = [
    ("sched_wakeup", "sched:sched_wakeup"),
    ("sched_wakeup_new", "sched:sched_wakeup_new"),
    ("sched_switch", "sched:sched_switch"),
    // The last: what it leaves for a switch must be seen there.
    ("sched_stat_runtime", "sched:sched_stat_runtime"),
];
const RSS_STAT: &str = "rss_stat";
const SETTLE: &str = "settle";
const ADOPT: &str = "adopt";

/// The programs, attached for as long as this lives or their links are pinned.
pub(crate) struct Programs {
    raw: Vec<(&'static str, RawTracePoint)>,
    rss_stat: TracePoint,
    settle: RawTracePoint,
    /// Where these are new and may go on with what others counted.
    adopt: Option<RawTracePoint>,
    _links: Vec<FdLink>,
}

/// The maps that user space looks at.
pub(crate) struct Maps {
    pub(crate) cgroups: HashMap<MapData, u64, Subject>,
    pub(crate) owners: Array<MapData, Owner>,
    pub(crate) times: PerCpuArray<MapData, Times>,
    pub(crate) resident: Array<MapData, Resident>,
    pub(crate) processes: HashMap<MapData, u32, Process>,
    pub(crate) running: PerCpuArray<MapData, Running>,
    pub(crate) tasks: HashMap<MapData, u64, Task>,
    pub(crate) lost: PerCpuArray<MapData, Lost>,
}

/// Loads and attaches all anew, and pins all in a folder where there is one.
pub(crate) fn load(limits: Limits, fields: &RssStatFields, pins: Option<&Path>) -> Result<(Programs, Maps), LoadError> {
    let cpus = aya::util::nr_cpus().map_err(|(path, source)| LoadError::Start(LedgerError::Cpus { path, source }))?;
    let uncharged = u32::try_from(cpus).unwrap_or(u32::MAX).saturating_mul(UNCHARGED);
    let mut ebpf = EbpfLoader::new()
        // Nothing here needs the kernel's types, and to parse them takes longer than all else.
        .btf(None)
        .map_max_entries("CGROUPS", limits.cgroups)
        .map_max_entries("OWNERS", limits.subjects)
        .map_max_entries("TIMES", limits.subjects)
        .map_max_entries("RESIDENT", limits.subjects)
        .map_max_entries("TASKS", limits.tasks)
        .map_max_entries("UNCHARGED", uncharged)
        .map_max_entries("PROCESSES", limits.processes)
        .override_global("RSS_STAT", fields, true)
        .load(OBJECT)
        .map_err(refused)?;
    let maps = Maps::new(|name| {
        let map = ebpf.take_map(name).ok_or(LoadError::Part(name))?;
        if let Some(pins) = pins {
            pin(pins, name, |path| map.pin(path))?;
        }
        Ok(map)
    })?;
    let mut links = Vec::new();
    let mut keep = |link: FdLink, program: &str| -> Result<(), LoadError> {
        links.push(match pins {
            Some(pins) => pin(pins, &link_name(program), |path| link.pin(path))?.into(),
            None => link,
        });
        Ok(())
    };
    let mut raw = Vec::new();
    for (name, tracepoint) in RAW {
        raw.push((name, load_raw(&mut ebpf, name, pins)?));
        let program = program::<RawTracePoint>(&mut ebpf, name)?;
        let failed = |source| attach_failed(tracepoint, source);
        let link = program.attach(name).map_err(failed)?;
        keep(program.take_link(link).map_err(failed)?.into(), name)?;
    }
    let rss_stat: &mut TracePoint = program(&mut ebpf, RSS_STAT)?;
    rss_stat.load().map_err(refused)?;
    if let Some(pins) = pins {
        pin(pins, RSS_STAT, |path| rss_stat.pin(path))?;
    }
    let failed = |source| attach_failed("kmem:rss_stat", source);
    let link = rss_stat.attach("kmem", RSS_STAT).map_err(failed)?;
    let link = rss_stat.take_link(link).map_err(failed)?;
    // A link of its own where kernels have links of perf events: from 5.15 on.
    keep(FdLink::try_from(link).map_err(refused)?, RSS_STAT)?;
    let rss_stat =
        TracePoint::from_program_info(rss_stat.info().map_err(refused)?, RSS_STAT.into()).map_err(refused)?;
    let programs = Programs {
        raw,
        rss_stat,
        settle: load_raw(&mut ebpf, SETTLE, pins)?,
        adopt: pins.map(|_| load_raw(&mut ebpf, ADOPT, None)).transpose()?,
        _links: links,
    };
    Ok((programs, maps))
}

/// Opens what [`load`] has pinned in a folder; `None` where a part of it is not there, or not what it should be.
pub(crate) fn open(pins: &Path) -> Result<Option<(Programs, Maps)>, LoadError> {
    open_with(pins, &RAW.map(|(name, _)| name))
}

/// The same of another version, which may hang on other tracepoints: what its sums are read by.
pub(crate) fn open_other(pins: &Path) -> Result<Option<(Programs, Maps)>, LoadError> {
    open_with(pins, &[])
}

fn open_with(pins: &Path, tracepoints: &[&'static str]) -> Result<Option<(Programs, Maps)>, LoadError> {
    let opened = || -> Result<(Programs, Maps), LoadError> {
        let raw = |name: &'static str| RawTracePoint::from_pin(pins.join(name)).map_err(refused);
        let programs = Programs {
            raw: tracepoints
                .iter()
                .map(|&name| Ok((name, raw(name)?)))
                .collect::<Result<_, LoadError>>()?,
            rss_stat: TracePoint::from_pin(pins.join(RSS_STAT)).map_err(refused)?,
            settle: raw(SETTLE)?,
            adopt: None,
            _links: tracepoints
                .iter()
                .copied()
                .chain([RSS_STAT])
                .map(|name| {
                    Ok(PinnedLink::from_pin(pins.join(link_name(name)))
                        .map_err(refused)?
                        .into())
                })
                .collect::<Result<_, LoadError>>()?,
        };
        let maps = Maps::new(|name| {
            let map = MapData::from_pin(pins.join(name)).map_err(refused)?;
            Map::from_map_data(map).map_err(refused)
        })?;
        Ok((programs, maps))
    };
    match opened() {
        Ok(opened) => Ok(Some(opened)),
        // What is of another type or size is refused without a system call.
        Err(error) if matches!(errno(&error), None | Some(ENOENT)) => Ok(None),
        Err(error) => Err(error),
    }
}

// === impl Programs ===

impl Programs {
    /// Finds out whose the thread is that runs on a CPU; what it has run up to now is nobody's, if it is. Never twice at once
    /// on the same CPU.
    pub(crate) fn settle(&self, cpu: u32) -> Result<(), LedgerError> {
        let options = RawTracePointRunOptions {
            cpu: Some(cpu),
            ..RawTracePointRunOptions::new()
        };
        match self.settle.test_run(options) {
            Ok(_) => Ok(()),
            // Nothing runs on a CPU that went offline.
            Err(error) if errno(&error) == Some(ENXIO) => Ok(()),
            Err(source) => Err(LedgerError::Settle {
                cpu,
                source: Box::new(source),
            }),
        }
    }

    /// The same on each CPU. Once it returns none is in the middle of charging a subject that was there before.
    pub(crate) fn settle_all(&self) -> Result<(), LedgerError> {
        online_cpus()?.into_iter().try_for_each(|cpu| self.settle(cpu))
    }

    /// Sets what an address space has, in bytes by kind, as part of a slot's sum; nothing, where it has ended.
    pub(crate) fn adopt(&self, mm: u32, slot: Slot, bytes: [i64; KINDS]) -> Result<(), LedgerError> {
        let Some(adopt) = &self.adopt else { return Ok(()) };
        let mut options = RawTracePointRunOptions::new();
        let sizes = bytes.map(i64::cast_unsigned);
        let args = [mm.into(), slot.index.into(), slot.generation.into()]
            .into_iter()
            .chain(sizes);
        for (arg, value) in options.args.iter_mut().zip(args) {
            *arg = value;
        }
        match adopt.test_run(options) {
            Ok(_) => Ok(()),
            Err(source) => Err(LedgerError::Adopt(Box::new(source))),
        }
    }

    pub(crate) fn cost(&self) -> Result<Vec<ProgramCost>, LedgerError> {
        let raw = self.raw.iter().map(|(name, program)| (*name, program.info()));
        raw.chain([(RSS_STAT, self.rss_stat.info()), (SETTLE, self.settle.info())])
            .map(|(program, info)| {
                let info: ProgramInfo = info.map_err(|source| LedgerError::Cost(source.into()))?;
                Ok(ProgramCost {
                    program,
                    id: info.id(),
                    runs: info.run_count(),
                    run_time: info.run_time(),
                })
            })
            .collect()
    }
}

// === impl Maps ===

impl Maps {
    /// Of maps by name.
    fn new(mut map: impl FnMut(&'static str) -> Result<Map, LoadError>) -> Result<Self, LoadError> {
        Ok(Self {
            cgroups: map("CGROUPS")?.try_into().map_err(refused::<MapError>)?,
            owners: map("OWNERS")?.try_into().map_err(refused::<MapError>)?,
            times: map("TIMES")?.try_into().map_err(refused::<MapError>)?,
            resident: map("RESIDENT")?.try_into().map_err(refused::<MapError>)?,
            processes: map("PROCESSES")?.try_into().map_err(refused::<MapError>)?,
            running: map("RUNNING")?.try_into().map_err(refused::<MapError>)?,
            tasks: map("TASKS")?.try_into().map_err(refused::<MapError>)?,
            lost: map("LOST")?.try_into().map_err(refused::<MapError>)?,
        })
    }
}

pub(crate) fn online_cpus() -> Result<Vec<u32>, LedgerError> {
    aya::util::online_cpus().map_err(|(path, source)| LedgerError::Cpus { path, source })
}

// === helpers of load and open ===

/// Loads a raw tracepoint's program, of which aya's own handle goes with `ebpf`.
fn load_raw(ebpf: &mut Ebpf, name: &'static str, pins: Option<&Path>) -> Result<RawTracePoint, LoadError> {
    let raw: &mut RawTracePoint = program(ebpf, name)?;
    raw.load().map_err(refused)?;
    if let Some(pins) = pins {
        pin(pins, name, |path| raw.pin(path))?;
    }
    RawTracePoint::from_program_info(raw.info().map_err(refused)?, name.into()).map_err(refused)
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, LoadError>
where
    &'a mut P: TryFrom<&'a mut Program, Error = ProgramError>,
{
    ebpf.program_mut(name)
        .ok_or(LoadError::Part(name))?
        .try_into()
        .map_err(refused)
}

/// Where the link of a program is pinned: beside the program itself. The kernel allows no dots in names.
fn link_name(program: &str) -> String {
    format!("{program}_link")
}

fn pin<T>(folder: &Path, name: &str, pin: impl FnOnce(&Path) -> Result<T, aya::pin::PinError>) -> Result<T, LoadError> {
    let path = folder.join(name);
    pin(&path).map_err(|source| {
        PinsError::Failed {
            doing: "pinning",
            path,
            source: source.into(),
        }
        .into()
    })
}

fn refused<E: std::error::Error + Send + Sync + 'static>(error: E) -> LoadError {
    if errno(&error) == Some(EPERM) {
        LoadError::Permission(error.into())
    } else {
        LoadError::Object(error.into())
    }
}

fn attach_failed(name: &'static str, source: ProgramError) -> LoadError {
    match errno(&source) {
        Some(EPERM) => LoadError::Permission(source.into()),
        Some(ENOENT) => LoadError::NoTracepoint {
            name,
            source: std::io::Error::from_raw_os_error(ENOENT),
        },
        _ => LoadError::Attach {
            name,
            source: Box::new(source),
        },
    }
}
