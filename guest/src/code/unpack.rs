//! Unpacks a customer's zip. The agent has looked at it, but this does not rely on that: nothing is written outside the
//! folder, nothing that the zip says of its sizes is believed.

use std::collections::HashSet;
use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{BufReader, Read, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};

use zip::ZipArchive;
use zip::read::{Config, ZipFile};
use zip::result::ZipError;
use zip::unstable::read::ZipIterable;

use super::UNPACKED_LIMIT;

/// Files, folders and links, folders that are only implied among them. Each costs the kernel [`INODE`].
const ENTRIES: usize = 65_536;
const PAGE: u64 = 4096;
/// What a tmpfs takes for each file beside its content, in bytes: an inode (about 700) and a name (about 200).
const INODE: u64 = 1024;
/// The longest target of a link, in bytes.
const LINK_LIMIT: u64 = 4096;
/// The longest path, in bytes.
const PATH_LIMIT: usize = 1024;

/// What is wrong with a zip, or with unpacking it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnpackError {
    #[error("not a zip that can be read: {0}")]
    Zip(#[from] ZipError),
    #[error("the zip holds more than {ENTRIES} files and folders")]
    Entries,
    #[error("the zip holds a name twice")]
    Duplicates,
    #[error("the zip holds more than {UNPACKED_LIMIT} bytes unpacked")]
    TooLarge,
    #[error("the zip's entry {name:?} {why}")]
    Entry { name: String, why: &'static str },
    #[error("cannot write the zip's entry {name:?}: {source}")]
    Write { name: String, source: std::io::Error },
    #[error("cannot read the zip: {0}")]
    Read(#[source] std::io::Error),
}

/// What a zip will need, as it says itself. A file system of that size bounds it to that.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Survey {
    /// Of the file system.
    pub(super) bytes: u64,
    /// Files, folders and links, folders that are only implied among them.
    pub(super) files: u64,
}

enum Kind {
    Folder,
    File { mode: u32 },
    Link,
}

struct Entry {
    path: PathBuf,
    kind: Kind,
}

type Reader = BufReader<File>;

// === impl UnpackError ===

impl UnpackError {
    /// Whether the zip is too large, rather than wrong.
    pub(crate) fn is_size(&self) -> bool {
        matches!(self, Self::Entries | Self::TooLarge)
    }

    /// Whether the zip is at fault.
    pub(crate) fn is_zip(&self) -> bool {
        !matches!(self, Self::Write { .. } | Self::Read(_))
    }
}

// === impl Survey ===

impl Survey {
    /// The memory that it will take, what the kernel keeps for each file included.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.bytes + self.files * INODE
    }

    fn count_one(&mut self) -> Result<(), UnpackError> {
        if self.files >= ENTRIES as u64 {
            return Err(UnpackError::Entries);
        }
        self.files += 1;
        Ok(())
    }
}

/// Looks through a zip of at most `limit` bytes without unpacking it.
pub(super) fn survey(zip: &Path, limit: u64) -> Result<Survey, UnpackError> {
    let archive = open(zip)?;
    let mut survey = Survey::default();
    let mut said = 0_u64;
    let mut folders = HashSet::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_data(index)?;
        let path = checked_path(entry.name_raw())?;
        said = said.saturating_add(entry.size());
        if said > limit {
            return Err(UnpackError::TooLarge);
        }
        survey.bytes += entry.size().next_multiple_of(PAGE);
        // Folders are counted once, whether they have entries or are only implied, which a short zip can do often.
        let is_folder = entry.name_raw().ends_with(b"/");
        if !is_folder {
            survey.count_one()?;
        }
        for folder in path.ancestors().skip(usize::from(!is_folder)) {
            if folder.as_os_str().is_empty() || folders.contains(folder) {
                break;
            }
            survey.count_one()?;
            folders.insert(folder.to_owned());
        }
    }
    // For what the file system itself takes: its root, and long links.
    survey.bytes += PAGE * (survey.files / 16 + 16);
    Ok(survey)
}

/// Unpacks a zip of at most `limit` bytes into `folder`, which is empty.
pub(super) fn unpack(zip: &Path, folder: &Path, limit: u64) -> Result<(), UnpackError> {
    let mut archive = open(zip)?;
    let mut left = limit;
    let mut folders = HashSet::new();
    let mut links = Vec::new();
    for index in 0..archive.len() {
        let mut file = archive.by_index(index)?;
        let entry = check(&file)?;
        let target = folder.join(&entry.path);
        match entry.kind {
            Kind::Folder => make_folder(folder, &entry.path, &mut folders)?,
            Kind::File { mode } => {
                make_parent(folder, &entry.path, &mut folders)?;
                left -= write(&mut file, &target, mode, left).map_err(|error| error.of(&entry.path))?;
            }
            Kind::Link => {
                make_parent(folder, &entry.path, &mut folders)?;
                let to = link_target(&mut file, &entry.path)?;
                links.push((entry.path, to));
            }
        }
    }
    // Last of all, so that nothing above is written through one.
    for (path, to) in links {
        symlink(to, folder.join(&path)).map_err(|source| Writing::Io(source).of(&path))?;
    }
    Ok(())
}

fn open(zip: &Path) -> Result<ZipArchive<Reader>, UnpackError> {
    let mut file = BufReader::new(File::open(zip).map_err(UnpackError::Read)?);
    // Counted first: the archive keeps some hundred bytes for each entry.
    if ZipIterable::try_new(&mut file, Config::default())?.len() > ENTRIES {
        return Err(UnpackError::Entries);
    }
    let archive = ZipArchive::new(file)?;
    if archive.has_duplicate_names() {
        return Err(UnpackError::Duplicates);
    }
    Ok(archive)
}

