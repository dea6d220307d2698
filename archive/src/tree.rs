//! The files, folders and links of a zip as they will lie when unpacked: finds names that lie outside, twice, or behind
//! a link, and follows links without leaving the root.

use std::collections::BTreeMap;

/// The longest path of an entry in bytes: `PATH_MAX`, 4096 with a NUL, less 256 for the folder that the zip is unpacked
/// into and a function finds it in.
pub const MAX_PATH: usize = 3840;

/// The longest part of a path in bytes (`NAME_MAX`).
pub const MAX_NAME: usize = 255;

/// The most folders a path may go down.
pub const MAX_DEPTH: usize = 64;

/// The longest target of a link in bytes (`PATH_MAX` less the NUL).
pub const MAX_TARGET: usize = 4095;

/// The most links that are followed for one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The most parts of paths that are looked up to check all the links of a zip: links that lead through one another can
/// cost a million times what they take in the zip.
const MAX_STEPS: usize = 1 << 20;

/// The root's place.
const ROOT: Place = Place(0);

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A file.
    File {
        /// Whether its owner, group or others may execute it; not where the zip has no permissions.
        executable: bool,
    },
    /// A folder.
    Folder,
    /// A symbolic link to this target.
    Link(String),
}

/// Why a path or link was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// `/etc/passwd`, `C:\x`
    #[error("is an absolute path")]
    Absolute,
    /// `../x`
    #[error("has `..` in its path")]
    Parent,
    /// `a\b`
    #[error("has a backslash in its path; paths in a zip are separated by `/`")]
    Backslash,
    /// A NUL or another control character.
    #[error("has a control character in its path")]
    Control,
    /// Nothing, or only `.` and `/`.
    #[error("has an empty path")]
    Empty,
    /// Longer or deeper than a file system takes.
    #[error("has too long or too deep a path")]
    TooLong,
    /// There is something of that path.
    #[error("is in the zip twice")]
    Twice,
    /// A file and a folder of one path, or something below a file.
    #[error("lies below something that is not a folder")]
    BelowFile,
    /// Below a link: would be written to where the link leads.
    #[error("lies below a symbolic link")]
    BelowLink,
    /// A link that leads out.
    #[error("is a symbolic link that leads out of the zip")]
    LeadsOut,
    /// More files and folders than the limit, those among them that no entry names.
    #[error("is one file or folder too many")]
    TooMany,
    /// A link whose target is longer than [`MAX_TARGET`], empty, not UTF-8, or has a NUL.
    #[error("is a symbolic link with an impossible target")]
    Target,
    /// A link of so many, through so many others, that to follow them all takes too long.
    #[error("is one symbolic link too many: there are too many, or they lead through too many others")]
    Tangled,
}

/// All of a zip's paths.
#[derive(Debug)]
pub struct Tree {
    /// The root first, each folder before what lies in it.
    entries: Vec<Entry>,
    limit: usize,
}

/// Where something lies in a [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place(usize);

/// One part of a path, kept once however many paths lead through it.
#[derive(Debug)]
struct Entry {
    parent: Place,
    name: Box<str>,
    node: Node,
    /// An entry of the zip names it, rather than only lying in it.
    named: bool,
    children: BTreeMap<Box<str>, Place>,
}

// === impl Tree ===

impl Tree {
    /// Takes up to `limit` files, folders and links. Folders that no entry names count too: a short path can imply many.
    pub fn new(limit: usize) -> Self {
        Self {
            entries: vec![Entry::new(ROOT, "", Node::Folder)],
            limit,
        }
    }

