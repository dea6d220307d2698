//! ACPI tables (ACPI 6.5): RSDP, XSDT, a hardware-reduced FADT, MADT, and a DSDT that lists the devices, for the guest's
//! kernel has no other way to find them.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::devices::{power, pvpanic, serial};
use crate::memory::layout;

mod cpus;

use cpus::Cpus;

const OEM: [u8; 6] = *b"STOKER";
const OEM_TABLE: [u8; 8] = *b"STOKRVMM";
const REVISION: u32 = 1;
const DSDT_REVISION: u8 = 6;
const SDT_HEADER: u32 = 36;
/// Tables begin at multiples of this.
const ALIGN: usize = 16;

/// `IAPC_BOOT_ARCH` (ACPI 6.5, table 5.11): no VGA to probe, no CMOS clock to read; no keyboard controller either, which
/// its bit 1 not being set says.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_CLOCK: u16 = 1 << 5;

/// A virtio-mmio device, as the DSDT tells of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Address of its registers, below 4 GiB.
    pub address: u64,
    /// Its interrupt, edge-triggered.
    pub gsi: u32,
}

/// Builds the tables for a machine that starts with `vcpus` CPUs and may be plugged up to `ceiling`, where there is one. They belong at
/// [`layout::ACPI`]; the RSDP is their beginning.
pub fn tables(vcpus: u32, ceiling: Option<u32>, devices: &[VirtioMmio]) -> Vec<u8> {
    let mut blob = Blob(vec![0; Rsdp::len().next_multiple_of(ALIGN)]);
    let dsdt = blob.add(&dsdt(ceiling, devices));
    let fadt = blob.add(&fadt(dsdt));
    let madt = blob.add(&madt(vcpus, ceiling));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = blob.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    for (to, from) in blob.0.iter_mut().zip(rsdp) {
        *to = from;
    }
    blob.0
}

/// Tables one behind the other.
struct Blob(Vec<u8>);

impl Blob {
    /// Adds a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let at = self.0.len();
        table.to_aml_bytes(&mut self.0);
        self.0.resize(self.0.len().next_multiple_of(ALIGN), 0);
        layout::ACPI + at as u64
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let register = |offset| {
        GAS::new(
            AddressSpace::SystemIo,
            8,
            0,
            AccessSize::ByteAccess,
            u64::from(power::PORT + offset),
        )
    };
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_CLOCK).into();
    fadt.sleep_control_reg = register(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = register(power::SLEEP_STATUS);
    fadt.reset_reg = register(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.finalize()
}

fn madt(vcpus: u32, ceiling: Option<u32>) -> impl Aml {
    let controller = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, REVISION, controller);
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    for number in 0..ceiling.unwrap_or(vcpus) {
        let enabled = match number < vcpus {
            true => EnabledStatus::Enabled,
            // May come later: a kernel makes room for it (5.2.12.2).
            false => EnabledStatus::DisabledOnlineCapable,
        };
        madt.add_structure(cpus::local_apic(number, enabled));
    }
    madt
}

fn dsdt(ceiling: Option<u32>, devices: &[VirtioMmio]) -> impl Aml {
    let mut sdt = Sdt::new(*b"DSDT", SDT_HEADER, DSDT_REVISION, OEM, OEM_TABLE, REVISION);
    let mut body = Vec::new();
    // \_S5: what to write as SLP_TYP to power off.
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&power::SLEEP_TYPE_S5, &power::SLEEP_TYPE_S5]),
    )
    .to_aml_bytes(&mut body);
    let com1 = com1();
    let panic = panic_device();
    let virtio: Vec<_> = devices.iter().zip(0u32..).map(virtio).collect();
    let mut children: Vec<&dyn Aml> = vec![&com1, &panic];
    children.extend(virtio.iter().map(|device| device as &dyn Aml));
    let cpus = ceiling.map(|ceiling| Cpus { ceiling });
    children.extend(cpus.iter().map(|cpus| cpus as &dyn Aml));
    Scope::new("\\_SB_".into(), children).to_aml_bytes(&mut body);
    sdt.append_slice(&body);
    sdt
}

