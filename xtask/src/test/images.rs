//! What makes and serves the images that a test imports and pulls.

use crate::setup::{
    Step,
    apt::{BOOKWORM, Fetch},
};

/// Its folder in the cache.
const FOLDER: &str = "image-tools";
const PACKAGES: &[&str] = &["docker-registry", "skopeo", "umoci"];

/// They are only unpacked, with the libraries that they want.
pub(super) static TOOLS: Step = Step {
    name: "test-image-tools",
    says: "umoci, skopeo and docker-registry, for a test (240 MB)",
    seconds: 15,
    needs: &[],
    // Its fsck.erofs checks what comes of images.
    packages: &["erofs-utils"],
    debs: &[],
    as_root: false,
    outputs: &[FOLDER],
    inputs: |_| Ok(format!("{PACKAGES:?}")),
    make: |work| BOOKWORM.unpack(work, PACKAGES, Fetch::WithDependencies, &work.out(FOLDER)?),
};
