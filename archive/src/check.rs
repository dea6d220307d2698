//! All zips of a function, its own and its layers, as they come in.

use std::io::{Read, Seek};

use crate::archive::{Archive, Limits, Size};
use crate::error::ArchiveError;
use crate::handler;

/// Why the zips of a function were refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// Something is wrong with its own.
    #[error(transparent)]
    Code(#[from] ArchiveError),
    /// Something is wrong with a layer.
    #[error("layer {number}: {source}")]
    Layer {
        /// Which, from 1.
        number: usize,
        /// What.
        source: ArchiveError,
    },
    /// With this layer they are too large together.
    #[error(
        "with layer {number} the function unpacks to more than {} MiB or {} files and folders",
        limits.unzipped_bytes >> 20, limits.entries
    )]
    TooLarge {
        /// Which, from 1.
        number: usize,
        /// The most that all may be together.
        limits: Limits,
    },
}

/// What the zips of a function unpack to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// The content of all of them in bytes.
    pub bytes: u64,
    /// What each takes when it is unpacked, the function's own first.
    pub sizes: Vec<Size>,
}

/// Reads a function's own zip and its layers whole and checks them, and that its runtime finds what it starts; answers with
/// what they unpack to. Nothing is written. Blocks.
///
/// # Errors
///
/// [`CheckError`], for the first thing that is wrong.
pub fn check<R: Read + Seek>(
    code: R,
    layers: impl IntoIterator<Item = R>,
    runtime: &str,
    handler: &str,
    limits: Limits,
) -> Result<Checked, CheckError> {
    let mut code = Archive::open(code, limits)?;
    let mut left = limits.less(&code);
    let mut opened = Vec::new();
    for (number, layer) in (1..).zip(layers) {
        let layer = Archive::open(layer, left).map_err(|source| match source.is_size() {
            true => CheckError::TooLarge { number, limits },
            false => CheckError::Layer { number, source },
        })?;
        left = left.less(&layer);
        opened.push(layer);
    }
    let trees: Vec<_> = opened.iter().map(Archive::tree).collect();
    handler::check(code.tree(), &trees, runtime, handler).map_err(ArchiveError::from)?;
    let sizes = std::iter::once(code.size())
        .chain(opened.iter().map(Archive::size))
        .collect();
    let mut bytes = code.read_through()?;
    for (number, layer) in (1..).zip(&mut opened) {
        bytes += layer
            .read_through()
            .map_err(|source| CheckError::Layer { number, source })?;
    }
    Ok(Checked { bytes, sizes })
}
