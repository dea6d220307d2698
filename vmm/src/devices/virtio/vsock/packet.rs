//! The header of a vsock packet (`struct virtio_vsock_hdr`, virtio 1.3, 5.10.6).
//!
//! rust-vmm's `virtio-vsock` has one too, but its packets must lie in one or two descriptors, and Linux since 6.7 sends
//! zero-copy packets in more. So headers are read through [`Buffers`](crate::devices::virtio::buffers::Buffers), which take any framing.

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's context id (virtio 1.3, 5.10.4).
pub const HOST_CID: u64 = 2;
/// `VIRTIO_VSOCK_TYPE_STREAM`, the only type offered.
pub const TYPE_STREAM: u16 = 1;

/// Operations (virtio 1.3, 5.10.6).
pub mod op {
    /// Asks for a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts one.
    pub const RESPONSE: u16 = 2;
    /// Refuses or ends one at once.
    pub const RST: u16 = 3;
    /// Will not receive, or send, any more.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Tells how much room there is.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Asks how much room there is.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// Flags of `SHUTDOWN` (virtio 1.3, 5.10.6.6).
pub mod shutdown {
    /// The sender of the packet will receive no more.
    pub const RECEIVE: u32 = 1;
    /// The sender of the packet will send no more.
    pub const SEND: u32 = 2;
    /// Neither.
    pub const BOTH: u32 = RECEIVE | SEND;
}

/// The header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// Who sends it.
    pub src_cid: u64,
    /// Who is to have it.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// Bytes of payload.
    pub len: u32,
    /// `TYPE_STREAM`.
    pub kind: u16,
    /// One of [`op`].
    pub op: u16,
    /// For `SHUTDOWN`.
    pub flags: u32,
    /// Bytes that the sender can hold for this connection.
    pub buf_alloc: u32,
    /// Bytes that the sender has passed on since the connection began, modulo 2^32.
    pub fwd_cnt: u32,
}

// === impl Header ===

impl Header {
    /// As it is in memory: little-endian, packed.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (to, from) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *to = *from;
        }
        bytes
    }

    /// The inverse of [`Header::to_bytes`]; every pattern of bits is a header.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = bytes.iter().copied();
        let mut take = |count: u32| {
            (0..count).fold(0u64, |value, index| {
                value | u64::from(rest.next().unwrap_or(0)) << (8 * index)
            })
        };
        Self {
            src_cid: take(8),
            dst_cid: take(8),
            src_port: take(4) as u32,
            dst_port: take(4) as u32,
            len: take(4) as u32,
            kind: take(2) as u16,
            op: take(2) as u16,
            flags: take(4) as u32,
            buf_alloc: take(4) as u32,
            fwd_cnt: take(4) as u32,
        }
    }

    /// The `RST` that answers this packet.
    pub fn reset(&self) -> Self {
        Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_lie_in_memory_as_virtio_says() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1122_3344,
            dst_port: 1024,
            len: 5,
            kind: 1,
            op: op::RW,
            flags: 3,
            buf_alloc: 0xdead_beef,
            fwd_cnt: 7,
        };
        let bytes = header.to_bytes();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[16..20], [0x44, 0x33, 0x22, 0x11]);
        assert_eq!(bytes[24..32], [5, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[36..40], [0xef, 0xbe, 0xad, 0xde]);
        assert_eq!(Header::from_bytes(&bytes), header);
    }
}
