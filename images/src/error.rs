//! What can be wrong with an image.

use std::{io, path::PathBuf};

use crate::{
    config::ConfigError,
    digest::{Digest, DigestError},
    limits::Exceeded,
    registry::RegistryError,
};

/// Why an image was not imported, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The host could not do it: nothing is said of the image.
    #[error("can't {what}: {source}")]
    Io {
        /// What it could not do.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither kind of image lies there.
    #[error(
        "{} is not an image: {why}; an OCI image layout (a folder or a tar of it), what `docker save` writes, or a tar of \
         a root file system can be imported", path.display()
    )]
    NotAnImage {
        /// Where it was looked for.
        path: PathBuf,
        /// What lies there.
        why: String,
    },
    /// Something that the image names is not in it.
    #[error("the image is not whole: it names {0:?} and does not have it")]
    Missing(String),
    /// A manifest, an index or a configuration can't be read.
    #[error("{what} of the image is damaged: {source}")]
    Document {
        /// Which of them.
        what: String,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// Other bytes than the image says.
    #[error("{what} of the image is damaged: its digest should be {expected} and is {found}")]
    Digest {
        /// What is damaged.
        what: String,
        /// The digest that it is named by.
        expected: Digest,
        /// The one that it has.
        found: Digest,
    },
    /// More or fewer bytes than the image says.
    #[error("{what} of the image is damaged: it should have {expected} bytes and has {found}")]
    Size {
        /// What is damaged.
        what: String,
        /// The size that the image says, in bytes.
        expected: u64,
        /// The one that was found, in bytes.
        found: u64,
    },
    /// By another algorithm, or no digest at all.
    #[error("the image names something by what is no digest that is supported: {0}")]
    DigestName(#[from] DigestError),
    /// What it is made of is not known here.
    #[error("{what} of the image is of the kind {media_type:?}, which is not supported")]
    MediaType {
        /// Which part.
        what: String,
        /// Its media type.
        media_type: String,
    },
    /// Made for other processors or another system.
    #[error("the image is for {}; this host runs linux/amd64", found.join(", "))]
    Platform {
        /// What it is for.
        found: Vec<String>,
    },
    /// There are more images than one, and none is named.
    #[error("there are several images ({}); say which of them", names.join(", "))]
    Several {
        /// Their names, or digests where they have none.
        names: Vec<String>,
    },
    /// None of the images there has the name.
    #[error("there is no image {wanted:?} in it; there is {}", names.join(", "))]
    NoSuchImage {
        /// The name that was asked for.
        wanted: String,
        /// Those that are there.
        names: Vec<String>,
    },
    /// An index of indexes of indexes.
    #[error("the image has indexes in indexes, more than {0} deep")]
    Nested(usize),
    /// More of something than [`Limits`](crate::Limits) allow.
    #[error("the image is too large: {0}")]
    Limit(#[from] Exceeded),
    /// Neither plain nor compressed as images may be, or damaged.
    #[error("{what} of the image can't be decompressed: {source}")]
    Compression {
        /// What is damaged.
        what: String,
        /// What is wrong.
        source: io::Error,
    },
    /// The configuration tells of another number of layers than there are.
    #[error("the image has {layers} layers and its configuration names {diff_ids}")]
    LayerCount {
        /// In its manifest.
        layers: usize,
        /// In its configuration.
        diff_ids: usize,
    },
    /// The tar that the image is in.
    #[error("the image's tar: {0}")]
    Tar(#[source] TarError),
    /// Something is wrong in a layer.
    #[error("layer {number} of the image: {source}")]
    Layer {
        /// Counted from 1, the lowest.
        number: usize,
        /// What is wrong.
        source: LayerError,
    },
    /// Its configuration can't be meant.
    #[error("the image's configuration: {0}")]
    Config(#[from] ConfigError),
    /// It could not be pulled.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A name under which no image can be kept.
    #[error(
        "{0:?} can't be an image's name: 1 to 200 letters, digits, `.`, `_`, `-`, `:` and `/`, the first a letter or digit"
    )]
    Name(String),
    /// Without their names, images can't be told from those that were deleted.
    #[error(
        "{} is missing, and there are images in {}; nothing is removed: put the names back, or remove the images to begin anew",
        names.display(),
        images.display()
    )]
    NamesLost {
        /// The folder of names.
        names: PathBuf,
        /// That of images.
        images: PathBuf,
    },
    /// Files of an image that is kept are missing.
    #[error("the image {0:?} is damaged where it is kept; import or pull it again, or remove it")]
    Damaged(String),
    /// No image has the name.
    #[error("there is no image {0:?}")]
    NotFound(String),
}

