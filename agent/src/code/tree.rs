//! The files, folders and links of a zip as they will lie when unpacked: finds names that lie outside, twice, or behind
//! a link, and follows links without leaving the root.

use std::collections::{BTreeMap, BTreeSet};

/// The longest path in bytes (`PATH_MAX` less the terminating NUL).
const MAX_PATH: usize = 4095;

/// The longest part of a path in bytes (`NAME_MAX`).
const MAX_NAME: usize = 255;

/// The most folders a path may go down.
const MAX_DEPTH: usize = 64;

/// The most links that are followed for one path, as in the kernel (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// The most parts of paths that are looked up to check all the links of a zip: links that lead through one another can
/// cost a million times what they take in the zip.
const MAX_STEPS: usize = 1 << 20;

/// What lies at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A file, with its Unix permission bits where the zip has any.
    File {
        /// The lower 12 bits of `st_mode`.
        mode: Option<u32>,
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
    /// A link whose target is longer than a path can be, or empty.
    #[error("is a symbolic link with an impossible target")]
    Target,
    /// A link of so many, through so many others, that to follow them all takes too long.
    #[error("is one symbolic link too many: there are too many, or they lead through too many others")]
    Tangled,
}

/// All of a zip's paths.
#[derive(Debug)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
    /// Folders that no entry names but that entries lie in.
    implied: BTreeSet<String>,
    limit: usize,
}

// === impl Tree ===

impl Tree {
    /// Takes up to `limit` files, folders and links. Folders that no entry names count too: a short path can imply many.
    pub fn new(limit: usize) -> Self {
        Self {
            nodes: BTreeMap::new(),
            implied: BTreeSet::new(),
            limit,
        }
    }

    /// Adds what lies at a path; a trailing slash and parts that are `.` don't count.
    ///
    /// # Errors
    ///
    /// [`PathError`].
    pub fn add(&mut self, path: &str, node: Node) -> Result<(), PathError> {
        let path = parts(path)?.join("/");
        if self.nodes.contains_key(&path) {
            return Err(PathError::Twice);
        }
        if node != Node::Folder && self.implied.contains(&path) {
            return Err(PathError::BelowFile);
        }
        for above in path.match_indices('/').filter_map(|(end, _)| path.get(..end)) {
            match self.nodes.get(above) {
                Some(Node::File { .. }) => return Err(PathError::BelowFile),
                Some(Node::Link(_)) => return Err(PathError::BelowLink),
                Some(Node::Folder) => {}
                None if self.implied.contains(above) => {}
                None => {
                    self.check_room()?;
                    self.implied.insert(above.to_owned());
                }
            }
        }
        // Named now, and so counted once.
        self.implied.remove(&path);
        self.check_room()?;
        self.nodes.insert(path, node);
        Ok(())
    }

    fn check_room(&self) -> Result<(), PathError> {
        if self.nodes.len() + self.implied.len() < self.limit {
            Ok(())
        } else {
            Err(PathError::TooMany)
        }
    }

    /// Checks that no link leads out, whatever other links it leads through; names the first that does.
    ///
    /// # Errors
    ///
    /// The link's path with [`PathError::LeadsOut`], [`PathError::Target`] or [`PathError::Tangled`].
    pub fn check_links(&self) -> Result<(), (String, PathError)> {
        let mut steps = MAX_STEPS;
        for (path, node) in &self.nodes {
            if let Node::Link(target) = node {
                let error = if target.is_empty() || target.len() > MAX_PATH {
                    Some(PathError::Target)
                } else {
                    self.walk(path, &mut steps).err()
                };
                if let Some(error) = error {
                    return Err((path.clone(), error));
                }
            }
        }
        Ok(())
    }

    /// What lies at a path once links are followed; `None` where nothing does.
    pub fn resolve(&self, path: &str) -> Option<&Node> {
        let reached = self.walk(&parts(path).ok()?.join("/"), &mut { MAX_STEPS }).ok()??;
        match self.nodes.get(&reached) {
            None => self.implied.contains(&reached).then_some(&Node::Folder),
            found => found,
        }
    }

    /// Follows a path as the kernel would with the zip's root as `/`, in at most `steps` parts, which it takes away;
    /// `Ok(None)` where it ends in a loop of links.
    fn walk(&self, path: &str, steps: &mut usize) -> Result<Option<String>, PathError> {
        // What is still to be walked, the next part last.
        let mut todo: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
        let mut at = String::new();
        let mut links = 0;
        while let Some(part) = todo.pop() {
            *steps = steps.checked_sub(1).ok_or(PathError::Tangled)?;
            match part.as_str() {
                "" | "." => continue,
                ".." => {
                    if at.is_empty() {
                        return Err(PathError::LeadsOut);
                    }
                    at.truncate(parent_len(&at));
                    continue;
                }
                _ => {
                    if !at.is_empty() {
                        at.push('/');
                    }
                    at.push_str(&part);
                }
            }
            if let Some(Node::Link(target)) = self.nodes.get(&at) {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(None);
                }
                if target.starts_with('/') {
                    return Err(PathError::LeadsOut);
                }
                at.truncate(parent_len(&at));
                todo.extend(target.split('/').rev().map(str::to_owned));
            }
        }
        Ok(Some(at))
    }
}

/// The length of the path of the folder that `path` lies in.
fn parent_len(path: &str) -> usize {
    path.rfind('/').unwrap_or(0)
}

/// The parts of a path that stays inside and that every file system takes.
fn parts(path: &str) -> Result<Vec<String>, PathError> {
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
    let parts: Vec<String> = path
        .split('/')
        .filter(|part| !part.is_empty() && *part != ".")
        .map(str::to_owned)
        .collect();
    if parts.is_empty() {
        return Err(PathError::Empty);
    }
    if parts.iter().any(|part| part == "..") {
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

    const FILE: Node = Node::File { mode: Some(0o644) };
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
        assert_eq!(tree.nodes.len() + tree.implied.len(), 5);
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
