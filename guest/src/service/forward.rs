//! `ForwardPort`: a connection over one call. Each side's end of what it sends is passed on by itself, and what one side does not
//! take is not read of the other. One on which nothing is sent costs its socket; once the container's side has ended it costs that for
//! as long as the caller sends something.

use std::io::{self, ErrorKind};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use stoker_proto::limits::STREAMED_BYTES;
use stoker_proto::v1::forward_port_request::Part;
use stoker_proto::v1::{ForwardPortRequest, ForwardPortResponse};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio_stream::{Stream, StreamExt as _};
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

/// How long nothing may be sent to a container whose side has ended: one that has closed the connection whole looks like one that has
/// sent all, and still reads. So long does Linux wait for the other side of one that is closed (`tcp_fin_timeout` of tcp(7)).
const HALF_CLOSED: Duration = Duration::from_secs(60);

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

/// Carries bytes both ways until both sides have ended, or the caller or the container has left.
pub(super) async fn carry(workload: Workload, connection: Connection, requests: Streaming<ForwardPortRequest>, to: To) {
    let Connection { stream, budget, _place } = connection;
    let gone = async { drop(workload.end().await) };
    budget.paced(both_ways(stream, requests, to, gone)).await;
}

/// `gone` resolves when nobody in the container is left.
async fn both_ways<S>(stream: TcpStream, requests: S, to: To, gone: impl Future<Output = ()>)
where
    S: Stream<Item = Result<ForwardPortRequest, Status>> + Unpin,
{
    let (read, write) = stream.into_split();
    let taken = AtomicU64::new(0);
    let mut incoming = pin!(into(write, requests, &taken));
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
                tokio::select! {
                    () = half_closed(incoming, &taken) => {}
                    () = gone => {}
                }
            }
        }
        Err(wrong) => {
            let _ = to.send(Err(wrong)).await;
        }
    }
}

/// Goes on with what the caller sends until its end, or until nothing more of it is `taken`.
async fn half_closed<T>(mut incoming: impl Future<Output = T> + Unpin, taken: &AtomicU64) {
    let mut before = taken.load(Ordering::Relaxed);
    while tokio::time::timeout(HALF_CLOSED, &mut incoming).await.is_err() {
        let now = taken.load(Ordering::Relaxed);
        if std::mem::replace(&mut before, now) == now {
            return;
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

/// What the caller sends, counting the messages that were taken. Where the container takes no more, it may have something to say
/// still.
async fn into<S>(mut write: OwnedWriteHalf, mut requests: S, taken: &AtomicU64) -> Result<(), Status>
where
    S: Stream<Item = Result<ForwardPortRequest, Status>> + Unpin,
{
    while let Some(request) = requests.next().await {
        match request?.part {
            Some(Part::Data(data)) => {
                at_most(STREAMED_BYTES, "`data`", data.len())?;
                if write.write_all(&data).await.is_err() {
                    return Ok(());
                }
                budget::passed_on(data.len());
                taken.fetch_add(1, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt as _;
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::ReceiverStream;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_the_container_has_closed_stays_as_long_as_something_is_sent() {
        let (taken, begun) = (AtomicU64::new(0), tokio::time::Instant::now());
        let sent = async {
            for _ in 0..5 {
                tokio::time::sleep(HALF_CLOSED * 2 / 3).await;
                taken.fetch_add(1, Ordering::Relaxed);
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = half_closed(std::future::pending::<()>(), &taken) => {}
            () = sent => {}
        }
        let lasted = begun.elapsed();
        assert!(lasted > HALF_CLOSED * 10 / 3 && lasted < HALF_CLOSED * 6, "{lasted:?}");
    }

    #[tokio::test]
    async fn of_a_container_that_is_gone_no_connection_stays() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (mut container, _) = listener.accept().await.unwrap();
        let (caller, requests) = mpsc::channel(1);
        let (to, mut answers) = mpsc::channel(1);
        let (tell, told) = tokio::sync::oneshot::channel::<()>();
        let gone = async { drop(told.await) };
        let carrying = tokio::spawn(both_ways(stream, ReceiverStream::new(requests), to, gone));
        container.write_all(b"last").await.unwrap();
        container.shutdown().await.unwrap();
        assert_eq!(answers.recv().await.unwrap().unwrap().data, "last");
        assert!(answers.recv().await.is_none());
        let late = ForwardPortRequest {
            part: Some(Part::Data(Bytes::from_static(b"late"))),
        };
        caller.send(Ok(late)).await.unwrap();
        let mut read = [0; 4];
        container.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"late", "it is still sent to");
        drop(tell);
        tokio::time::timeout(HALF_CLOSED / 2, carrying).await.unwrap().unwrap();
        assert!(caller.is_closed());
    }
}
