//! Messages as JSON: protobuf's own mapping, as grpcurl prints it.

use std::sync::LazyLock;

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};
use serde_json::Value;

/// Why a message has no JSON. Only a name that the protos don't have leads to it.
#[derive(Debug, thiserror::Error)]
pub enum JsonError {
    /// The descriptors built into the program are damaged or have no such message.
    #[error("there is no message stoker.v1.{0}")]
    Unknown(&'static str),
    /// The message is not of the type named.
    #[error("can't read the message as stoker.v1.{name}: {source}")]
    Decode {
        /// The type.
        name: &'static str,
        /// The underlying error.
        source: prost::DecodeError,
    },
    /// A value that JSON has no form for, as a time outside the years 1 to 9999.
    #[error("can't write stoker.v1.{name} as JSON: {source}")]
    Write {
        /// The type.
        name: &'static str,
        /// The underlying error.
        source: serde_json::Error,
    },
}

static POOL: LazyLock<Option<DescriptorPool>> =
    LazyLock::new(|| DescriptorPool::decode(stoker_proto::FILE_DESCRIPTOR_SET).ok());

/// A message of the package `stoker.v1` as JSON; `name` is its type within the package.
///
/// # Errors
///
/// [`JsonError`].
pub fn of(name: &'static str, message: &impl Message) -> Result<Value, JsonError> {
    let descriptor = POOL
        .as_ref()
        .and_then(|pool| pool.get_message_by_name(&format!("stoker.v1.{name}")))
        .ok_or(JsonError::Unknown(name))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(|source| JsonError::Decode { name, source })?;
    serde_json::to_value(&dynamic).map_err(|source| JsonError::Write { name, source })
}

#[cfg(test)]
mod tests {
    use stoker_proto::v1;

    use super::*;

    #[test]
    fn messages_have_protobufs_own_json() {
        let machine = v1::Machine {
            name: "machines/01".into(),
            state: v1::machine::State::Booting.into(),
            boot_duration: Some(prost_types::Duration {
                seconds: 1,
                nanos: 500_000_000,
            }),
            usage: Some(v1::Usage {
                cpu_ns: 7,
                ..Default::default()
            }),
            ..Default::default()
        };
        assert_eq!(
            of("Machine", &machine).unwrap(),
            serde_json::json!({
                "name": "machines/01", "state": "BOOTING", "bootDuration": "1.500s", "usage": {"cpuNs": "7"}
            })
        );
        assert!(of("Nothing", &machine).is_err());
    }
}
