//! What a guest plugs CPUs by: an object for each that it may ever have (ACPI 6.5, 8.4), over the registers of
//! [`cpu_hotplug`], and a Generic Event Device (5.6.9) that has the guest look at them when its host wants something.
//!
//! In ASL, for the CPU 5 of a machine:
//!
//! ```text
//! Device (C005) {
//!     Name (_HID, "ACPI0007")
//!     Name (_UID, 5)
//!     Name (_MAT, Buffer () { its entry of the MADT, enabled })
//!     Method (_STA, 0) { Return (CSTA (5)) }
//!     Method (_EJ0, 1) { CEJ0 (5) }
//!     Method (_OST, 3) { COST (5, Arg0, Arg1) }
//! }
//! ```

use acpi_tables::aml::{
    Acquire, Arg, BufferData, Device, Else, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule,
    If, Interrupt, Local, Method, MethodCall, Mutex, Name, Notify, ONE, OpRegion, OpRegionSpace, Path, Release,
    ResourceTemplate, Return, Store, While, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};
use acpi_tables::{Aml, AmlSink};

use crate::devices::cpu_hotplug::{self, COMMAND, DATA, NEXT_EVENT, OST_EVENT, OST_STATUS, SELECTOR, STATE};

/// `_STA`: present, enabled, shown, working (6.3.7).
const THERE: u8 = 0xf;
/// What a CPU is notified of (5.6.6): look whether you are there; you are to go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// `Acquire` without a time limit.
const FOR_EVER: u16 = 0xffff;

/// The entry of a MADT that is about the CPU of that number. Its APIC id is the same.
pub(super) fn local_apic(number: u32, enabled: EnabledStatus) -> ProcessorLocalApic {
    // At most 240: see `config::MAX_VCPUS`.
    ProcessorLocalApic::new(number as u8, number as u8, enabled)
}

/// Objects for the scope `\_SB`, of a machine that may have up to `ceiling` CPUs.
pub(super) struct Cpus {
    /// How many.
    pub(super) ceiling: u32,
}

// === impl Cpus ===

impl Aml for Cpus {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        registers(sink);
        state(sink);
        eject(sink);
        tell_status(sink);
        scan(sink);
        self.notify(sink);
        (0..self.ceiling).for_each(|number| cpu(number, sink));
        event_device(sink);
    }
}

impl Cpus {
    /// `CTFY (number, value)`: notifies a CPU. An object can't be named by a number.
    fn notify(&self, sink: &mut dyn AmlSink) {
        let cases: Vec<_> = (0..self.ceiling).map(|number| (number, path(number))).collect();
        let cases: Vec<_> = cases.iter().map(|(number, path)| NotifyCase { number, path }).collect();
        let cases = cases.iter().map(|case| case as &dyn Aml).collect();
        Method::new("CTFY".into(), 2, true, cases).to_aml_bytes(sink);
    }
}

struct NotifyCase<'a> {
    number: &'a u32,
    path: &'a Path,
}

impl Aml for NotifyCase<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let is_it = Equal::new(&Arg(0), self.number);
        let notify = Notify::new(self.path, &Arg(1));
        If::new(&is_it, vec![&notify]).to_aml_bytes(sink);
    }
}

fn path(number: u32) -> Path {
    Path::new(&format!("C{number:03X}"))
}

fn name(name: &'static str) -> Path {
    Path::new(name)
}

