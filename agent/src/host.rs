//! What this host is: how much of it a machine can have, and addresses on it.

use std::fmt;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// The largest amount that one machine of this host can give to a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// CPU in millicores.
    pub cpu_millis: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
}

/// An address of a gRPC server: a Unix socket or TCP.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `unix:/path`
    Unix(PathBuf),
    /// `http://host:port`
    Tcp(String),
}

/// Why an address was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} must be `unix:/absolute/path` or `http://host:port`")]
pub struct AddressError {
    given: String,
}

/// vCPUs that the VMM gives one machine at most.
const MAX_VCPUS: usize = 8;

/// Guest memory in MiB that kernel and init need for themselves.
pub(crate) const GUEST_OVERHEAD_MIB: u32 = 64;

/// Makes a folder, and those above it that are missing, that only its owner and group may enter (mode 0750). One that is
/// there already is left as it is.
///
/// # Errors
///
/// Where it can't be made.
pub fn make_private_dir(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o750).create(path)
}

// === impl Capacity ===

impl Capacity {
    /// What this host has: its CPUs as this process may use them (at most 8, the VMM's limit), and its memory less what a
    /// guest needs for itself.
    ///
    /// # Errors
    ///
    /// Where `/proc/meminfo` or the CPU count can't be read.
    pub fn of_this_host() -> std::io::Result<Self> {
        let cpus = std::thread::available_parallelism()?.get().min(MAX_VCPUS);
        let meminfo = std::fs::read_to_string("/proc/meminfo")?;
        let total_mib = mem_total_kib(&meminfo)
            .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidData, "/proc/meminfo has no MemTotal"))?
            / 1024;
        Ok(Self {
            cpu_millis: u32::try_from(cpus * 1000).unwrap_or(u32::MAX),
            memory_mib: u32::try_from(total_mib.saturating_sub(u64::from(GUEST_OVERHEAD_MIB))).unwrap_or(u32::MAX),
        })
    }
}

fn mem_total_kib(meminfo: &str) -> Option<u64> {
    meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

// === impl Address ===

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError { given: text.to_owned() };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Self::Unix(path))
            } else {
                Err(error())
            };
        }
        let host = text.strip_prefix("http://").ok_or_else(error)?;
        let uri: Uri = text.parse().map_err(|_| error())?;
        if uri.port_u16().is_none() || uri.path() != "/" || uri.query().is_some() {
            return Err(error());
        }
        Ok(Self::Tcp(host.trim_end_matches('/').to_owned()))
    }
}

impl Address {
    /// Connects to the gRPC server there. A connection whose other end is gone is noticed within half a minute.
    ///
    /// # Errors
    ///
    /// Where nobody listens.
    pub async fn connect(&self) -> Result<Channel, tonic::transport::Error> {
        match self {
            Self::Unix(path) => {
                let path = path.clone();
                // The URI only fills in HTTP/2's `:authority`.
                endpoint(Endpoint::from_static("http://localhost"))
                    .connect_with_connector(tower::service_fn(move |_: Uri| {
                        let path = path.clone();
                        async move { UnixStream::connect(path).await.map(TokioIo::new) }
                    }))
                    .await
            }
            Self::Tcp(_) => endpoint(Endpoint::from_shared(self.to_string())?).connect().await,
        }
    }
}

fn endpoint(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(Duration::from_secs(5))
        .http2_keep_alive_interval(Duration::from_secs(20))
        .keep_alive_timeout(Duration::from_secs(10))
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host) => write!(f, "http://{host}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_both_kinds() {
        assert_eq!("unix:/run/c.sock".parse(), Ok(Address::Unix("/run/c.sock".into())));
        assert_eq!("http://[::1]:7000".parse(), Ok(Address::Tcp("[::1]:7000".into())));
        for bad in [
            "",
            "/run/c.sock",
            "unix:c.sock",
            "http://localhost",
            "https://a:1",
            "http://a:1/x",
            "http://a:99999",
        ] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_read_in_kib() {
        assert_eq!(
            mem_total_kib("MemTotal:       24689548 kB\nMemFree: 1 kB\n"),
            Some(24_689_548)
        );
        assert_eq!(mem_total_kib("MemFree: 1 kB\n"), None);
    }

    #[test]
    fn this_host_has_something() {
        let capacity = Capacity::of_this_host().unwrap();
        assert!((1000..=8000).contains(&capacity.cpu_millis) && capacity.memory_mib > 0);
    }
}
