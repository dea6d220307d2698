//! Checks a zip before it is kept: that it is whole, that it unpacks to no more than it may, that nothing in it lies or
//! leads outside, and that what its runtime starts is there. Nothing is written; every byte is decompressed and counted,
//! for what a zip says of its own sizes can't be trusted.

use std::io::{self, Read, Seek};

use zip::result::ZipError;
use zip::{CompressionMethod, ZipArchive};

use super::tree::{Node, PathError, Tree};

/// What a zip may be.
#[derive(Debug, Clone, Copy)]
pub struct ArchiveLimits {
    /// The most bytes that it may unpack to.
    pub unzipped_bytes: u64,
    /// The most files and folders, also those folders that only other entries' paths tell of.
    pub entries: usize,
}

/// Why a zip was refused.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It could not be read from disk.
    #[error("can't read the zip: {0}")]
    Io(#[source] io::Error),
    /// Not a zip, cut short, or damaged.
    #[error("the zip is damaged or not a zip: {0}")]
    Corrupt(#[source] ZipError),
    /// An entry's bytes are damaged.
    #[error("{name:?} in the zip is damaged: {source}")]
    CorruptEntry {
        /// The entry.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// Nothing in it.
    #[error("the zip is empty")]
    Empty,
    /// More entries than the limit, with the folders that they only imply.
    #[error("the zip has more than {limit} files and folders")]
    TooManyEntries {
        /// The limit.
        limit: usize,
    },
    /// It unpacks to more than the limit.
    #[error("the zip unpacks to more than {} MiB", limit >> 20)]
    TooLarge {
        /// The limit in bytes.
        limit: u64,
    },
    /// A password would be needed.
    #[error("{name:?} in the zip is encrypted")]
    Encrypted {
        /// The entry.
        name: String,
    },
    /// Neither stored nor deflated.
    #[error("{name:?} in the zip is compressed by a method that is not supported ({method}); use deflate")]
    Method {
        /// The entry.
        name: String,
        /// What the zip names.
        method: String,
    },
    /// A device, pipe or socket.
    #[error("{name:?} in the zip is neither a file nor a folder nor a symbolic link")]
    Special {
        /// The entry.
        name: String,
    },
    /// Its name or where it leads.
    #[error("{name:?} in the zip {source}")]
    Path {
        /// The entry.
        name: String,
        /// Why.
        source: PathError,
    },
    /// The runtime would not find what it starts.
    #[error(transparent)]
    Handler(#[from] HandlerError),
}

/// Why a runtime could not start what a zip holds.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HandlerError {
    /// No module of that name.
    #[error("the zip has no module for the handler {handler:?}: {expected:?} is missing")]
    NoModule {
        /// As given.
        handler: String,
        /// The file that would usually be there.
        expected: String,
    },
    /// No `bootstrap` at the root.
    #[error("the zip has no executable `bootstrap` at its root, which the runtime `provided` starts")]
    NoBootstrap,
    /// A `bootstrap` without the permission to execute.
    #[error("`bootstrap` in the zip is not executable; set its mode to 0755 before zipping")]
    NotExecutable,
}

/// Reads a whole zip and checks it; answers with the bytes it unpacks to. Blocks.
///
/// # Errors
///
/// [`ArchiveError`], for the first thing that is wrong.
pub fn check(file: impl Read + Seek, runtime: &str, handler: &str, limits: ArchiveLimits) -> Result<u64, ArchiveError> {
    let mut archive = open(io::BufReader::with_capacity(1 << 16, file), limits)?;
    let mut tree = Tree::new(limits.entries);
    let mut unpacked = 0;
    for index in 0..archive.len() {
        unpacked +=
            check_entry(&mut archive, index, &mut tree, limits.unzipped_bytes - unpacked).map_err(
                |error| match error {
                    ArchiveError::TooLarge { .. } => ArchiveError::TooLarge {
                        limit: limits.unzipped_bytes,
                    },
                    ArchiveError::Path {
                        source: PathError::TooMany,
                        ..
                    } => ArchiveError::TooManyEntries { limit: limits.entries },
                    other => other,
                },
            )?;
    }
    tree.check_links()
        .map_err(|(name, source)| ArchiveError::Path { name, source })?;
    check_handler(&tree, runtime, handler)?;
    Ok(unpacked)
}

fn open<R: Read + Seek>(mut file: R, limits: ArchiveLimits) -> Result<ZipArchive<R>, ArchiveError> {
    // The count first, without an index of all entries: a zip of the largest size could hold a million.
    let count = zip::unstable::read::ZipIterable::try_new(&mut file, Default::default())
        .map_err(corrupt)?
        .len();
    if count > limits.entries {
        return Err(ArchiveError::TooManyEntries { limit: limits.entries });
    }
    let mut archive = ZipArchive::new(file).map_err(corrupt)?;
    if archive.len() > limits.entries {
        return Err(ArchiveError::TooManyEntries { limit: limits.entries });
    }
    if archive.is_empty() {
        return Err(ArchiveError::Empty);
    }
    // Headers that contradict the directory, entries that overlap (a bomb's trick), entries that the directory hides,
    // and names that are there twice: programs that unpack disagree on what such a zip holds.
    archive.validate_header_consistency().map_err(corrupt)?;
    Ok(archive)
}

/// Checks one entry, adds it to the tree and answers with its bytes; at most `room` of them.
fn check_entry<R: Read + Seek>(
    archive: &mut ZipArchive<R>,
    index: usize,
    tree: &mut Tree,
    room: u64,
) -> Result<u64, ArchiveError> {
    let entry = archive.by_index_data(index).map_err(corrupt)?;
    let name = entry.name().map_err(corrupt)?.into_owned();
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
    let mode = entry.unix_mode();
    let kind = mode.map_or(0, |mode| mode & file_type::S_IFMT);
    let (is_folder, is_link) = (entry.is_dir(), entry.is_symlink());
    let regular = [0, file_type::S_IFREG, file_type::S_IFDIR, file_type::S_IFLNK].contains(&kind);
    let folder_as_file = is_folder != (kind == file_type::S_IFDIR) && kind != 0;
    if !regular || folder_as_file || (is_folder && is_link) {
        return Err(ArchiveError::Special { name });
    }
    let mut content = archive.by_index(index).map_err(corrupt)?;
    let mut target = Vec::new();
    let damaged = |source| {
        if is_of_the_disk(&source) {
            return ArchiveError::Io(source);
        }
        ArchiveError::CorruptEntry {
            name: name.clone(),
            source,
        }
    };
    // One byte more than there is room for tells a zip that is too large.
    let mut limited = (&mut content).take(room.saturating_add(1));
    if is_link {
        // Longer targets than any path are found out by the tree.
        (&mut limited).take(4097).read_to_end(&mut target).map_err(damaged)?;
    }
    let rest = io::copy(&mut limited, &mut io::sink()).map_err(damaged)?;
    let bytes = rest + target.len() as u64;
    if bytes > room {
        return Err(ArchiveError::TooLarge { limit: room });
    }
    let node = if is_folder {
        Node::Folder
    } else if is_link {
        Node::Link(String::from_utf8(target).map_err(|_| ArchiveError::Path {
            name: name.clone(),
            source: PathError::Target,
        })?)
    } else {
        Node::File {
            mode: mode.map(|mode| mode & 0o7777),
        }
    };
    tree.add(&name, node)
        .map_err(|source| ArchiveError::Path { name, source })?;
    Ok(bytes)
}

/// The file types of `st_mode` (inode(7)), which zips made on Unix carry.
mod file_type {
    pub(super) const S_IFMT: u32 = 0o170_000;
    pub(super) const S_IFREG: u32 = 0o100_000;
    pub(super) const S_IFDIR: u32 = 0o040_000;
    pub(super) const S_IFLNK: u32 = 0o120_000;
}

fn check_handler(tree: &Tree, runtime: &str, handler: &str) -> Result<(), HandlerError> {
    let is_file = |path: &str| matches!(tree.resolve(path), Some(Node::File { .. }));
    if runtime == "provided" {
        return match tree.resolve("bootstrap") {
            Some(Node::File { mode: Some(mode) }) if mode & 0o111 != 0 => Ok(()),
            Some(Node::File { .. }) => Err(HandlerError::NotExecutable),
            _ => Err(HandlerError::NoBootstrap),
        };
    }
    // As awslambdaric finds it: what is before the last dot is the module, `/` in it is as good as `.`.
    let module = handler
        .rsplit_once('.')
        .map_or(handler, |(module, _)| module)
        .replace('.', "/");
    let found = [
        ".py",
        "/__init__.py",
        ".pyc",
        "/__init__.pyc",
        ".so",
        ".abi3.so",
        ".cpython-311-x86_64-linux-gnu.so",
    ]
    .iter()
    .any(|suffix| is_file(&format!("{module}{suffix}")));
    if found {
        Ok(())
    } else {
        Err(HandlerError::NoModule {
            handler: handler.to_owned(),
            expected: format!("{module}.py"),
        })
    }
}

fn corrupt(error: ZipError) -> ArchiveError {
    match error {
        ZipError::Io(source) if is_of_the_disk(&source) => ArchiveError::Io(source),
        other => ArchiveError::Corrupt(other),
    }
}

/// A read that failed below us; ends that come too early and seeks to impossible places are the zip's fault.
fn is_of_the_disk(error: &io::Error) -> bool {
    error.raw_os_error().is_some() && error.kind() != io::ErrorKind::InvalidInput
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Write as _};

    use proptest::prelude::*;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    const LIMITS: ArchiveLimits = ArchiveLimits {
        unzipped_bytes: 1 << 20,
        entries: 10,
    };

    fn options() -> SimpleFileOptions {
        SimpleFileOptions::default().compression_method(CompressionMethod::Deflated)
    }

    fn zip(fill: impl FnOnce(&mut ZipWriter<Cursor<Vec<u8>>>)) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        fill(&mut zip);
        zip.finish().unwrap().into_inner()
    }

    fn files(entries: &[(&str, u32, &[u8])]) -> Vec<u8> {
        zip(|zip| {
            for (name, mode, content) in entries {
                zip.start_file(*name, options().unix_permissions(*mode)).unwrap();
                zip.write_all(content).unwrap();
            }
        })
    }

    fn app() -> Vec<u8> {
        files(&[("app.py", 0o644, b"def handler(event, context): pass")])
    }

    fn python(zip: &[u8]) -> Result<u64, ArchiveError> {
        check(Cursor::new(zip), "python3.11", "app.handler", LIMITS)
    }

    /// The same zip with each `from` in its headers replaced by `to` of the same length.
    fn patched(mut zip: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
        assert_eq!(from.len(), to.len());
        let mut found = 0;
        for at in 0..=zip.len() - from.len() {
            if zip[at..].starts_with(from) {
                zip[at..at + to.len()].copy_from_slice(to);
                found += 1;
            }
        }
        assert!(found > 0);
        zip
    }

    #[test]
    fn a_good_zip_is_measured() {
        assert_eq!(python(&app()).unwrap(), 33);
    }

    #[test]
    fn damaged_zips_are_refused() {
        let good = files(&[("app.py", 0o644, &[b'x'; 5000])]);
        for length in 0..good.len() {
            assert!(python(&good[..length]).is_err(), "cut to {length} bytes");
        }
        assert!(matches!(python(b"no zip at all"), Err(ArchiveError::Corrupt(_))));
        let mut damaged = files(&[("app.py", 0o644, b"x = 1"), ("b.py", 0o644, b"0123456789")]);
        let at = damaged.windows(4).position(|w| w == b"x = ").unwrap_or(45);
        damaged[at] ^= 0x40;
        assert!(matches!(
            python(&damaged),
            Err(ArchiveError::CorruptEntry { .. } | ArchiveError::Corrupt(_))
        ));
    }

    #[test]
    fn sizes_are_counted_not_believed() {
        let zeros = vec![0; LIMITS.unzipped_bytes as usize + 1];
        let bomb = files(&[("app.py", 0o644, &zeros)]);
        assert!(bomb.len() < 10_000);
        assert!(matches!(python(&bomb), Err(ArchiveError::TooLarge { limit }) if limit == 1 << 20));
        // The same with headers that speak of 5 bytes.
        let size = (zeros.len() as u32).to_le_bytes();
        assert!(python(&patched(bomb, &size, &5u32.to_le_bytes())).is_err());
        // Many that are large only together.
        let halves = files(&[("app.py", 0o644, &zeros[..600_000]), ("b.py", 0o644, &zeros[..600_000])]);
        assert!(matches!(python(&halves), Err(ArchiveError::TooLarge { limit }) if limit == 1 << 20));
        let exactly = files(&[("app.py", 0o644, &zeros[1..])]);
        assert_eq!(python(&exactly).unwrap(), 1 << 20);
    }

    #[test]
    fn overlapping_entries_are_refused() {
        let overlap = zip(|zip| {
            zip.start_file("app.py", options()).unwrap();
            zip.write_all(&[0; 1000]).unwrap();
            zip.shallow_copy_file("app.py", "b.py").unwrap();
        });
        assert!(matches!(python(&overlap), Err(ArchiveError::Corrupt(_))));
    }

    #[test]
    fn numbers_are_limited() {
        let names: Vec<String> = (0..11).map(|i| format!("f{i}")).collect();
        let entries: Vec<(&str, u32, &[u8])> = names.iter().map(|n| (n.as_str(), 0o644, &b""[..])).collect();
        assert!(matches!(
            python(&files(&entries)),
            Err(ArchiveError::TooManyEntries { limit: 10 })
        ));
        assert!(matches!(python(&zip(|_| ())), Err(ArchiveError::Empty)));
    }

    #[test]
    fn implied_folders_are_limited_too() {
        let deep = format!("{}x.py", "a/".repeat(9));
        assert!(matches!(
            python(&files(&[("app.py", 0o644, b""), (&deep, 0o644, b"")])),
            Err(ArchiveError::TooManyEntries { limit: 10 })
        ));
        let normal = zip(|zip| {
            for folder in ["lib/", "lib/deep/"] {
                zip.add_directory(folder, options()).unwrap();
            }
            for file in [
                "app.py",
                "lib/a.py",
                "lib/deep/b.py",
                "lib/deep/c.py",
                "other/deep/d.py",
            ] {
                zip.start_file(file, options()).unwrap();
            }
        });
        python(&normal).unwrap();
    }

    #[test]
    fn paths_outside_are_refused() {
        for bad in ["../../x.py", "/abs/xx.py", "a\\..\\x.py", "C:/xxxx.py", "a/../xx.py"] {
            let name = "q".repeat(bad.len());
            let evil = files(&[("app.py", 0o644, b""), (&name, 0o644, b"")]);
            let evil = patched(evil, name.as_bytes(), bad.as_bytes());
            let error = python(&evil).unwrap_err();
            assert!(matches!(error, ArchiveError::Path { .. }), "{bad}: {error}");
        }
    }

    #[test]
    fn names_that_are_there_twice_are_refused() {
        let twice = files(&[("app.py", 0o644, b"1"), ("apq.py", 0o644, b"2")]);
        assert!(python(&twice).is_ok());
        assert!(python(&patched(twice, b"apq.py", b"app.py")).is_err());
        let twice = files(&[("app.py", 0o644, b"1"), ("./app.py", 0o644, b"2")]);
        assert!(matches!(
            python(&twice),
            Err(ArchiveError::Path {
                source: PathError::Twice,
                ..
            })
        ));
    }

    #[test]
    fn links_are_taken_inside_and_refused_outside() {
        let link = |target: &str| {
            zip(|zip| {
                zip.start_file("src/main.py", options()).unwrap();
                zip.add_symlink("app.py", target, options()).unwrap();
            })
        };
        python(&link("src/main.py")).unwrap();
        for out in ["/etc/passwd", "../x", "src/../../x"] {
            let error = python(&link(out)).unwrap_err();
            assert!(
                matches!(
                    error,
                    ArchiveError::Path {
                        source: PathError::LeadsOut,
                        ..
                    }
                ),
                "{out}: {error}"
            );
        }
        assert!(matches!(
            python(&link("src/gone.py")),
            Err(ArchiveError::Handler(HandlerError::NoModule { .. }))
        ));
    }

    #[test]
    fn encrypted_and_special_entries_are_refused() {
        let mut encrypted = app();
        // Bit 0 of the general purpose flags (APPNOTE 4.4.4), in the local (offset 6) and central (offset 8) headers.
        encrypted[6] |= 1;
        let central = encrypted.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        encrypted[central + 8] |= 1;
        assert!(matches!(python(&encrypted), Err(ArchiveError::Encrypted { .. })));
        let mut device = app();
        let central = device.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
        // The upper half of the external attributes is st_mode: a character device.
        device[central + 40..central + 42].copy_from_slice(&0o020_644u16.to_le_bytes());
        assert!(matches!(python(&device), Err(ArchiveError::Special { .. })));
    }

    #[test]
    fn handlers_are_looked_for_where_the_runtime_does() {
        let at =
            |name: &str, handler: &str| check(Cursor::new(files(&[(name, 0o644, b"")])), "python3.11", handler, LIMITS);
        for (name, handler) in [
            ("app.py", "app.handler"),
            ("pkg/app.py", "pkg.app.handler"),
            ("pkg/app.py", "pkg/app.handler"),
            ("app/__init__.py", "app.handler"),
            ("app.cpython-311-x86_64-linux-gnu.so", "app.handler"),
        ] {
            at(name, handler).unwrap();
        }
        let error = at("app.py", "main.handler").unwrap_err().to_string();
        assert!(error.contains("\"main.py\" is missing"), "{error}");
        let native = |mode| check(Cursor::new(files(&[("bootstrap", mode, b"")])), "provided", "", LIMITS);
        native(0o755).unwrap();
        assert!(matches!(
            native(0o644),
            Err(ArchiveError::Handler(HandlerError::NotExecutable))
        ));
        assert!(matches!(
            check(Cursor::new(app()), "provided", "", LIMITS),
            Err(ArchiveError::Handler(HandlerError::NoBootstrap))
        ));
    }

    proptest! {
        #[test]
        fn rubbish_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..500)) {
            prop_assert!(python(&bytes).is_err());
        }

        #[test]
        fn a_few_changed_bytes_never_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
            let mut bytes = files(&[("app.py", 0o644, b"pass"), ("lib/x.so", 0o755, &[7; 300])]);
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let _ = python(&bytes);
        }
    }
}
