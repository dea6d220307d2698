//! Where the parts of an image are read from: a folder, a tar, or what was pulled.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use crate::{
    error::{ImageError, TarError},
    limits::{Exceeded, Limits},
    tar::{Ending, EntryType, Reader, Section},
};

/// The most links that lead from one name of an archive to another.
const MAX_LINKS: usize = 8;

/// The files that an image is made of, by their names.
pub(crate) trait Files {
    /// Opens one.
    fn open(&self, name: &str) -> Result<Box<dyn Read + '_>, ImageError>;
}

/// A folder.
pub(crate) struct Folder {
    path: PathBuf,
    handle: File,
}

/// A tar, uncompressed.
pub(crate) struct Archive {
    file: File,
    places: HashMap<Vec<u8>, Place>,
}

/// Files without names on the disk.
#[derive(Default)]
pub(crate) struct Pulled {
    files: HashMap<String, (File, u64)>,
}

enum Place {
    File {
        at: u64,
        size: u64,
    },
    /// To another name, from the tar's root.
    Link(Vec<u8>),
}

/// Reads a manifest, an index, or a configuration.
pub(crate) fn document(files: &dyn Files, name: &str, limits: &Limits) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    let mut from = files.open(name)?.take(limits.document + 1);
    from.read_to_end(&mut bytes)
        .map_err(ImageError::io(format!("read {name} of the image")))?;
    if bytes.len() as u64 > limits.document {
        return Err(Exceeded::Document(limits.document).into());
    }
    Ok(bytes)
}

// === impl Folder ===

impl Folder {
    pub(crate) fn open(path: &Path) -> Result<Self, ImageError> {
        let handle = File::open(path).map_err(ImageError::io(format!("open {}", path.display())))?;
        Ok(Self {
            path: path.to_owned(),
            handle,
        })
    }
}

impl Files for Folder {
    fn open(&self, name: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        // The folder is whose image it is, and we may be root: nothing outside of it is read, and nothing that is no file.
        let how = OpenHow::new()
            .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        let opened: Result<OwnedFd, _> = openat2(&self.handle, name, how);
        let file = match opened {
            Ok(file) => File::from(file),
            Err(
                nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::EXDEV | nix::Error::ELOOP | nix::Error::ENXIO,
            ) => {
                return Err(ImageError::Missing(name.to_owned()));
            }
            Err(error) => {
                let path = self.path.join(name);
                return Err(ImageError::io(format!("open {}", path.display()))(error.into()));
            }
        };
        let metadata = file
            .metadata()
            .map_err(ImageError::io(format!("look at {name} of the image")))?;
        if !metadata.is_file() {
            return Err(ImageError::Missing(name.to_owned()));
        }
        Ok(Box::new(file))
    }
}

// === impl Archive ===

impl Archive {
    /// Reads what is in a tar of this length in bytes.
    pub(crate) fn index(file: File, len: u64, limits: &Limits) -> Result<Self, TarError> {
        let mut reader = Reader::new(&file, len, Ending::Marked);
        let mut places = HashMap::new();
        let (mut count, mut names) = (0, 0);
        while let Some(entry) = reader.next()? {
            count += 1;
            names += entry.path.len() + entry.link.len();
            if count > limits.entries {
                return Err(Exceeded::Entries(limits.entries).into());
            }
            if names as u64 > limits.names {
                return Err(Exceeded::Names(limits.names).into());
            }
            let Some(path) = normal(b"", &entry.path) else { continue };
            let place = match entry.kind {
                EntryType::Regular => Some(Place::File {
                    at: entry.offset,
                    size: entry.size,
                }),
                EntryType::Link => normal(b"", &entry.link).map(Place::Link),
                // As `docker save` writes a layer that is there twice.
                EntryType::Symlink => normal(parent(&path), &entry.link).map(Place::Link),
                _ => None,
            };
            if let Some(place) = place {
                places.insert(path, place);
            }
        }
        Ok(Self { file, places })
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name.as_bytes())
    }

    /// The tar itself.
    pub(crate) fn into_file(self) -> File {
        self.file
    }
}

impl Files for Archive {
    fn open(&self, name: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        let missing = || ImageError::Missing(name.to_owned());
        let mut at = normal(b"", name.as_bytes()).ok_or_else(missing)?;
        for _ in 0..=MAX_LINKS {
            match self.places.get(&at) {
                Some(Place::File { at, size }) => return Ok(Box::new(Section::new(&self.file, *at, *size))),
                Some(Place::Link(target)) => at.clone_from(target),
                None => break,
            }
        }
        Err(missing())
    }
}

// === impl Pulled ===

impl Pulled {
    pub(crate) fn insert(&mut self, name: String, file: File, size: u64) {
        self.files.insert(name, (file, size));
    }
}

impl Files for Pulled {
    fn open(&self, name: &str) -> Result<Box<dyn Read + '_>, ImageError> {
        let (file, size) = self
            .files
            .get(name)
            .ok_or_else(|| ImageError::Missing(name.to_owned()))?;
        Ok(Box::new(Section::new(file, 0, *size)))
    }
}

/// The path without `.`, `..` and slashes that say nothing, from where `folder` is; none where it leads out.
fn normal(folder: &[u8], path: &[u8]) -> Option<Vec<u8>> {
    let mut parts: Vec<&[u8]> = Vec::new();
    let folder = if path.starts_with(b"/") { &b""[..] } else { folder };
    for part in folder
        .split(|byte| *byte == b'/')
        .chain(path.split(|byte| *byte == b'/'))
    {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join(&b'/'))
}

fn parent(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|byte| *byte == b'/').unwrap_or_default();
    path.get(..end).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_an_archive_stay_in_it() {
        for (folder, path, expected) in [
            ("", "./a//b/", Some("a/b")),
            ("a/b", "../../c/layer.tar", Some("c/layer.tar")),
            ("a", "/c", Some("c")),
            ("a", "../../c", None),
            ("", "a/../b", Some("b")),
        ] {
            let found = normal(folder.as_bytes(), path.as_bytes());
            assert_eq!(found.as_deref(), expected.map(str::as_bytes), "{folder} {path}");
        }
        assert_eq!(parent(b"a/b/c"), b"a/b");
        assert_eq!(parent(b"a"), b"");
    }

    #[test]
    fn of_a_folder_only_files_in_it_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let [outside, inside] = ["outside", "inside"].map(|name| folder.path().join(name));
        std::fs::write(&outside, "secret").unwrap();
        std::fs::create_dir(&inside).unwrap();
        std::fs::write(inside.join("file"), "text").unwrap();
        std::os::unix::fs::symlink("file", inside.join("link")).unwrap();
        std::os::unix::fs::symlink("../outside", inside.join("up")).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("absolute")).unwrap();
        std::os::unix::fs::symlink("circle", inside.join("circle")).unwrap();
        nix::unistd::mkfifo(&inside.join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let files = Folder::open(&inside).unwrap();
        for name in ["file", "link"] {
            assert_eq!(document(&files, name, &Limits::default()).unwrap(), b"text");
        }
        for name in [
            "up",
            "absolute",
            "circle",
            "pipe",
            ".",
            "nothing",
            "file/x",
            "../outside",
        ] {
            assert!(matches!(files.open(name), Err(ImageError::Missing(_))), "{name}");
        }
        let limits = Limits {
            document: 3,
            ..Limits::default()
        };
        let error = document(&files, "file", &limits).unwrap_err();
        assert!(matches!(error, ImageError::Limit(Exceeded::Document(3))), "{error}");
    }
}