/// Bytes of AML that are there already.
struct Bytes(Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(path: Path, hid: &dyn Aml, uid: u32, resources: Vec<&dyn Aml>) -> Bytes {
    let hid = Name::new("_HID".into(), hid);
    let uid = Name::new("_UID".into(), &uid);
    let crs = Name::new("_CRS".into(), &ResourceTemplate::new(resources));
    let mut bytes = Vec::new();
    Device::new(path, vec![&hid, &uid, &crs]).to_aml_bytes(&mut bytes);
    Bytes(bytes)
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

fn com1() -> Bytes {
    let ports = IO::new(serial::PORT, serial::PORT, 0, serial::PORTS as u8);
    device(
        "COM1".into(),
        &EISAName::new("PNP0501"),
        1,
        vec![&ports, &edge(serial::GSI)],
    )
}

fn panic_device() -> Bytes {
    let port = IO::new(pvpanic::PORT, pvpanic::PORT, 1, 1);
    device("PEVT".into(), &"QEMU0001", 1, vec![&port])
}

fn virtio((mmio, index): (&VirtioMmio, u32)) -> Bytes {
    let registers = Memory32Fixed::new(true, mmio.address as u32, layout::VIRTIO_MMIO_SIZE as u32);
    let path = Path::new(&format!("V{index:03}"));
    device(path, &"LNRO0005", index, vec![&registers, &edge(mmio.gsi)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(blob: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(blob[at..at + 8].try_into().unwrap())
    }

    fn table(blob: &[u8], address: u64) -> &[u8] {
        let at = (address - layout::ACPI) as usize;
        let length = u32::from_le_bytes(blob[at + 4..at + 8].try_into().unwrap()) as usize;
        let table = &blob[at..at + length];
        let sum = table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0, "checksum of {:?}", &table[..4]);
        table
    }

    fn devices() -> Vec<VirtioMmio> {
        let device = |index| VirtioMmio {
            address: layout::VIRTIO_MMIO + index * layout::VIRTIO_MMIO_SIZE,
            gsi: 5 + index as u32,
        };
        (0..14).map(device).collect()
    }

    /// FADT, MADT and DSDT, found as a kernel does.
    fn find(blob: &[u8]) -> [&[u8]; 3] {
        assert!(layout::ACPI + blob.len() as u64 <= layout::ACPI_END);
        assert_eq!(&blob[..8], b"RSD PTR ");
        let xsdt = table(blob, word(blob, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(blob, word(xsdt, 36));
        assert_eq!(&fadt[..4], b"FACP");
        let madt = table(blob, word(xsdt, 44));
        assert_eq!(&madt[..4], b"APIC");
        let dsdt = table(blob, word(fadt, 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        [fadt, madt, dsdt]
    }

    fn count(table: &[u8], word: &[u8]) -> usize {
        table.windows(word.len()).filter(|part| *part == word).count()
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp() {
        let blob = tables(240, None, &devices());
        let [fadt, madt, dsdt] = find(&blob);
        let flags = u32::from_le_bytes(fadt[112..116].try_into().unwrap());
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(madt.len(), 44 + 12 + 240 * 8);
        assert_eq!(count(dsdt, b"LNRO0005"), 14);
        assert_eq!(
            count(dsdt, b"ACPI0007") + count(dsdt, b"ACPI0013"),
            0,
            "nothing is plugged"
        );
    }

    #[test]
    fn cpus_up_to_the_ceiling_are_told() {
        let blob = tables(2, Some(240), &devices());
        let [_, madt, dsdt] = find(&blob);
        let entries: Vec<_> = madt[56..].chunks(8).collect();
        assert_eq!(entries.len(), 240);
        for (number, entry) in (0..).zip(entries) {
            let flags = if number < 2 { 1 } else { 2 };
            assert_eq!(entry, [0, 8, number, number, flags, 0, 0, 0]);
        }
        assert_eq!(count(dsdt, b"ACPI0007"), 240);
        assert_eq!(count(dsdt, b"_EJ0"), 239, "the first can't be ejected");
        assert_eq!(count(dsdt, b"ACPI0013"), 1);
        // What is there without stays as it is.
        let without = tables(2, None, &devices());
        let [_, _, plain] = find(&without);
        assert_eq!(count(dsdt, b"LNRO0005"), count(plain, b"LNRO0005"));
    }

    #[test]
    fn a_ceiling_of_64_costs_few_bytes() {
        let length = |ceiling| find(&tables(1, ceiling, &devices()))[2].len();
        let more = length(Some(64)) - length(None);
        println!("DSDT: {} bytes, with 64 CPUs {more} more", length(None));
        assert!(more < 8 << 10, "{more}");
    }
}
