//! The files, folders and links of a zip as they will lie when unpacked: finds names that lie outside, twice, or behind
//! a link, and follows links as the kernel will in a container.

use std::collections::BTreeMap;

use stoker_proto::runtimes::TASK_ROOT;

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
    /// A symbolic link to this target, which may be anywhere: it is followed in a container, whose root is its own.
    Link(String),
}

/// What is found at a path once links are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found<'a> {
    /// A file or folder of the zip.
    Here(&'a Node),
    /// Something outside of the zip: there only a container can look.
    Elsewhere,
    /// Nothing.
    Nothing,
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
    #[error("is there twice; make the zip anew, with one entry of each name")]
    Twice,
    /// A file and a folder of one path, or something below a file.
    #[error("lies below something that is not a folder")]
    BelowFile,
    /// Below a link: would be written to where the link leads.
    #[error("lies below a symbolic link")]
    BelowLink,
    /// More files and folders than the limit, those among them that no entry names.
    #[error("is one file or folder too many")]
    TooMany,
    /// A link whose target is longer than [`MAX_TARGET`], empty, not UTF-8, or has a NUL.
    #[error("is a symbolic link whose target is empty, too long, or not in UTF-8")]
    Target,
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

/// How far a path has led.
#[derive(Debug, Clone, Copy)]
enum At {
    /// To something of the zip.
    Tree(Place),
    /// To a folder that the zip's root lies in: the one that so many parts of [`TASK_ROOT`] lead to.
    Above(usize),
}

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
        if let Node::Link(target) = &node
            && (target.is_empty() || target.len() > MAX_TARGET || target.contains('\0'))
        {
            return Err(PathError::Target);
        }
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

    /// What lies at a path below the zip's root once links are followed, as the kernel follows them in a container, which
    /// has the zip at [`TASK_ROOT`].
    pub fn resolve(&self, path: &str) -> Found<'_> {
        let root: Vec<&str> = TASK_ROOT.split('/').skip(1).collect();
        // What is still to be walked, the next part last.
        let mut todo: Vec<&str> = path.split('/').rev().collect();
        let mut at = At::Tree(ROOT);
        let mut links = 0;
        while let Some(part) = todo.pop() {
            at = match (part, at) {
                ("" | ".", _) => at,
                ("..", At::Tree(ROOT)) => At::Above(root.len().saturating_sub(1)),
                ("..", At::Tree(place)) => At::Tree(self.parent(place)),
                ("..", At::Above(depth)) => At::Above(depth.saturating_sub(1)),
                (name, At::Above(depth)) if root.get(depth) != Some(&name) => return Found::Elsewhere,
                (_, At::Above(depth)) if depth + 1 == root.len() => At::Tree(ROOT),
                (_, At::Above(depth)) => At::Above(depth + 1),
                (name, At::Tree(folder)) => {
                    let Some(place) = self.child(folder, name) else {
                        return Found::Nothing;
                    };
                    match self.node(place) {
                        Some(Node::Link(target)) => {
                            links += 1;
                            if links > MAX_LINKS {
                                return Found::Nothing;
                            }
                            todo.extend(target.split('/').rev());
                            if target.starts_with('/') { At::Above(0) } else { at }
                        }
                        // Not even `file/.` is anything.
                        Some(Node::File { .. }) if !todo.is_empty() => return Found::Nothing,
                        _ => At::Tree(place),
                    }
                }
            };
        }
        match at {
            At::Tree(place) => self.node(place).map_or(Found::Nothing, Found::Here),
            At::Above(_) => Found::Elsewhere,
        }
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
        assert_eq!(tree.resolve("a/b"), Found::Here(&Node::Folder));
        // Nothing is kept beyond the limit.
        for name in 0..100 {
            let _ = tree.add(&format!("{name}{}", "/a".repeat(60)), FILE);
        }
        assert_eq!(tree.len(), 5);
    }

    #[test]
    fn links_are_followed_as_in_a_container() {
        let tree = tree(&[
            ("src/app.py", FILE),
            ("app.py", link("src/app.py")),
            ("src/up", link("..")),
            ("current", link("src/up/src")),
            ("whole", link("/var/task/src")),
            ("up/down", link("../../../var/task/../task/src")),
            ("loop", link("loop")),
            ("nowhere", link("missing/file")),
            ("through", link("src/app.py/../app.py")),
            ("python", link("/usr/bin/python3.11")),
            ("beside", link("../runtime/bootstrap.py")),
            ("above", link("..")),
            ("root", link("/../..")),
        ]);
        for path in [
            "app.py",
            "current/app.py",
            "src/up/src/app.py",
            "whole/app.py",
            "up/down/app.py",
            "root/var/task/app.py",
            "above/task/app.py",
        ] {
            assert_eq!(tree.resolve(path), Found::Here(&FILE), "{path}");
        }
        for path in ["current", "whole", "."] {
            assert_eq!(tree.resolve(path), Found::Here(&Node::Folder), "{path}");
        }
        for path in ["loop", "nowhere", "through", "app.py/", "src/app.py/.", "absent"] {
            assert_eq!(tree.resolve(path), Found::Nothing, "{path}");
        }
        for path in ["python", "beside", "above", "root", "root/etc/passwd", "../opt"] {
            assert_eq!(tree.resolve(path), Found::Elsewhere, "{path}");
        }
    }

    #[test]
    fn impossible_links_are_refused() {
        let mut tree = Tree::new(LIMIT);
        for target in [String::new(), "a\0b".to_owned(), "x".repeat(MAX_TARGET + 1)] {
            assert_eq!(tree.add("l", Node::Link(target)), Err(PathError::Target));
        }
        tree.add("l", Node::Link("x".repeat(MAX_TARGET))).unwrap();
        assert_eq!(tree.resolve("l"), Found::Nothing);
    }

    #[test]
    fn links_that_lead_through_many_others_take_no_time() {
        let there_and_back = "d/../".repeat(800);
        let mut tree = Tree::new(1000);
        tree.add("d", Node::Folder).unwrap();
        tree.add("l0", link("d")).unwrap();
        for number in 1..60 {
            let target = format!("{there_and_back}l{}", number - 1);
            tree.add(&format!("l{number}"), link(&target)).unwrap();
        }
        assert_eq!(tree.resolve("l39"), Found::Here(&Node::Folder));
        // As the kernel has it.
        assert_eq!(tree.resolve("l40"), Found::Nothing);
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
    }
}
