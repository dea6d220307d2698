//! The `Machines` service.

use std::pin::Pin;

use stoker_proto::v1;
use stoker_proto::v1::machines_server;
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use super::errors::{invalid, not_found};
use super::page;
use crate::host::HostHandle;

/// Shows machines and the containers in them.
#[derive(Debug)]
pub struct Machines {
    host: HostHandle,
}

// === impl Machines ===

impl Machines {
    /// A service over these machines.
    pub fn new(host: HostHandle) -> Self {
        Self { host }
    }

    /// A machine by its name, also one that has ended.
    async fn find(&self, name: &str) -> Result<v1::Machine, Status> {
        let mut all = self.host.machines(true).await.into_iter();
        all.find(|machine| machine.name == name)
            .ok_or_else(|| not_found("machine", name))
    }
}

#[tonic::async_trait]
impl machines_server::Machines for Machines {
    async fn launch_machine(&self, _: Request<v1::LaunchMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn resize_machine(
        &self,
        _: Request<v1::ResizeMachineRequest>,
    ) -> Result<Response<v1::ResizeMachineResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn set_thresholds(&self, _: Request<v1::SetThresholdsRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn list_resizes(
        &self,
        _: Request<v1::ListResizesRequest>,
    ) -> Result<Response<v1::ListResizesResponse>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn stop_machine(&self, _: Request<v1::StopMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    type ExecStream = Pin<Box<dyn Stream<Item = Result<v1::ExecResponse, Status>> + Send>>;

    async fn exec(&self, _: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    type ForwardPortStream = Pin<Box<dyn Stream<Item = Result<v1::ForwardPortResponse, Status>> + Send>>;

    async fn forward_port(
        &self,
        _: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        Err(Status::unimplemented("not yet"))
    }

    async fn get_machine(&self, request: Request<v1::GetMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        let name = request.into_inner().name;
        machine_id(&name).map_err(|problem| invalid("name", problem))?;
        self.find(&name).await.map(Response::new)
    }

    async fn list_machines(
        &self,
        request: Request<v1::ListMachinesRequest>,
    ) -> Result<Response<v1::ListMachinesResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size)?;
        let all = self.host.machines(request.include_ended).await;
        let (machines, next_page_token) =
            page::of(all, size, &request.page_token, "machines/", |machine| &machine.name)?;
        Ok(Response::new(v1::ListMachinesResponse {
            machines,
            next_page_token,
        }))
    }

    async fn list_containers(
        &self,
        request: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size)?;
        let within = match request.parent.as_str() {
            "machines/-" => "machines/".to_owned(),
            machine => {
                machine_id(machine).map_err(|problem| invalid("parent", format!("{problem}, or `machines/-`")))?;
                self.find(machine).await?;
                format!("{machine}/")
            }
        };
        let mut all = self.host.containers().await;
        all.retain(|container| container.name.starts_with(&within));
        let (containers, next_page_token) =
            page::of(all, size, &request.page_token, &within, |container| &container.name)?;
        Ok(Response::new(v1::ListContainersResponse {
            containers,
            next_page_token,
        }))
    }
}

fn machine_id(name: &str) -> Result<Ulid, String> {
    let id = name.strip_prefix("machines/").and_then(|id| Ulid::from_string(id).ok());
    id.ok_or_else(|| "must be of the form `machines/{machine}`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_names_are_ulids() {
        assert!(machine_id("machines/01ARZ3NDEKTSV4RRFFQ69G5FAV").is_ok());
        for name in [
            "",
            "machines/",
            "machines/-",
            "machines/x",
            "01ARZ3NDEKTSV4RRFFQ69G5FAV",
        ] {
            assert!(machine_id(name).is_err(), "{name}");
        }
    }
}
