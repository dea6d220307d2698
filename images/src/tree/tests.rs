//! Layers over one another, against a model that knows paths alone; and tars that are damaged anywhere.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test fails by panicking, its helpers too"
)]

use std::{collections::BTreeMap, io::Write as _};

use proptest::prelude::*;

use super::*;
use crate::{
    erofs,
    tar::{Ending, Reader},
};

/// What one entry of a layer does.
#[derive(Debug, Clone)]
enum Step {
    File,
    Folder,
    Hide,
    Opaque,
}

/// What lies at a path, and of which layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Known {
    is_folder: bool,
    layer: usize,
}

#[derive(Default)]
struct Model(BTreeMap<Vec<String>, Known>);

impl Model {
    /// False where the layer is refused.
    fn add(&mut self, layer: usize, step: &Step, path: &[String]) -> bool {
        let is_folder =
            |model: &Self, path: &[String]| path.is_empty() || model.0.get(path).is_some_and(|known| known.is_folder);
        let (name, parent) = path.split_last().unwrap();
        match step {
            Step::File | Step::Folder => {
                for end in 1..path.len() {
                    let known = Known { is_folder: true, layer };
                    if !self.0.entry(path[..end].to_vec()).or_insert(known).is_folder {
                        return false;
                    }
                }
                let is_file = matches!(step, Step::File);
                if is_file || !is_folder(self, path) {
                    self.0.retain(|other, _| !other.starts_with(path));
                }
                let known = Known {
                    is_folder: !is_file,
                    layer,
                };
                self.0.insert(path.to_vec(), known);
            }
            Step::Hide if is_folder(self, parent) => self.hide(layer, parent, |child| child == name),
            Step::Opaque if is_folder(self, path) => self.hide(layer, path, |_| true),
            Step::Hide | Step::Opaque => {}
        }
        true
    }

    fn hide(&mut self, layer: usize, folder: &[String], is_meant: impl Fn(&String) -> bool) {
        let kept: Vec<Vec<String>> = self
            .0
            .iter()
            .filter(|(_, known)| known.layer == layer)
            .map(|(path, _)| path.clone())
            .collect();
        self.0.retain(|path, _| {
            let is_below = path.len() > folder.len() && path.starts_with(folder) && is_meant(&path[folder.len()]);
            !is_below || kept.iter().any(|kept| kept.starts_with(path))
        });
    }
}

fn entry(step: &Step, path: &[String]) -> Entry {
    let (name, parent) = path.split_last().unwrap();
    let path = match step {
        Step::File | Step::Folder => path.join("/"),
        Step::Hide => [parent, &[format!(".wh.{name}")]].concat().join("/"),
        Step::Opaque => [path, &[".wh..wh..opq".to_owned()]].concat().join("/"),
    };
    Entry {
        path: path.into_bytes(),
        link: Vec::new(),
        kind: if matches!(step, Step::Folder) {
            EntryType::Directory
        } else {
            EntryType::Regular
        },
        mode: 0o644,
        uid: 0,
        gid: 0,
        mtime: (0, 0),
        offset: 0,
        size: 0,
        xattrs: Vec::new(),
    }
}

fn all(tree: &Tree, id: NodeId, path: &[String], found: &mut BTreeMap<Vec<String>, bool>) {
    let Some(folder) = tree.folder(id) else { return };
    for (name, child) in &folder.children {
        let path = [path, &[String::from_utf8(name.to_vec()).unwrap()]].concat();
        found.insert(path.clone(), tree.folder(child.node).is_some());
        all(tree, child.node, &path, found);
    }
}

fn steps() -> impl Strategy<Value = Vec<(usize, Step, Vec<String>)>> {
    let step = prop_oneof![
        Just(Step::File),
        Just(Step::Folder),
        Just(Step::Hide),
        Just(Step::Opaque)
    ];
    let path = prop::collection::vec("[abc]", 1..4);
    prop::collection::vec((0..4_usize, step, path), 1..40).prop_map(|mut steps| {
        steps.sort_by_key(|(layer, ..)| *layer);
        steps
    })
}

/// A tar of a bit of everything.
fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut add = |path: &str, kind: EntryType, link: &str, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        if !link.is_empty() {
            header.set_link_name(link).unwrap();
        }
        builder
            .append_pax_extensions([("SCHILY.xattr.user.a", &b"value"[..])])
            .unwrap();
        builder.append_data(&mut header, path, content).unwrap();
    };
    add("etc/", EntryType::Directory, "", b"");
    add("etc/passwd", EntryType::Regular, "", b"web:x:1:1::/:\n");
    add(&("long/".repeat(40) + "x"), EntryType::Regular, "", b"content");
    add("link", EntryType::Symlink, "etc", b"");
    add("link/hard", EntryType::Link, "etc/passwd", b"");
    add("link/.wh.passwd", EntryType::Regular, "", b"");
    builder.into_inner().unwrap()
}

/// Lays a tar twice and writes what comes of it.
fn lay(bytes: &[u8]) -> Result<u64, LayerError> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    let limits = Limits {
        entries: 1000,
        ..Limits::default()
    };
    let mut tree = Tree::new(limits);
    for layer in 0..2 {
        tree.begin_layer(layer);
        let mut reader = Reader::new(&file, bytes.len() as u64, Ending::Any);
        while let Some(entry) = reader.next()? {
            tree.add(entry)?;
        }
    }
    let mut image = tempfile::tempfile().unwrap();
    let files = [file.try_clone().unwrap(), file];
    erofs::write(&tree, &files, [0; 16], u64::MAX, &mut image).unwrap();
    Ok(image.metadata().unwrap().len())
}

proptest! {
    #[test]
    fn layers_come_to_what_the_model_says(steps in steps()) {
        let mut tree = Tree::new(Limits::default());
        let mut model = Model::default();
        for (layer, step, path) in &steps {
            tree.begin_layer(*layer);
            let is_taken = tree.add(entry(step, path)).is_ok();
            prop_assert_eq!(is_taken, model.add(*layer, step, path), "{:?} {:?}", step, path);
            if !is_taken {
                break;
            }
            let mut found = BTreeMap::new();
            all(&tree, Tree::ROOT, &[], &mut found);
            let expected: BTreeMap<_, _> = model.0.iter().map(|(path, known)| (path.clone(), known.is_folder)).collect();
            prop_assert_eq!(found, expected, "after {:?} {:?}", step, path);
        }
    }

    /// Whatever a tar says, it is taken or refused, and what is taken can be written.
    #[test]
    fn a_tar_that_is_damaged_anywhere_does_no_harm(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        fix in any::<bool>(),
    ) {
        let mut bytes = tar();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
            // With the right check sum for what may be a header, so that the rest of it is looked at.
            let start = at / 512 * 512;
            let block = &mut bytes[start..start + 512];
            if fix && &block[257..262] == b"ustar" {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
        if let Ok(size) = lay(&bytes) {
            prop_assert!(size < 1 << 20);
        }
    }
}

#[test]
fn the_tar_that_is_damaged_there_is_whole() {
    assert!(lay(&tar()).unwrap() >= 4096);
}
