//! Compiles the `.proto` files with protox, so that nobody installs protoc.

use std::path::PathBuf;

use prost::Message as _;

const PROTOS: [&str; 15] = [
    "stoker/v1/accounts.proto",
    "stoker/v1/admin.proto",
    "stoker/v1/code.proto",
    "stoker/v1/controller.proto",
    "stoker/v1/credits.proto",
    "stoker/v1/decisions.proto",
    "stoker/v1/functions.proto",
    "stoker/v1/images.proto",
    "stoker/v1/invocations.proto",
    "stoker/v1/logs.proto",
    "stoker/v1/machines.proto",
    "stoker/v1/notifications.proto",
    "stoker/v1/telemetry.proto",
    "stoker/guest/v1/guest.proto",
    "stoker/vmm/v1/control.proto",
];

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=stoker");
    let files = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("stoker_descriptor.bin"), files.encode_to_vec())?;
    if std::env::var_os("CARGO_FEATURE_GRPC").is_some() {
        tonic_prost_build::configure()
            .build_transport(false)
            .bytes(".")
            .compile_fds(files)?;
    } else {
        prost_build::Config::new().bytes(["."]).compile_fds(files)?;
    }
    Ok(())
}
