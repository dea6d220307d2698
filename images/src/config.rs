//! What an image says of how it is run.

use serde::{Deserialize, Serialize};
use stoker_linux::users::{self, User, UserError};

use crate::signal;

/// How an image is run, checked and with its user looked up: what lies beside its files, as JSON.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// What is started, before `cmd`. Both may be empty: then who runs the image says what to start.
    pub entrypoint: Vec<String>,
    /// Arguments of the entrypoint, or the program and its arguments where there is none.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`
    pub env: Vec<String>,
    /// Who it runs as.
    pub user: User,
    /// An absolute path in the image, which need not be there.
    pub working_dir: String,
    /// What it listens on, in order.
    pub exposed_ports: Vec<Port>,
    /// The number of the signal that asks it to end.
    pub stop_signal: i32,
}

/// A port that an image listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Port {
    /// From 1.
    pub number: u16,
    /// Over what.
    pub protocol: Protocol,
}

/// What carries a port's traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// `tcp`
    Tcp,
    /// `udp`
    Udp,
    /// `sctp`
    Sctp,
}

/// What can't be meant in an image's configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// No environment variable, which are written `NAME=VALUE`.
    #[error("{0:?} is not an environment variable")]
    Env(String),
    /// A NUL, which ends what a program is given.
    #[error("{0:?} has a NUL in it")]
    Nul(String),
    /// No signal of that name or number.
    #[error("{0:?} is not a signal")]
    Signal(String),
    /// No port, which are written `80`, `80/tcp`, `53/udp` or `80/sctp`.
    #[error("{0:?} is not a port")]
    Port(String),
    /// No such user.
    #[error(transparent)]
    User(#[from] UserError),
}

// === impl Config ===

impl Config {
    /// Checks what an image says; `passwd` and `group` are the files of these names in its `/etc`.
    pub(crate) fn checked(
        said: Option<&oci_spec::image::Config>,
        passwd: &[u8],
        group: &[u8],
    ) -> Result<Self, ConfigError> {
        let list = |list: Option<&Vec<String>>| -> Result<Vec<String>, ConfigError> {
            list.into_iter().flatten().cloned().map(without_nul).collect()
        };
        let (entrypoint, cmd, env) = match said {
            Some(said) => (
                list(said.entrypoint().as_ref())?,
                list(said.cmd().as_ref())?,
                list(said.env().as_ref())?,
            ),
            None => Default::default(),
        };
        if let Some(wrong) = env.iter().find(|variable| variable.find('=').is_none_or(|at| at == 0)) {
            return Err(ConfigError::Env(wrong.clone()));
        }
        let text = |text: Option<&String>| text.cloned().unwrap_or_default();
        let user = text(said.and_then(|said| said.user().as_ref()));
        let folder = without_nul(text(said.and_then(|said| said.working_dir().as_ref())))?;
        let signal = text(said.and_then(|said| said.stop_signal().as_ref()));
        let ports = said
            .and_then(|said| said.exposed_ports().as_ref())
            .into_iter()
            .flatten();
        let mut exposed_ports = ports.map(|port| Port::parse(port)).collect::<Result<Vec<_>, _>>()?;
        exposed_ports.sort_unstable();
        exposed_ports.dedup();
        Ok(Self {
            entrypoint,
            cmd,
            env,
            user: users::look_up(&user, passwd, group)?,
            // As Docker has it where it is relative.
            working_dir: if folder.starts_with('/') {
                folder
            } else {
                format!("/{folder}")
            },
            exposed_ports,
            stop_signal: match &*signal {
                "" => nix::libc::SIGTERM,
                name => signal::number(name).ok_or_else(|| ConfigError::Signal(name.to_owned()))?,
            },
        })
    }
}

// === impl Port ===

impl Port {
    fn parse(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::Port(text.to_owned());
        let (number, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
        let protocol = match &*protocol.to_ascii_lowercase() {
            "tcp" => Protocol::Tcp,
            "udp" => Protocol::Udp,
            "sctp" => Protocol::Sctp,
            _ => return Err(wrong()),
        };
        let number = number.parse().ok().filter(|number| *number > 0).ok_or_else(wrong)?;
        Ok(Self { number, protocol })
    }
}

fn without_nul(text: String) -> Result<String, ConfigError> {
    if text.contains('\0') {
        Err(ConfigError::Nul(text))
    } else {
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> Result<Config, ConfigError> {
        let said = serde_json::from_str(json).unwrap();
        Config::checked(Some(&said), b"web:x:101:102::/var/www:/bin/sh\n", b"")
    }

    #[test]
    fn what_an_image_says_is_kept() {
        let config = checked(
            r#"{"Entrypoint":["/entry"],"Cmd":["-g","x"],"Env":["A=b=c","E="],"User":"web","WorkingDir":"srv",
                "ExposedPorts":{"443/tcp":{},"80":{},"53/UDP":{},"80/tcp":{}},"StopSignal":"SIGQUIT","Labels":{"a":"b"}}"#,
        )
        .unwrap();
        assert_eq!(config.entrypoint, ["/entry"]);
        assert_eq!(config.cmd, ["-g", "x"]);
        assert_eq!(config.env, ["A=b=c", "E="]);
        assert_eq!(
            (config.user.uid, config.user.gid, &*config.user.home),
            (101, 102, "/var/www")
        );
        assert_eq!(config.working_dir, "/srv");
        let ports: Vec<_> = config
            .exposed_ports
            .iter()
            .map(|port| (port.number, port.protocol))
            .collect();
        assert_eq!(ports, [(53, Protocol::Udp), (80, Protocol::Tcp), (443, Protocol::Tcp)]);
        assert_eq!(config.stop_signal, nix::libc::SIGQUIT);
        let written = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<Config>(&written).unwrap(), config);
    }

    #[test]
    fn what_it_does_not_say_has_defaults() {
        let nulls = r#"{"Entrypoint":null,"Cmd":null,"Env":null,"ExposedPorts":null,"User":"","WorkingDir":""}"#;
        let config = checked(nulls).unwrap();
        assert_eq!(config, Config::checked(None, b"", b"").unwrap());
        assert_eq!(
            (config.user.uid, &*config.working_dir, config.stop_signal),
            (0, "/", 15)
        );
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for env in ["A", "=b", ""] {
            assert!(
                matches!(checked(&format!(r#"{{"Env":["{env}"]}}"#)), Err(ConfigError::Env(_))),
                "{env}"
            );
        }
        for port in ["0/tcp", "65536", "80/icmp", "", "80-90/tcp", "-1", "80/tcp/x"] {
            let error = checked(&format!(r#"{{"ExposedPorts":{{"{port}":{{}}}}}}"#));
            assert!(matches!(error, Err(ConfigError::Port(_))), "{port}");
        }
        for json in [
            r#"{"Cmd":["a\u0000b"]}"#,
            r#"{"Entrypoint":["\u0000"]}"#,
            r#"{"Env":["A=\u0000"]}"#,
            r#"{"WorkingDir":"/\u0000"}"#,
        ] {
            assert!(matches!(checked(json), Err(ConfigError::Nul(_))), "{json}");
        }
        assert!(matches!(
            checked(r#"{"StopSignal":"SIGNONE"}"#),
            Err(ConfigError::Signal(_))
        ));
        assert!(matches!(
            checked(r#"{"User":"nobody-here"}"#),
            Err(ConfigError::User(_))
        ));
    }
}
