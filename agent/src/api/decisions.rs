//! The `Decisions` service.

use stoker_proto::v1;
use stoker_proto::v1::decisions_server;
use tonic::{Request, Response, Status};

use super::errors::{database, invalid};
use super::page;
use crate::host::HostHandle;

/// The most bytes of a subject's name: longer ones name nothing.
const MAX_SUBJECT: usize = 128;

/// Shows what was decided, and why.
#[derive(Debug)]
pub struct Decisions {
    host: HostHandle,
}

// === impl Decisions ===

impl Decisions {
    /// A service over this host's journal.
    pub fn new(host: HostHandle) -> Self {
        Self { host }
    }
}

#[tonic::async_trait]
impl decisions_server::Decisions for Decisions {
    async fn list_decisions(
        &self,
        request: Request<v1::ListDecisionsRequest>,
    ) -> Result<Response<v1::ListDecisionsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size)?;
        let about = subject(&request.subject)?;
        let after = match request.page_token.as_str() {
            "" => 0,
            token => token
                .parse()
                .map_err(|_| invalid("page_token", "is not one that this list gave"))?,
        };
        let listed = self.host.decisions(about, after, size + 1).await;
        let mut decisions = listed.map_err(|error| database(&error))?;
        let more = page::cut(&mut decisions, size);
        let next_page_token = decisions
            .last()
            .filter(|_| more)
            .map(|last| last.sequence.to_string())
            .unwrap_or_default();
        Ok(Response::new(v1::ListDecisionsResponse {
            decisions,
            next_page_token,
            lost: self.host.decisions_lost(),
        }))
    }
}

/// The id at the end of a subject's name.
fn subject(name: &str) -> Result<Option<String>, Status> {
    let parts: Vec<&str> = name.split('/').collect();
    let id = match parts.as_slice() {
        [""] => return Ok(None),
        [id] | ["machines" | "requests", id] | ["machines", _, "containers", id] => *id,
        _ => "",
    };
    if id.is_empty() || name.len() > MAX_SUBJECT {
        return Err(invalid(
            "subject",
            "must be `machines/{machine}`, `machines/{machine}/containers/{container}`, `requests/{request}` or an id",
        ));
    }
    Ok(Some(id.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subject_ends_in_its_id() {
        for name in ["x", "machines/x", "requests/x", "machines/m/containers/x"] {
            assert_eq!(subject(name).unwrap().as_deref(), Some("x"), "{name}");
        }
        assert_eq!(subject("").unwrap(), None);
        for name in [
            "/",
            "machines/",
            "functions/x",
            "containers/x",
            "a/b/c/d/e",
            &"x".repeat(200),
        ] {
            assert!(subject(name).is_err(), "{name}");
        }
    }
}
