//! The `Machines` service.

mod calls;
mod launch;
mod program;
mod sizes;
mod thresholds;

use std::time::Duration;

use stoker_policy::MachineId;
use stoker_proto::limits::{LONGEST_STOP_GRACE, STDIN_WINDOW_BYTES, STDIN_WINDOW_KEY, STOP_GRACE};
use stoker_proto::v1;
use stoker_proto::v1::machines_server;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use ulid::Ulid;

use self::calls::{Asked, Calls, Place};
use super::caller::who;
use super::errors::{invalid, not_found, precondition, unavailable};
use super::page;
use crate::host::{HostHandle, LaunchedError};
use crate::images::Images;
use crate::machines::{Guest, GuestError};

/// How long a guest may take for another size before its caller is answered, where that says nothing, and at most.
const TIMEOUT: Duration = Duration::from_secs(10);
const MAX_TIMEOUT: Duration = Duration::from_secs(60);

/// The most resizes on a page: as many as are kept.
const RESIZES: usize = crate::machines::RESIZES;

/// How long it may take until it is known how a machine ended whose guest does not answer any more.
const END: Duration = Duration::from_secs(15);

/// Shows machines and the containers in them, and launches, resizes and ends those that accounts want.
pub struct Machines {
    host: HostHandle,
    images: Images,
    calls: Calls,
}

// === impl Machines ===

impl Machines {
    /// A service over these machines, launched from these images.
    pub fn new(host: HostHandle, images: Images) -> Self {
        Self {
            host,
            images,
            calls: Calls::default(),
        }
    }

    /// A machine by its name, also one that has ended.
    async fn find(&self, name: &str) -> Result<v1::Machine, Status> {
        let mut all = self.host.machines(true).await.into_iter();
        all.find(|machine| machine.name == name)
            .ok_or_else(|| not_found("machine", name))
    }

    /// Says of a machine that it has ended or was not launched, where that is so.
    async fn or_other(&self, name: &str, refused: Status) -> Status {
        if refused.code() != tonic::Code::NotFound {
            return refused;
        }
        match self.find(name).await {
            Ok(v1::Machine { end: Some(end), .. }) => {
                precondition("MACHINE_ENDED", format!("the machine ended: {}", end.detail))
            }
            Ok(v1::Machine { launched: Some(_), .. }) => refused,
            Ok(_) => precondition(
                "NOT_LAUNCHED",
                format!("{name} runs functions: it was not launched by an account, and is the agent's to care for"),
            ),
            Err(unknown) => unknown,
        }
    }

    /// The guest of a machine whose program runs, and a place for a call on it.
    async fn guest(&self, name: &str, machine: MachineId) -> Result<(Guest, Place), Status> {
        match self.host.guest(machine).await {
            Ok(guest) => Ok((guest, self.calls.take(machine)?)),
            Err(error @ (LaunchedError::Ended(_) | LaunchedError::Ending)) => {
                Err(unavailable("MACHINE_ENDED", error.to_string()))
            }
            Err(error) => Err(self.or_other(name, sizes::not_done(name, error)).await),
        }
    }

    /// Why a guest did not do what it was asked to.
    async fn why(&self, machine: MachineId, error: GuestError) -> Status {
        match error {
            GuestError::Refused { status, .. } => calls::refused(&status),
            _ => broken(self.host.clone(), machine).await,
        }
    }
}

/// What became of a machine whose guest does not answer.
async fn broken(host: HostHandle, machine: MachineId) -> Status {
    match tokio::time::timeout(END, host.end_of(machine)).await {
        Ok(Some(machine)) => {
            let end = machine.end.unwrap_or_default();
            unavailable("MACHINE_ENDED", format!("the machine ended: {}", end.detail))
        }
        Ok(None) => unavailable("MACHINE_ENDED", "the machine ended"),
        Err(_) => unavailable("GUEST_FAILED", "the guest ended the call before it was over"),
    }
}

#[tonic::async_trait]
impl machines_server::Machines for Machines {
    async fn launch_machine(
        &self,
        request: Request<v1::LaunchMachineRequest>,
    ) -> Result<Response<v1::Machine>, Status> {
        let by = launch::by(&request)?;
        let request = request.into_inner();
        let launched = launch::launch(&self.host, &self.images, request, by).await;
        launched.map(Response::new)
    }

    async fn resize_machine(
        &self,
        request: Request<v1::ResizeMachineRequest>,
    ) -> Result<Response<v1::ResizeMachineResponse>, Status> {
        let by = who(&request);
        let v1::ResizeMachineRequest { name, size, timeout } = request.into_inner();
        let machine = named("name", &name)?;
        let change = sizes::change(size)?;
        let timeout = sizes::time("timeout", timeout, TIMEOUT, Duration::ZERO..=MAX_TIMEOUT)?;
        match self.host.resize(machine, change, by, timeout).await {
            Ok(resize) => Ok(Response::new(v1::ResizeMachineResponse { resize: Some(resize) })),
            Err(error) => Err(self.or_other(&name, sizes::not_resized(&name, error)).await),
        }
    }

