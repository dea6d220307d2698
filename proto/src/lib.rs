//! The protocols of Stoker, generated from the `.proto` files beside this crate: the public API (`stoker.v1`), what
//! the agent says to a VMM (`stoker.vmm.v1`) and to a guest (`stoker.guest.v1`). The `.proto` files are the
//! documentation.

pub mod excerpt;
pub mod limits;
mod log_lines;
pub mod runtimes;
pub mod scratch;

#[allow(missing_docs, unreachable_pub, clippy::all, clippy::indexing_slicing)]
/// The packages, as they are named.
pub mod stoker {
    /// The public API.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/stoker.v1.rs"));
    }
    /// The control socket of a VMM.
    pub mod vmm {
        #[allow(missing_docs)]
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/stoker.vmm.v1.rs"));
        }
    }
    /// The agent's calls into a guest.
    pub mod guest {
        #[allow(missing_docs)]
        pub mod v1 {
            include!(concat!(env!("OUT_DIR"), "/stoker.guest.v1.rs"));
        }
    }
}

pub use stoker::{guest::v1 as guest, v1, vmm::v1 as vmm};

/// Every file above as an encoded `FileDescriptorSet`, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/stoker_descriptor.bin"));
