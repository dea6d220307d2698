//! The files of an image, as its layers lay them over one another: in memory, but for their content.
//!
//! Nothing is unpacked on the host. So no name, link, owner, device or set-user-ID file of an image ever lies in a file
//! system of the host's, and links are followed here, where `/` and `..` end at the image's root.

use std::collections::BTreeMap;

use crate::{
    error::LayerError,
    limits::{Exceeded, Limits},
    tar::{Entry, EntryType},
};

/// The longest path in bytes (`PATH_MAX` less the NUL), which is also the longest target of a symbolic link.
const MAX_PATH: usize = 4095;
/// The longest part of a path in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// The most folders that anything lies below.
const MAX_DEPTH: u16 = 512;
/// The most symbolic links that are followed for one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;
/// The longest name of an extended attribute (`XATTR_NAME_MAX`).
const MAX_XATTR_NAME: usize = 255;
/// What an attribute takes of memory beside its name and value, in bytes: two allocations, and its place in a map.
const XATTR_COST: usize = 128;
/// The most bytes that all attributes of a file may have: below what erofs can say.
const MAX_XATTRS: usize = 128 << 10;
/// How many folders and links, on average, an entry's path may lead through, and its whiteouts over.
const WORK_PER_ENTRY: usize = 64;
/// What the name of a whiteout begins with: the rest names what is hidden of the layers below (OCI image specification,
/// "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Hides all that the layers below have in its folder.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// What AUFS keeps for itself: it never was meant for others.
const AUFS: &[u8] = b".wh..wh.";

/// Where a [`Node`] is in its [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NodeId(usize);

/// The files, folders and links.
pub(crate) struct Tree {
    /// The root first. Those that no folder holds any more stay.
    nodes: Vec<Node>,
    limits: Limits,
    /// Entries so far, of all layers.
    entries: usize,
    /// Bytes of names, targets and attributes so far.
    names: u64,
    /// Folders and links that were gone through so far.
    work: usize,
    /// The layer that is laid over the others, from 0.
    layer: usize,
}

/// A file, folder, link or pipe.
#[derive(Debug)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) meta: Meta,
    /// How many names it has.
    pub(crate) links: u32,
}

/// What every node has.
#[derive(Debug, Default)]
pub(crate) struct Meta {
    /// Permissions with set-user-ID, set-group-ID and sticky.
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// In s since the epoch, and ns after that.
    pub(crate) mtime: (i64, u32),
    /// By their full names.
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Debug)]
pub(crate) enum Kind {
    Folder(Folder),
    File(Content),
    /// A symbolic link to this target, which is kept as it is: only a container follows it, in its own root.
    Link(Box<[u8]>),
    Pipe,
}

#[derive(Debug)]
pub(crate) struct Folder {
    parent: NodeId,
    depth: u16,
    pub(crate) children: BTreeMap<Box<[u8]>, Child>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Child {
    pub(crate) node: NodeId,
    /// The last layer that had it.
    layer: usize,
}

/// Where a file's content lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) layer: usize,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

/// Whether folders on the way are made where there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Leave,
}

// === impl Tree ===

impl Tree {
    pub(crate) const ROOT: NodeId = NodeId(0);

