//! Addresses of gRPC servers.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

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
}
