//! Writes a tree as an erofs image, uncompressed, in one pass over its content.
//!
//! The format is the kernel's (`fs/erofs/erofs_fs.h`, Documentation/filesystems/erofs.rst): a superblock, then all inodes
//! with what lies in them, then blocks of content. Every inode is an extended one, so that owners of 32 bits and times are
//! kept; extended attributes are inline, and so is the last part of a content where it is short. The same tree gives the same
//! bytes.

use std::{
    fs::File,
    io::{self, BufWriter, Write as _},
    os::unix::fs::FileExt as _,
};

use crate::tree::{Content, Folder, Kind, Meta, Node, NodeId, Tree};

/// Bytes of a block, as its binary logarithm.
const BLOCK_BITS: u8 = 12;
const BLOCK: u64 = 1 << BLOCK_BITS;
const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 128;
/// `EROFS_FEATURE_COMPAT_MTIME`: times are those of modification.
const COMPAT_MTIME: u32 = 2;
/// Inodes are named by their place in units of this many bytes.
const SLOT: u64 = 32;
const INODE_SIZE: u64 = 64;
const DIRENT_SIZE: usize = 12;
const XATTR_HEADER_SIZE: usize = 12;
/// Content of up to this many bytes, or what is left of longer content after whole blocks, lies beside its inode. Of more
/// than half a block, less would be saved than is lost where it does not fit into the block that its inode begins in.
const MAX_INLINE: u64 = BLOCK / 2;
const PLAIN: u16 = 0;
const INLINE: u16 = 2;
const FOLDER: u8 = 2;

/// What erofs can't say.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Larger than it may be, or than erofs can be, which is no less than an image's files may take by default.
    #[error("the image is too large")]
    TooLarge,
}

/// Where an inode is and what belongs to it.
#[derive(Clone, Copy)]
struct Place {
    id: NodeId,
    /// In bytes from the start of the image.
    at: u64,
    /// Of the inode with its attributes.
    size: u64,
    /// Bytes of content.
    content: u64,
    layout: u16,
    /// What folders say that it is (`EROFS_FT_*`).
    kind: u8,
    /// The first block of content.
    block: u32,
}

struct Layout {
    /// In the order in which they are written.
    places: Vec<Place>,
    /// The index in `places` by the node's own; `u32::MAX` where it has none.
    by_node: Vec<u32>,
    /// The first block behind all inodes, and the first behind all.
    content: u64,
    end: u64,
}

// === impl Layout ===

impl Layout {
    fn of(tree: &Tree) -> Result<Self, WriteError> {
        let mut layout = Self {
            places: Vec::new(),
            by_node: vec![u32::MAX; tree.len()],
            content: 0,
            end: 0,
        };
        // The root comes first: the superblock has 16 bits for where it is.
        let mut at = SUPERBLOCK_AT + SUPERBLOCK_SIZE as u64;
        let mut todo = vec![Tree::ROOT];
        while let Some(id) = todo.pop() {
            let index = u32::try_from(layout.places.len()).map_err(|_| WriteError::TooLarge)?;
            // A file that has several names comes several times.
            match (tree.node(id), layout.by_node.get_mut(id.index())) {
                (Some(node), Some(known)) if *known == u32::MAX => {
                    *known = index;
                    let place = Place::of(id, node, at)?;
                    at = place.end();
                    layout.places.push(place);
                    if let Kind::Folder(folder) = &node.kind {
                        todo.extend(folder.children.values().rev().map(|child| child.node));
                    }
                }
                _ => {}
            }
        }
        layout.content = at.div_ceil(BLOCK);
        layout.end = layout.content;
        for place in &mut layout.places {
            place.block = u32::try_from(layout.end).map_err(|_| WriteError::TooLarge)?;
            layout.end += place.blocks();
        }
        Ok(layout)
    }

    fn place(&self, id: NodeId) -> Option<&Place> {
        let index = usize::try_from(*self.by_node.get(id.index())?).ok()?;
        self.places.get(index)
    }

