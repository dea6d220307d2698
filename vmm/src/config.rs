//! What a machine is made of, as its configuration file says it.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use stoker_proto::limits::MAX_SCRATCH_MIB;

use crate::memory::BLOCK;

/// Least memory of a machine in MiB: below it no kernel of ours finds room to unpack itself.
pub const MIN_MEMORY_MIB: u32 = 32;
/// Most memory of a machine in MiB (1 TiB).
pub const MAX_MEMORY_MIB: u32 = 1024 * 1024;
/// Most vCPUs of a machine. APIC ids stay below 255, so that 8-bit MADT entries serve.
pub const MAX_VCPUS: u32 = 240;
/// Most drives of a machine: with the scratch drive, vsock, rng, memory, balloon and COM1 they share the 24 pins of one I/O APIC.
pub const MAX_DRIVES: usize = 12;
/// Longest kernel command line in bytes without its closing NUL (Linux's `COMMAND_LINE_SIZE` on x86 is 2048).
pub const MAX_CMDLINE: usize = 2047;
/// Longest path of a Unix socket in bytes (`sun_path` holds 108 with its NUL).
const MAX_SOCKET_PATH: usize = 107;

/// One machine. The agent fills it and writes it as JSON; `stoker-vmm --config FILE` reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// What others call this machine (a ULID); it appears in no behaviour, only in messages and thread names.
    pub id: String,
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// How many it may ever have, up to [`MAX_VCPUS`]: it is resized between 1 and that while it runs, by ACPI. Each costs the guest's
    /// kernel memory from the start, and neither a thread nor a descriptor before it is plugged. Where absent, `vcpus` stay as they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_vcpus: Option<u32>,
    /// What it starts with and always has, [`MIN_MEMORY_MIB`] to [`MAX_MEMORY_MIB`].
    pub memory_mib: u32,
    /// The most that it may have while it runs, in blocks of [`crate::memory::BLOCK`] more than `memory_mib`; where absent, that. Linux
    /// keeps its records of what is plugged, 16 MiB for each GiB, in what it started with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_memory_mib: Option<u32>,
    /// Whether there is a balloon: memory can be asked back, what the guest frees goes back by itself, and it tells how its
    /// memory is.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub balloon: bool,
    /// A bzImage or an uncompressed ELF `vmlinux`.
    pub kernel: PathBuf,
    /// A cpio archive, compressed or not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, at most [`MAX_CMDLINE`] bytes.
    #[serde(default)]
    pub cmdline: String,
    /// Block devices in the order in which the guest sees them (`/dev/vda` first), at most [`MAX_DRIVES`].
    #[serde(default)]
    pub drives: Vec<DriveConfig>,
    /// The drive behind those, empty and writable, if there is to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<ScratchConfig>,
    /// The vsock device, if there is to be one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Unix socket on which the machine is controlled (see [`crate::control`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<PathBuf>,
    /// The folder of a threaded cgroup below the one that the VMM is started in: the vCPUs' threads move there before they run the
    /// guest, so that what it uses is limited and counted apart. Where absent they stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus_cgroup: Option<PathBuf>,
    /// File for the serial console's output; standard output where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<PathBuf>,
}

/// A file given to the guest as a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveConfig {
    /// A raw image; its size is a multiple of 512 bytes.
    pub path: PathBuf,
    /// A read-only image may be shared by any number of machines, a writable one belongs to one.
    pub read_only: bool,
}

/// A drive that lives as long as the machine: a file without a name, which takes of the host's disk what is written to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScratchConfig {
    /// Where the file lies. In a folder that is in memory (tmpfs), what is written counts as memory of the machine.
    pub folder: PathBuf,
    /// What it holds at the start, in MiB: 1 to [`MAX_SCRATCH_MIB`]. It may grow up to that, and never shrinks.
    pub size_mib: u32,
}

/// The vsock device and its end on the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 to 2^32 - 2.
    pub cid: u32,
    /// Unix socket on which the host reaches the guest. A guest that connects to port P of the host reaches the Unix
    /// socket `{socket}_{P}`.
    pub socket: PathBuf,
}

