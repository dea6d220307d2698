//! Manifests: which image is meant, and what it is made of.

use std::collections::HashSet;

use oci_spec::{
    distribution::Reference,
    image::{Arch, Config, Descriptor, ImageIndex, ImageManifest, MediaType, Os, RootFs, ToDockerV2S2 as _},
};
use serde::Deserialize;

use crate::{
    digest::Digest,
    error::ImageError,
    limits::{Exceeded, Limits},
    source::{Files, document},
    spool::{Blob, check},
};

/// How deep indexes may lie in one another.
pub(crate) const MAX_NESTED: usize = 3;
/// Annotations that name an image in a layout: of the OCI, and of what containerd and Docker write.
const NAMES: [&str; 2] = ["io.containerd.image.name", "org.opencontainers.image.ref.name"];
/// What Docker calls a layer that is not compressed, and one that is not to be passed on.
const DOCKER_LAYERS: [&str; 2] = [
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
];

/// What an image is made of.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Its configuration, as it is: the image is named by the digest of it.
    pub(crate) config: Vec<u8>,
    pub(crate) parsed: ConfigFile,
    /// The lowest first.
    pub(crate) layers: Vec<Layer>,
}

#[derive(Debug)]
pub(crate) struct Layer {
    /// What it is called where it is read from.
    pub(crate) name: String,
    /// What it is there; none where nothing says.
    pub(crate) blob: Option<Blob>,
    /// Its digest once it is decompressed.
    pub(crate) diff_id: Digest,
}

/// What matters of an image's configuration. Not its history, which `ImageConfiguration` has: of three bytes in the document for
/// a step it makes some hundred in memory.
#[derive(Debug, Deserialize)]
pub(crate) struct ConfigFile {
    architecture: Arch,
    os: Os,
    pub(crate) config: Option<Config>,
    rootfs: RootFs,
}

/// What a descriptor may name, of what leads to an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Index,
    Manifest,
}

/// One image in what `docker save` writes: an element of its `manifest.json`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

// === impl Plan ===

impl Plan {
    /// Of an OCI image layout: the image of this name, or the only one.
    pub(crate) fn of_layout(files: &dyn Files, wanted: Option<&str>, limits: &Limits) -> Result<Self, ImageError> {
        let index: ImageIndex = parse("the index", &document(files, "index.json", limits)?)?;
        let named = named(index.manifests(), wanted)?;
        let mut found = for_this_platform(&named)?;
        let mut seen = HashSet::new();
        found.retain(|descriptor| seen.insert(descriptor.digest()));
        let [descriptor] = &found[..] else {
            return Err(ImageError::Several {
                names: found.iter().map(|found| name(found)).collect(),
            });
        };
        let mut descriptor = (*descriptor).clone();
        for _ in 0..=MAX_NESTED {
            let bytes = blob_document(files, &descriptor, limits)?;
            descriptor = match kind(&descriptor) {
                Some(Kind::Manifest) => {
                    let manifest: ImageManifest = parse("the manifest", &bytes)?;
                    let config = blob_document(files, manifest.config(), limits)?;
                    return Self::of_manifest(&manifest, config, limits);
                }
                _ => choose(&parse("the index", &bytes)?)?,
            };
        }
        Err(ImageError::Nested(MAX_NESTED))
    }

    /// Of a manifest and the configuration that it names.
    pub(crate) fn of_manifest(manifest: &ImageManifest, config: Vec<u8>, limits: &Limits) -> Result<Self, ImageError> {
        check_media(manifest)?;
        let layers = manifest.layers().iter().map(|layer| {
            let blob = blob(layer)?;
            Ok((blob_name(blob.digest), Some(blob)))
        });
        Self::new(config, layers.collect::<Result<_, ImageError>>()?, limits)
    }

    /// Of what `docker save` and `podman save` write.
    pub(crate) fn of_docker(files: &dyn Files, wanted: Option<&str>, limits: &Limits) -> Result<Self, ImageError> {
        let images: Vec<DockerImage> = parse("manifest.json", &document(files, "manifest.json", limits)?)?;
        let names = |image: &DockerImage| image.repo_tags.clone().unwrap_or_default();
        let all = || images.iter().flat_map(names).collect();
        let image = match (wanted, &images[..]) {
            (None, [image]) => image,
            (None, []) => return Err(ImageError::Missing("an image".to_owned())),
            (None, _) => return Err(ImageError::Several { names: all() }),
            (Some(wanted), _) => {
                let image = images
                    .iter()
                    .find(|image| names(image).iter().any(|name| is_same(name, wanted)));
                image.ok_or_else(|| ImageError::NoSuchImage {
                    wanted: wanted.to_owned(),
                    names: all(),
                })?
            }
        };
        let config = document(files, &image.config, limits)?;
        // Most name it by its digest.
        let stem = image.config.trim_end_matches(".json");
        let stem = stem.rsplit_once('/').map_or(stem, |(_, stem)| stem);
        if let Ok(expected) = Digest::from_hex(stem) {
            check("the configuration", expected, Digest::of(&config))?;
        }
        Self::new(
            config,
            image.layers.iter().map(|layer| (layer.clone(), None)).collect(),
            limits,
        )
    }

