//! The programs, their links and their maps in the kernel.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray, RingBuf};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::{
    BtfTracePoint, Program, ProgramError, ProgramInfo, RawTracePoint, RawTracePointRunOptions, TestRun, TracePoint,
};
use aya::{Btf, Ebpf, EbpfLoader, VerifierLogLevel};
use stoker_ebpf_types::{
    AccountEntry, Alarm, Change, EXIT_CODES, Exit, Guest, KINDS, Lost, Owner, PARTS, Part, Preemption, Process,
    Resident, Running, Settings, Subject, Thread, ThrottleFields, Times, WAYS, WaitFields,
};

use crate::cost::ProgramCost;
use crate::error::{ENOENT, EPERM, LedgerError, LoadError, PinsError, errno, writing};
use crate::kernel::Kernel;
use crate::ledger::Limits;
use crate::shared::Shared;
use crate::slots::Slot;
use crate::usage::Time;

/// The compiled programs.
pub(crate) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("STOKER_EBPF_OBJECT"));

/// What the kernel says when told to run something on a CPU that has gone offline.
const ENXIO: i32 = 6;

/// Room for what is told of accounts and was not read yet, in bytes: some 200 crossings.
const CROSSINGS: u32 = 1 << 16;

/// Raw tracepoints of the group `sched`, each the name of its program too.
const WAKEUP: &str = "sched_wakeup";
/// Where waits are counted by the kernel: the program on the same tracepoint that is typed by BTF.
const WAKEUP_HELD: &str = "sched_wakeup_held";
const WAKEUP_NEW: &str = "sched_wakeup_new";
const SWITCH: &str = "sched_switch";
const STAT_RUNTIME: &str = "sched_stat_runtime";
const RSS_STAT: &str = "rss_stat";
const KVM_ENTRY: &str = "kvm_entry";
const KVM_EXIT: &str = "kvm_exit";
const SETTLE: &str = "settle";
const ACCOUNT: &str = "account";
const ADOPT: &str = "adopt";
const ADOPT_TIMES: &str = "adopt_times";

/// Which programs there are.
struct Hooks {
    /// Raw tracepoints, by the names of both.
    raw: Vec<&'static str>,
    /// Raw tracepoints whose arguments have types: the program, and the tracepoint.
    typed: Vec<(&'static str, &'static str)>,
    /// Other tracepoints, the same with their group.
    records: Vec<(&'static str, &'static str)>,
    /// Whether there are accounts.
    accounts: bool,
}