/// Why a configuration was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("cannot read the configuration {path}: {source}; give the path of a JSON file with --config")]
    Read {
        /// The file.
        path: PathBuf,
        /// The underlying error.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("the configuration {path} is not valid: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// No vCPU, or too many.
    #[error("`vcpus` is {0}; it must be 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// Fewer than it starts with, or too many.
    #[error("`max_vcpus` is {max}; it must be `vcpus`, {vcpus}, to {MAX_VCPUS}")]
    MaxVcpus {
        /// What it is.
        max: u32,
        /// What the machine starts with.
        vcpus: u32,
    },
    /// Too little or too much memory.
    #[error("`memory_mib` is {0}; it must be {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}")]
    Memory(u32),
    /// Less at most than from the start, too much, or not in blocks.
    #[error(
        "`max_memory_mib` is {max}; it must be {memory} (`memory_mib`) to {MAX_MEMORY_MIB}, and a multiple of {block} MiB more than that",
        block = BLOCK >> 20
    )]
    MaxMemory {
        /// The most.
        max: u32,
        /// What there is from the start.
        memory: u32,
    },
    /// The command line is too long or holds a NUL.
    #[error("`cmdline` has {0} bytes or holds a NUL; it may have up to {MAX_CMDLINE} bytes and no NUL")]
    Cmdline(usize),
    /// Too many drives.
    #[error("there are {0} drives; at most {MAX_DRIVES} are possible")]
    Drives(usize),
    /// A scratch drive of no size, or too large.
    #[error("the scratch drive's `size_mib` is {0}; it must be 1 to {MAX_SCRATCH_MIB}")]
    Scratch(u32),
    /// A reserved context id.
    #[error("the vsock `cid` is {0}; it must be 3 to 4294967294, the others are reserved")]
    Cid(u32),
    /// A socket's path does not fit into `sockaddr_un`.
    #[error("the socket path {0} is too long; a Unix socket's path has at most {1} bytes")]
    SocketPath(PathBuf, usize),
}

// === impl MachineConfig ===

impl MachineConfig {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    /// Where it cannot be read, is not the JSON expected, or a value is out of its range.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        let config: Self = serde_json::from_slice(&text).map_err(|source| ConfigError::Parse {
            path: path.to_owned(),
            source,
        })?;
        config.check()?;
        Ok(config)
    }

    /// The most memory that the machine may have, in MiB.
    pub fn max_memory_mib(&self) -> u32 {
        self.max_memory_mib.unwrap_or(self.memory_mib)
    }

    /// Checks every value against its range. Files are not looked at.
    ///
    /// # Errors
    /// The first value out of range.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !(1..=MAX_VCPUS).contains(&self.vcpus) {
            return Err(ConfigError::Vcpus(self.vcpus));
        }
        if let Some(max) = self.max_vcpus
            && !(self.vcpus..=MAX_VCPUS).contains(&max)
        {
            let vcpus = self.vcpus;
            return Err(ConfigError::MaxVcpus { max, vcpus });
        }
        if !(MIN_MEMORY_MIB..=MAX_MEMORY_MIB).contains(&self.memory_mib) {
            return Err(ConfigError::Memory(self.memory_mib));
        }
        let (max, memory) = (self.max_memory_mib(), self.memory_mib);
        if !(memory..=MAX_MEMORY_MIB).contains(&max) || !(u64::from(max - memory) << 20).is_multiple_of(BLOCK) {
            return Err(ConfigError::MaxMemory { max, memory });
        }
        if self.cmdline.len() > MAX_CMDLINE || self.cmdline.contains('\0') {
            return Err(ConfigError::Cmdline(self.cmdline.len()));
        }
        if self.drives.len() > MAX_DRIVES {
            return Err(ConfigError::Drives(self.drives.len()));
        }
        if let Some(scratch) = &self.scratch
            && !(1..=MAX_SCRATCH_MIB).contains(&scratch.size_mib)
        {
            return Err(ConfigError::Scratch(scratch.size_mib));
        }
        if let Some(control) = &self.control {
            check_socket_path(control, MAX_SOCKET_PATH)?;
        }
        if let Some(vsock) = &self.vsock {
            if !(3..u32::MAX).contains(&vsock.cid) {
                return Err(ConfigError::Cid(vsock.cid));
            }
            // Room for `_` and a port of ten digits.
            check_socket_path(&vsock.socket, MAX_SOCKET_PATH - 11)?;
        }
        Ok(())
    }
}

