//! What guests have in common that are played by a test's own process.

use std::future::Future;
use std::net::Shutdown;

use stoker_proto::guest::guest_server::{Guest, GuestServer};
use stoker_proto::guest::{PutCodeRequest, PutCodeResponse};
use tokio::net::UnixStream;
use tokio_stream::StreamExt as _;
use tonic::transport::Server;
use tonic::{Request, Response, Status, Streaming};

/// Serves over that one stream until it is told to stop, and hangs up.
pub(crate) async fn serve(guest: impl Guest, stream: UnixStream, stop: impl Future) {
    let stream = stream.into_std().unwrap();
    let end = stream.try_clone().unwrap();
    // The server ends with what comes in: nothing more does, but it might.
    let once = tokio_stream::once(UnixStream::from_std(stream)).chain(tokio_stream::pending());
    let server = Server::builder().add_service(GuestServer::new(guest));
    tokio::select! {
        served = server.serve_with_incoming(once) => served.unwrap(),
        _ = stop => {}
    }
    // Its streams are open as long as the connection is.
    let _ = end.shutdown(Shutdown::Both);
}

/// Takes a zip and keeps nothing of it.
pub(crate) async fn put_code(request: Request<Streaming<PutCodeRequest>>) -> Result<Response<PutCodeResponse>, Status> {
    let mut parts = request.into_inner();
    while parts.message().await?.is_some() {}
    Ok(Response::new(PutCodeResponse { present: false }))
}