    /// What names a node in the image.
    fn nid(&self, id: NodeId) -> u64 {
        self.place(id).map_or(0, |place| place.at / SLOT)
    }

    /// What folders say that a node is.
    fn kind(&self, id: NodeId) -> u8 {
        self.place(id).map_or(0, |place| place.kind)
    }
}

// === impl Place ===

impl Place {
    /// Places an inode at or behind `from`.
    fn of(id: NodeId, node: &Node, from: u64) -> Result<Self, WriteError> {
        let size = INODE_SIZE + xattrs_size(&node.meta) as u64;
        let (kind, content) = match &node.kind {
            Kind::File(content) => (1, content.size),
            Kind::Folder(folder) => (FOLDER, folder_size(folder)),
            Kind::Pipe => (5, 0),
            Kind::Link(target) => (7, target.len() as u64),
        };
        let tail = content % BLOCK;
        let layout = if (1..=MAX_INLINE).contains(&tail) && size + tail <= BLOCK {
            INLINE
        } else {
            PLAIN
        };
        let mut at = from.next_multiple_of(SLOT);
        // What is inline lies in one block.
        if layout == INLINE && (at + size) % BLOCK + tail > BLOCK {
            at = at.next_multiple_of(BLOCK);
        }
        if content > u64::from(u32::MAX) * BLOCK {
            return Err(WriteError::TooLarge);
        }
        Ok(Self {
            id,
            at,
            size,
            content,
            layout,
            kind,
            block: 0,
        })
    }

    fn inline(&self) -> u64 {
        if self.layout == INLINE { self.content % BLOCK } else { 0 }
    }

    fn blocks(&self) -> u64 {
        if self.layout == INLINE {
            self.content / BLOCK
        } else {
            self.content.div_ceil(BLOCK)
        }
    }

    /// Where it ends in the inodes' part.
    fn end(&self) -> u64 {
        self.at + self.size + self.inline()
    }
}

/// Writes the image, of at most `limit` bytes, into an empty file. Files' content is read from the files of the layers that
/// they say; `uuid` is what the image calls itself.
pub(crate) fn write(tree: &Tree, layers: &[File], uuid: [u8; 16], limit: u64, to: &mut File) -> Result<(), WriteError> {
    let layout = Layout::of(tree)?;
    if layout.end * BLOCK > limit {
        return Err(WriteError::TooLarge);
    }
    let mut out = Out {
        to: BufWriter::with_capacity(1 << 18, to),
        at: 0,
    };
    out.fill(SUPERBLOCK_AT)?;
    out.write(&superblock(&layout, uuid)?)?;
    for place in &layout.places {
        let Some(node) = tree.node(place.id) else { continue };
        out.fill(place.at)?;
        out.write(&inode(&layout, place, node))?;
        out.write(&xattrs(&node.meta))?;
        let skipped = place.content - place.inline();
        out.content(&layout, node, place, layers, skipped..place.content)?;
    }
    for place in &layout.places {
        let Some(node) = tree.node(place.id) else { continue };
        out.fill(if place.blocks() == 0 {
            out.at
        } else {
            u64::from(place.block) * BLOCK
        })?;
        out.content(&layout, node, place, layers, 0..place.content - place.inline())?;
    }
    out.fill(layout.end * BLOCK)?;
    out.to.flush()?;
    Ok(())
}

struct Out<'a> {
    to: BufWriter<&'a mut File>,
    at: u64,
}

// === impl Out ===

