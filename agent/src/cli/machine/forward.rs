//! `stoker machine port-forward`

use std::net::Ipv4Addr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::Args;
use stoker_proto::limits::{FORWARDED_PORTS, STREAMED_BYTES};
use stoker_proto::v1;
use stoker_proto::v1::machines_client::MachinesClient;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use v1::forward_port_request::Part;

use super::{client, name_of};
use crate::address::Address;
use crate::cli::{Connection, Failure};
use crate::render::say;

/// How many pieces of a connection wait to be sent.
const QUEUE: usize = 2;

/// How long nothing is accepted after that failed: this program has too many files open, say.
const PAUSE: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(in crate::cli) struct Forward {
    /// machines/MACHINE, or its id alone
    machine: String,
    /// A port of the machine, and LOCAL to listen on another one here; 0 takes one that is free
    #[arg(required = true, value_name = "[LOCAL:]PORT", value_parser = parse)]
    ports: Vec<Ports>,
}

/// Where connections come from, and where they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ports {
    /// Of this host's loopback.
    local: u16,
    /// Of the machine.
    remote: u16,
}

fn parse(text: &str) -> Result<Ports, String> {
    let (local, remote) = text.split_once(':').unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok();
    match (port(local), port(remote)) {
        (Some(local), Some(remote)) if remote > 0 => Ok(Ports { local, remote }),
        _ => Err("must be PORT or LOCAL:PORT, ports being 1 to 65535, as `8080:80`".to_owned()),
    }
}

/// Passes connections on until this program is ended, or can't.
pub(super) async fn run(connection: &Connection, forward: Forward) -> Result<(), Failure> {
    let name = name_of(&forward.machine);
    let request = v1::GetMachineRequest { name: name.clone() };
    let machine = client(connection).await?.get_machine(request).await?.into_inner();
    if let Some(end) = machine.end {
        return Err(Failure::Failed(format!("{name} has ended: {}", end.detail)));
    }
    // Others wait: a machine takes no more.
    let places = Arc::new(Semaphore::new(FORWARDED_PORTS));
    let mut listening = JoinSet::new();
    for ports in forward.ports {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, ports.local)).await;
        let listener = listener.map_err(|error| {
            let at = format!("127.0.0.1:{}", ports.local);
            Failure::local(format!(
                "can't listen on {at}: {error}; name another port as LOCAL:{}",
                ports.remote
            ))
        })?;
        let address = listener
            .local_addr()
            .map_err(|error| Failure::local(error.to_string()))?;
        if connection.json {
            // One line a port, for programs that read on.
            say!(
                "{}",
                serde_json::json!({ "address": address, "machine": name, "port": ports.remote })
            );
        } else {
            say!("{address} is port {} of {name}", ports.remote);
        }
        let target = Target {
            agent: connection.socket.clone(),
            name: name.clone(),
            port: ports.remote,
        };
        listening.spawn(accept(listener, target, places.clone()));
    }
    // None of them ends.
    while listening.join_next().await.is_some() {}
    Ok(())
}

/// Where connections go.
#[derive(Clone)]
struct Target {
    agent: Address,
    name: String,
    port: u16,
}

async fn accept(listener: TcpListener, target: Target, places: Arc<Semaphore>) {
    loop {
        let Ok(place) = places.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, _)) => {
                let target = target.clone();
                tokio::spawn(async move {
                    if let Err(failure) = target.pass(stream).await {
                        eprintln!("port {}: {failure}", target.port);
                    }
                    drop(place);
                });
            }
            Err(error) => {
                eprintln!("port {}: can't accept a connection: {error}", target.port);
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

// === impl Target ===

impl Target {
    /// Passes a connection on, until both sides of it have ended. It has a connection to the agent of its own, so that one
    /// from which nobody reads holds up no other.
    async fn pass(&self, stream: TcpStream) -> Result<(), Failure> {
        // Who writes little at a time waits for answers.
        let _ = stream.set_nodelay(true);
        let (to, rest) = mpsc::channel(QUEUE);
        let start = v1::ForwardPortStart {
            name: self.name.clone(),
            port: self.port.into(),
        };
        let requests = tokio_stream::once(Part::Start(start)).chain(ReceiverStream::new(rest).map(Part::Data));
        let requests = requests.map(|part| v1::ForwardPortRequest { part: Some(part) });
        let channel = self.agent.connect().await;
        let channel = channel.map_err(|error| Failure::unreachable(&self.agent, error))?;
        let mut client = MachinesClient::new(channel);
        let mut answers = client.forward_port(requests).await?.into_inner();
        let (read, write) = stream.into_split();
        let mut sending = pin!(send(read, to));
        let mut receiving = pin!(receive(&mut answers, write));
        let mut is_sent = false;
        loop {
            tokio::select! {
                sent = &mut sending, if !is_sent => match sent {
                    Ok(()) => is_sent = true,
                    Err(Gone) => return Ok(()),
                },
                received = &mut receiving => {
                    if let Ok(Ok(())) = &received && !is_sent {
                        // The machine takes what it is still sent.
                        let _ = sending.await;
                    }
                    return received.map(drop);
                }
            }
        }
    }
}

/// Nobody is at this end of the connection any more, and is left to be told anything.
struct Gone;

/// Sends what comes, and that there is no more, until the machine takes no more.
async fn send(mut from: OwnedReadHalf, to: mpsc::Sender<Bytes>) -> Result<(), Gone> {
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(STREAMED_BYTES);
        // No more than a message may have, whatever room there is.
        let mut piece = (&mut from).take(STREAMED_BYTES as u64);
        let read = tokio::select! {
            read = piece.read_buf(&mut buffer) => read,
            () = to.closed() => return Ok(()),
        };
        match read {
            Ok(0) => return Ok(()),
            Ok(_) => {
                if to.send(buffer.split().freeze()).await.is_err() {
                    return Ok(());
                }
            }
            Err(_) => return Err(Gone),
        }
    }
}

/// Writes what comes, and that there is no more.
async fn receive(
    answers: &mut Streaming<v1::ForwardPortResponse>,
    mut to: OwnedWriteHalf,
) -> Result<Result<(), Gone>, Failure> {
    while let Some(answer) = answers.message().await? {
        if to.write_all(&answer.data).await.is_err() {
            return Ok(Err(Gone));
        }
    }
    Ok(to.shutdown().await.map_err(|_| Gone))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read() {
        assert_eq!(parse("80"), Ok(Ports { local: 80, remote: 80 }));
        assert_eq!(
            parse("8080:80"),
            Ok(Ports {
                local: 8080,
                remote: 80
            })
        );
        assert_eq!(parse("0:80"), Ok(Ports { local: 0, remote: 80 }));
        for wrong in ["", "0", "80:0", "x", "80:", ":80", "65536", "1:2:3", "-1"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
