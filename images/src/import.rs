//! From what was found to what is kept: opens an image, lays its layers over one another, and writes the result.

use std::{
    fs::{self, File},
    io::{Read, Write as _},
    os::unix::fs::FileExt as _,
    path::Path,
};

use stoker_linux::users;

use crate::{
    config::Config,
    erofs::{self, WriteError},
    error::{ImageError, LayerError, TarError},
    limits::{Exceeded, Limits},
    manifest::Plan,
    source::{Archive, Files, Folder, Pulled},
    spool::{Compression, Spool, check, spool},
    tar::{Ending, Reader, Section},
    tree::Tree,
};

/// An image's files as erofs, in the folder of the image.
pub(crate) const ROOT: &str = "root.erofs";
/// How it is run, as JSON, beside it.
pub(crate) const CONFIG: &str = "config.json";

/// An image that was opened: what it is made of is known, and its layers were not read yet.
pub(crate) struct Opened {
    pub(crate) plan: Plan,
    content: Content,
}

enum Content {
    Files(Box<dyn Files>),
    /// The tar of a root file system.
    Root(Spool),
}

// === impl Opened ===

impl Opened {
    /// Finds out what lies at a path. `wanted` says which image is meant where there are several; what has to be unpacked for
    /// it goes to `work`.
    pub(crate) fn path(path: &Path, wanted: Option<&str>, work: &Path, limits: &Limits) -> Result<Self, ImageError> {
        let opening = || ImageError::io(format!("open {}", path.display()));
        let file = File::open(path).map_err(opening())?;
        let metadata = file.metadata().map_err(opening())?;
        if metadata.is_dir() {
            let folder = Folder::open(path)?;
            if matches!(folder.open("oci-layout"), Err(ImageError::Missing(_))) {
                return Err(not_an_image(path, "the folder has no file `oci-layout`"));
            }
            let plan = Plan::of_layout(&folder, wanted, limits)?;
            return Ok(Self {
                plan,
                content: Content::Files(Box::new(folder)),
            });
        }
        let mut start = [0; 8];
        if !metadata.is_file() || file.read_at(&mut start, 0).map_err(opening())? == 0 {
            return Err(not_an_image(
                path,
                "it is neither a folder nor a file with something in it",
            ));
        }
        if Compression::of(&start) == Compression::Plain {
            return Self::tar(file, metadata.len(), None, path, wanted, work, limits);
        }
        Self::stream(file, path, wanted, work, limits)
    }

    /// The same of what comes as a stream; `path` is what it is called.
    pub(crate) fn stream(
        from: impl Read,
        path: &Path,
        wanted: Option<&str>,
        work: &Path,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        let spool = spool(from, None, work, limits.unpacked, "the tar")?;
        let file = spool.file.try_clone().map_err(ImageError::io("open a file again"))?;
        Self::tar(file, spool.size, Some(spool), path, wanted, work, limits)
    }

    /// What was pulled.
    pub(crate) fn pulled(plan: Plan, files: Pulled) -> Self {
        Self {
            plan,
            content: Content::Files(Box::new(files)),
        }
    }

    fn tar(
        file: File,
        len: u64,
        spooled: Option<Spool>,
        path: &Path,
        wanted: Option<&str>,
        work: &Path,
        limits: &Limits,
    ) -> Result<Self, ImageError> {
        match Reader::new(&file, len, Ending::Marked).next() {
            Ok(Some(_)) => {}
            Ok(None) => return Err(not_an_image(path, "there is nothing in it")),
            Err(TarError::Header(_) | TarError::Truncated) => return Err(not_an_image(path, "it is not a tar")),
            Err(error) => return Err(ImageError::tar(error)),
        }
        let archive = Archive::index(file, len, limits).map_err(ImageError::tar)?;
        let plan = if archive.has("oci-layout") && archive.has("index.json") {
            Plan::of_layout(&archive, wanted, limits)?
        } else if archive.has("manifest.json") {
            Plan::of_docker(&archive, wanted, limits)?
        } else if let Some(wanted) = wanted {
            return Err(ImageError::NoSuchImage {
                wanted: wanted.to_owned(),
                names: vec!["a root file system".to_owned()],
            });
        } else {
            let root = match spooled {
                Some(spooled) => spooled,
                // A copy, which nobody changes meanwhile.
                None => {
                    let file = archive.into_file();
                    spool(Section::new(&file, 0, len), None, work, limits.unpacked, "the tar")?
                }
            };
            return Ok(Self {
                plan: Plan::of_root(root.digest)?,
                content: Content::Root(root),
            });
        };
        Ok(Self {
            plan,
            content: Content::Files(Box::new(archive)),
        })
    }

