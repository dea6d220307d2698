//! `ForwardPort`: a connection over one call. Each side's end of what it sends is passed on by itself, and what one side does not
//! take is not read of the other. One on which nothing is sent costs its socket.

use std::io::{self, ErrorKind};
use std::pin::pin;

use bytes::Bytes;
use stoker_proto::limits::STREAMED_BYTES;
use stoker_proto::v1::forward_port_request::Part;
use stoker_proto::v1::{ForwardPortRequest, ForwardPortResponse};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming};

use super::checks::at_most;
use super::image::not_running;
use crate::budget;
use crate::container::Workload;
use crate::container::workload::{Connection, PortError};

/// Where answers go.
type To = mpsc::Sender<Result<ForwardPortResponse, Status>>;

/// What is read at a time, in bytes. Nothing is kept while nothing is read.
const CHUNK: usize = 32 << 10;

/// Connects as the first message says.
pub(super) async fn connect(
    workload: &Workload,
    requests: &mut Streaming<ForwardPortRequest>,
) -> Result<Connection, Status> {
    let first = requests.next().await.transpose()?.and_then(|request| request.part);
    let Some(Part::Start(start)) = first else {
        return Err(Status::invalid_argument("the first message is to be the start"));
    };
    let port = u16::try_from(start.port).ok().filter(|port| *port > 0);
    let port = port.ok_or_else(|| Status::invalid_argument("`port` is to be 1 to 65535"))?;
    workload.connect(port).await.map_err(|error| status(&error))
}

/// Carries bytes both ways until both sides have ended, or the caller has left.
pub(super) async fn carry(connection: Connection, requests: Streaming<ForwardPortRequest>, to: To) {
    let Connection { stream, budget, _place } = connection;
    budget.paced(both_ways(stream, requests, to)).await;
}

async fn both_ways(stream: TcpStream, requests: Streaming<ForwardPortRequest>, to: To) {
    let (read, write) = stream.into_split();
    let mut incoming = pin!(into(write, requests));
    let mut sending = true;
    let over = {
        let mut outgoing = pin!(out(&read, &to));
        loop {
            tokio::select! {
                biased;
                // Whatever is left of it goes with it.
                () = to.closed() => return,
                over = &mut outgoing => break over,
                sent = &mut incoming, if sending => match sent {
                    Ok(()) => sending = false,
                    wrong => break wrong,
                },
            }
        }
    };
    match over {
        Ok(()) => {
            // That side has ended, which is told so.
            drop(to);
            if sending {
                let _ = incoming.await;
            }
        }
        Err(wrong) => {
            let _ = to.send(Err(wrong)).await;
        }
    }
}

/// What the container sends.
async fn out(read: &OwnedReadHalf, to: &To) -> Result<(), Status> {
    loop {
        read.readable().await.map_err(broken)?;
        let Ok(place) = to.reserve().await else {
            return Ok(());
        };
        match read_now(read) {
            Ok(bytes) if bytes.is_empty() => return Ok(()),
            Ok(data) => {
                budget::passed_on(data.len());
                place.send(Ok(ForwardPortResponse { data }));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(broken(error)),
        }
    }
}

fn read_now(read: &OwnedReadHalf) -> io::Result<Bytes> {
    let mut chunk = [0; CHUNK];
    let length = read.try_read(&mut chunk)?;
    Ok(Bytes::copy_from_slice(chunk.get(..length).unwrap_or_default()))
}

/// What the caller sends. Where the container takes no more of it, it may have something to say still.
async fn into(mut write: OwnedWriteHalf, mut requests: Streaming<ForwardPortRequest>) -> Result<(), Status> {
    while let Some(request) = requests.next().await {
        match request?.part {
            Some(Part::Data(data)) => {
                at_most(STREAMED_BYTES, "`data`", data.len())?;
                if write.write_all(&data).await.is_err() {
                    return Ok(());
                }
                budget::passed_on(data.len());
            }
            Some(Part::Start(_)) => return Err(Status::invalid_argument("there is one start only")),
            None => return Err(Status::invalid_argument("a message is empty")),
        }
    }
    // The other side may have closed it already.
    let _ = write.shutdown().await;
    Ok(())
}

fn broken(error: io::Error) -> Status {
    Status::aborted(format!("the connection to the port broke: {error}"))
}

fn status(error: &PortError) -> Status {
    let message = error.to_string();
    match error {
        PortError::NotRunning(error) => not_running(error),
        PortError::TooMany => Status::resource_exhausted(message),
        PortError::Refused(_) | PortError::Connect { .. } => Status::unavailable(message),
        PortError::Socket(_) => Status::internal(message),
    }
}
