//! The CPU hot-plug registers that QEMU documents (docs/specs/acpi_cpu_hotplug.rst in QEMU; the modern interface, without the parts
//! that are firmware's). By them the guest's ACPI sees which vCPUs are plugged, hears what its host wants, gives vCPUs back, and
//! says what became of it. The code that does so in the guest is AML of ours: `boot::acpi`.
//!
//! ```text
//!                 plug                    take_back
//!   unplugged ───────────► plugged ─────────────────────► plugged, to be given back
//!       ▲                   ▲   │            keep                  │
//!       │                   └───┼──────────────────────────────────┤
//!       └───────────────────────┴──────────────────────────────────┘
//!                               the guest ejects it
//! ```
//!
//! The interrupt is triggered by its level: it is raised for as long as there is an event that the guest has not taken up. So a guest
//! that listens late, as one that boots, misses none. Every arrow upwards is the host's: whatever the guest does, it can cause no more
//! than one ejection for each time that the host has plugged a vCPU.

use std::fmt;
use std::mem;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// First I/O port, as QEMU's Q35 has it.
pub const PORT: u16 = 0xcd8;
/// Number of ports.
pub const PORTS: u16 = 12;
/// Its interrupt: the last pin of the I/O APIC.
pub const GSI: u32 = 23;

/// Offset of the selector (32 bits, written): the vCPU that all other registers are about.
pub const SELECTOR: u16 = 0;
/// Offset of the state of the selected vCPU (8 bits).
pub const STATE: u16 = 4;
/// Offset of the command (8 bits, written).
pub const COMMAND: u16 = 5;
/// Offset of the command's data (32 bits).
pub const DATA: u16 = 8;

/// Bits of [`STATE`]: it is plugged.
const ENABLED: u8 = 1 << 0;
/// It was plugged. Written: the guest has taken that up.
const INSERTING: u8 = 1 << 1;
/// It is to be given back. Written: the guest has taken that up.
const REMOVING: u8 = 1 << 2;
/// Written: the guest gives it back.
const EJECT: u8 = 1 << 3;

/// Commands. Selects the next vCPU with an event, where there is one; the data is the selected vCPU's number.
pub const NEXT_EVENT: u8 = 0;
/// What is written as data is the first argument of `_OST`: what the guest tells about.
pub const OST_EVENT: u8 = 1;
/// What is written as data is the second argument of `_OST`: what became of it.
pub const OST_STATUS: u8 = 2;

/// Events and statuses of `_OST` (ACPI 6.5, 6.3.5).
const OST_EJECT_REQUEST: u32 = 3;
const OST_EJECT_PROCESSING: u32 = 0x103;
const OST_SUCCESS: u32 = 0;
/// Of an ejection: it goes on.
const OST_EJECT_IN_PROGRESS: u32 = 0x84;
/// Of an insertion: it goes on.
const OST_INSERT_IN_PROGRESS: u32 = 0x80;

/// An interrupt line that is triggered by its level.
pub trait Line: Send {
    /// Raises it, or takes that back.
    fn set(&mut self, raised: bool);
}

/// The registers.
pub struct CpuHotplug {
    /// By their numbers, up to the ceiling.
    cpus: Vec<Cpu>,
    selected: u32,
    command: u8,
    ost_event: u32,
    refusal: Option<Refusal>,
    ejected: Vec<Ejected>,
    line: Box<dyn Line>,
    raised: bool,
    wake: Arc<EventFd>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Cpu {
    plugged: bool,
    /// Events that the guest has not taken up.
    inserting: bool,
    removing: bool,
    /// It has taken up that it was plugged.
    told_of: bool,
    /// How often it may have seen that it is to give it back, and neither did so nor refused. A guest does one after the other, and
    /// so may give back what it was plugged again meanwhile.
    requests: u32,
}

/// A vCPU that the guest gave back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ejected {
    /// Its number.
    pub number: u32,
    /// Whether the guest was asked for it, and had not answered that yet.
    pub asked_for: bool,
}

/// What the guest said of a vCPU that it did not take, or did not give back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The vCPU.
    pub number: u32,
    event: u32,
    status: u32,
}

// === impl CpuHotplug ===

impl CpuHotplug {
    /// Registers of a machine that starts with `plugged` vCPUs and may have up to `ceiling`. `wake` becomes readable when the guest
    /// has given one back.
    pub fn new(plugged: u32, ceiling: u32, line: Box<dyn Line>, wake: Arc<EventFd>) -> Self {
        let cpu = |number| Cpu {
            plugged: number < plugged,
            // Its kernel starts with them.
            told_of: number < plugged,
            ..Cpu::default()
        };
        Self {
            cpus: (0..ceiling).map(cpu).collect(),
            selected: 0,
            command: NEXT_EVENT,
            ost_event: 0,
            refusal: None,
            ejected: Vec::new(),
            line,
            raised: false,
            wake,
        }
    }

    /// A vCPU is there from now on, and the guest is told.
    pub fn plug(&mut self, number: u32) {
        if let Some(cpu) = self.cpu(number)
            && !cpu.plugged
        {
            cpu.plugged = true;
            cpu.inserting = true;
            self.set_line();
        }
    }

    /// Asks the guest to give a vCPU back, again where it was asked before. The first it keeps.
    pub fn take_back(&mut self, number: u32) {
        if let Some(cpu) = self.cpu(number)
            && cpu.plugged
            && number > 0
        {
            cpu.inserting = false;
            cpu.removing = true;
            self.set_line();
        }
    }

    /// The guest is to keep a vCPU. Where it was asked for it already, it may still give it back.
    pub fn keep(&mut self, number: u32) {
        if let Some(cpu) = self.cpu(number)
            && cpu.plugged
        {
            // The guest may have seen it, and not said so yet.
            cpu.end_request();
            cpu.inserting = !cpu.told_of;
            self.set_line();
        }
    }

