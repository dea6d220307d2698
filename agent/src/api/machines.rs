//! The `Machines` service.

use stoker_proto::v1;
use stoker_proto::v1::machines_server;
use tonic::{Request, Response, Status};
use ulid::Ulid;

use super::errors::{invalid, not_found};
use super::pages::page_size;
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
        let size = page_size(request.page_size)?;
        let all = self.host.machines(request.include_ended).await;
        let (machines, next_page_token) = page(all, size, &request.page_token, "machines/", |machine| &machine.name)?;
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
        let size = page_size(request.page_size)?;
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
        let (containers, next_page_token) = page(all, size, &request.page_token, &within, |container| &container.name)?;
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

/// The entries after the one that a token names, and the token of the next page; names begin with `within`. Entries are
/// in the order of their names, so nothing is shown twice or left out for what came or went between two calls.
fn page<T>(
    mut all: Vec<T>,
    size: usize,
    token: &str,
    within: &str,
    name: impl Fn(&T) -> &String,
) -> Result<(Vec<T>, String), Status> {
    if !token.is_empty() {
        if !token.starts_with(within) {
            return Err(invalid("page_token", "is not one that the list of this parent gave"));
        }
        all.retain(|entry| name(entry).as_str() > token);
    }
    let more = all.len() > size;
    all.truncate(size);
    let next = all
        .last()
        .filter(|_| more)
        .map(|last| name(last).clone())
        .unwrap_or_default();
    Ok((all, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_one_another() {
        let all: Vec<String> = (0..5).map(|n| format!("machines/{n}")).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let (entries, next) = page(all.clone(), 2, &token, "machines/", |name| name).unwrap();
            assert!(entries.len() <= 2);
            seen.extend(entries);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, all);
        assert!(page(all.clone(), 2, "rubbish", "machines/", |name| name).is_err());
        assert!(page(all, 2, "machines/1/containers/2", "machines/2/", |name| name).is_err());
    }

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
