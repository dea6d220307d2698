//! Container images: imported from files ([`Store::import`]) or pulled from a registry ([`Store::fetch`]), checked, and kept
//! as erofs, one file an image, with how it is run ([`Config`]) beside it.
//!
//! An image is somebody else's, and hostile: nothing that it says is believed before it was checked, and its [`Limits`] hold
//! while it is read. Nothing of it is unpacked on the host. Its layers are laid over one another in memory (`tree.rs`), their
//! content stays in files that have no name (`spool.rs`), and what comes of it is written as erofs, which a guest's kernel
//! reads (`erofs.rs`). So no external program is needed for it, and nothing is left behind by what fails.
//!
//! What an image has is kept as it is: owners, modes with set-user-ID and set-group-ID, times, hard links, pipes, names that
//! are not UTF-8, and symbolic links, wherever they lead: only a container follows them, in its own root. Of extended
//! attributes those are kept that a container may rely on: `security.capability` and `user.*`. Devices in `/dev` are left
//! out, for a container has its own; elsewhere they are refused.

mod config;
mod digest;
mod erofs;
mod error;
mod import;
mod limits;
mod manifest;
mod registry;
mod signal;
mod source;
mod spool;
mod store;
mod tar;
mod tree;

pub use config::{Config, ConfigError, Port, Protocol};
pub use digest::{Digest, DigestError};
pub use error::{ImageError, LayerError, TarError};
pub use limits::{Exceeded, Limits};
pub use registry::{Credentials, Progress, RegistryError, registry_of};
pub use stoker_linux::users::{User, UserError};
pub use store::{Fetched, Image, Named, Store, Swept, Usage};
