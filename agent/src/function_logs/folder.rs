//! The files of all functions, `ACCOUNT/FUNCTION.UID/NUMBER-BEGUN.log`, and of machines that were launched, `ACCOUNT/@machine.ID/`. What
//! is not named so is left alone.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use ulid::Ulid;

use super::Bounds;
use super::line::{Entry, now};
use super::segment::Segment;
use super::sources::{Source, Whose, of_folder};
use super::views::Views;

/// Into how many files what is kept of a function is divided, by size and by time: the oldest of them goes at a time.
const PARTS: u32 = 8;

/// The folder. Its methods block.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    bounds: Bounds,
    views: Views,
    functions: HashMap<Ulid, Files>,
    bytes: u64,
    /// The last that was to be written or removed could not be.
    failing: bool,
}

/// The files of a function.
#[derive(Debug)]
struct Files {
    folder: PathBuf,
    /// Nobody deletes a machine's: they go with the last that is kept of it.
    of_machine: bool,
    /// The oldest first.
    segments: VecDeque<Segment>,
    bytes: u64,
    /// Up to where it was written, as [`Segment::start`] counts.
    end: u64,
    /// The number of the next one.
    next: u64,
    /// What could not be written since it last could, in bytes of text.
    lost: u64,
}

// === impl Folder ===

impl Folder {
    /// The folder as if nothing were in it.
    pub(super) fn new(path: PathBuf, bounds: Bounds, views: Views) -> Self {
        Self {
            path,
            bounds,
            views,
            functions: HashMap::new(),
            bytes: 0,
            failing: false,
        }
    }

    /// Looks what an earlier agent left.
    pub(super) fn find(&mut self) {
        let found = folders(&self.path).and_then(|accounts| {
            for account in accounts {
                for folder in folders(&account)? {
                    self.find_function(folder)?;
                }
            }
            Ok(())
        });
        if let Err(error) = found {
            tracing::error!(folder = %self.path.display(), %error, "logs of functions can't be read; what is not read is not bounded either");
        }
        self.tidy();
        self.views.all_found();
    }

    fn find_function(&mut self, folder: PathBuf) -> io::Result<()> {
        let name = folder.file_name().and_then(|name| name.to_str());
        let Some((uid, of_machine)) = name.and_then(of_folder) else {
            return Ok(());
        };
        let mut segments = Vec::new();
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let found = entry.metadata()?;
            if found.is_file()
                && let Some(segment) = Segment::find(entry.path(), &found)?
            {
                segments.push(segment);
            }
        }
        segments.sort_unstable_by_key(|segment| segment.number);
        let mut files = Files::new(folder, of_machine);
        for mut segment in segments {
            segment.start = files.end;
            files.end = segment.end();
            files.bytes += segment.bytes;
            files.next = segment.number.saturating_add(1);
            files.segments.push_back(segment);
        }
        self.bytes += files.bytes;
        self.views.show(uid, files.segments.iter().cloned());
        self.functions.insert(uid, files);
        Ok(())
    }

    /// Appends lines of a function. What can't be written is lost, and said in the file once something can.
    pub(super) fn append(&mut self, source: &Source, entries: &[Entry]) {
        let files = self.functions.entry(source.uid).or_insert_with(|| {
            let of_machine = matches!(source.whose, Whose::Machine(_));
            Files::new(self.path.join(source.folder()), of_machine)
        });
        let before = files.bytes;
        let appended = files.append(entries, &self.bounds);
        self.bytes = (self.bytes + files.bytes).saturating_sub(before);
        self.views.show(source.uid, files.segments.iter().cloned());
        self.note(appended);
        if self.bytes > self.bounds.total_bytes {
            self.make_room();
        }
    }

    /// Removes what is older than it is to be.
    pub(super) fn tidy(&mut self) {
        let mut tidied = Ok(());
        let oldest = now().saturating_sub(self.bounds.retention);
        for (uid, files) in &mut self.functions {
            let (bytes, count) = (files.bytes, files.segments.len());
            while files.segments.front().is_some_and(|segment| segment.written < oldest) {
                tidied = tidied.and(files.drop_oldest());
            }
            if files.segments.len() == count {
                continue;
            }
            self.bytes = (self.bytes + files.bytes).saturating_sub(bytes);
            self.views.show(*uid, files.segments.iter().cloned());
            if files.segments.is_empty() {
                files.remove_folder();
            }
        }
        let views = &self.views;
        // As long as somebody reads it, it may go on.
        self.functions
            .retain(|uid, files| !files.of_machine || !files.segments.is_empty() || !views.forget_unread(*uid));
        self.note(tidied);
        if self.bytes > self.bounds.total_bytes {
            self.make_room();
        }
    }

    /// Removes all of a function.
    pub(super) fn delete(&mut self, uid: Ulid) {
        self.views.forget(uid);
        if let Some(mut files) = self.functions.remove(&uid) {
            self.bytes = self.bytes.saturating_sub(files.bytes);
            let mut deleted = Ok(());
            while !files.segments.is_empty() {
                deleted = deleted.and(files.drop_oldest());
            }
            files.remove_folder();
            self.note(deleted);
        }
    }

    /// Where all functions have more than they may, those lose their oldest that have the most.
    fn make_room(&mut self) {
        let mut made = Ok(());
        while self.bytes > self.bounds.total_bytes {
            let most = self.functions.iter_mut().max_by_key(|(_, files)| files.bytes);
            let Some((uid, files)) = most.filter(|(_, files)| files.bytes > 0) else {
                break;
            };
            let before = files.bytes;
            made = made.and(files.drop_oldest());
            self.bytes = (self.bytes + files.bytes).saturating_sub(before);
            self.views.show(*uid, files.segments.iter().cloned());
        }
        self.note(made);
    }

    /// Says once that it does not work, and once that it does again.
    fn note(&mut self, done: io::Result<()>) {
        let folder = self.path.display();
        match (done, self.failing) {
            (Ok(()), true) => tracing::info!(%folder, "logs of functions are kept again"),
            (Err(error), false) => {
                tracing::error!(%folder, %error, "logs of functions are not kept; see that its disk has room and can be written");
                self.failing = true;
                return;
            }
            (Ok(()), false) | (Err(_), true) => return,
        }
        self.failing = false;
    }
}

