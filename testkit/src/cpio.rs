//! cpio archives of the "newc" form, as the kernel unpacks them for its initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;

const S_IFREG: u32 = 0o100_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;

/// An archive being written. Paths have no slash in front and none at the end. Owner is root and times are zero, so that equal content gives equal bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    inodes: u32,
}

impl Archive {
    /// Adds a file, and the folders that it lies in, with these permission bits.
    pub fn file(&mut self, path: &str, permissions: u32, content: &[u8]) -> &mut Self {
        self.parents(path);
        self.entry(path, S_IFREG | permissions, (0, 0), content);
        self
    }

    /// Adds a folder and those it lies in.
    pub fn folder(&mut self, path: &str) -> &mut Self {
        self.parents(path);
        if self.folders.insert(path.to_owned()) {
            self.entry(path, S_IFDIR | 0o755, (0, 0), &[]);
        }
        self
    }

    /// Adds a character device with these permission bits.
    pub fn device(&mut self, path: &str, permissions: u32, major: u32, minor: u32) -> &mut Self {
        self.parents(path);
        self.entry(path, S_IFCHR | permissions, (major, minor), &[]);
        self
    }

    /// The whole archive.
    pub fn finish(mut self) -> Vec<u8> {
        self.inodes = 0;
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        for (end, _) in path.match_indices('/') {
            if let Some(parent) = path.get(..end).filter(|parent| !parent.is_empty())
                && self.folders.insert(parent.to_owned())
            {
                self.entry(parent, S_IFDIR | 0o755, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inodes += 1;
        let links = if mode & S_IFDIR == S_IFDIR { 2 } else { 1 };
        // No initramfs of ours comes near 4 GiB, which is what the form's fields hold.
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(b"070701");
        for field in [
            self.inodes,
            mode,
            0,
            0,
            links,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_size,
            0,
        ] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        io::Write,
        process::{Command, Stdio},
    };

    use super::*;

    #[test]
    fn busybox_unpacks_it() {
        if Command::new("busybox").output().is_err() {
            return;
        }
        let mut archive = Archive::default();
        archive
            .file("init", 0o755, b"#!/bin/sh\n")
            .file("lib/a/b.ko", 0o644, b"12345")
            .folder("lib/c");
        let folder = tempfile::tempdir().unwrap();
        let mut cpio = Command::new("busybox")
            .args(["cpio", "-i", "-d"])
            .current_dir(folder.path())
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(fs::read(folder.path().join("lib/a/b.ko")).unwrap(), b"12345");
        assert_eq!(fs::read(folder.path().join("init")).unwrap(), b"#!/bin/sh\n");
        assert!(folder.path().join("lib/c").is_dir());
    }

    #[test]
    fn equal_content_gives_equal_bytes_in_the_documented_form() {
        let mut archive = Archive::default();
        archive.file("a", 0o600, b"x");
        let bytes = archive.finish();
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[14..22], b"00008180");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(11).any(|window| window == b"TRAILER!!!\0"));
    }
}