/// Why a tar can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The host could not read it.
    #[error("can't read it: {0}")]
    Io(#[source] io::Error),
    /// It ends too early.
    #[error("it is cut short")]
    Truncated,
    /// A header has what can't be.
    #[error("it has a damaged header ({0})")]
    Header(&'static str),
    /// A file with holes: how large it becomes does not show in the tar.
    #[error("{} is stored as a sparse file; make the tar without `--sparse`", show(.0))]
    Sparse(Vec<u8>),
    /// Too long a header.
    #[error(transparent)]
    Limit(#[from] Exceeded),
}

/// Why a layer, or a root file system as a tar, was refused. Paths are bytes: they need not be UTF-8.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The tar itself.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// More than [`Limits`](crate::Limits) allow.
    #[error(transparent)]
    Limit(#[from] Exceeded),
    /// `..` in a path.
    #[error("{} has `..` in its path", show(.0))]
    Parent(Vec<u8>),
    /// No file system takes the name.
    #[error("{} has too long or too deep a path, or a NUL in it", show(.0))]
    Path(Vec<u8>),
    /// Below a file.
    #[error("{} lies below something that is not a folder", show(.0))]
    BelowFile(Vec<u8>),
    /// Links that lead in a circle, or over too many others.
    #[error("{} lies behind too many symbolic links", show(.0))]
    Loop(Vec<u8>),
    /// The root is something else than a folder.
    #[error("the root is not a folder")]
    Root,
    /// A device outside of `/dev`.
    #[error("{} is a device; only those in /dev are left out", show(.0))]
    Device(Vec<u8>),
    /// Neither file, folder, link nor pipe.
    #[error("{} is of a kind that is not supported ({:?})", show(path), char::from(*kind))]
    Kind {
        /// The path.
        path: Vec<u8>,
        /// The type in its header.
        kind: u8,
    },
    /// A symbolic link to nothing, or to what is longer than a path can be.
    #[error("{} is a symbolic link whose target is empty, too long, or has a NUL", show(.0))]
    Target(Vec<u8>),
    /// A hard link with `..` in its target.
    #[error("{} is a hard link that leads out of the image, to {}", show(path), show(target))]
    HardLinkOut {
        /// The path.
        path: Vec<u8>,
        /// The target.
        target: Vec<u8>,
    },
    /// A hard link to nothing or to a folder.
    #[error(
        "{} is a hard link to {}, which is not a file of the image",
        show(path),
        show(target)
    )]
    HardLink {
        /// The path.
        path: Vec<u8>,
        /// The target.
        target: Vec<u8>,
    },
    /// A whiteout of nothing, of `.` or of `..`.
    #[error("{} is a whiteout that names no file", show(.0))]
    Whiteout(Vec<u8>),
    /// Longer than a file system takes.
    #[error("{} has an extended attribute that is too long", show(.0))]
    Xattr(Vec<u8>),
}

// === impl ImageError ===

impl ImageError {
    /// What makes this of an error of the host.
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what: what.into(),
            source,
        }
    }

    /// A tar that is no layer.
    pub(crate) fn tar(error: TarError) -> Self {
        match error {
            TarError::Limit(exceeded) => Self::Limit(exceeded),
            TarError::Io(source) => Self::io("read the image")(source),
            other => Self::Tar(other),
        }
    }

    /// A layer, counted from 0.
    pub(crate) fn layer(index: usize, error: LayerError) -> Self {
        match error {
            LayerError::Limit(exceeded) | LayerError::Tar(TarError::Limit(exceeded)) => Self::Limit(exceeded),
            LayerError::Tar(TarError::Io(source)) => Self::io("read a layer of the image")(source),
            source => Self::Layer {
                number: index + 1,
                source,
            },
        }
    }

    /// Whether the host is at fault, rather than the image or who named it.
    pub fn is_of_the_host(&self) -> bool {
        matches!(self, Self::Io { .. } | Self::NamesLost { .. } | Self::Damaged(_))
    }
}

/// A path as people are shown it: in quotes, and escaped where it is not text.
fn show(path: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(path))
}
