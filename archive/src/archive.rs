//! An open zip whose directory has been checked.

use std::collections::BTreeSet;
use std::io::{self, BufReader, Read, Seek, Write};
use std::time::SystemTime;

use zip::result::{ZipError, ZipResult};
use zip::unstable::read::ZipIterable;
use zip::{CompressionMethod, System, ZipArchive};

use crate::error::ArchiveError;
use crate::time;
use crate::tree::{MAX_TARGET, Node, PathError, Place, Tree};

/// A tmpfs takes whole pages.
const PAGE: u64 = 4096;
/// Pages that a tmpfs takes for itself: its root and some to spare.
const SPARE_PAGES: u64 = 16;
/// What the kernel keeps of each file of a tmpfs beside its content, in bytes: an inode (about 700) and a name (about 200).
const INODE: u64 = 1024;

/// What the zips of a function may be, its own and its layers together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes that they may unpack to.
    pub unzipped_bytes: u64,
    /// The most files and folders, also those folders that only other entries' paths tell of.
    pub entries: usize,
}

/// What a zip needs of the tmpfs that it is unpacked into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// The file system's size in bytes: content in whole pages.
    pub bytes: u64,
    /// Files, folders and links, also folders that are only implied.
    pub files: u64,
}

/// A zip that can be unpacked as far as its directory tells: names, kinds, links and numbers are as they may be. Of its
/// content, only links have been read.
#[derive(Debug)]
pub struct Archive<R> {
    zip: ZipArchive<BufReader<R>>,
    tree: Tree,
    /// Where each entry lies, in the zip's order.
    places: Vec<Place>,
    /// Bytes of content, as the directory has them.
    unzipped: u64,
    size: Size,
}

/// What was copied of an entry.
pub(crate) struct Copied {
    /// Its length in bytes.
    pub(crate) length: u64,
    /// When it was last changed, where the zip says so.
    pub(crate) modified: Option<SystemTime>,
}

/// Copying an entry failed, at one end or the other.
pub(crate) enum CopyError {
    Archive(ArchiveError),
    Write(io::Error),
}

// === impl Limits ===

impl Limits {
    /// The most that a guest takes, of a function and its layers together: Lambda's 250 MiB, and 65,536 files, each of which
    /// costs the guest's kernel memory.
    pub const MOST: Self = Self {
        unzipped_bytes: 250 << 20,
        entries: 65_536,
    };

    /// What is left for other zips of the same function.
    pub(crate) fn less<R>(self, archive: &Archive<R>) -> Self {
        Self {
            unzipped_bytes: self.unzipped_bytes.saturating_sub(archive.unzipped),
            entries: self.entries.saturating_sub(archive.tree.len()),
        }
    }
}

// === impl Size ===

impl Size {
    /// The memory that it takes in bytes, with what the kernel keeps of each file.
    pub fn memory_bytes(&self) -> u64 {
        self.bytes + self.files * INODE
    }
}

// === impl Archive ===

impl<R: Read + Seek> Archive<R> {
    /// Reads and checks a zip's directory. Blocks.
    ///
    /// # Errors
    ///
    /// [`ArchiveError`], for the first thing that is wrong.
    pub fn open(file: R, limits: Limits) -> Result<Self, ArchiveError> {
        let mut zip = open(BufReader::with_capacity(1 << 16, file), limits)?;
        let mut tree = Tree::new(limits.entries);
        let mut places = Vec::with_capacity(zip.len());
        let (mut unzipped, mut pages) = (0_u64, SPARE_PAGES);
        for index in 0..zip.len() {
            let (name, node, said) = read_entry(&mut zip, index)?;
            unzipped = unzipped.saturating_add(said);
            if unzipped > limits.unzipped_bytes {
                return Err(ArchiveError::TooLarge {
                    limit: limits.unzipped_bytes,
                });
            }
            pages += said.div_ceil(PAGE);
            places.push(tree.add(&name, node).map_err(|source| match source {
                PathError::TooMany => ArchiveError::TooManyEntries { limit: limits.entries },
                source => ArchiveError::Path { name, source },
            })?);
        }
        let size = Size {
            bytes: pages * PAGE,
            files: tree.len() as u64,
        };
        Ok(Self {
            zip,
            tree,
            places,
            unzipped,
            size,
        })
    }

    /// Its files, folders and links.
    pub fn tree(&self) -> &Tree {
        &self.tree
    }

    /// What it takes when it is unpacked. Nothing larger is ever written.
    pub fn size(&self) -> Size {
        self.size
    }

    /// Decompresses every byte and answers with their number; one that this takes can be unpacked. Blocks.
    ///
    /// # Errors
    ///
    /// [`ArchiveError`] where an entry is damaged or has another size than the directory says.
    pub fn read_through(&mut self) -> Result<u64, ArchiveError> {
        let mut bytes = 0;
        for index in 0..self.places.len() {
            bytes += match self.copy(index, &mut io::sink()) {
                Ok(copied) => copied.length,
                Err(CopyError::Archive(error)) => return Err(error),
                Err(CopyError::Write(error)) => return Err(ArchiveError::Io(error)),
            };
        }
        Ok(bytes)
    }