    /// Of the only layer of an image that says nothing of how it is run.
    pub(crate) fn of_root(diff_id: Digest) -> Result<Self, ImageError> {
        let config =
            format!(r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{diff_id}"]}}}}"#);
        let layers = vec![("the tar".to_owned(), None)];
        Self::new(config.into_bytes(), layers, &Limits::default())
    }

    fn new(config: Vec<u8>, layers: Vec<(String, Option<Blob>)>, limits: &Limits) -> Result<Self, ImageError> {
        let parsed: ConfigFile = parse("the configuration", &config)?;
        if (&parsed.os, &parsed.architecture) != (&Os::Linux, &Arch::Amd64) {
            return Err(ImageError::Platform {
                found: vec![format!("{}/{}", parsed.os, parsed.architecture)],
            });
        }
        if layers.len() > limits.layers {
            return Err(Exceeded::Layers(limits.layers).into());
        }
        let diff_ids = parsed.rootfs.diff_ids();
        if layers.len() != diff_ids.len() {
            return Err(ImageError::LayerCount {
                layers: layers.len(),
                diff_ids: diff_ids.len(),
            });
        }
        let layers = layers.into_iter().zip(diff_ids).map(|((name, blob), diff_id)| {
            let diff_id = diff_id.parse()?;
            Ok(Layer { name, blob, diff_id })
        });
        Ok(Self {
            layers: layers.collect::<Result<_, ImageError>>()?,
            config,
            parsed,
        })
    }

    /// What the image is named by.
    pub(crate) fn id(&self) -> Digest {
        Digest::of(&self.config)
    }
}

/// What a descriptor leads to; none where that is no image.
pub(crate) fn kind(descriptor: &Descriptor) -> Option<Kind> {
    kind_of(descriptor.media_type())
}

/// What a document of this media type is; none where it is no image.
pub(crate) fn kind_of(media_type: &MediaType) -> Option<Kind> {
    [
        (MediaType::ImageIndex, Kind::Index),
        (MediaType::ImageManifest, Kind::Manifest),
    ]
    .into_iter()
    .find_map(|(known, kind)| is(media_type, &known).then_some(kind))
}

/// The media types of what leads to an image, for a registry.
pub(crate) fn accepted() -> String {
    let both = [MediaType::ImageIndex, MediaType::ImageManifest];
    let names = both
        .iter()
        .flat_map(|known| [Some(known.as_ref()), known.to_docker_v2s2().ok()]);
    names.flatten().collect::<Vec<_>>().join(", ")
}

/// The first entry of an index that is for this platform: so the OCI's specification has it.
pub(crate) fn choose(index: &ImageIndex) -> Result<Descriptor, ImageError> {
    let all: Vec<&Descriptor> = index.manifests().iter().collect();
    let found = for_this_platform(&all)?;
    found
        .first()
        .map(|found| (*found).clone())
        .ok_or_else(|| ImageError::Missing("an image".to_owned()))
}

/// What a descriptor says of the bytes that it names.
pub(crate) fn blob(descriptor: &Descriptor) -> Result<Blob, ImageError> {
    Ok(Blob {
        digest: descriptor.digest().to_string().parse()?,
        size: descriptor.size(),
    })
}

/// Where a layout has these bytes.
pub(crate) fn blob_name(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

pub(crate) fn parse<T: for<'de> Deserialize<'de>>(what: &str, bytes: &[u8]) -> Result<T, ImageError> {
    serde_json::from_slice(bytes).map_err(|source| ImageError::Document {
        what: what.to_owned(),
        source,
    })
}

/// Refuses what is not made of tars, and what is no image at all though its manifest is one's.
pub(crate) fn check_media(manifest: &ImageManifest) -> Result<(), ImageError> {
    let unknown = |what: &str, media_type: &MediaType| ImageError::MediaType {
        what: what.to_owned(),
        media_type: media_type.to_string(),
    };
    let config = manifest.config().media_type();
    if !is(config, &MediaType::ImageConfig) {
        return Err(unknown("the configuration", config));
    }
    for layer in manifest.layers() {
        let media_type = layer.media_type();
        let known = [
            MediaType::ImageLayer,
            MediaType::ImageLayerGzip,
            MediaType::ImageLayerZstd,
            MediaType::ImageLayerNonDistributable,
            MediaType::ImageLayerNonDistributableGzip,
            MediaType::ImageLayerNonDistributableZstd,
        ];
        if !known.iter().any(|known| is(media_type, known)) && !DOCKER_LAYERS.contains(&media_type.as_ref()) {
            return Err(unknown("a layer", media_type));
        }
    }
    Ok(())
}

/// Reads what a descriptor names, and checks it.
fn blob_document(files: &dyn Files, descriptor: &Descriptor, limits: &Limits) -> Result<Vec<u8>, ImageError> {
    let Blob { digest, size } = blob(descriptor)?;
    let name = blob_name(digest);
    let bytes = document(files, &name, limits)?;
    if bytes.len() as u64 != size {
        return Err(ImageError::Size {
            what: name,
            expected: size,
            found: bytes.len() as u64,
        });
    }
    check(&name, digest, Digest::of(&bytes))?;
    Ok(bytes)
}

/// The entries of an index that have a name, or all.
fn named<'a>(all: &'a [Descriptor], wanted: Option<&str>) -> Result<Vec<&'a Descriptor>, ImageError> {
    let Some(wanted) = wanted else {
        return Ok(all.iter().collect());
    };
    let found: Vec<&Descriptor> = all
        .iter()
        .filter(|descriptor| names(descriptor).any(|name| is_same(name, wanted)))
        .collect();
    if found.is_empty() {
        return Err(ImageError::NoSuchImage {
            wanted: wanted.to_owned(),
            names: all.iter().map(name).collect(),
        });
    }
    Ok(found)
}