fn check_socket_path(path: &Path, limit: usize) -> Result<(), ConfigError> {
    if path.as_os_str().len() > limit {
        return Err(ConfigError::SocketPath(path.to_owned(), limit));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> MachineConfig {
        serde_json::from_str(
            r#"{"id": "01J", "vcpus": 2, "max_vcpus": 8, "memory_mib": 512, "max_memory_mib": 1024, "balloon": true, "kernel": "/k",
                "initramfs": "/i", "cmdline": "quiet",
                "drives": [{"path": "/d", "read_only": true}], "scratch": {"folder": "/s", "size_mib": 1024}, "vsock": {"cid": 3, "socket": "/v.sock"},
                "control": "/c.sock", "vcpus_cgroup": "/c/vcpus", "console": "/c.log"}"#,
        )
        .unwrap()
    }

    #[test]
    fn a_configuration_survives_a_round_trip() {
        let config = sample();
        config.check().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<MachineConfig>(&text).unwrap(), config);
    }

    #[test]
    fn only_what_is_needed_must_be_there() {
        let config: MachineConfig =
            serde_json::from_str(r#"{"id": "a", "vcpus": 1, "memory_mib": 64, "kernel": "/k"}"#).unwrap();
        config.check().unwrap();
        assert_eq!((config.max_memory_mib(), config.balloon), (64, false));
        assert!(config.vsock.is_none() && config.drives.is_empty() && config.vcpus_cgroup.is_none());
        assert!(config.max_vcpus.is_none());
    }

    #[test]
    fn values_out_of_range_are_named() {
        let refuse = |change: fn(&mut MachineConfig), word: &str| {
            let mut config = sample();
            change(&mut config);
            let message = config.check().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        };
        refuse(|c| c.vcpus = 0, "`vcpus` is 0");
        refuse(|c| c.vcpus = 241, "1 to 240");
        refuse(
            |c| c.max_vcpus = Some(1),
            "`max_vcpus` is 1; it must be `vcpus`, 2, to 240",
        );
        refuse(|c| c.max_vcpus = Some(241), "`max_vcpus` is 241");
        refuse(|c| c.memory_mib = 31, "`memory_mib` is 31");
        refuse(|c| c.memory_mib = 2 << 20, "32 to 1048576");
        refuse(
            |c| c.max_memory_mib = Some(510),
            "`max_memory_mib` is 510; it must be 512",
        );
        refuse(|c| c.max_memory_mib = Some(2 << 20), "to 1048576");
        refuse(|c| c.max_memory_mib = Some(1023), "a multiple of 2 MiB more");
        refuse(|c| c.cmdline = "x".repeat(2048), "2047");
        refuse(|c| c.cmdline = "a\0b".into(), "NUL");
        refuse(|c| c.drives = vec![c.drives[0].clone(); 13], "at most 12");
        refuse(|c| c.scratch.as_mut().unwrap().size_mib = 0, "`size_mib` is 0");
        refuse(|c| c.scratch.as_mut().unwrap().size_mib = 65_537, "1 to 65536");
        refuse(|c| c.vsock.as_mut().unwrap().cid = 2, "reserved");
        refuse(|c| c.control = Some("/x".repeat(60).into()), "too long");
        refuse(
            |c| c.vsock.as_mut().unwrap().socket = format!("/{}", "x".repeat(96)).into(),
            "96 bytes",
        );
    }

    #[test]
    fn unknown_fields_are_refused() {
        let error = serde_json::from_str::<MachineConfig>(
            r#"{"id": "a", "vcpus": 1, "memory_mib": 64, "kernel": "/k", "memory": 64}"#,
        )
        .unwrap_err();
        assert!(error.to_string().contains("memory"));
    }
}
