//! Our programs: the host's, and that of guests.

use std::{env, ffi::OsStr, fs, path::PathBuf, process::Command, time::Duration};

use anyhow::{Context, Result};
use clap::ValueEnum;
use stoker_testkit::BIN_DIR;

use crate::{
    cache::Cache,
    image, kernel, process,
    setup::{self, left, tools},
};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// How they are built.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Profile {
    /// Soon built: for tests and the demo.
    Release,
    /// As they are given to users, which takes minutes: for packages and benches.
    Dist,
}

/// One of them, for the time that is left.
struct Part {
    program: &'static str,
    says: &'static str,
    /// As [`setup::Step::seconds`], with nothing compiled before but what comes before it here.
    seconds: u64,
}

const INIT: Part = Part {
    program: "stoker-init",
    says: "Compiling stoker-init, the program of guests",
    seconds: 110,
};
const VMM: Part = Part {
    program: "stoker-vmm",
    says: "Compiling stoker-vmm",
    seconds: 20,
};
const AGENT: Part = Part {
    program: "stokerd",
    says: "Compiling the agent",
    seconds: 100,
};

/// Says that all programs will have to be built for tests and the demo, of which not a version is there.
pub(crate) fn expect(cache: &Cache) {
    let folder = tools::target_dir(cache).join(Profile::Release.name());
    for part in [INIT, VMM, AGENT] {
        if !folder.join(part.program).exists() {
            left::expect(part.program, Duration::from_secs(part.seconds));
        }
    }
}

// === impl Part ===

impl Part {
    fn begin(&self) {
        if left::begin(self.program) {
            eprintln!("{} ... {}", self.says, left::words());
        }
    }
}

// === impl Profile ===

impl Profile {
    /// Cargo's name for it, and for the folder.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Release => "release",
            Self::Dist => "dist",
        }
    }
}

/// Builds the VMM and the agent and returns the folder they are in.
pub(crate) fn programs(cache: &Cache, profile: Profile) -> Result<PathBuf> {
    setup::ensure(cache, &[&tools::RUST_SRC])?;
    // Apart: built together, cargo would give the VMM the gRPC stack of the agent's copy of the protocols.
    let binaries = vmm(cache, profile)?;
    AGENT.begin();
    build(cache, profile.name(), "stoker-agent", "--bins")?;
    left::end();
    Ok(binaries)
}

/// Builds the VMM alone and returns the folder it is in. It is static: finding and binding libraries would be a fifth of the time from
/// its start to its guest's. A panic ends it (`stoker_vmm::crash`), so there is nothing to unwind.
pub(crate) fn vmm(cache: &Cache, profile: Profile) -> Result<PathBuf> {
    let profile = profile.name();
    VMM.begin();
    let of = ["--profile", profile, "--package", VMM.program];
    process::run(&mut static_program(cache, VMM.program, of, &["panic=abort"]))?;
    Ok(tools::target_dir(cache).join(profile))
}

/// Builds the program of every guest and returns it. It is static, for there is nothing but it in the initramfs; at a fixed
/// address, for 20,000 relocations would else be made at every boot; and a panic ends it.
pub(crate) fn init(cache: &Cache, profile: Profile) -> Result<PathBuf> {
    let (program, folder) = (INIT.program, tools::target_dir(cache));
    INIT.begin();
    match profile {
        // Beside the host's programs: much of what both are made of is the same.
        Profile::Release => {
            let profile = profile.name();
            let of = ["--profile", profile, "--package", program];
            let options = ["relocation-model=static", "panic=abort"];
            process::run(&mut static_program(cache, program, of, &options))?;
            Ok(folder.join(profile).join(program))
        }
        // Apart, with its own profile and flags for all that it is made of. Without unwind tables: it never unwinds. (That
        // the target is named keeps the flags from build scripts.)
        Profile::Dist => {
            let folder = folder.join("guest");
            process::run(
                tools::cargo(cache)
                    .args(["build", "--profile", "guest", "--package", program, "--bin", program])
                    .args(["--target", TARGET, "--target-dir"])
                    .arg(&folder)
                    .env(
                        "RUSTFLAGS",
                        "-C target-feature=+crt-static -C relocation-model=static -C force-unwind-tables=no",
                    ),
            )?;
            Ok(folder.join(TARGET).join("guest").join(program))
        }
    }
}

/// Cargo's command for a program that is linked statically and with these codegen options of the compiler. `of` are cargo's
/// arguments that say what it is made of, and how.
pub(crate) fn static_program(
    cache: &Cache,
    program: &str,
    of: impl IntoIterator<Item: AsRef<OsStr>>,
    options: &[&str],
) -> Command {
    let mut cargo = tools::cargo(cache);
    cargo
        .args(["rustc", "--bin", program])
        .args(of)
        .args(["--", "-C", "target-feature=+crt-static"]);
    for option in options {
        cargo.args(["-C", option]);
    }
    cargo
}

/// Builds the agent otherwise optimised, for upgrades to another build, and returns its `stokerd`.
pub(crate) fn other_agent(cache: &Cache, profile: Profile) -> Result<PathBuf> {
    setup::ensure(cache, &[&tools::RUST_SRC])?;
    let profile = profile.name();
    process::run(
        tools::cargo(cache)
            .args([
                "build",
                "--profile",
                profile,
                "--package",
                "stoker-agent",
                "--bin",
                "stokerd",
            ])
            .arg(format!("--config=profile.{profile}.package.stoker-agent.opt-level=2")),
    )?;
    let folder = tools::target_dir(cache).join(profile);
    let other = folder.join("other-stokerd");
    // The next build takes its place.
    fs::copy(folder.join("stokerd"), &other).with_context(|| format!("write {}", other.display()))?;
    Ok(other)
}

/// Builds the examples of a package, into `examples` in the folder of the programs, which it returns.
pub(crate) fn examples(cache: &Cache, profile: Profile, package: &str) -> Result<PathBuf> {
    build(cache, profile.name(), package, "--examples")?;
    Ok(tools::target_dir(cache).join(profile.name()))
}

fn build(cache: &Cache, profile: &str, package: &str, what: &str) -> Result<()> {
    process::run(tools::cargo(cache).args(["build", "--profile", profile, "--package", package, what]))
}

/// Makes the programs, all that machines boot, and the examples of the end-to-end tests, which run on them in a host; returns
/// the folder of the programs.
pub(crate) fn for_examples(cache: &Cache, profile: Profile) -> Result<PathBuf> {
    setup::ensure(cache, &[&kernel::TUNED])?;
    image::everything(cache, profile)?;
    let binaries = programs(cache, profile)?;
    examples(cache, profile, "stoker-tests")?;
    Ok(binaries)
}

/// The folder that [`BIN_DIR`] names.
pub(crate) fn named() -> Result<PathBuf> {
    env::var_os(BIN_DIR)
        .map(PathBuf::from)
        .with_context(|| format!("{BIN_DIR} is not set"))
}