    /// How many files, folders and links there are.
    pub fn len(&self) -> usize {
        // The root is none of the zip's.
        self.entries.len() - 1
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All of them with their paths, each folder before what lies in it.
    pub fn iter(&self) -> impl Iterator<Item = (String, &Node)> {
        let all = self.entries.iter().enumerate().skip(1);
        all.map(|(index, entry)| (self.path(Place(index)), &entry.node))
    }

    /// Adds what lies at a path; a trailing slash and parts that are `.` don't count.
    ///
    /// # Errors
    ///
    /// [`PathError`].
    pub(crate) fn add(&mut self, path: &str, node: Node) -> Result<Place, PathError> {
        let parts = parts(path)?;
        let Some((name, folders)) = parts.split_last() else {
            return Err(PathError::Empty);
        };
        let mut at = ROOT;
        for folder in folders {
            at = match self.child(at, folder) {
                Some(place) => match self.node(place) {
                    Some(Node::Link(_)) => return Err(PathError::BelowLink),
                    Some(Node::Folder) => place,
                    _ => return Err(PathError::BelowFile),
                },
                None => self.push(Entry::new(at, folder, Node::Folder))?,
            };
        }
        match self.child(at, name) {
            None => {
                let entry = Entry::new(at, name, node);
                self.push(Entry { named: true, ..entry })
            }
            Some(place) => match self.entries.get_mut(place.0) {
                Some(entry) if !entry.named && node == Node::Folder => {
                    entry.named = true;
                    Ok(place)
                }
                Some(entry) if !entry.named => Err(PathError::BelowFile),
                _ => Err(PathError::Twice),
            },
        }
    }

    /// Checks that no link leads out, whatever other links it leads through; names the first that does.
    ///
    /// # Errors
    ///
    /// The link's path with [`PathError::LeadsOut`], [`PathError::Target`] or [`PathError::Tangled`].
    pub(crate) fn check_links(&self) -> Result<(), (String, PathError)> {
        let mut steps = MAX_STEPS;
        for (index, entry) in self.entries.iter().enumerate() {
            if let Node::Link(target) = &entry.node {
                let error = if target.is_empty() || target.len() > MAX_TARGET || target.contains('\0') {
                    Some(PathError::Target)
                } else {
                    self.walk(entry.parent, &entry.name, &mut steps).err()
                };
                if let Some(error) = error {
                    return Err((self.path(Place(index)), error));
                }
            }
        }
        Ok(())
    }

    /// What lies at a path once links are followed; `None` where nothing does.
    pub fn resolve(&self, path: &str) -> Option<&Node> {
        parts(path).ok()?;
        self.node(self.walk(ROOT, path, &mut { MAX_STEPS }).ok()??)
    }

    /// The path of a place.
    pub(crate) fn path(&self, mut place: Place) -> String {
        let mut parts = Vec::new();
        while place != ROOT {
            let Some(entry) = self.entries.get(place.0) else { break };
            parts.push(&*entry.name);
            place = entry.parent;
        }
        parts.reverse();
        parts.join("/")
    }

    pub(crate) fn node(&self, place: Place) -> Option<&Node> {
        self.entries.get(place.0).map(|entry| &entry.node)
    }

    fn child(&self, folder: Place, name: &str) -> Option<Place> {
        self.entries.get(folder.0)?.children.get(name).copied()
    }

    fn push(&mut self, entry: Entry) -> Result<Place, PathError> {
        if self.len() >= self.limit {
            return Err(PathError::TooMany);
        }
        let place = Place(self.entries.len());
        if let Some(parent) = self.entries.get_mut(entry.parent.0) {
            parent.children.insert(entry.name.clone(), place);
        }
        self.entries.push(entry);
        Ok(place)
    }

    /// Follows a path from a folder as the kernel would with the zip's root as `/`, in at most `steps` parts, which it
    /// takes away; `Ok(None)` where it ends at nothing or in a loop of links.
    fn walk<'a>(&'a self, from: Place, path: &'a str, steps: &mut usize) -> Result<Option<Place>, PathError> {
        // What is still to be walked, the next part last.
        let mut todo: Vec<&str> = path.split('/').rev().collect();
        let mut at = from;
        // How many parts further than `at`, where nothing lies. The kernel would stop; links must not lead out by that way
        // either, for a function may make what is missing.
        let mut beyond = 0_usize;
        let mut links = 0;
        while let Some(part) = todo.pop() {
            *steps = steps.checked_sub(1).ok_or(PathError::Tangled)?;
            match part {
                "" | "." => {}
                ".." if beyond > 0 => beyond -= 1,
                ".." if at == ROOT => return Err(PathError::LeadsOut),
                ".." => at = self.parent(at),
                name => match self.child(at, name).filter(|_| beyond == 0) {
                    None => beyond += 1,
                    Some(child) => match self.node(child) {
                        Some(Node::Link(target)) => {
                            links += 1;
                            if links > MAX_LINKS {
                                return Ok(None);
                            }
                            if target.starts_with('/') {
                                return Err(PathError::LeadsOut);
                            }
                            todo.extend(target.split('/').rev());
                        }
                        _ => at = child,
                    },
                },
            }
        }
        Ok((beyond == 0).then_some(at))
    }

