//! `stoker-controller`: prints what agents report, a line an event, and acknowledges it.

use std::io::Write as _;

use anyhow::Context as _;
use clap::Parser;
use stoker_agent::address::Address;
use stoker_agent::api::listen;
use stoker_agent::arguments::StokerController;
use stoker_agent::controller::{Batch, Controller, line};
use stoker_agent::json;
use stoker_proto::v1::controller_server::ControllerServer;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

/// How many messages wait to be printed; agents wait for their acknowledgement meanwhile.
const QUEUE: usize = 16;

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = StokerController::parse();
    let (batches, mut queue) = mpsc::channel(QUEUE);
    let stop = CancellationToken::new();
    let serving = tokio::spawn(serve(args.listen.clone(), Controller::new(batches), stop.clone()));
    let printing = tokio::task::spawn_blocking(move || {
        while let Some(batch) = queue.blocking_recv() {
            print(batch, args.json)?;
        }
        anyhow::Ok(())
    });
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::pin!(serving, printing);
    tokio::select! {
        served = &mut serving => return served?,
        printed = &mut printing => {
            // Standard output is gone: nothing can be acknowledged any more.
            printed??;
            // The server is, and says why.
            return serving.await?;
        }
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    stop.cancel();
    // Agents keep their stream open; they connect again to whatever listens next.
    serving.abort();
    Ok(())
}

/// What is acknowledged has been written.
fn print(batch: Batch, as_json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for event in &batch.events {
        if as_json {
            let mut value = json::of("Event", event)?;
            if let Some(fields) = value.as_object_mut() {
                fields.insert("host".to_owned(), batch.host.as_str().into());
            }
            writeln!(out, "{value}").context("printing")?;
        } else {
            writeln!(out, "{}", line(&batch.host, event)).context("printing")?;
        }
    }
    out.flush().context("printing")?;
    // The agent may have left; it sends the events again.
    let _ = batch.taken.send(());
    Ok(())
}

async fn serve(address: Address, controller: Controller, stop: CancellationToken) -> anyhow::Result<()> {
    let router = Server::builder().add_service(ControllerServer::new(controller));
    eprintln!("stoker-controller: listening on {address}");
    match address {
        Address::Unix(path) => {
            let (listener, _file) = listen::unix(&path).await?;
            router
                .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop.cancelled())
                .await?;
        }
        Address::Tcp(host) => {
            let listener = TcpListener::bind(&host)
                .await
                .with_context(|| format!("can't listen on {host}"))?;
            router
                .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stop.cancelled())
                .await?;
        }
    }
    Ok(())
}