fn names(descriptor: &Descriptor) -> impl Iterator<Item = &String> {
    let annotations = descriptor.annotations().as_ref();
    NAMES.iter().filter_map(move |key| annotations?.get(*key))
}

fn name(descriptor: &Descriptor) -> String {
    names(descriptor)
        .next()
        .cloned()
        .unwrap_or_else(|| descriptor.digest().to_string())
}

/// Whether two names mean the same image: `web` is `docker.io/library/web:latest`.
fn is_same(name: &str, other: &str) -> bool {
    let whole = |name: &str| name.parse::<Reference>().ok().map(|reference| reference.whole());
    name == other || whole(name).is_some_and(|name| whole(other) == Some(name))
}

/// The entries that may be for this platform, which one need not say: the image's configuration does. An error where there
/// are others alone.
fn for_this_platform<'a>(all: &[&'a Descriptor]) -> Result<Vec<&'a Descriptor>, ImageError> {
    let images: Vec<&Descriptor> = all
        .iter()
        .copied()
        .filter(|descriptor| kind(descriptor).is_some())
        .collect();
    let fits = |descriptor: &&Descriptor| {
        let platform = descriptor.platform().as_ref();
        platform.is_none_or(|platform| (platform.os(), platform.architecture()) == (&Os::Linux, &Arch::Amd64))
    };
    let mut found: Vec<&Descriptor> = images.iter().copied().filter(fits).collect();
    // Of those for later processors of the kind only where there is no other.
    let is_later = |descriptor: &Descriptor| {
        let variant = descriptor
            .platform()
            .as_ref()
            .and_then(|platform| platform.variant().as_ref());
        variant.is_some_and(|variant| variant != "v1")
    };
    if found.iter().any(|descriptor| !is_later(descriptor)) {
        found.retain(|descriptor| !is_later(descriptor));
    }
    if !found.is_empty() {
        return Ok(found);
    }
    match (images.is_empty(), all.first()) {
        (false, _) => Err(ImageError::Platform {
            found: images
                .iter()
                .filter_map(|descriptor| descriptor.platform().as_ref())
                .map(|platform| format!("{}/{}", platform.os(), platform.architecture()))
                .collect(),
        }),
        (true, Some(first)) => Err(ImageError::MediaType {
            what: "what the index names".to_owned(),
            media_type: first.media_type().to_string(),
        }),
        (true, None) => Err(ImageError::Missing("an image".to_owned())),
    }
}

/// Whether a media type is this one, by its name of the OCI or by Docker's.
fn is(media_type: &MediaType, known: &MediaType) -> bool {
    media_type == known || known.to_docker_v2s2().is_ok_and(|docker| docker == media_type.as_ref())
}
