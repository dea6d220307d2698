//! The `Code` service.

use std::time::Duration;

use stoker_proto::v1;
use stoker_proto::v1::code_server;
use tonic::{Request, Response, Status};

use super::errors::invalid;
use super::page;
use crate::catalog::{Catalog, Orphan};

/// Shows and removes code that no function needs.
pub struct Code {
    catalog: Catalog,
}

// === impl Code ===

impl Code {
    /// A service over the code of these functions.
    pub fn new(catalog: Catalog) -> Self {
        Self { catalog }
    }
}

#[tonic::async_trait]
impl code_server::Code for Code {
    async fn list_orphans(
        &self,
        request: Request<v1::ListOrphansRequest>,
    ) -> Result<Response<v1::ListOrphansResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size)?;
        let all = self.catalog.orphans().await?.into_iter().map(proto).collect();
        let (orphans, next_page_token) = page::of(all, size, &request.page_token, "", |orphan| &orphan.code_sha256)?;
        Ok(Response::new(v1::ListOrphansResponse {
            orphans,
            next_page_token,
        }))
    }

    async fn remove_orphans(
        &self,
        request: Request<v1::RemoveOrphansRequest>,
    ) -> Result<Response<v1::RemoveOrphansResponse>, Status> {
        let older_than = request.into_inner().older_than.map(Duration::try_from).transpose();
        let older_than = older_than.map_err(|error| invalid("older_than", error.to_string()))?;
        let removed = self.catalog.remove_orphans(older_than).await?;
        Ok(Response::new(v1::RemoveOrphansResponse {
            removed: removed.len() as u64,
            removed_bytes: removed.iter().map(|orphan| orphan.size).sum(),
        }))
    }
}

fn proto(orphan: Orphan) -> v1::Orphan {
    v1::Orphan {
        code_sha256: orphan.code_sha256,
        size_bytes: orphan.size,
        orphan_time: Some(orphan.since.into()),
    }
}
