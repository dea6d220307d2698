//! Compiles the kernel-side programs (`ebpf/programs`) for the BPF target, to be embedded in the library.
//!
//! It is a build of its own inside this one: other target, other flags, `core` from source. The pinned stable compiler does it
//! with `RUSTC_BOOTSTRAP=1`, and no linker: with link-time optimisation all is one module, and its object file is what the
//! kernel's loaders take. Of itself the compiler would emit LLVM's bitcode, for a linker that goes on from there.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

const TARGET: &str = "bpfel-unknown-none";

/// Atomic exchange and 32-bit jumps, from kernel 5.12 on.
const CPU: &str = "v3";

/// The object files, and the variables that the library finds them by.
const OBJECTS: [(&str, &str); 2] = [
    ("stoker", "STOKER_EBPF_OBJECT"),
    ("scheduler", "STOKER_SCHEDULER_OBJECT"),
];

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = env::args_os().skip(1);
    if let Some(rustc) = arguments.next() {
        return Err(compile(rustc, arguments.collect()).into());
    }
    let out = PathBuf::from(variable("OUT_DIR")?);
    let programs = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("../programs");
    let own = ["src", "Cargo.toml", "Cargo.lock"];
    let shared = [
        "../types/src",
        "../types/Cargo.toml",
        "../../credits/src",
        "../../credits/Cargo.toml",
    ];
    for source in own.into_iter().chain(shared) {
        println!("cargo::rerun-if-changed={}", programs.join(source).display());
    }
    require_rust_src()?;

    let target = out.join("bpfel.json");
    fs::write(&target, specification()?)?;
    for (name, variable) in OBJECTS {
        let object = build(name, &programs, &target, &out)?;
        println!("cargo::rustc-env={variable}={}", object.display());
    }
    Ok(())
}

/// Compiles one object file.
fn build(name: &str, programs: &Path, target: &Path, out: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let object = out.join(name).with_extension("o");
    let mut cargo = Command::new(variable("CARGO")?);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_build) {
            cargo.env_remove(name);
        }
    }
    let status = cargo
        .current_dir(programs)
        .args([
            "rustc",
            "--bin",
            name,
            "--release",
            "--locked",
            "-Zbuild-std=core",
            "-Zjson-target-spec",
        ])
        .arg("--target")
        .arg(target)
        .arg("--target-dir")
        .arg(out.join("programs"))
        .arg("--")
        .arg(format!("--emit=obj={}", object.display()))
        // aya links functions by their addresses in one section.
        .arg("-Zfunction-sections=no")
        .env("RUSTC", variable("RUSTC")?)
        .env("RUSTC_WRAPPER", env::current_exe()?)
        .env("RUSTC_BOOTSTRAP", "1")
        // The object file is all that is wanted.
        .env(
            "CARGO_ENCODED_RUSTFLAGS",
            format!("-Clinker=true\u{1f}-Ctarget-cpu={CPU}"),
        )
        .status()?;
    if !status.success() {
        return Err(format!("compiling {} for {TARGET} ended with {status}", programs.display()).into());
    }
    Ok(object)
}

/// The compiler as cargo starts it for the programs. `compiler_builtins`, which the programs use nothing of, has 128-bit
/// arithmetic that can't be expressed in BPF: no code is made of it.
fn compile(rustc: OsString, mut arguments: Vec<OsString>) -> std::io::Error {
    if arguments.iter().any(|argument| argument == "compiler_builtins") {
        arguments.push("-Zno-codegen".into());
    }
    Command::new(rustc).args(arguments).exec()
}

/// The compiler's own description of the target, but for what it emits: object files.
fn specification() -> Result<String, Box<dyn Error>> {
    const BITCODE: &str = "\"obj-is-bitcode\": true";
    let printed = rustc(&["-Zunstable-options", "--print", "target-spec-json", "--target", TARGET])?;
    if !printed.contains(BITCODE) {
        return Err(format!("the compiler describes {TARGET} without {BITCODE}:\n{printed}").into());
    }
    Ok(printed.replace(BITCODE, "\"obj-is-bitcode\": false"))
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

/// What the compiler prints.
fn rustc(arguments: &[&str]) -> Result<String, Box<dyn Error>> {
    let output = Command::new(variable("RUSTC")?)
        .args(arguments)
        .env("RUSTC_BOOTSTRAP", "1")
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("rustc {} ended with {}: {said}", arguments.join(" "), output.status).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// `-Zbuild-std` compiles `core` from the toolchain's `rust-src`.
fn require_rust_src() -> Result<(), Box<dyn Error>> {
    let sysroot = rustc(&["--print", "sysroot"])?;
    let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/Cargo.toml");
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