impl Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    /// Zeros up to a place.
    fn fill(&mut self, up_to: u64) -> io::Result<()> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while self.at < up_to {
            let count = usize::try_from(up_to - self.at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            self.write(ZEROS.get(..count).unwrap_or(&ZEROS))?;
        }
        Ok(())
    }

    /// A part of what a node contains.
    fn content(
        &mut self,
        layout: &Layout,
        node: &Node,
        place: &Place,
        layers: &[File],
        range: std::ops::Range<u64>,
    ) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        match &node.kind {
            Kind::File(content) => self.file(*content, layers, range),
            Kind::Folder(folder) => {
                let bytes = folder_bytes(layout, folder, place.id);
                self.write(part(&bytes, range))
            }
            Kind::Link(target) => self.write(part(target, range)),
            Kind::Pipe => Ok(()),
        }
    }

    fn file(&mut self, content: Content, layers: &[File], range: std::ops::Range<u64>) -> io::Result<()> {
        let layer = layers.get(content.layer).ok_or(io::ErrorKind::NotFound)?;
        let mut buffer = vec![0; 1 << 16];
        let mut at = range.start;
        while at < range.end {
            let most = usize::try_from(range.end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            let part = buffer.get_mut(..most).unwrap_or_default();
            layer.read_exact_at(part, content.offset + at)?;
            at += part.len() as u64;
            self.write(part)?;
        }
        Ok(())
    }
}

fn part(bytes: &[u8], range: std::ops::Range<u64>) -> &[u8] {
    let [start, end] = [range.start, range.end].map(|at| usize::try_from(at).unwrap_or(usize::MAX));
    bytes.get(start..end).unwrap_or_default()
}

/// `struct erofs_super_block`
fn superblock(layout: &Layout, uuid: [u8; 16]) -> Result<Vec<u8>, WriteError> {
    let too_large = |_| WriteError::TooLarge;
    let root = u16::try_from(layout.nid(Tree::ROOT)).map_err(too_large)?;
    let blocks = u32::try_from(layout.end).map_err(too_large)?;
    let mut bytes = Bytes::default();
    bytes.u32(MAGIC);
    // No check sum: the feature that says that there is one is not set.
    bytes.u32(0);
    bytes.u32(COMPAT_MTIME);
    bytes.extend(&[BLOCK_BITS, 0]);
    bytes.u16(root);
    bytes.u64(layout.places.len() as u64);
    // The time that the image was made, s and ns: none, so that equal images have equal bytes.
    bytes.u64(0);
    bytes.u32(0);
    bytes.u32(blocks);
    // Where inodes and shared attributes begin, in blocks.
    bytes.u32(0);
    bytes.u32(0);
    bytes.extend(&uuid);
    bytes.0.resize(SUPERBLOCK_SIZE, 0);
    Ok(bytes.0)
}

/// `struct erofs_inode_extended`
fn inode(layout: &Layout, place: &Place, node: &Node) -> Vec<u8> {
    let Meta {
        mode, uid, gid, mtime, ..
    } = &node.meta;
    let (kind, links) = match &node.kind {
        Kind::Folder(folder) => {
            let children = folder.children.values().map(|child| child.node);
            // Its own `.` and name, and `..` of those in it.
            let folders = children.filter(|id| layout.kind(*id) == FOLDER).count();
            (
                nix::libc::S_IFDIR,
                u32::try_from(folders).unwrap_or(u32::MAX).saturating_add(2),
            )
        }
        Kind::File(_) => (nix::libc::S_IFREG, node.links),
        Kind::Link(_) => (nix::libc::S_IFLNK, node.links),
        Kind::Pipe => (nix::libc::S_IFIFO, node.links),
    };
    let mode = if matches!(node.kind, Kind::Link(_)) {
        0o777
    } else {
        u32::from(*mode)
    };
    let xattrs = xattrs_size(&node.meta);
    // In words behind the header, which counts as one; 0 where there is none.
    let xattr_words = if xattrs == 0 {
        0
    } else {
        (xattrs - XATTR_HEADER_SIZE) / 4 + 1
    };
    let number = layout.by_node.get(place.id.index()).map_or(0, |index| index + 1);
    let mut bytes = Bytes::default();
    // Its lowest bit says that it is an extended one.
    bytes.u16(1 | place.layout << 1);
    bytes.u16(u16::try_from(xattr_words).unwrap_or_default());
    bytes.u16(u16::try_from(kind | mode).unwrap_or_default());
    bytes.u16(0);
    bytes.u64(place.content);
    bytes.u32(place.block);
    bytes.u32(number);
    bytes.u32(*uid);
    bytes.u32(*gid);
    bytes.u64(mtime.0.cast_unsigned());
    bytes.u32(mtime.1);
    bytes.u32(links);
    bytes.0.resize(usize::try_from(INODE_SIZE).unwrap_or_default(), 0);
    bytes.0
}