    async fn set_thresholds(
        &self,
        request: Request<v1::SetThresholdsRequest>,
    ) -> Result<Response<v1::Machine>, Status> {
        let by = who(&request);
        let v1::SetThresholdsRequest { name, thresholds, etag } = request.into_inner();
        let machine = named("name", &name)?;
        let set = match self.host.bounds_of(machine).await {
            Some(bounds) => {
                let thresholds = thresholds::checked(&thresholds, &bounds)?;
                let etag = Some(etag).filter(|etag| !etag.is_empty());
                self.host.set_thresholds(machine, thresholds, etag, by).await
            }
            None => Err(LaunchedError::Unknown),
        };
        match set {
            Ok(machine) => Ok(Response::new(machine)),
            Err(error) => Err(self.or_other(&name, sizes::not_done(&name, error)).await),
        }
    }

    async fn list_resizes(
        &self,
        request: Request<v1::ListResizesRequest>,
    ) -> Result<Response<v1::ListResizesResponse>, Status> {
        let request = request.into_inner();
        let machine = named("parent", &request.parent)?;
        let (size, before) = (page::size(request.page_size)?, page::number(&request.page_token)?);
        let resizes = match self.host.resizes(machine).await {
            Some(resizes) => resizes,
            None => {
                let unknown = not_found("launched machine", &request.parent);
                return Err(self.or_other(&request.parent, unknown).await);
            }
        };
        // No two are decided in the same nanosecond.
        let mut numbered: Vec<_> = resizes.into_iter().map(|resize| (number(&resize), resize)).collect();
        numbered.retain(|(number, _)| before.is_none_or(|before| *number < before));
        let (resizes, next_page_token) = page::numbered(numbered, size.min(RESIZES));
        Ok(Response::new(v1::ListResizesResponse {
            resizes,
            next_page_token,
        }))
    }

    async fn stop_machine(&self, request: Request<v1::StopMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        let by = who(&request);
        let v1::StopMachineRequest { name, grace } = request.into_inner();
        let machine = named("name", &name)?;
        let grace = sizes::time("grace", grace, STOP_GRACE, Duration::ZERO..=LONGEST_STOP_GRACE)?;
        match self.host.stop(machine, grace, by).await {
            Ok(machine) => Ok(Response::new(machine)),
            Err(error) => Err(self.or_other(&name, sizes::not_done(&name, error)).await),
        }
    }

    type ExecStream = ReceiverStream<Result<v1::ExecResponse, Status>>;

    async fn exec(&self, request: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut from_caller = request.into_inner();
        let first = calls::first(&mut from_caller).await?;
        let start = first.start().ok_or_else(|| invalid("start", "is missing"))?;
        let machine = named("start.name", &start.name)?;
        calls::check_start(start)?;
        let (guest, place) = self.guest(&start.name, machine).await?;
        let (to_guest, input) = mpsc::channel(1);
        // There is room for the first.
        let _ = to_guest.try_send(first);
        match guest.exec(input).await {
            Ok((from_guest, grants)) => {
                let why = broken(self.host.clone(), machine);
                let answers = calls::pass(place, from_caller, to_guest, from_guest, why);
                let mut response = Response::new(answers);
                // Of one that was booted with an older init nobody is to wait for grants.
                if grants {
                    let headers = response.metadata_mut();
                    headers.insert(STDIN_WINDOW_KEY, STDIN_WINDOW_BYTES.into());
                }
                Ok(response)
            }
            Err(error) => Err(self.why(machine, error).await),
        }
    }

    type ForwardPortStream = ReceiverStream<Result<v1::ForwardPortResponse, Status>>;

    async fn forward_port(
        &self,
        request: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        let mut from_caller = request.into_inner();
        let first = calls::first(&mut from_caller).await?;
        let start = first.start().ok_or_else(|| invalid("start", "is missing"))?;
        let machine = named("start.name", &start.name)?;
        if !(1..=u32::from(u16::MAX)).contains(&start.port) {
            return Err(invalid(
                "start.port",
                format!("{} is not 1 to {}", start.port, u16::MAX),
            ));
        }
        let (guest, place) = self.guest(&start.name, machine).await?;
        let (to_guest, data) = mpsc::channel(1);
        let _ = to_guest.try_send(first);
        match guest.forward_port(data).await {
            Ok(from_guest) => {
                let why = broken(self.host.clone(), machine);
                let answers = calls::pass(place, from_caller, to_guest, from_guest, why);
                Ok(Response::new(answers))
            }
            Err(error) => Err(self.why(machine, error).await),
        }
    }

    async fn get_machine(&self, request: Request<v1::GetMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        let name = request.into_inner().name;
        named("name", &name)?;
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

/// A machine's id.
fn named(field: &str, name: &str) -> Result<MachineId, Status> {
    machine_id(name).map_err(|problem| invalid(field, problem))
}

/// What a resize is known by on pages: when it was decided, in ns since 1970.
fn number(resize: &v1::Resize) -> u64 {
    let time = resize.time.unwrap_or_default();
    let ns = i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
    u64::try_from(ns).unwrap_or_default()
}

fn machine_id(name: &str) -> Result<MachineId, String> {
    let id = name.strip_prefix("machines/").and_then(|id| Ulid::from_string(id).ok());
    id.map(MachineId)
        .ok_or_else(|| "must be of the form `machines/{machine}`".to_owned())
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