/// The registers by name, as QEMU's own AML has them, and the mutex of those who select a CPU.
fn registers(sink: &mut dyn AmlSink) {
    let bits = |offset: u16| usize::from(offset) * 8;
    let (port, count) = (cpu_hotplug::PORT, cpu_hotplug::PORTS);
    OpRegion::new("PRST".into(), OpRegionSpace::SystemIO, &port, &count).to_aml_bytes(sink);
    let field = |access, entries| {
        // What is not named is written as zeroes, which do nothing.
        let (no_lock, zeroes) = (FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
        Field::new("PRST".into(), access, no_lock, zeroes, entries)
    };
    let bytes = vec![
        FieldEntry::Reserved(bits(STATE)),
        FieldEntry::Named(*b"CPEN", 1),
        FieldEntry::Named(*b"CINS", 1),
        FieldEntry::Named(*b"CRMV", 1),
        FieldEntry::Named(*b"CEJT", 1),
        FieldEntry::Reserved(bits(COMMAND) - bits(STATE) - 4),
        FieldEntry::Named(*b"CCMD", 8),
    ];
    field(FieldAccessType::Byte, bytes).to_aml_bytes(sink);
    let words = vec![
        FieldEntry::Reserved(bits(SELECTOR)),
        FieldEntry::Named(*b"CSEL", 32),
        FieldEntry::Reserved(bits(DATA) - 32),
        FieldEntry::Named(*b"CDAT", 32),
    ];
    field(FieldAccessType::DWord, words).to_aml_bytes(sink);
    Mutex::new("CPLK".into(), 0).to_aml_bytes(sink);
}

/// A method whose body nobody else's that selects a CPU runs beside.
fn alone(path: &'static str, args: u8, body: Vec<&dyn Aml>, last: Option<&dyn Aml>, sink: &mut dyn AmlSink) {
    let (acquire, release) = (Acquire::new("CPLK".into(), FOR_EVER), Release::new("CPLK".into()));
    let mut all: Vec<&dyn Aml> = vec![&acquire];
    all.extend(body);
    all.push(&release);
    all.extend(last);
    Method::new(path.into(), args, true, all).to_aml_bytes(sink);
}

/// `CSTA (number)`: its `_STA`.
fn state(sink: &mut dyn AmlSink) {
    let (selector, enabled) = (name("CSEL"), name("CPEN"));
    let select = Store::new(&selector, &Arg(0));
    let absent = Store::new(&Local(0), &ZERO);
    let there = Store::new(&Local(0), &THERE);
    let is_enabled = Equal::new(&enabled, &ONE);
    let if_enabled = If::new(&is_enabled, vec![&there]);
    let answer = Return::new(&Local(0));
    alone("CSTA", 1, vec![&select, &absent, &if_enabled], Some(&answer), sink);
}

/// `CEJ0 (number)`: its `_EJ0`.
fn eject(sink: &mut dyn AmlSink) {
    let (selector, eject) = (name("CSEL"), name("CEJT"));
    let select = Store::new(&selector, &Arg(0));
    let eject = Store::new(&eject, &ONE);
    alone("CEJ0", 1, vec![&select, &eject], None, sink);
}

/// `COST (number, event, status)`: its `_OST`.
fn tell_status(sink: &mut dyn AmlSink) {
    let (selector, command, data) = (name("CSEL"), name("CCMD"), name("CDAT"));
    let select = Store::new(&selector, &Arg(0));
    let first = Store::new(&command, &OST_EVENT);
    let event = Store::new(&data, &Arg(1));
    let second = Store::new(&command, &OST_STATUS);
    let status = Store::new(&data, &Arg(2));
    alone("COST", 3, vec![&select, &first, &event, &second, &status], None, sink);
}

/// `CSCN`: takes up every event there is, and notifies whom it is about.
fn scan(sink: &mut dyn AmlSink) {
    let (selector, command, data) = (name("CSEL"), name("CCMD"), name("CDAT"));
    let (inserting, removing) = (name("CINS"), name("CRMV"));
    let inserted = MethodCall::new("CTFY".into(), vec![&data, &DEVICE_CHECK]);
    let removed = MethodCall::new("CTFY".into(), vec![&data, &EJECT_REQUEST]);
    let from_first = Store::new(&selector, &ZERO);
    let begin = Store::new(&Local(0), &ONE);
    let end = Store::new(&Local(0), &ZERO);
    let next = Store::new(&command, &NEXT_EVENT);
    let (inserted_is_heard, removed_is_heard) = (Store::new(&inserting, &ONE), Store::new(&removing, &ONE));
    let (is_inserting, is_removing) = (Equal::new(&inserting, &ONE), Equal::new(&removing, &ONE));
    let if_removing = If::new(&is_removing, vec![&removed, &removed_is_heard, &begin]);
    let otherwise = Else::new(vec![&if_removing]);
    let if_inserting = If::new(&is_inserting, vec![&inserted, &inserted_is_heard, &begin]);
    let goes_on = Equal::new(&Local(0), &ONE);
    let each = While::new(&goes_on, vec![&end, &next, &if_inserting, &otherwise]);
    alone("CSCN", 0, vec![&from_first, &begin, &each], None, sink);
}

fn cpu(number: u32, sink: &mut dyn AmlSink) {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &number);
    let mut entry = Vec::new();
    local_apic(number, EnabledStatus::Enabled).to_aml_bytes(&mut entry);
    let entry = BufferData::new(entry);
    let mat = Name::new("_MAT".into(), &entry);
    let state = MethodCall::new("CSTA".into(), vec![&number]);
    let state = Return::new(&state);
    let sta = Method::new("_STA".into(), 0, false, vec![&state]);
    let eject = MethodCall::new("CEJ0".into(), vec![&number]);
    let ej0 = Method::new("_EJ0".into(), 1, false, vec![&eject]);
    let status = MethodCall::new("COST".into(), vec![&number, &Arg(0), &Arg(1)]);
    let ost = Method::new("_OST".into(), 3, false, vec![&status]);
    let mut objects: Vec<&dyn Aml> = vec![&hid, &uid, &mat, &sta, &ost];
    // A CPU without `_EJ0` can't be taken back, and the guest knows so.
    if number > 0 {
        objects.push(&ej0);
    }
    Device::new(path(number), objects).to_aml_bytes(sink);
}

/// The Generic Event Device: its interrupt is raised for as long as there is an event.
fn event_device(sink: &mut dyn AmlSink) {
    let hid = Name::new("_HID".into(), &"ACPI0013");
    let uid = Name::new("_UID".into(), &ZERO);
    let interrupt = Interrupt::new(true, false, false, false, cpu_hotplug::GSI);
    let resources = ResourceTemplate::new(vec![&interrupt]);
    let crs = Name::new("_CRS".into(), &resources);
    let scan = MethodCall::new("CSCN".into(), vec![]);
    let evt = Method::new("_EVT".into(), 1, true, vec![&scan]);
    Device::new("GED0".into(), vec![&hid, &uid, &crs, &evt]).to_aml_bytes(sink);
}
