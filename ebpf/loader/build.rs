//! Compiles the kernel-side programs (`ebpf/programs`) for the BPF target, to be embedded in the library.
//!
//! It is a build of its own inside this one: other target, other flags, other linker, `core` from source. The pinned
//! stable compiler does it with `RUSTC_BOOTSTRAP=1`.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";

/// Atomic exchange and 32-bit jumps, from kernel 5.12 on.
const CPU: &str = "v3";

fn main() -> Result<(), Box<dyn Error>> {
    let out = PathBuf::from(variable("OUT_DIR")?);
    let programs = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("../programs");
    for source in ["src", "Cargo.toml", "Cargo.lock", "../types/src", "../types/Cargo.toml"] {
        println!("cargo::rerun-if-changed={}", programs.join(source).display());
    }
    for name in ["PATH", "XDG_CACHE_HOME", "HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let linker = linker()?;
    println!("cargo::rerun-if-changed={}", linker.display());
    let sysroot = sysroot()?;
    require_rust_src(&sysroot)?;

    let target_dir = out.join("programs");
    let mut cargo = Command::new(variable("CARGO")?);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_build) {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .current_dir(&programs)
        .args(["build", "--release", "--locked", "-Zbuild-std=core"])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir)
        .env("RUSTC", variable("RUSTC")?)
        .env("RUSTC_BOOTSTRAP", "1")
        // bpf-linker loads the compiler's own LLVM.
        .env("LD_LIBRARY_PATH", sysroot.join("lib"))
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("-Clinker={}\u{1f}-Ctarget-cpu={CPU}", linker.display()),
        )
        .status()?;
    if !status.success() {
        return Err(format!("compiling {} for {TARGET} ended with {status}", programs.display()).into());
    }
    let object = target_dir.join(TARGET).join("release/stoker");
    println!("cargo::rustc-env=STOKER_EBPF_OBJECT={}", object.display());
    Ok(())
}

/// What cargo tells a build script about the outer build, and what users set to steer that one. Registries, proxies
/// and the jobserver stay.
fn belongs_to_outer_build(name: &str) -> bool {
    const NAMES: [&str; 18] = [
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_INCREMENTAL",
        "CARGO_TARGET_DIR",
        "DEBUG",
        "HOST",
        "LD_LIBRARY_PATH",
        "NUM_JOBS",
        "OPT_LEVEL",
        "OUT_DIR",
        "PROFILE",
        "RUSTC",
        "RUSTC_LINKER",
        "RUSTC_WORKSPACE_WRAPPER",
        "RUSTC_WRAPPER",
        "RUSTDOC",
        "RUSTDOCFLAGS",
        "RUSTFLAGS",
        "TARGET",
    ];
    const PREFIXES: [&str; 7] = [
        "CARGO_BUILD_",
        "CARGO_CFG_",
        "CARGO_FEATURE_",
        "CARGO_MANIFEST_",
        "CARGO_PKG_",
        "CARGO_PROFILE_",
        "CARGO_TARGET_",
    ];
    NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// `bpf-linker` from Stoker's cache, where `cargo xtask setup` puts it, else from PATH.
fn linker() -> Result<PathBuf, Box<dyn Error>> {
    let cache = env::var_os("XDG_CACHE_HOME")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    let cached = cache.map(|cache| cache.join("stoker/bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    cached
        .into_iter()
        .chain(env::split_paths(&path))
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
        .ok_or_else(|| "bpf-linker is neither in Stoker's cache folder nor in PATH: run `cargo xtask setup`".into())
}

fn sysroot() -> Result<PathBuf, Box<dyn Error>> {
    let output = Command::new(variable("RUSTC")?).args(["--print", "sysroot"]).output()?;
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// `-Zbuild-std` compiles `core` from the toolchain's `rust-src`.
fn require_rust_src(sysroot: &Path) -> Result<(), Box<dyn Error>> {
    let core = sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml");
    println!("cargo::rerun-if-changed={}", core.display());
    if core.is_file() {
        return Ok(());
    }
    Err(format!(
        "the compiler has no rust-src ({} is missing): run `cargo xtask setup`",
        core.display()
    )
    .into())
}

fn variable(name: &str) -> Result<String, Box<dyn Error>> {
    env::var(name).map_err(|error| format!("{name}: {error}").into())
}
