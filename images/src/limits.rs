//! How much an image may be.

/// What an image may be at most; more is refused as soon as it is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that all layers unpack to, with what later ones hide; and about as many before that, or layers of nothing could be
    /// read for hours.
    pub unpacked: u64,
    /// Bytes that it takes as it is kept: its files as erofs, which has them in blocks, and how it is run.
    pub size: u64,
    /// Files, folders and links of all layers, with folders that are only implied.
    pub entries: usize,
    /// Layers.
    pub layers: usize,
    /// Bytes of all names, targets of links, and extended attributes: they are kept in memory during an import. An
    /// attribute counts as 128 more than it has, for that is what keeping it takes.
    pub names: u64,
    /// Bytes of a manifest, an index, or a configuration.
    pub document: u64,
}

/// A limit that an image is beyond.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Exceeded {
    /// [`Limits::unpacked`]
    #[error("it unpacks to more than {} MiB", .0 >> 20)]
    Unpacked(u64),
    /// [`Limits::size`]
    #[error("it takes more than {} MiB as it is kept", .0 >> 20)]
    Size(u64),
    /// [`Limits::entries`]
    #[error("it has more than {0} files and folders")]
    Entries(usize),
    /// [`Limits::layers`]
    #[error("it has more than {0} layers")]
    Layers(usize),
    /// [`Limits::names`]
    #[error("its names, links and extended attributes take more than {} MiB", .0 >> 20)]
    Names(u64),
    /// [`Limits::document`]
    #[error("it has a manifest or configuration of more than {} KiB", .0 >> 10)]
    Document(u64),
    /// An extended header of a tar is longer than this many bytes.
    #[error("it has a tar header of more than {} KiB", .0 >> 10)]
    Header(u64),
    /// Its paths lead through too many folders and links, or its whiteouts over too many files, to be followed.
    #[error("its links and whiteouts lead over too much")]
    Work,
}

// === impl Limits ===

impl Default for Limits {
    /// 10 GiB as for AWS Lambda's container images, and for their blocks half as much more, 127 layers as Docker has it, and manifests of 4 MiB, which the OCI
    /// distribution specification wants registries to take at least.
    fn default() -> Self {
        Self {
            unpacked: 10 << 30,
            size: 15 << 30,
            entries: 500_000,
            layers: 127,
            names: 256 << 20,
            document: 4 << 20,
        }
    }
}
