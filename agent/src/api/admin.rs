//! The `Admin` service.

use std::io::{self, BufWriter, Write};

use bytes::Bytes;
use stoker_proto::limits::CODE_CHUNK_BYTES;
use stoker_proto::v1;
use stoker_proto::v1::admin_server;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::caller::administrator;
use super::errors::database;
use crate::catalog::Catalog;
use crate::store::Store;

/// How many pieces of an archive wait for the caller.
const QUEUE: usize = 2;

/// Cares for what is on the disk, for administrators.
pub struct Admin {
    catalog: Catalog,
    store: Store,
}

type Pieces = mpsc::Sender<Result<v1::BackupResponse, Status>>;

// === impl Admin ===

impl Admin {
    /// A service over these functions and their database.
    pub fn new(catalog: Catalog, store: Store) -> Self {
        Self { catalog, store }
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    type BackupStream = ReceiverStream<Result<v1::BackupResponse, Status>>;

    async fn backup(&self, request: Request<v1::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        administrator(&request, "make a backup")?;
        let with_key = request.into_inner().with_key;
        let (pieces, stream) = mpsc::channel(QUEUE);
        let catalog = self.catalog.clone();
        tokio::spawn(async move {
            let to = BufWriter::with_capacity(CODE_CHUNK_BYTES, Sending(pieces.clone()));
            if let Err(error) = catalog.backup(with_key, to).await {
                // A caller that left has no use for it.
                let _ = pieces.send(Err(error.into())).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn rotate_key(
        &self,
        request: Request<v1::RotateKeyRequest>,
    ) -> Result<Response<v1::RotateKeyResponse>, Status> {
        let by = administrator(&request, "change the key of environment variables")?;
        let rotated = self.store.rotate_key().await.map_err(|error| database(&error))?;
        tracing::info!(
            key = rotated.key,
            values = rotated.values,
            %by,
            "changed the key of environment variables"
        );
        Ok(Response::new(v1::RotateKeyResponse {
            key_id: rotated.key,
            values: rotated.values as u64,
        }))
    }
}

/// Sends what is written to the caller; fails once that has left. Blocks.
struct Sending(Pieces);

impl Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // No piece is larger, whatever is written at once.
        let piece = bytes.get(..CODE_CHUNK_BYTES).unwrap_or(bytes);
        let chunk = Bytes::copy_from_slice(piece);
        let sent = self.0.blocking_send(Ok(v1::BackupResponse { chunk }));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