// === impl Files ===

impl Files {
    fn new(folder: PathBuf, of_machine: bool) -> Self {
        Self {
            folder,
            of_machine,
            segments: VecDeque::new(),
            bytes: 0,
            end: 0,
            next: 1,
            lost: 0,
        }
    }

    fn append(&mut self, entries: &[Entry], bounds: &Bounds) -> io::Result<()> {
        let part_bytes = bounds.function_bytes / u64::from(PARTS);
        let (mut lines, mut texts) = (Vec::new(), 0);
        let mut result = Ok(());
        for entry in entries {
            if lines.len() as u64 >= part_bytes {
                result = result.and(self.write(&lines, texts, bounds));
                (lines, texts) = (Vec::new(), 0);
            }
            entry.write(&mut lines);
            texts += entry.what.bytes();
        }
        result = result.and(self.write(&lines, texts, bounds));
        while self.bytes > bounds.function_bytes && self.segments.len() > 1 {
            result = result.and(self.drop_oldest());
        }
        result
    }

    /// Writes lines to one file; where that fails their texts are lost.
    fn write(&mut self, lines: &[u8], texts: u64, bounds: &Bounds) -> io::Result<()> {
        let mut data = Vec::new();
        if self.lost > 0 {
            Entry::lost(self.lost).write(&mut data);
        }
        data.extend_from_slice(lines);
        let written = self.write_data(&data, bounds);
        self.lost = match written {
            Ok(()) => 0,
            Err(_) => self.lost + texts,
        };
        written
    }

    fn write_data(&mut self, data: &[u8], bounds: &Bounds) -> io::Result<()> {
        let now = now();
        let bytes = data.len() as u64;
        if self
            .segments
            .back()
            .is_none_or(|last| is_full(last, bytes, bounds, now))
        {
            DirBuilder::new().recursive(true).mode(0o700).create(&self.folder)?;
            let next = Segment::begin(&self.folder, self.next, self.end, now);
            self.next = self.next.saturating_add(1);
            self.segments.push_back(next);
        }
        if let Some(last) = self.segments.back_mut() {
            last.append(data, now)?;
            self.bytes += bytes;
            self.end = last.end();
        }
        Ok(())
    }

    fn drop_oldest(&mut self) -> io::Result<()> {
        let Some(oldest) = self.segments.pop_front() else {
            return Ok(());
        };
        self.bytes = self.bytes.saturating_sub(oldest.bytes);
        oldest.remove()
    }

    /// Where something else is in it, it stays.
    fn remove_folder(&self) {
        let _ = fs::remove_dir(&self.folder);
        if let Some(account) = self.folder.parent() {
            let _ = fs::remove_dir(account);
        }
    }
}

/// Whether so many bytes more go to a new file.
fn is_full(last: &Segment, bytes: u64, bounds: &Bounds, now: Duration) -> bool {
    let parts = u64::from(PARTS);
    // What is in one file goes at a time: it is to be of one size, and of one time. A clock that was set back makes nothing old.
    let large = last.bytes > 0 && last.bytes + bytes > bounds.function_bytes / parts;
    let old = now.saturating_sub(last.begun) > bounds.retention / PARTS;
    last.torn || large || (last.bytes > 0 && old)
}

/// The folders in a folder.
fn folders(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut folders = Vec::new();
    for entry in entries {
        let entry = entry?;
        // Links are nobody's of ours.
        if entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}
