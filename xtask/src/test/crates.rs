//! A function and extensions on the public crates for Lambda, which a test of the guest runs.

use std::fs;

use anyhow::{Context as _, Result};

use crate::demo::functions::{digest, native};
use crate::setup::{Step, Work};

const SOURCE: &str = "guest/tests/crates";

/// All of them.
pub(super) static CRATES: Step = Step {
    name: "test-crates",
    says: "a function and extensions on the lambda_runtime and lambda-extension crates, for a test",
    seconds: 60,
    needs: &[],
    packages: &["gcc", "libc6-dev"],
    debs: &[],
    as_root: false,
    outputs: &["crates/bootstrap", "crates/external", "crates/logs"],
    inputs: |cache| {
        digest(
            cache,
            &[
                "guest/tests/crates/Cargo.toml",
                "guest/tests/crates/Cargo.lock",
                "guest/tests/crates/src/bin/bootstrap.rs",
                "guest/tests/crates/src/bin/external.rs",
                "guest/tests/crates/src/bin/logs.rs",
            ],
        )
    },
    make,
};

fn make(work: &Work<'_>) -> Result<()> {
    for name in ["bootstrap", "external", "logs"] {
        let program = native(work, SOURCE, name)?;
        fs::copy(program, work.out(&format!("crates/{name}"))?).with_context(|| format!("take {name}"))?;
    }
    Ok(())
}