fn check(file: &ZipFile<'_, Reader>) -> Result<Entry, UnpackError> {
    let path = checked_path(file.name_raw())?;
    let refuse = |why| {
        Err(UnpackError::Entry {
            name: path.display().to_string(),
            why,
        })
    };
    if file.encrypted() {
        return refuse("is encrypted");
    }
    // Made where there are no permissions: everything may be run, then.
    let mode = file.unix_mode().unwrap_or(0o755);
    let kind = match mode & libc::S_IFMT {
        _ if file.name_raw().ends_with(b"/") => Kind::Folder,
        libc::S_IFDIR => Kind::Folder,
        libc::S_IFLNK => Kind::Link,
        libc::S_IFREG | 0 => Kind::File { mode: readable(mode) },
        _ => return refuse("is a device or the like"),
    };
    Ok(Entry { path, kind })
}

/// Permissions as they were, as far as they matter where nobody writes and the container is nobody's owner: who runs the
/// function may read everything, and run what its owner could.
fn readable(mode: u32) -> u32 {
    if mode & 0o100 == 0 { 0o444 } else { 0o555 }
}

/// The path of an entry: relative, and not leaving its folder.
fn checked_path(name: &[u8]) -> Result<PathBuf, UnpackError> {
    let refuse = |why| {
        let shown: String = String::from_utf8_lossy(name).chars().take(200).collect();
        Err(UnpackError::Entry { name: shown, why })
    };
    let Ok(text) = std::str::from_utf8(name) else {
        return refuse("has a name that is not UTF-8");
    };
    if text.len() > PATH_LIMIT {
        return refuse("has a name that is too long");
    }
    if text.contains('\0') {
        return refuse("has a zero byte in its name");
    }
    if text.contains('\\') {
        return refuse("has a backslash in its name");
    }
    let mut path = PathBuf::new();
    for component in Path::new(text).components() {
        match component {
            Component::Normal(part) if part.len() <= 255 => path.push(part),
            Component::Normal(_) => return refuse("has a name that is too long"),
            Component::CurDir => {}
            Component::ParentDir => return refuse("would lie outside the function's folder"),
            Component::RootDir | Component::Prefix(_) => return refuse("has an absolute path"),
        }
    }
    // `./` is the folder itself.
    if path.as_os_str().is_empty() && !text.ends_with('/') {
        return refuse("has no name");
    }
    Ok(path)
}

/// Where a link leads. Links may lead about in the function's folder only.
fn link_target(file: &mut ZipFile<'_, Reader>, path: &Path) -> Result<PathBuf, UnpackError> {
    let refuse = |why| UnpackError::Entry {
        name: path.display().to_string(),
        why,
    };
    let mut target = String::new();
    file.take(LINK_LIMIT + 1)
        .read_to_string(&mut target)
        .map_err(|_| refuse("is a link that cannot be read"))?;
    if target.len() as u64 > LINK_LIMIT || target.is_empty() || target.contains('\0') {
        return Err(refuse("is a link to nowhere"));
    }
    let mut depth = path.components().count().saturating_sub(1);
    for component in Path::new(&target).components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::CurDir => {}
            Component::ParentDir if depth > 0 => depth -= 1,
            _ => return Err(refuse("is a link that leads outside the function's folder")),
        }
    }
    Ok(target.into())
}

fn make_parent(root: &Path, path: &Path, made: &mut HashSet<PathBuf>) -> Result<(), UnpackError> {
    make_folder(root, path.parent().unwrap_or(Path::new("")), made)
}

fn make_folder(root: &Path, path: &Path, made: &mut HashSet<PathBuf>) -> Result<(), UnpackError> {
    if path.as_os_str().is_empty() || made.contains(path) {
        return Ok(());
    }
    make_parent(root, path, made)?;
    DirBuilder::new()
        .mode(0o755)
        .create(root.join(path))
        .map_err(|source| Writing::Io(source).of(path))?;
    made.insert(path.to_owned());
    Ok(())
}

/// What may go wrong with one file.
enum Writing {
    TooLarge,
    Zip(std::io::Error),
    Io(std::io::Error),
}

// === impl Writing ===

impl Writing {
    fn of(self, path: &Path) -> UnpackError {
        let name = path.display().to_string();
        match self {
            Self::TooLarge => UnpackError::TooLarge,
            Self::Zip(error) => UnpackError::Zip(ZipError::Io(error)),
            Self::Io(error) if error.kind() == std::io::ErrorKind::AlreadyExists => UnpackError::Entry {
                name,
                why: "is there twice",
            },
            Self::Io(error) if error.kind() == std::io::ErrorKind::NotADirectory => UnpackError::Entry {
                name,
                why: "lies in what is not a folder",
            },
            Self::Io(error) if error.kind() == std::io::ErrorKind::StorageFull => UnpackError::Entry {
                name,
                why: "is larger than the zip says",
            },
            Self::Io(source) => UnpackError::Write { name, source },
        }
    }
}

/// Writes one file of at most `limit` bytes. Its length.
fn write(file: &mut ZipFile<'_, Reader>, target: &Path, mode: u32, limit: u64) -> Result<u64, Writing> {
    let mut to = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(target)
        .map_err(Writing::Io)?;
    let mut chunk = vec![0; 64 << 10];
    let mut length = 0_u64;
    loop {
        let read = file.read(&mut chunk).map_err(Writing::Zip)?;
        if read == 0 {
            break;
        }
        length += read as u64;
        if length > limit {
            return Err(Writing::TooLarge);
        }
        to.write_all(chunk.get(..read).unwrap_or_default())
            .map_err(Writing::Io)?;
    }
    to.set_permissions(Permissions::from_mode(mode)).map_err(Writing::Io)?;
    Ok(length)
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