    /// What the guest has given back since this was asked last: no more than there are vCPUs.
    pub fn take_ejected(&mut self) -> Vec<Ejected> {
        mem::take(&mut self.ejected)
    }

    /// What the guest has refused last, since it was forgotten.
    pub fn refusal(&self) -> Option<Refusal> {
        self.refusal
    }

    /// Forgets it: something else is asked for.
    pub fn forget_refusal(&mut self) {
        self.refusal = None;
    }

    fn cpu(&mut self, number: u32) -> Option<&mut Cpu> {
        self.cpus.get_mut(usize::try_from(number).ok()?)
    }

    fn set_line(&mut self) {
        let pending = self.cpus.iter().any(Cpu::has_event);
        if pending != self.raised {
            self.raised = pending;
            self.line.set(pending);
        }
    }

    fn state(&mut self) -> u8 {
        let bit = |set, bit| if set { bit } else { 0 };
        self.cpu(self.selected).map_or(0, |cpu| {
            bit(cpu.plugged, ENABLED) | bit(cpu.inserting, INSERTING) | bit(cpu.removing, REMOVING)
        })
    }

    fn write_state(&mut self, value: u8) {
        let number = self.selected;
        let Some(cpu) = self.cpu(number).filter(|cpu| cpu.plugged) else {
            return;
        };
        if value & INSERTING != 0 && cpu.inserting {
            cpu.inserting = false;
            cpu.told_of = true;
        }
        if value & REMOVING != 0 {
            cpu.end_request();
        }
        // What runs the guest's last code can't be given back.
        if value & EJECT != 0 && number > 0 {
            cpu.end_request();
            let asked_for = cpu.requests > 0;
            *cpu = Cpu {
                requests: cpu.requests.saturating_sub(1),
                ..Cpu::default()
            };
            self.ejected.push(Ejected { number, asked_for });
            self.refusal.take_if(|refusal| refusal.number == number);
            // It is read before its counter can be full.
            let _ = self.wake.write(1);
        }
        self.set_line();
    }

    fn select_next_event(&mut self) {
        let from = self.cpus.iter().zip(0..).skip(self.selected as usize);
        let before = self.cpus.iter().zip(0..).take(self.selected as usize);
        let next = from.chain(before).find(|(cpu, _)| cpu.has_event());
        if let Some((_, number)) = next {
            self.selected = number;
        }
    }

    fn write_data(&mut self, value: u32) {
        let number = self.selected;
        match self.command {
            OST_EVENT => self.ost_event = value,
            OST_STATUS => {
                let said = Refusal {
                    number,
                    event: self.ost_event,
                    status: value,
                };
                let Some(cpu) = self.cpu(number).filter(|_| !said.is_in_progress()) else {
                    return;
                };
                if value == OST_SUCCESS {
                    self.refusal.take_if(|refusal| refusal.number == number);
                    return;
                }
                if said.is_of_ejection() {
                    cpu.requests = cpu.requests.saturating_sub(1);
                }
                self.refusal = Some(said);
            }
            _ => {}
        }
    }
}

impl BusDevice for CpuHotplug {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match (u16::try_from(offset), data) {
            (Ok(STATE), [value]) => *value = self.state(),
            (Ok(DATA), data) if self.command == NEXT_EVENT => {
                if let Some(data) = data.first_chunk_mut::<4>() {
                    *data = self.selected.to_le_bytes();
                }
            }
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let number = || <[u8; 4]>::try_from(data).map(u32::from_le_bytes);
        match (u16::try_from(offset), data) {
            (Ok(SELECTOR), _) => {
                if let Ok(number) = number() {
                    self.selected = number;
                }
            }
            (Ok(STATE), [value]) => self.write_state(*value),
            (Ok(COMMAND), [value]) => {
                self.command = *value;
                if *value == NEXT_EVENT {
                    self.select_next_event();
                }
            }
            (Ok(DATA), _) => {
                if let Ok(value) = number() {
                    self.write_data(value);
                }
            }
            _ => {}
        }
    }
}

// === impl Cpu ===

impl Cpu {
    fn has_event(&self) -> bool {
        self.inserting || self.removing
    }

    /// Does not ask for it any more: the guest has seen it, or is not to.
    fn end_request(&mut self) {
        if mem::take(&mut self.removing) {
            self.requests = self.requests.saturating_add(1);
        }
    }
}

// === impl Refusal ===

impl Refusal {
    fn is_of_ejection(&self) -> bool {
        matches!(self.event, OST_EJECT_REQUEST | OST_EJECT_PROCESSING)
    }

    fn is_in_progress(&self) -> bool {
        let in_progress = match self.is_of_ejection() {
            true => OST_EJECT_IN_PROGRESS,
            false => OST_INSERT_IN_PROGRESS,
        };
        self.status == in_progress
    }

    fn why(&self) -> &'static str {
        match (self.is_of_ejection(), self.status) {
            (_, 1) => "it failed",
            (_, 2) => "it does not know what it was asked for",
            (true, 0x80) => "it can't give it back",
            (true, 0x81) => "a program uses it",
            (true, 0x82) => "it is busy",
            (true, 0x83) => "what depends on it is busy",
            (false, 0x81) => "its driver can't be loaded",
            (false, 0x82) => "it can't take it",
            _ => "for a reason that ACPI does not name",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let did_not = match self.is_of_ejection() {
            true => "give back",
            false => "take",
        };
        let (number, why, event, status) = (self.number, self.why(), self.event, self.status);
        write!(
            f,
            "the guest did not {did_not} vCPU {number}: {why} (_OST event {event:#x}, status {status:#x})"
        )
    }
}

#[cfg(test)]
mod tests;