    /// How many entries there are, and where one of them lies.
    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Copies the content of an entry, which is as long as the directory says.
    pub(crate) fn copy(&mut self, index: usize, to: &mut impl Write) -> Result<Copied, CopyError> {
        let mut entry = self.zip.by_index(index).map_err(ArchiveError::of_zip)?;
        let modified = time::modified(&entry);
        let said = entry.size();
        let name = |tree: &Tree| {
            self.places
                .get(index)
                .map_or_else(String::new, |&place| tree.path(place))
        };
        let mut chunk = vec![0; 64 << 10];
        let mut length = 0_u64;
        loop {
            let read = entry
                .read(&mut chunk)
                .map_err(|source| ArchiveError::of_entry(&name(&self.tree), source))?;
            length += read as u64;
            if length > said || (read == 0 && length < said) {
                let name = name(&self.tree);
                return Err(ArchiveError::WrongSize { name, said }.into());
            }
            if read == 0 {
                return Ok(Copied { length, modified });
            }
            to.write_all(chunk.get(..read).unwrap_or_default())
                .map_err(CopyError::Write)?;
        }
    }
}

// === impl CopyError ===

impl From<ArchiveError> for CopyError {
    fn from(error: ArchiveError) -> Self {
        Self::Archive(error)
    }
}

fn open<R: Read + Seek>(mut file: R, limits: Limits) -> Result<ZipArchive<R>, ArchiveError> {
    // The count first, without an index of all entries: a zip of the largest size could hold a million.
    let count = ZipIterable::try_new(&mut file, Default::default())
        .map_err(ArchiveError::of_zip)?
        .len();
    if count > limits.entries {
        return Err(ArchiveError::TooManyEntries { limit: limits.entries });
    }
    let mut zip = ZipArchive::new(file).map_err(ArchiveError::of_zip)?;
    if zip.len() > limits.entries {
        return Err(ArchiveError::TooManyEntries { limit: limits.entries });
    }
    if zip.is_empty() {
        return Err(ArchiveError::Empty);
    }
    if zip.has_duplicate_names() {
        let name = name_there_twice(zip.into_inner()).map_err(ArchiveError::of_zip)?;
        let source = PathError::Twice;
        return Err(ArchiveError::Path { name, source });
    }
    // Headers that contradict the directory, entries that overlap (a bomb's trick) and entries that the directory hides:
    // programs that unpack disagree on what such a zip holds.
    zip.validate_header_consistency().map_err(ArchiveError::of_zip)?;
    Ok(zip)
}

/// The name of two entries.
fn name_there_twice<R: Read + Seek>(file: R) -> ZipResult<String> {
    let mut seen = BTreeSet::new();
    let mut zip = ZipIterable::try_new(file, Default::default())?;
    for entry in zip.files()? {
        let name = entry?.name()?.into_owned();
        if let Some(name) = seen.replace(name) {
            return Ok(name);
        }
    }
    // Two names are the same bytes, so this is never reached where nobody writes to the file.
    Err(ZipError::FileNotFound)
}

/// An entry's name, what it is, and its size in bytes as the directory has it.
fn read_entry<R: Read + Seek>(zip: &mut ZipArchive<R>, index: usize) -> Result<(String, Node, u64), ArchiveError> {
    let entry = zip.by_index_data(index).map_err(ArchiveError::of_zip)?;
    let mut name = entry.name().map_err(ArchiveError::of_zip)?.into_owned();
    let system = entry.system();
    if matches!(system, System::Dos | System::WindowsNTFS | System::VFAT) {
        // Old makers there separate the parts of a path so.
        name = name.replace('\\', "/");
    }
    if entry.encrypted() {
        return Err(ArchiveError::Encrypted { name });
    }
    let method = entry.compression();
    if !matches!(method, CompressionMethod::Stored | CompressionMethod::Deflated) {
        return Err(ArchiveError::Method {
            name,
            method: method.to_string(),
        });
    }
    // Zips that were not made on Unix have no mode (of DOS's attributes the library makes one): in them a folder is what
    // is named as one.
    let mode = entry.unix_mode().filter(|_| system != System::Dos);
    let kind = mode.map_or(0, |mode| mode & libc::S_IFMT);
    let (is_folder, is_link) = (entry.is_dir(), entry.is_symlink());
    let regular = [0, libc::S_IFREG, libc::S_IFDIR, libc::S_IFLNK].contains(&kind);
    let folder_as_file = is_folder != (kind == libc::S_IFDIR) && kind != 0;
    if !regular || folder_as_file || (is_folder && is_link) {
        return Err(ArchiveError::Special { name });
    }
    let said = entry.size();
    drop(entry);
    let node = if is_folder {
        Node::Folder
    } else if is_link {
        match read_target(zip, index, &name)? {
            Some(target) => Node::Link(target),
            None => {
                return Err(ArchiveError::Path {
                    name,
                    source: PathError::Target,
                });
            }
        }
    } else {
        Node::File {
            executable: mode.is_some_and(|mode| mode & 0o111 != 0),
        }
    };
    Ok((name, node, said))
}

/// Where a link leads. None where no link can.
fn read_target<R: Read + Seek>(
    zip: &mut ZipArchive<R>,
    index: usize,
    name: &str,
) -> Result<Option<String>, ArchiveError> {
    let mut target = Vec::new();
    let content = zip.by_index(index).map_err(|error| match error {
        ZipError::Io(source) => ArchiveError::of_entry(name, source),
        other => ArchiveError::of_zip(other),
    })?;
    content
        .take(MAX_TARGET as u64 + 1)
        .read_to_end(&mut target)
        .map_err(|source| ArchiveError::of_entry(name, source))?;
    Ok(String::from_utf8(target)
        .ok()
        .filter(|target| target.len() <= MAX_TARGET))
}