/// The programs, attached for as long as this lives or their links are pinned.
pub(crate) struct Programs {
    raw: Vec<(&'static str, RawTracePoint)>,
    typed: Vec<(&'static str, BtfTracePoint)>,
    records: Vec<(&'static str, TracePoint)>,
    settle: RawTracePoint,
    /// Where there are accounts.
    account: Option<RawTracePoint>,
    /// Where these are new and may go on with what others counted.
    adopt: Option<Adopt>,
    _links: Vec<FdLink>,
}

struct Adopt {
    process: RawTracePoint,
    times: RawTracePoint,
}

/// Alarms, and what tells of those that were due.
pub(crate) struct Alarms {
    pub(crate) set: Array<MapData, Alarm>,
    pub(crate) rang: RingBuf<MapData>,
}

/// The maps that user space looks at.
pub(crate) struct Maps {
    pub(crate) cgroups: HashMap<MapData, u64, Subject>,
    pub(crate) owners: Array<MapData, Owner>,
    pub(crate) times: Shared<Times>,
    pub(crate) resident: Shared<Resident>,
    pub(crate) accounts: Shared<AccountEntry>,
    /// The same map, for another program that goes by it.
    pub(crate) accounts_map: OwnedFd,
    pub(crate) guests: Shared<Guest>,
    pub(crate) processes: HashMap<MapData, u32, Process>,
    pub(crate) preemptions: HashMap<MapData, Preemption, u64>,
    pub(crate) running: PerCpuArray<MapData, Running>,
    pub(crate) keys: Shared<[u64; WAYS as usize]>,
    pub(crate) threads: Shared<Thread>,
    pub(crate) lost: PerCpuArray<MapData, Lost>,
    pub(crate) change: Array<MapData, Change>,
    pub(crate) crossings: RingBuf<MapData>,
    pub(crate) near: RingBuf<MapData>,
    /// Of containers, as long as who loaded the programs is there.
    pub(crate) alarms: Option<Alarms>,
}

/// Loads and attaches all anew, and pins all in a folder where there is one.
pub(crate) fn load(limits: Limits, kernel: &Kernel, pins: Option<&Path>) -> Result<(Programs, Maps), LoadError> {
    let sets = limits.tasks.div_ceil(WAYS).next_power_of_two();
    let settings = Settings {
        sets,
        machines: limits.machines.into(),
        uncharged_ns: kernel.uncharged_ns,
        throttle: kernel.throttle,
        waits: kernel.waits,
    };
    // What machines alone have.
    let machines = |room: u32| if limits.machines { room } else { 1 };
    let exit_fields = kernel.kvm_exit.unwrap_or_default();
    let mut ebpf = EbpfLoader::new()
        // The objects need none of the kernel's types, and to parse them takes longer than all else.
        .btf(None)
        // Why a program is refused, and not each of its instructions: a guest's console takes seconds for those.
        .verifier_log_level(VerifierLogLevel::STATS)
        .map_max_entries("CGROUPS", limits.cgroups)
        .map_max_entries("OWNERS", limits.subjects)
        .map_max_entries("TIMES", limits.subjects.saturating_mul(PARTS))
        .map_max_entries("RESIDENT", limits.subjects)
        .map_max_entries("ACCOUNTS", machines(limits.subjects))
        .map_max_entries("ALARMS", if limits.machines { 1 } else { limits.subjects })
        .map_max_entries("GUESTS", machines(limits.subjects))
        .map_max_entries("KEYS", sets)
        .map_max_entries("THREADS", sets.saturating_mul(WAYS))
        .map_max_entries("PROCESSES", limits.processes)
        .map_max_entries("PREEMPTIONS", machines(limits.subjects))
        .map_max_entries("CROSSINGS", machines(CROSSINGS))
        .override_global("RSS_STAT", &kernel.rss_stat, true)
        .override_global("KVM_EXIT", &exit_fields, true)
        .override_global("SETTINGS", &settings, true)
        .load(OBJECT)
        .map_err(refused)?;
    if kernel.kvm_exit.is_some() {
        name_exits(&mut ebpf)?;
    }
    let mut maps = Maps::new(|name| {
        let map = ebpf.take_map(name).ok_or(LoadError::Part(name))?;
        if let Some(pins) = pins {
            pin(pins, name, |path| map.pin(path))?;
        }
        Ok(map)
    })?;
    if !limits.machines && pins.is_none() {
        let mut map = |name| ebpf.take_map(name).ok_or(LoadError::Part(name));
        maps.alarms = Some(Alarms {
            set: map("ALARMS")?.try_into().map_err(refused::<MapError>)?,
            rang: map("RANG")?.try_into().map_err(refused::<MapError>)?,
        });
    }
    let mut links = Vec::new();
    let mut keep = |link: FdLink, program: &str| -> Result<(), LoadError> {
        links.push(match pins {
            Some(pins) => pin(pins, &link_name(program), |path| link.pin(path))?.into(),
            None => link,
        });
        Ok(())
    };
    let hooks = Hooks::new(limits, kernel);
    let mut raw = Vec::new();
    for name in hooks.raw {
        raw.push((name, load_raw(&mut ebpf, name, pins)?));
        let program = program::<RawTracePoint>(&mut ebpf, name)?;
        let failed = |source| attach_failed(name, source);
        let link = program.attach(name).map_err(failed)?;
        keep(program.take_link(link).map_err(failed)?.into(), name)?;
    }
    let mut typed = Vec::new();
    if !hooks.typed.is_empty() {
        let types = Btf::from_sys_fs().map_err(refused)?;
        for (name, tracepoint) in hooks.typed {
            let program: &mut BtfTracePoint = program(&mut ebpf, name)?;
            program.load(tracepoint, &types).map_err(refused)?;
            if let Some(pins) = pins {
                pin(pins, name, |path| program.pin(path))?;
            }
            let failed = |source| attach_failed(tracepoint, source);
            let link = program.attach().map_err(failed)?;
            keep(program.take_link(link).map_err(failed)?.into(), name)?;
            let info = program.info().map_err(refused)?;
            // SAFETY: it was loaded as one just now.
            let program = unsafe { BtfTracePoint::from_program_info(info, name.into()) };
            typed.push((tracepoint, program.map_err(refused)?));
        }
    }
    let mut records = Vec::new();
    for (group, name) in hooks.records {
        let program: &mut TracePoint = program(&mut ebpf, name)?;
        program.load().map_err(refused)?;
        if let Some(pins) = pins {
            pin(pins, name, |path| program.pin(path))?;
        }
        let failed = |source| attach_failed(name, source);
        let link = program.attach(group, name).map_err(failed)?;
        let link = program.take_link(link).map_err(failed)?;
        // A link of its own where kernels have links of perf events: from 5.15 on.
        keep(FdLink::try_from(link).map_err(refused)?, name)?;
        let info = program.info().map_err(refused)?;
        records.push((name, TracePoint::from_program_info(info, name.into()).map_err(refused)?));
    }
    let adopt = |ebpf: &mut Ebpf| -> Result<Adopt, LoadError> {
        Ok(Adopt {
            process: load_raw(ebpf, ADOPT, None)?,
            times: load_raw(ebpf, ADOPT_TIMES, None)?,
        })
    };
    let account = hooks.accounts.then(|| load_raw(&mut ebpf, ACCOUNT, pins));
    let programs = Programs {
        raw,
        typed,
        records,
        settle: load_raw(&mut ebpf, SETTLE, pins)?,
        account: account.transpose()?,
        adopt: pins.map(|_| adopt(&mut ebpf)).transpose()?,
        _links: links,
    };
    Ok((programs, maps))
}

/// Tells the programs what the codes of exits come to.
fn name_exits(ebpf: &mut Ebpf) -> Result<(), LoadError> {
    const NAME: &str = "EXIT_REASONS";
    let map = ebpf.map_mut(NAME).ok_or(LoadError::Part(NAME))?;
    let mut reasons = Array::<_, u32>::try_from(map).map_err(refused)?;
    for index in 0..EXIT_CODES {
        let exit = Exit::of_index(index);
        if exit != Exit::Other {
            let set = reasons.set(index, exit as u32, 0);
            set.map_err(|error| LoadError::Start(writing(NAME)(error)))?;
        }
    }
    Ok(())
}

/// Opens what [`load`] has pinned in a folder; `None` where a part of it is not there, or not what it should be.
pub(crate) fn open(pins: &Path, limits: Limits, kernel: &Kernel) -> Result<Option<(Programs, Maps)>, LoadError> {
    open_with(pins, &Hooks::new(limits, kernel))
}

/// The same of another version, which may hang on other tracepoints: what its sums are read by.
pub(crate) fn open_other(pins: &Path) -> Result<Option<(Programs, Maps)>, LoadError> {
    let least = Hooks {
        raw: Vec::new(),
        typed: Vec::new(),
        records: Vec::new(),
        accounts: pins.join(ACCOUNT).exists(),
    };
    open_with(pins, &least)
}

fn open_with(pins: &Path, hooks: &Hooks) -> Result<Option<(Programs, Maps)>, LoadError> {
    let opened = || -> Result<(Programs, Maps), LoadError> {
        let raw = |name: &'static str| RawTracePoint::from_pin(pins.join(name)).map_err(refused);
        let typed = hooks.typed.iter().map(|&(name, _)| name);
        let records = hooks.records.iter().map(|&(_, name)| name);
        let programs = Programs {
            raw: hooks
                .raw
                .iter()
                .map(|&name| Ok((name, raw(name)?)))
                .collect::<Result<_, LoadError>>()?,
            typed: hooks
                .typed
                .iter()
                .map(|&(name, tracepoint)| {
                    let program = BtfTracePoint::from_pin(pins.join(name)).map_err(refused)?;
                    Ok((tracepoint, program))
                })
                .collect::<Result<_, LoadError>>()?,
            records: records
                .clone()
                .map(|name| Ok((name, TracePoint::from_pin(pins.join(name)).map_err(refused)?)))
                .collect::<Result<_, LoadError>>()?,
            settle: raw(SETTLE)?,
            account: hooks.accounts.then(|| raw(ACCOUNT)).transpose()?,
            adopt: None,
            _links: hooks
                .raw
                .iter()
                .copied()
                .chain(typed)
                .chain(records)
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

// === impl Hooks ===

impl Hooks {
    fn new(limits: Limits, kernel: &Kernel) -> Self {
        let mut hooks = Self {
            raw: Vec::new(),
            typed: Vec::new(),
            records: vec![("kmem", RSS_STAT)],
            accounts: limits.machines,
        };
        if kernel.waits == WaitFields::default() {
            hooks.raw.extend([WAKEUP, WAKEUP_NEW]);
        } else if kernel.throttle != ThrottleFields::default() {
            hooks.typed.push((WAKEUP_HELD, WAKEUP));
        }
        // The latter after the former: what it leaves for a switch must be seen there.
        hooks.raw.extend([SWITCH, STAT_RUNTIME]);
        if kernel.kvm_exit.is_some() {
            hooks.raw.push(KVM_ENTRY);
            hooks.records.push(("kvm", KVM_EXIT));
        }
        hooks
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

    /// Changes an account as the map `CHANGE` says, which says then what came of it.
    pub(crate) fn change_account(&self) -> Result<(), LedgerError> {
        let account = self.account.as_ref().ok_or(LedgerError::NoAccounts)?;
        match account.test_run(RawTracePointRunOptions::new()) {
            Ok(_) => Ok(()),
            Err(source) => Err(LedgerError::Account(Box::new(source))),
        }
    }

    /// Sets what an address space has, in bytes by kind, as part of a slot's sum; nothing, where it has ended.
    pub(crate) fn adopt(&self, mm: u32, slot: Slot, bytes: [i64; KINDS]) -> Result<(), LedgerError> {
        let Some(Adopt { process, .. }) = &self.adopt else {
            return Ok(());
        };
        let [file, anonymous, shared] = bytes.map(i64::cast_unsigned);
        let slot = [slot.index.into(), slot.generation.into()];
        run(process, &[mm.into(), slot[0], slot[1], file, anonymous, shared])
    }

    /// Adds to what a part of a slot's owner has used.
    pub(crate) fn adopt_times(&self, slot: Slot, part: Part, time: Time) -> Result<(), LedgerError> {
        let Some(Adopt { times, .. }) = &self.adopt else {
            return Ok(());
        };
        let place = Subject::place_of(slot.index, part).into();
        let Time {
            cpu_ns,
            wait_ns,
            throttled_ns,
        } = time;
        run(times, &[place, slot.generation.into(), cpu_ns, wait_ns, throttled_ns])
    }

    pub(crate) fn cost(&self) -> Result<Vec<ProgramCost>, LedgerError> {
        let raw = self.raw.iter().map(|(name, program)| (*name, program.info()));
        let typed = self.typed.iter().map(|(name, program)| (*name, program.info()));
        let records = self.records.iter().map(|(name, program)| (*name, program.info()));
        raw.chain(typed)
            .chain(records)
            .chain([(SETTLE, self.settle.info())])
            .chain(self.account.iter().map(|program| (ACCOUNT, program.info())))
            .map(|(program, info)| {
                let info: ProgramInfo = info.map_err(|source| LedgerError::Cost(source.into()))?;
                Ok(ProgramCost {
                    program,
                    id: info.id(),
                    runs: info.run_count(),
                    run_time: info.run_time(),
                    verified_instructions: info.verified_instruction_count(),
                })
            })
            .collect()
    }
}

/// Runs a program with these arguments.
fn run(program: &RawTracePoint, args: &[u64]) -> Result<(), LedgerError> {
    let mut options = RawTracePointRunOptions::new();
    for (arg, &value) in options.args.iter_mut().zip(args) {
        *arg = value;
    }
    match program.test_run(options) {
        Ok(_) => Ok(()),
        Err(source) => Err(LedgerError::Adopt(Box::new(source))),
    }
}

// === impl Maps ===

impl Maps {
    /// Of maps by name.
    fn new(mut map: impl FnMut(&'static str) -> Result<Map, LoadError>) -> Result<Self, LoadError> {
        let accounts = map("ACCOUNTS")?;
        Ok(Self {
            cgroups: map("CGROUPS")?.try_into().map_err(refused::<MapError>)?,
            owners: map("OWNERS")?.try_into().map_err(refused::<MapError>)?,
            times: Shared::new(map("TIMES")?).map_err(refused)?,
            resident: Shared::writable(map("RESIDENT")?).map_err(refused)?,
            accounts_map: descriptor(&accounts).map_err(refused)?,
            accounts: Shared::new(accounts).map_err(refused)?,
            guests: Shared::new(map("GUESTS")?).map_err(refused)?,
            processes: map("PROCESSES")?.try_into().map_err(refused::<MapError>)?,
            preemptions: map("PREEMPTIONS")?.try_into().map_err(refused::<MapError>)?,
            running: map("RUNNING")?.try_into().map_err(refused::<MapError>)?,
            keys: Shared::new(map("KEYS")?).map_err(refused)?,
            threads: Shared::new(map("THREADS")?).map_err(refused)?,
            lost: map("LOST")?.try_into().map_err(refused::<MapError>)?,
            change: map("CHANGE")?.try_into().map_err(refused::<MapError>)?,
            crossings: map("CROSSINGS")?.try_into().map_err(refused::<MapError>)?,
            near: map("NEAR")?.try_into().map_err(refused::<MapError>)?,
            alarms: None,
        })
    }
}

fn descriptor(map: &Map) -> Result<OwnedFd, MapError> {
    match map {
        Map::Array(data) => data.fd().as_fd().try_clone_to_owned().map_err(MapError::IoError),
        _ => Err(MapError::InvalidMapType { map_type: 0 }),
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
