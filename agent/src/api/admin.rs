//! The `Admin` service.

use stoker_proto::v1;
use stoker_proto::v1::admin_server;
use tonic::{Request, Response, Status};

use super::errors::database;
use crate::store::Store;

/// Cares for what is on the disk.
#[derive(Debug)]
pub struct Admin {
    store: Store,
}

// === impl Admin ===

impl Admin {
    /// A service over this database.
    pub fn new(store: Store) -> Self {
        Self { store }
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    async fn rotate_key(
        &self,
        _request: Request<v1::RotateKeyRequest>,
    ) -> Result<Response<v1::RotateKeyResponse>, Status> {
        let rotated = self.store.rotate_key().await.map_err(|error| database(&error))?;
        tracing::info!(
            key = rotated.key,
            values = rotated.values,
            "changed the key of environment variables"
        );
        Ok(Response::new(v1::RotateKeyResponse {
            key_id: rotated.key,
            values: rotated.values as u64,
        }))
    }
}