    /// A root that is everybody's to read, and nothing in it.
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            nodes: vec![Node {
                kind: Kind::Folder(Folder::new(Self::ROOT, 0)),
                meta: Meta::of_folder(),
                links: 1,
            }],
            limits,
            entries: 0,
            names: 0,
            work: 0,
            layer: 0,
        }
    }

    /// Says that the entries that follow are of this layer, counted from 0, the lowest.
    pub(crate) fn begin_layer(&mut self, layer: usize) {
        self.layer = layer;
    }

    pub(crate) fn node(&self, id: NodeId) -> Option<&Node> {
        self.nodes.get(id.0)
    }

    /// How many nodes there are, with those that are hidden.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The file at a path of the image once links are followed; none where it is something else or nothing.
    pub(crate) fn file(&mut self, path: &[u8]) -> Option<Content> {
        let id = self.resolve(&parts(path), path, Missing::Leave).ok()??;
        match self.node(id)?.kind {
            Kind::File(content) => Some(content),
            _ => None,
        }
    }

    /// Lays an entry over what there is.
    pub(crate) fn add(&mut self, mut entry: Entry) -> Result<(), LayerError> {
        self.count_entry()?;
        let path = std::mem::take(&mut entry.path);
        let parts = checked(&path)?;
        let Some((name, folders)) = parts.split_last() else {
            return self.set_root(entry, &path);
        };
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.white_out(name, hidden, folders, &path);
        }
        let is_in_dev = matches!(folders, [first, ..] if *first == b"dev");
        let kind = match entry.kind {
            EntryType::Directory => None,
            EntryType::Regular => Some(Kind::File(Content {
                layer: self.layer,
                offset: entry.offset,
                size: entry.size,
            })),
            EntryType::Symlink => Some(Kind::Link(self.target(&entry.link, &path)?)),
            EntryType::Fifo => Some(Kind::Pipe),
            EntryType::Link => return self.hard_link(&entry.link, name, folders, &path),
            // A container has a /dev of its own.
            EntryType::Block | EntryType::Char if is_in_dev => return Ok(()),
            EntryType::Block | EntryType::Char => return Err(LayerError::Device(path)),
            other => {
                let kind = other.as_byte();
                return Err(LayerError::Kind { path, kind });
            }
        };
        let parent = self.parent(folders, &path)?;
        let meta = self.meta(entry, &path)?;
        match kind {
            Some(kind) => {
                let node = self.push(Node { kind, meta, links: 0 });
                self.put(parent, name, node)
            }
            None => self.put_folder(parent, name, meta, &path),
        }
    }

    /// The folder that an entry lies in, made where it is not there.
    fn parent(&mut self, folders: &[&[u8]], path: &[u8]) -> Result<NodeId, LayerError> {
        let below_file = || LayerError::BelowFile(path.to_owned());
        let id = self.resolve(folders, path, Missing::Make)?.ok_or_else(below_file)?;
        self.folder(id).map(|_| id).ok_or_else(below_file)
    }

    fn set_root(&mut self, entry: Entry, path: &[u8]) -> Result<(), LayerError> {
        if entry.kind != EntryType::Directory {
            return Err(LayerError::Root);
        }
        let meta = self.meta(entry, path)?;
        if let Some(root) = self.nodes.get_mut(Self::ROOT.0) {
            root.meta = meta;
        }
        Ok(())
    }

    fn target(&mut self, target: &[u8], path: &[u8]) -> Result<Box<[u8]>, LayerError> {
        if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
            return Err(LayerError::Target(path.to_owned()));
        }
        self.count_names(target.len())?;
        Ok(target.into())
    }

    fn meta(&mut self, entry: Entry, path: &[u8]) -> Result<Meta, LayerError> {
        let wrong = || LayerError::Xattr(path.to_owned());
        let mut xattrs = BTreeMap::new();
        for (name, value) in entry.xattrs {
            if !is_kept(&name) {
                continue;
            }
            if name.len() > MAX_XATTR_NAME || name.contains(&0) || value.len() > usize::from(u16::MAX) {
                return Err(wrong());
            }
            self.count_names(name.len() + value.len() + XATTR_COST)?;
            xattrs.insert(name, value);
        }
        let sizes = xattrs.iter().map(|(name, value)| name.len() + value.len() + 8);
        if sizes.sum::<usize>() > MAX_XATTRS {
            return Err(wrong());
        }
        Ok(Meta {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs,
        })
    }

    /// Another name for a file of this layer or one below. A leading slash is the image's root.
    fn hard_link(&mut self, target: &[u8], name: &[u8], folders: &[&[u8]], path: &[u8]) -> Result<(), LayerError> {
        let parts = match checked(target) {
            Ok(parts) => parts,
            Err(LayerError::Parent(target)) => {
                let path = path.to_owned();
                return Err(LayerError::HardLinkOut { path, target });
            }
            // So long a name is nothing's.
            Err(_) => Vec::new(),
        };
        let found = match parts.split_last() {
            Some((last, parents)) => {
                let folder = self.resolve(parents, path, Missing::Leave)?;
                folder.and_then(|id| self.child(id, last))
            }
            None => None,
        };
        let Some(node) = found
            .map(|child| child.node)
            .filter(|node| self.folder(*node).is_none())
        else {
            let [path, target] = [path, target].map(<[u8]>::to_owned);
            return Err(LayerError::HardLink { path, target });
        };
        let parent = self.parent(folders, path)?;
        self.put(parent, name, node)
    }

    /// Hides what the layers below have under a name, or all that they have in a folder. What is not there needs no hiding:
    /// builders also write whiteouts of what one step made and the next removed.
    fn white_out(&mut self, name: &[u8], hidden: &[u8], folders: &[&[u8]], path: &[u8]) -> Result<(), LayerError> {
        if matches!(hidden, b"" | b"." | b"..") {
            return Err(LayerError::Whiteout(path.to_owned()));
        }
        let Some(folder) = self.resolve(folders, path, Missing::Leave)? else {
            return Ok(());
        };
        if name == OPAQUE {
            self.hide_children(folder)?;
        } else if !name.starts_with(AUFS) {
            self.hide(folder, hidden)?;
        }
        Ok(())
    }

    /// Takes away what a folder has of the layers below; true where nothing is left in it.
    fn hide_children(&mut self, folder: NodeId) -> Result<bool, LayerError> {
        let names: Vec<Box<[u8]>> = match self.folder(folder) {
            Some(folder) => folder.children.keys().cloned().collect(),
            None => return Ok(true),
        };
        let mut is_empty = true;
        for name in names {
            is_empty &= self.hide(folder, &name)?;
        }
        Ok(is_empty)
    }

    /// Takes away a name as far as it is of the layers below; true where it is gone.
    fn hide(&mut self, folder: NodeId, name: &[u8]) -> Result<bool, LayerError> {
        self.count_work(1)?;
        let Some(child) = self.child(folder, name) else {
            return Ok(true);
        };
        let is_emptied = self.hide_children(child.node)?;
        let is_gone = child.layer < self.layer && is_emptied;
        if is_gone {
            self.remove(folder, name);
        }
        Ok(is_gone)
    }

    /// Gives a node a name, in place of what has it.
    fn put(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<(), LayerError> {
        self.count_names(name.len())?;
        // Before anything is taken away, which may be the same node.
        if let Some(node) = self.nodes.get_mut(node.0) {
            node.links += 1;
        }
        self.remove(parent, name);
        let layer = self.layer;
        if let Some(folder) = self.folder_mut(parent) {
            folder.children.insert(name.into(), Child { node, layer });
        }
        Ok(())
    }

    /// A folder of a name: a new one, or the one that is there with other rights.
    fn put_folder(&mut self, parent: NodeId, name: &[u8], meta: Meta, path: &[u8]) -> Result<(), LayerError> {
        let there = self
            .child(parent, name)
            .filter(|child| self.folder(child.node).is_some());
        let Some(child) = there else {
            return self.make_folder(parent, name, meta, path).map(drop);
        };
        if let Some(node) = self.nodes.get_mut(child.node.0) {
            node.meta = meta;
        }
        let layer = self.layer;
        if let Some(child) = self.folder_mut(parent).and_then(|folder| folder.children.get_mut(name)) {
            child.layer = layer;
        }
        Ok(())
    }

    fn make_folder(&mut self, parent: NodeId, name: &[u8], meta: Meta, path: &[u8]) -> Result<NodeId, LayerError> {
        let depth = self.folder(parent).map_or(0, |folder| folder.depth) + 1;
        if depth > MAX_DEPTH {
            return Err(LayerError::Path(path.to_owned()));
        }
        let node = self.push(Node {
            kind: Kind::Folder(Folder::new(parent, depth)),
            meta,
            links: 0,
        });
        self.put(parent, name, node)?;
        Ok(node)
    }

    /// Takes a name away, and all below it.
    fn remove(&mut self, parent: NodeId, name: &[u8]) {
        let removed = self.folder_mut(parent).and_then(|folder| folder.children.remove(name));
        let mut removed: Vec<NodeId> = removed.map(|child| child.node).into_iter().collect();
        while let Some(id) = removed.pop() {
            let Some(node) = self.nodes.get_mut(id.0) else { continue };
            node.links = node.links.saturating_sub(1);
            if let Kind::Folder(folder) = &mut node.kind {
                removed.extend(
                    std::mem::take(&mut folder.children)
                        .into_values()
                        .map(|child| child.node),
                );
            }
        }
    }

    /// Follows a path from the root, links with it, the last one too. None where something on the way is not there.
    fn resolve(&mut self, path: &[&[u8]], whole: &[u8], missing: Missing) -> Result<Option<NodeId>, LayerError> {
        // What is still to be walked, the next part last.
        let mut todo: Vec<Box<[u8]>> = path.iter().rev().map(|part| (*part).into()).collect();
        self.count_work(todo.len())?;
        let mut at = Self::ROOT;
        let mut links = 0;
        while let Some(part) = todo.pop() {
            let Some(folder) = self.folder(at) else {
                return match missing {
                    Missing::Make => Err(LayerError::BelowFile(whole.to_owned())),
                    Missing::Leave => Ok(None),
                };
            };
            at = match &*part {
                b".." => folder.parent,
                name => match (folder.children.get(name).map(|child| child.node), missing) {
                    (Some(node), _) => match self.node(node).map(|node| &node.kind) {
                        Some(Kind::Link(target)) => {
                            links += 1;
                            if links > MAX_LINKS {
                                return Err(LayerError::Loop(whole.to_owned()));
                            }
                            let from = if target.starts_with(b"/") { Self::ROOT } else { at };
                            let parts: Vec<Box<[u8]>> = parts(target).iter().rev().map(|part| (*part).into()).collect();
                            self.count_work(parts.len())?;
                            todo.extend(parts);
                            from
                        }
                        _ => node,
                    },
                    (None, Missing::Leave) => return Ok(None),
                    (None, Missing::Make) => {
                        self.count_entry()?;
                        if name.len() > MAX_NAME {
                            return Err(LayerError::Path(whole.to_owned()));
                        }
                        self.make_folder(at, name, Meta::of_folder(), whole)?
                    }
                },
            };
        }
        Ok(Some(at))
    }

    fn push(&mut self, node: Node) -> NodeId {
        self.nodes.push(node);
        NodeId(self.nodes.len() - 1)
    }

    fn folder(&self, id: NodeId) -> Option<&Folder> {
        match &self.node(id)?.kind {
            Kind::Folder(folder) => Some(folder),
            _ => None,
        }
    }

    fn folder_mut(&mut self, id: NodeId) -> Option<&mut Folder> {
        match &mut self.nodes.get_mut(id.0)?.kind {
            Kind::Folder(folder) => Some(folder),
            _ => None,
        }
    }

    fn child(&self, folder: NodeId, name: &[u8]) -> Option<Child> {
        self.folder(folder)?.children.get(name).copied()
    }

    fn count_entry(&mut self) -> Result<(), Exceeded> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            return Err(Exceeded::Entries(self.limits.entries));
        }
        Ok(())
    }

    fn count_names(&mut self, bytes: usize) -> Result<(), Exceeded> {
        self.names += bytes as u64;
        if self.names > self.limits.names {
            return Err(Exceeded::Names(self.limits.names));
        }
        Ok(())
    }

    fn count_work(&mut self, steps: usize) -> Result<(), Exceeded> {
        self.work += steps;
        if self.work > self.limits.entries.saturating_mul(WORK_PER_ENTRY) {
            return Err(Exceeded::Work);
        }
        Ok(())
    }
}

