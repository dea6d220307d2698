//! What the guest finds when its first vCPU starts: the kernel, Linux's boot parameters, ACPI tables and CPU state.
//!
//! Kernels are entered by the 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst in Linux), not by PVH: it is the
//! one entry that a bzImage and an ELF `vmlinux` have in common, `CONFIG_PVH` need not be set, and the kernel is spared
//! its way from 32 to 64 bits. The RSDP's address goes with it, so that nothing is searched for.

pub mod acpi;
pub mod cpuid;
pub mod kernel;
pub mod params;
pub mod registers;