    /// Writes the image into an empty folder, by way of files in `work`.
    pub(crate) fn build(self, folder: &Path, work: &Path, limits: &Limits) -> Result<(), ImageError> {
        let id = self.plan.id();
        let layers = match self.content {
            Content::Root(root) => vec![root],
            Content::Files(files) => unpack(&*files, &self.plan, work, limits)?,
        };
        let mut tree = Tree::new(*limits);
        for (index, layer) in layers.iter().enumerate() {
            lay(&mut tree, index, layer).map_err(|error| ImageError::layer(index, error))?;
        }
        let files: Vec<File> = layers.into_iter().map(|layer| layer.file).collect();
        let [passwd, group] = ["etc/passwd", "etc/group"].map(|path| read(&mut tree, &files, path, users::FILE_BYTES));
        let config = Config::checked(self.plan.parsed.config.as_ref(), &passwd?, &group?)?;
        let writing = || ImageError::io(format!("write an image in {}", folder.display()));
        let json = serde_json::to_vec(&config).map_err(|error| writing()(error.into()))?;
        let too_large = || ImageError::from(Exceeded::Size(limits.size));
        let size = limits.size.checked_sub(json.len() as u64).ok_or_else(too_large)?;
        let mut root = File::create_new(folder.join(ROOT)).map_err(writing())?;
        match erofs::write(&tree, &files, id.head(), size, &mut root) {
            Ok(()) => {}
            Err(WriteError::Io(error)) => return Err(writing()(error)),
            Err(WriteError::TooLarge) => return Err(too_large()),
        }
        root.sync_all().map_err(writing())?;
        let mut file = File::create_new(folder.join(CONFIG)).map_err(writing())?;
        file.write_all(&json)
            .and_then(|()| file.sync_all())
            .map_err(writing())?;
        sync(folder)
    }
}

/// Reads all layers into files, each checked.
fn unpack(files: &dyn Files, plan: &Plan, work: &Path, limits: &Limits) -> Result<Vec<Spool>, ImageError> {
    let mut left = limits.unpacked;
    let mut layers = Vec::new();
    for layer in &plan.layers {
        let spool =
            spool(files.open(&layer.name)?, layer.blob, work, left, &layer.name).map_err(|error| match error {
                ImageError::Limit(Exceeded::Unpacked(_)) => Exceeded::Unpacked(limits.unpacked).into(),
                other => other,
            })?;
        check(&layer.name, layer.diff_id, spool.digest)?;
        // The same layer may come many times, and nothing of it: to read it takes its time all the same.
        left = left.saturating_sub(spool.size.max(spool.read));
        layers.push(spool);
    }
    Ok(layers)
}

fn lay(tree: &mut Tree, index: usize, layer: &Spool) -> Result<(), LayerError> {
    tree.begin_layer(index);
    let mut reader = Reader::new(&layer.file, layer.size, Ending::Any);
    while let Some(entry) = reader.next()? {
        tree.add(entry)?;
    }
    Ok(())
}

/// The start of a file of the image; nothing where there is none.
fn read(tree: &mut Tree, layers: &[File], path: &str, most: u64) -> Result<Vec<u8>, ImageError> {
    let Some(content) = tree.file(path.as_bytes()) else {
        return Ok(Vec::new());
    };
    let mut bytes = vec![0; usize::try_from(content.size.min(most)).unwrap_or_default()];
    if let Some(layer) = layers.get(content.layer) {
        layer
            .read_exact_at(&mut bytes, content.offset)
            .map_err(ImageError::io(format!("read {path} of the image")))?;
    }
    Ok(bytes)
}

/// Has what was done in a folder on the disk.
pub(crate) fn sync(folder: &Path) -> Result<(), ImageError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(ImageError::io(format!("write {}", folder.display())))
}

/// Reads the configuration of an image that is kept.
pub(crate) fn read_config(folder: &Path) -> Result<Config, ImageError> {
    let path = folder.join(CONFIG);
    let bytes = fs::read(&path).map_err(ImageError::io(format!("read {}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|error| ImageError::io(format!("read {}", path.display()))(error.into()))
}

fn not_an_image(path: &Path, why: &str) -> ImageError {
    ImageError::NotAnImage {
        path: path.to_owned(),
        why: why.to_owned(),
    }
}
