//! `stoker admin`

use clap::Subcommand;
use stoker_proto::v1;
use stoker_proto::v1::admin_client::AdminClient;

use super::{Connection, Failure, json, print_json};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Change the key that values of environment variables are encrypted with
    RotateKey,
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::RotateKey => rotate_key(connection).await,
    }
}

async fn rotate_key(connection: &Connection) -> Result<(), Failure> {
    let mut client = AdminClient::new(connection.channel().await?);
    let rotated = client.rotate_key(v1::RotateKeyRequest {}).await?.into_inner();
    if connection.json {
        print_json(&json("RotateKeyResponse", &rotated)?);
    } else {
        println!(
            "{} values are encrypted with the new key {}; keep a copy of it elsewhere, and the old one as long as backups need it",
            rotated.values, rotated.key_id
        );
    }
    Ok(())
}
