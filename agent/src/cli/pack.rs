//! Packs a folder as a zip: the same folder gives the same bytes.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Seek as _, SeekFrom};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

/// Packs everything below a folder but `.git`; links stay links. The file is gone when the handle is. Blocks.
///
/// # Errors
///
/// Where something in it can't be read, or is neither file, folder nor link.
pub(super) fn folder(root: &Path) -> io::Result<File> {
    let mut zip = ZipWriter::new(BufWriter::new(tempfile::tempfile()?));
    add(&mut zip, root, "")?;
    let mut file = zip.finish()?.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

fn add(zip: &mut ZipWriter<BufWriter<File>>, folder: &Path, prefix: &str) -> io::Result<()> {
    let mut entries = std::fs::read_dir(folder)?.collect::<Result<Vec<_>, _>>()?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let named = |what: &str| io::Error::other(format!("{}: {what}", path.display()));
        let file_name = entry.file_name();
        let Some(file_name) = file_name.to_str() else {
            return Err(named("its name is not UTF-8"));
        };
        let name = format!("{prefix}{file_name}");
        let kind = entry.file_type()?;
        let mode = std::fs::symlink_metadata(&path)?.permissions().mode() & 0o777;
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Deflated)
            .unix_permissions(mode);
        if kind.is_dir() {
            if name != ".git" {
                zip.add_directory(&name, options)?;
                add(zip, &path, &format!("{name}/"))?;
            }
        } else if kind.is_symlink() {
            let target = std::fs::read_link(&path)?;
            let target = target.to_str().ok_or_else(|| named("its target is not UTF-8"))?;
            zip.add_symlink(&name, target, options)?;
        } else if kind.is_file() {
            let mut file = BufReader::new(File::open(&path).map_err(|error| named(&error.to_string()))?);
            zip.start_file(&name, options)?;
            io::copy(&mut file, zip)?;
        } else {
            return Err(named("is neither a file nor a folder nor a link"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use stoker_archive::{Limits as ArchiveLimits, check};

    #[test]
    fn a_folder_becomes_a_zip_that_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::create_dir_all(at("pkg")).unwrap();
        std::fs::create_dir_all(at(".git/objects")).unwrap();
        std::fs::write(at(".git/objects/x"), "no").unwrap();
        std::fs::write(at("pkg/app.py"), "def handler(event, context): pass").unwrap();
        std::os::unix::fs::symlink("pkg/app.py", at("app.py")).unwrap();
        std::fs::write(at("bootstrap"), "#!/bin/sh").unwrap();
        std::fs::set_permissions(at("bootstrap"), std::fs::Permissions::from_mode(0o755)).unwrap();
        let limits = ArchiveLimits {
            unzipped_bytes: 1 << 20,
            entries: 4,
        };
        for (runtime, handler) in [("python3.11", "app.handler"), ("provided", "")] {
            let unpacked = check(folder(dir.path()).unwrap(), runtime, handler, limits).unwrap();
            assert_eq!(unpacked, 33 + 10 + 9);
        }
        let read = || {
            let mut bytes = Vec::new();
            io::Read::read_to_end(&mut folder(dir.path()).unwrap(), &mut bytes).unwrap();
            bytes
        };
        assert!(read() == read());
    }
}
