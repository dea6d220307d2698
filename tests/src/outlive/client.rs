//! A client that asks again at once where its connection broke, and where an agent says that it may, when it says so.

use std::error::Error as _;
use std::path::Path;
use std::time::{Duration, Instant};

use stoker_proto::v1;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::invocations_client::InvocationsClient;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};
use tonic_types::StatusExt as _;

use crate::PATIENCE;
use crate::host::{creation, lasting_channel};

/// Between two attempts to ask: the processors are few, and an agent that starts needs them.
const AGAIN: Duration = Duration::from_millis(25);

/// Asks over a connection of its own.
#[derive(Clone, Debug)]
pub(super) struct Client(Channel);

/// What came of a question.
#[derive(Debug)]
pub(super) struct Answer<T> {
    /// What the agent said; where it said nothing in time, how the last connection broke.
    pub(super) said: Result<T, Status>,
    /// How many connections broke meanwhile.
    pub(super) broken: u64,
}

// === impl Client ===

impl Client {
    pub(super) fn new(socket: &Path) -> Self {
        Self(lasting_channel(socket))
    }

    pub(super) async fn invoke(&self, request: &v1::InvokeRequest) -> Answer<v1::InvokeResponse> {
        ask(|| {
            let (mut client, request) = (InvocationsClient::new(self.0.clone()), request.clone());
            async move { client.invoke(request).await }
        })
        .await
    }

    /// The name is the request's id too, as far as an id may be one.
    pub(super) async fn create(&self, function: &v1::Function, code: &[u8]) -> Answer<v1::Function> {
        let parts = creation(function.clone(), &function.name.replace('/', "-"), code);
        ask(|| {
            let (mut client, parts) = (self.functions(), parts.clone());
            async move { client.create_function(tokio_stream::iter(parts)).await }
        })
        .await
    }

    /// Deletes a function that is there.
    pub(super) async fn delete(&self, name: &str) -> Answer<()> {
        let Answer { said, broken } = ask(|| {
            let (mut client, name) = (self.functions(), name.to_owned());
            async move { client.delete_function(v1::DeleteFunctionRequest { name }).await }
        })
        .await;
        let said = match said {
            // An earlier attempt was done, and its answer lost.
            Err(status) if broken > 0 && status.code() == Code::NotFound => Ok(()),
            said => said,
        };
        Answer { said, broken }
    }

    pub(super) async fn get(&self, name: &str) -> Answer<v1::Function> {
        ask(|| {
            let mut client = self.functions();
            let request = v1::GetFunctionRequest {
                name: name.into(),
                ..Default::default()
            };
            async move { client.get_function(request).await }
        })
        .await
    }

    fn functions(&self) -> FunctionsClient<Channel> {
        FunctionsClient::new(self.0.clone())
    }
}

async fn ask<T, F>(mut question: impl FnMut() -> F) -> Answer<T>
where
    F: Future<Output = Result<Response<T>, Status>>,
{
    let (began, mut broken) = (Instant::now(), 0);
    loop {
        let said = question().await;
        let again = match &said {
            // What an agent says has no cause here.
            Err(status) if status.source().is_some() => {
                broken += 1;
                Some(AGAIN)
            }
            Err(status) => status
                .get_error_details()
                .retry_info()
                .and_then(|info| info.retry_delay),
            Ok(_) => None,
        };
        match again {
            Some(delay) if began.elapsed() < PATIENCE => tokio::time::sleep(delay).await,
            _ => {
                let said = said.map(Response::into_inner);
                return Answer { said, broken };
            }
        }
    }
}