    fn parent(&self, place: Place) -> Place {
        self.entries.get(place.0).map_or(ROOT, |entry| entry.parent)
    }
}

// === impl Entry ===

impl Entry {
    fn new(parent: Place, name: &str, node: Node) -> Self {
        Self {
            parent,
            name: name.into(),
            node,
            named: false,
            children: BTreeMap::new(),
        }
    }
}

/// The parts of a path that stays inside and that every file system takes.
fn parts(path: &str) -> Result<Vec<&str>, PathError> {
    let drive = matches!(path.as_bytes(), [letter, b':', ..] if letter.is_ascii_alphabetic());
    if path.starts_with(['/', '\\']) || drive {
        return Err(PathError::Absolute);
    }
    if path.contains('\\') {
        return Err(PathError::Backslash);
    }
    if path.chars().any(char::is_control) {
        return Err(PathError::Control);
    }
    if path.len() > MAX_PATH {
        return Err(PathError::TooLong);
    }
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .collect();
    if parts.is_empty() {
        return Err(PathError::Empty);
    }
    if parts.contains(&"..") {
        return Err(PathError::Parent);
    }
    if parts.len() > MAX_DEPTH || parts.iter().any(|part| part.len() > MAX_NAME) {
        return Err(PathError::TooLong);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: Node = Node::File { executable: false };
    const LIMIT: usize = 100;

    fn link(target: &str) -> Node {
        Node::Link(target.into())
    }

    fn tree(entries: &[(&str, Node)]) -> Tree {
        let mut tree = Tree::new(LIMIT);
        for (path, node) in entries {
            tree.add(path, node.clone()).unwrap();
        }
        tree
    }

    #[test]
    fn paths_that_stay_inside_are_taken() {
        for path in ["a", "./a", "a/b.py", "a//b", "a/./b/", "..a/b..", "ä/ö.py", "c:"] {
            let given = if path == "c:" { "cc:" } else { path };
            Tree::new(LIMIT).add(given, FILE).unwrap();
        }
    }

    #[test]
    fn paths_that_do_not_are_refused() {
        for (path, error) in [
            ("/etc/passwd", PathError::Absolute),
            ("\\\\host\\x", PathError::Absolute),
            ("C:\\x", PathError::Absolute),
            ("c:x", PathError::Absolute),
            ("../x", PathError::Parent),
            ("a/../../x", PathError::Parent),
            ("a/..", PathError::Parent),
            ("a\\..\\x", PathError::Backslash),
            ("a\0b", PathError::Control),
            ("a\nb", PathError::Control),
            ("", PathError::Empty),
            ("./", PathError::Empty),
            (&"a/".repeat(65), PathError::TooLong),
            (&"a".repeat(256), PathError::TooLong),
        ] {
            assert_eq!(Tree::new(LIMIT).add(path, FILE), Err(error), "{path:?}");
        }
    }

    #[test]
    fn nothing_lies_twice_or_below_what_is_no_folder() {
        let mut tree = tree(&[("a/b", FILE), ("l", link("a")), ("d/", Node::Folder)]);
        assert_eq!(tree.add("./a//b", FILE), Err(PathError::Twice));
        assert_eq!(tree.add("a", FILE), Err(PathError::BelowFile));
        assert_eq!(tree.add("a", link("x")), Err(PathError::BelowFile));
        assert_eq!(tree.add("a/b/c", FILE), Err(PathError::BelowFile));
        assert_eq!(tree.add("l/x", FILE), Err(PathError::BelowLink));
        assert_eq!(tree.add("d", Node::Folder), Err(PathError::Twice));
        tree.add("a", Node::Folder).unwrap();
        tree.add("d/x", FILE).unwrap();
    }

    #[test]
    fn folders_that_no_entry_names_are_counted() {
        let mut tree = Tree::new(5);
        tree.add("a/b/c", FILE).unwrap();
        // Counted already.
        tree.add("a", Node::Folder).unwrap();
        tree.add("a/b/", Node::Folder).unwrap();
        tree.add("a/b/d", FILE).unwrap();
        assert_eq!(tree.add("x/y/z", FILE), Err(PathError::TooMany));
        assert_eq!(tree.resolve("a/b"), Some(&Node::Folder));
        // Nothing is kept beyond the limit.
        for name in 0..100 {
            let _ = tree.add(&format!("{name}{}", "/a".repeat(60)), FILE);
        }
        assert_eq!(tree.len(), 5);
    }

    #[test]
    fn links_inside_are_followed() {
        let tree = tree(&[
            ("src/app.py", FILE),
            ("app.py", link("src/app.py")),
            ("src/up", link("..")),
            ("current", link("src/up/src")),
            ("loop", link("loop")),
            ("nowhere", link("missing/file")),
        ]);
        tree.check_links().unwrap();
        for path in ["app.py", "current/app.py", "src/up/src/app.py"] {
            assert_eq!(tree.resolve(path), Some(&FILE), "{path}");
        }
        assert_eq!(tree.resolve("current"), Some(&Node::Folder));
        assert_eq!(tree.resolve("loop"), None);
        assert_eq!(tree.resolve("nowhere"), None);
    }

    #[test]
    fn links_that_lead_out_are_refused() {
        for entries in [
            &[("l", link("/etc/passwd"))][..],
            &[("l", link("../x"))],
            &[("a/l", link("../../x"))],
            &[("a/l", link("b/../../../x"))],
            // Each stays inside by itself; together they lead out.
            &[("s/t", link("..")), ("s/u", link("t/../x"))],
        ] {
            let (_, error) = tree(entries).check_links().unwrap_err();
            assert_eq!(error, PathError::LeadsOut, "{entries:?}");
        }
        assert!(tree(&[("l", link(""))]).check_links().is_err());
    }

    #[test]
    fn links_that_take_too_long_to_follow_are_refused() {
        let there_and_back = "d/../".repeat(800);
        let mut tree = Tree::new(1000);
        tree.add("d", Node::Folder).unwrap();
        tree.add("l0", link("d")).unwrap();
        for number in 1..60 {
            let target = format!("{there_and_back}l{}", number - 1);
            tree.add(&format!("l{number}"), link(&target)).unwrap();
        }
        let (_, error) = tree.check_links().unwrap_err();
        assert_eq!(error, PathError::Tangled);
    }

    proptest! {
        /// Whatever is accepted stays below the root, judged by another implementation.
        #[test]
        fn accepted_paths_stay_inside(path in "[a./\\\\:\\x00]{0,12}") {
            if Tree::new(LIMIT).add(&path, FILE).is_ok() {
                let stays = std::path::Path::new(&path).components().all(|part| {
                    matches!(part, std::path::Component::Normal(_) | std::path::Component::CurDir)
                });
                prop_assert!(stays);
            }
        }

        /// Following links ends, and never with a path above the root.
        #[test]
        fn walking_ends(links in prop::collection::vec(("[abc](/[abc]){0,2}", "(\\.\\.|[abc])(/(\\.\\.|[abc])){0,3}"), 0..8), path in "[abc](/[abc]){0,3}") {
            let mut tree = Tree::new(LIMIT);
            for (path, target) in &links {
                let _ = tree.add(path, link(target));
            }
            let _ = tree.check_links();
            if let Some(node) = tree.resolve(&path) {
                prop_assert!(!matches!(node, Node::Link(_)));
            }
        }
    }
}