// === impl Meta, Folder, NodeId ===

impl Meta {
    /// Of a folder that no layer says anything of.
    fn of_folder() -> Self {
        Self {
            mode: 0o755,
            ..Self::default()
        }
    }
}

impl Folder {
    fn new(parent: NodeId, depth: u16) -> Self {
        Self {
            parent,
            depth,
            children: BTreeMap::new(),
        }
    }

    /// The folder that it lies in; of the root itself.
    pub(crate) fn parent(&self) -> NodeId {
        self.parent
    }
}

impl NodeId {
    pub(crate) fn index(self) -> usize {
        self.0
    }
}

/// Whether an extended attribute matters in a container: capabilities of files, and what belongs to users. Others are the
/// builder's (`security.selinux`), or would say something to the overlay that a container writes to.
fn is_kept(name: &[u8]) -> bool {
    name == b"security.capability"
        || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay.") && name != b"user.")
}

/// The parts of a path from the root, as they are.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    path.split(|byte| *byte == b'/')
        .filter(|part| !part.is_empty() && *part != b".")
        .collect()
}

/// The parts of a path that stays inside and that every file system takes. A leading slash is the image's root, as with Docker.
fn checked(path: &[u8]) -> Result<Vec<&[u8]>, LayerError> {
    let parts = parts(path);
    if parts.contains(&&b".."[..]) {
        return Err(LayerError::Parent(path.to_owned()));
    }
    if path.len() > MAX_PATH || path.contains(&0) || parts.iter().any(|part| part.len() > MAX_NAME) {
        return Err(LayerError::Path(path.to_owned()));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests;
