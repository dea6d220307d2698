//! What the software between a caller and a function costs, without a VM: calls of an echo function through `stokerd` and
//! `stoker-init` on one kernel, beside calls of a bare gRPC server that echoes, over the same kind of socket. `cargo xtask
//! bench world` runs it, as root, in a host with cgroup v2 and `/dev/kvm`; it prints a line of JSON a figure.
//!
//! The agent is as it always is, but for `machines.vmm`: a script that starts `stoker-init` in place of a VMM.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use stoker_proto::v1;
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::invocations_server::{Invocations, InvocationsServer};
use stoker_testkit::permille::permille;
use stoker_tests::code;
use stoker_tests::host::{self, Host, Options};
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};

/// Calls one after the other.
const CALLS: usize = 2000;
/// Calls before they are timed.
const WARM_UP: usize = 200;
/// Callers at once, and for how long.
const CALLERS: usize = 8;
const DURATION: Duration = Duration::from_secs(10);

const PAYLOAD: &[u8] = br#"{"hello": "world"}"#;

struct Echo;

#[tonic::async_trait]
impl Invocations for Echo {
    async fn invoke(&self, request: Request<v1::InvokeRequest>) -> Result<Response<v1::InvokeResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(v1::InvokeResponse {
            request_id: request.request_id,
            payload: request.payload,
            ..Default::default()
        }))
    }

    type InvokeWithResponseStreamStream = tokio_stream::Empty<Result<v1::InvokeWithResponseStreamResponse, Status>>;

    async fn invoke_with_response_stream(
        &self,
        _: Request<v1::InvokeRequest>,
    ) -> Result<Response<Self::InvokeWithResponseStreamStream>, Status> {
        Err(Status::unimplemented("nobody measures it"))
    }
}

/// The bare server: this program again, since a server is a process of its own.
struct Bare(Child);

impl Drop for Bare {
    fn drop(&mut self) {
        // It has ended where it can't be killed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    if let Some(socket) = std::env::args_os().nth(1) {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket)?);
        let served = Server::builder().add_service(InvocationsServer::new(Echo));
        return Ok(served.serve_with_incoming(incoming).await?);
    }
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("echo.sock");
    let me = std::env::current_exe().context("find this program")?;
    let _bare = Bare(Command::new(me).arg(&socket).spawn()?);
    stoker_tests::eventually("the bare server", async || Ok(socket.exists().then_some(()))).await?;
    let image = mount(folder.path())?;
    let measured = measure(folder.path(), &socket, &image).await;
    let unmounted = Command::new("umount").arg(&image).status()?;
    ensure!(unmounted.success(), "can't unmount {}", image.display());
    measured
}

async fn measure(folder: &Path, socket: &Path, image: &Path) -> anyhow::Result<()> {
    let vmm = script(folder, image)?;
    let settings = vec![
        ("machines.vmm", vmm.display().to_string().into()),
        ("log.level", "warn".into()),
        // As it is by default: tests want to see it sooner.
        ("telemetry.interval", "10s".into()),
    ];
    let agent = Host::start(Options { warming: 0, settings }).await?;
    let zip = code::echo()?;
    for (id, cpu_millis) in [("one", 1000), ("many", 250)] {
        let function = v1::Function {
            name: format!("{}/functions/{id}", stoker_tests::ACCOUNT),
            runtime: "provided".into(),
            handler: "bootstrap".into(),
            amount: Some(v1::Amount {
                cpu_millis,
                memory_mib: 32,
            }),
            ..Default::default()
        };
        agent.create(function, &zip).await?;
    }
    let bare = host::channel(socket).await?;
    let ours = host::channel(&agent.folder().join("stokerd.sock")).await?;
    for (path, channel) in [("bare", &bare), ("ours", &ours), ("named", &ours)] {
        let sorted = one_by_one(channel, path == "named").await?;
        let at = |of| permille(&sorted, of).unwrap_or_default().as_nanos();
        println!(
            "{{\"path\": \"{path}\", \"p50_ns\": {}, \"p99_ns\": {}}}",
            at(500),
            at(990)
        );
    }
    for (path, channel) in [("bare", &bare), ("ours", &ours)] {
        println!(
            "{{\"path\": \"{path}\", \"calls_per_second\": {}}}",
            at_once(channel, "many").await?
        );
    }
    agent.stop().await?;
    Ok(())
}

fn request(id: &str) -> v1::InvokeRequest {
    v1::InvokeRequest {
        name: format!("{}/functions/{id}", stoker_tests::ACCOUNT),
        payload: PAYLOAD.into(),
        ..Default::default()
    }
}

/// How long each call took, sorted; whether each has a request id, so that its answer is kept.
async fn one_by_one(channel: &Channel, named: bool) -> anyhow::Result<Vec<Duration>> {
    let mut client = InvocationsClient::new(channel.clone());
    let mut times = Vec::with_capacity(CALLS);
    for call in 0..WARM_UP + CALLS {
        let mut request = request("one");
        if named {
            request.request_id = format!("call-{call}");
        }
        let began = Instant::now();
        let answer = client.invoke(request).await?.into_inner();
        if call >= WARM_UP {
            times.push(began.elapsed());
        }
        ensure!(&answer.payload[..] == PAYLOAD, "answered {:?}", answer.payload);
    }
    times.sort_unstable();
    Ok(times)
}

/// How many calls were answered in a second, with [`CALLERS`] at once.
async fn at_once(channel: &Channel, id: &'static str) -> anyhow::Result<f64> {
    // Each finds its container made.
    for time in [Duration::from_secs(3), DURATION] {
        let began = Instant::now();
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| {
                let mut client = InvocationsClient::new(channel.clone());
                tokio::spawn(async move {
                    let mut calls = 0_u32;
                    while began.elapsed() < time {
                        client.invoke(request(id)).await?;
                        calls += 1;
                    }
                    Ok::<_, Status>(calls)
                })
            })
            .collect();
        let mut calls = 0;
        for caller in callers {
            calls += caller.await??;
        }
        if time == DURATION {
            return Ok(f64::from(calls) / began.elapsed().as_secs_f64());
        }
    }
    anyhow::bail!("nothing was measured")
}

/// In place of a VMM: the guest's `stoker-init` as a process, dialling where the guest's vsock would come out.
fn script(folder: &Path, image: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt as _;
    let init = std::env::var_os("STOKER_INIT").context("STOKER_INIT is not set: run by `cargo xtask bench world`")?;
    let text = format!(
        "#!/bin/sh\nexec {} serve --socket \"$PWD/vsock.sock_{}\" --image {}\n",
        PathBuf::from(init).display(),
        stoker_proto::limits::GUEST_PORT,
        image.display()
    );
    let file = folder.join("init-as-vmm");
    std::fs::write(&file, text)?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    Ok(file)
}

fn mount(folder: &Path) -> anyhow::Result<PathBuf> {
    let on = folder.join("image");
    std::fs::create_dir(&on)?;
    for module in ["loop", "erofs", "overlay"] {
        // Built in, in some kernels.
        let _ = Command::new("modprobe").arg(module).status();
    }
    let mut mount = Command::new("mount");
    mount.args(["-t", "erofs", "-o", "ro,loop"]);
    let mounted = mount.arg(stoker_tests::cache("image/root.erofs")?).arg(&on).status()?;
    ensure!(mounted.success(), "can't mount the guest's image");
    Ok(on)
}