/// The index in erofs of what a name begins with, and the rest of the name.
fn short_name(name: &[u8]) -> (u8, &[u8]) {
    match (name.strip_prefix(b"user."), name.strip_prefix(b"security.")) {
        (Some(rest), _) => (1, rest),
        (_, Some(rest)) => (6, rest),
        _ => (0, name),
    }
}

/// Of an inode's attributes, in bytes.
fn xattrs_size(meta: &Meta) -> usize {
    let entries = meta.xattrs.iter();
    let size: usize = entries
        .map(|(name, value)| (4 + short_name(name).1.len() + value.len()).next_multiple_of(4))
        .sum();
    if size == 0 { 0 } else { XATTR_HEADER_SIZE + size }
}

/// `struct erofs_xattr_ibody_header`, and after it `struct erofs_xattr_entry` for each.
fn xattrs(meta: &Meta) -> Vec<u8> {
    if meta.xattrs.is_empty() {
        return Vec::new();
    }
    let mut bytes = Bytes(vec![0; XATTR_HEADER_SIZE]);
    for (name, value) in &meta.xattrs {
        let (index, rest) = short_name(name);
        bytes.extend(&[u8::try_from(rest.len()).unwrap_or_default(), index]);
        bytes.u16(u16::try_from(value.len()).unwrap_or_default());
        bytes.extend(rest);
        bytes.extend(value);
        bytes.0.resize(bytes.0.len().next_multiple_of(4), 0);
    }
    bytes.0
}

/// All names of a folder in the order of their bytes, with `.` and `..`, by blocks.
fn folder_blocks(folder: &Folder) -> Vec<Vec<&[u8]>> {
    let mut names: Vec<&[u8]> = folder.children.keys().map(|name| &**name).collect();
    names.extend([&b"."[..], b".."]);
    names.sort_unstable();
    let mut blocks = vec![Vec::new()];
    let mut used = 0;
    for name in names {
        let size = DIRENT_SIZE + name.len();
        if used + size > usize::try_from(BLOCK).unwrap_or_default() {
            blocks.push(Vec::new());
            used = 0;
        }
        used += size;
        if let Some(block) = blocks.last_mut() {
            block.push(name);
        }
    }
    blocks
}

/// Bytes of a folder's content: all blocks are whole but the last.
fn folder_size(folder: &Folder) -> u64 {
    let blocks = folder_blocks(folder);
    let last: usize = blocks
        .last()
        .map_or(0, |names| names.iter().map(|name| DIRENT_SIZE + name.len()).sum());
    (blocks.len() as u64 - 1) * BLOCK + last as u64
}

/// `struct erofs_dirent` for each name of a block, then its names; the next block.
fn folder_bytes(layout: &Layout, folder: &Folder, id: NodeId) -> Vec<u8> {
    let mut bytes = Bytes::default();
    for names in folder_blocks(folder) {
        bytes
            .0
            .resize(bytes.0.len().next_multiple_of(usize::try_from(BLOCK).unwrap_or(1)), 0);
        let mut name_at = names.len() * DIRENT_SIZE;
        for name in &names {
            let target = match *name {
                b"." => id,
                b".." => folder.parent(),
                name => folder.children.get(name).map_or(id, |child| child.node),
            };
            bytes.u64(layout.nid(target));
            bytes.u16(u16::try_from(name_at).unwrap_or_default());
            bytes.extend(&[layout.kind(target), 0]);
            name_at += name.len();
        }
        for name in names {
            bytes.extend(name);
        }
    }
    bytes.0
}

/// Numbers, lowest byte first.
#[derive(Default)]
struct Bytes(Vec<u8>);

// === impl Bytes ===

impl Bytes {
    fn u16(&mut self, value: u16) {
        self.extend(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.extend(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend(&value.to_le_bytes());
    }

    fn extend(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }
}
