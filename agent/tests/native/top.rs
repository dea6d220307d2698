//! `stoker top` in a terminal, beside an agent whose machines are made up.

use std::pin::Pin;
use std::process::Stdio;
use std::time::{Duration, Instant, SystemTime};

use stoker_proto::v1;
use stoker_proto::v1::credits_server::{Credits, CreditsServer};
use stoker_proto::v1::machines_server::{Machines, MachinesServer};
use stoker_proto::v1::telemetry_server::{Telemetry, TelemetryServer};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixListener;
use tokio::process::{ChildStdout, Command};
use tokio_stream::wrappers::{IntervalStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

use crate::common::*;

const MACHINE: &str = "machines/01JABCDEFGHJKMNPQRSTVWXYZ0";

/// An agent with one machine, which uses half a CPU.
struct Fake(SystemTime);

#[tonic::async_trait]
impl Telemetry for Fake {
    type WatchUseStream = Pin<Box<dyn Stream<Item = Result<v1::UseSamples, Status>> + Send>>;

    async fn watch_use(&self, _: Request<v1::WatchUseRequest>) -> Result<Response<Self::WatchUseStream>, Status> {
        let begun = self.0;
        let ticks = IntervalStream::new(tokio::time::interval(Duration::from_millis(100)));
        let samples = ticks.map(move |_| {
            let now = SystemTime::now();
            let since = now.duration_since(begun).unwrap_or_default();
            let usage = v1::Usage {
                cpu_ns: u64::try_from(since.as_nanos()).unwrap() / 2,
                memory_bytes: 64 << 20,
                measure_time: Some(now.into()),
                ..Default::default()
            };
            Ok(v1::UseSamples {
                samples: vec![v1::UseSample {
                    name: MACHINE.into(),
                    account: "accounts/acme".into(),
                    usage: Some(usage),
                    ..Default::default()
                }],
                more: false,
            })
        });
        Ok(Response::new(Box::pin(samples)))
    }
}

#[tonic::async_trait]
impl Machines for Fake {
    async fn launch_machine(&self, _: Request<v1::LaunchMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn resize_machine(
        &self,
        _: Request<v1::ResizeMachineRequest>,
    ) -> Result<Response<v1::ResizeMachineResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn set_thresholds(&self, _: Request<v1::SetThresholdsRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn list_resizes(
        &self,
        _: Request<v1::ListResizesRequest>,
    ) -> Result<Response<v1::ListResizesResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn stop_machine(&self, _: Request<v1::StopMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    type ExecStream = Pin<Box<dyn Stream<Item = Result<v1::ExecResponse, Status>> + Send>>;

    async fn exec(&self, _: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    type ForwardPortStream = Pin<Box<dyn Stream<Item = Result<v1::ForwardPortResponse, Status>> + Send>>;

    async fn forward_port(
        &self,
        _: Request<Streaming<v1::ForwardPortRequest>>,
    ) -> Result<Response<Self::ForwardPortStream>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn get_machine(&self, _: Request<v1::GetMachineRequest>) -> Result<Response<v1::Machine>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn list_machines(
        &self,
        _: Request<v1::ListMachinesRequest>,
    ) -> Result<Response<v1::ListMachinesResponse>, Status> {
        let machine = v1::Machine {
            name: MACHINE.into(),
            state: v1::machine::State::Active.into(),
            account: "accounts/acme".into(),
            create_time: Some(self.0.into()),
            ..Default::default()
        };
        Ok(Response::new(v1::ListMachinesResponse {
            machines: vec![machine],
            next_page_token: String::new(),
        }))
    }

    async fn list_containers(
        &self,
        _: Request<v1::ListContainersRequest>,
    ) -> Result<Response<v1::ListContainersResponse>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

#[tonic::async_trait]
impl Credits for Fake {
    async fn list_machine_credits(
        &self,
        request: Request<v1::ListMachineCreditsRequest>,
    ) -> Result<Response<v1::ListMachineCreditsResponse>, Status> {
        assert_eq!(request.into_inner().parent, "machines/-");
        let mut credits = v1::MachineCredits {
            name: format!("{MACHINE}/credits"),
            balance: 5.5,
            launch: 0.25,
            time_to_empty: Some(prost_types::Duration { seconds: 383, nanos: 0 }),
            ..Default::default()
        };
        credits.set_class(v1::machine_credits::Class::High);
        Ok(Response::new(v1::ListMachineCreditsResponse {
            machine_credits: vec![credits],
            next_page_token: String::new(),
        }))
    }

    async fn get_machine_credits(
        &self,
        _: Request<v1::GetMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn update_machine_credits(
        &self,
        _: Request<v1::UpdateMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }

    async fn grant_machine_credits(
        &self,
        _: Request<v1::GrantMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        Err(Status::unimplemented("nobody asks"))
    }
}

/// Reads on until this was drawn.
async fn until(screen: &mut ChildStdout, drawn: &mut String, wanted: &str) {
    // It draws on and on.
    let start = Instant::now();
    let mut buffer = [0; 4096];
    while !drawn.contains(wanted) {
        let read = tokio::time::timeout(PATIENCE, screen.read(&mut buffer)).await;
        let read = read.unwrap_or(Ok(0)).unwrap();
        let goes_on = read > 0 && start.elapsed() < PATIENCE;
        assert!(goes_on, "{wanted:?} was not drawn, but {drawn:?}");
        drawn.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
}

#[tokio::test]
async fn machines_are_shown_until_somebody_quits() {
    let dir = tempfile::tempdir().unwrap();
    let path = socket(dir.path());
    let incoming = UnixListenerStream::new(UnixListener::bind(&path).unwrap());
    let router = Server::builder()
        .add_service(TelemetryServer::new(Fake(SystemTime::now())))
        .add_service(MachinesServer::new(Fake(SystemTime::now())))
        .add_service(CreditsServer::new(Fake(SystemTime::now())));
    let serving = tokio::spawn(router.serve_with_incoming(incoming));
    // script(1) gives it a terminal, which has no size of its own there.
    let top = format!(
        "stty rows 24 cols 80 && exec {} --socket {} top --interval 100ms",
        env!("CARGO_BIN_EXE_stoker"),
        path.display()
    );
    let mut running = Command::new("script")
        .args(["--quiet", "--flush", "--return", "--command", &top, "/dev/null"])
        .env("TERM", "xterm-256color")
        .env("SHELL", "/bin/sh")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let (mut keys, mut screen) = (running.stdin.take().unwrap(), running.stdout.take().unwrap());
    let mut drawn = String::new();
    // The alternate screen, the machine in its row with its credits, and its rate once there are two samples.
    for wanted in [
        "\x1b[?1049h",
        "CPU%▼",
        "STVWXYZ0  acme",
        "high",
        "5.75",
        "6m 23s",
        "50.0",
    ] {
        until(&mut screen, &mut drawn, wanted).await;
    }
    keys.write_all(b">").await.unwrap();
    until(&mut screen, &mut drawn, "WAIT%▼").await;
    keys.write_all(b"q").await.unwrap();
    until(&mut screen, &mut drawn, "\x1b[?1049l").await;
    let status = tokio::time::timeout(PATIENCE, running.wait()).await.unwrap().unwrap();
    assert_eq!(status.code(), Some(0), "{drawn}");
    serving.abort();
}
