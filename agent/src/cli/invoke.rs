//! `stoker invoke`

use std::io::{Read as _, Write as _};

use bytes::Bytes;
use clap::Args;
use serde_json::Value;
use stoker_proto::v1;
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::invoke_with_response_stream_response::Event;
use stoker_proto::v1::placement::Source;
use tonic::transport::Channel;
use tonic::{Status, Streaming};

use super::names::Function;
use super::{Connection, Failure, MAX_MESSAGE, json, print_json};
use crate::render::{amount, bytes, duration, give_up, nanos, notification, short};

/// Runs a function once. The answer goes to standard output, its log and a summary to standard error.
#[derive(Debug, Args)]
pub(super) struct Invoke {
    #[command(flatten)]
    function: Function,
    /// JSON, or @FILE, or @- for standard input
    #[arg(long, default_value = "{}")]
    payload: String,
    /// Resources in place of the function's own, as `500m,256MiB`
    #[arg(long, value_parser = super::amounts::parse)]
    amount: Option<v1::Amount>,
    /// The request's id, a UUID; the agent makes one where none is given
    #[arg(long, default_value = "")]
    request_id: String,
    /// Write the answer to standard output as it comes, as it is
    #[arg(long)]
    stream: bool,
}

pub(super) async fn run(connection: &Connection, invoke: Invoke) -> Result<(), Failure> {
    if invoke.stream && connection.json {
        return Err(Failure::local(
            "an answer is written as it comes (--stream), or as JSON (--json)",
        ));
    }
    let name = invoke.function.name()?;
    let payload = read_payload(invoke.payload).await?;
    let mut client = InvocationsClient::new(connection.channel().await?)
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let request = v1::InvokeRequest {
        name,
        payload,
        amount: invoke.amount,
        request_id: invoke.request_id,
    };
    let response = if invoke.stream {
        let response = stream(client, request).await?;
        print_end(&response).unwrap_or_else(|error| give_up(&error));
        response
    } else {
        let response = client.invoke(request).await?.into_inner();
        if connection.json {
            print_json(&as_json(&response)?);
        } else {
            print(&response).unwrap_or_else(|error| give_up(&error));
        }
        response
    };
    if response.function_error.is_empty() {
        Ok(())
    } else {
        Err(Failure::Function(kind_of_error(&response)))
    }
}

async fn read_payload(payload: String) -> Result<Bytes, Failure> {
    let Some(file) = payload.strip_prefix('@').map(str::to_owned) else {
        return Ok(payload.into());
    };
    let reading = tokio::task::spawn_blocking(move || {
        let read = if file == "-" {
            let mut bytes = Vec::new();
            std::io::stdin().lock().read_to_end(&mut bytes).map(|_| bytes)
        } else {
            std::fs::read(&file)
        };
        read.map(Bytes::from)
            .map_err(|error| Failure::local(format!("can't read the payload {file}: {error}")))
    });
    match reading.await {
        Ok(read) => read,
        Err(error) => Err(Failure::local(error.to_string())),
    }
}

/// Writes the answer as it comes. What it came to: the payload is the error object, if there is one.
async fn stream(
    mut client: InvocationsClient<Channel>,
    request: v1::InvokeRequest,
) -> Result<v1::InvokeResponse, Failure> {
    let mut events = client.invoke_with_response_stream(request).await?.into_inner();
    let mut request_id = String::new();
    let end = loop {
        match next(&mut events).await? {
            Event::Head(head) => request_id = head.request_id,
            Event::Chunk(chunk) => write_out(&chunk).unwrap_or_else(|error| give_up(&error)),
            Event::Complete(end) => break end,
        }
    };
    Ok(v1::InvokeResponse {
        request_id,
        payload: end.error,
        function_error: end.function_error,
        log: end.log,
        log_truncated: end.log_truncated,
        placement: end.placement,
        latency: end.latency,
        usage: end.usage,
        notification: end.notification,
    })
}

async fn next(events: &mut Streaming<v1::InvokeWithResponseStreamResponse>) -> Result<Event, Status> {
    let event = events.message().await?.and_then(|message| message.event);
    event.ok_or_else(|| Status::internal("the agent ended the answer before it was over"))
}

fn write_out(chunk: &[u8]) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(chunk)?;
    out.flush()
}

/// What there is to say of an answer that was written as it came.
fn print_end(response: &v1::InvokeResponse) -> std::io::Result<()> {
    print_log(response)?;
    let mut err = std::io::stderr().lock();
    if !response.function_error.is_empty() {
        err.write_all(&response.payload)?;
        writeln!(err)?;
    }
    writeln!(err, "{}", summary(response))
}

fn print(response: &v1::InvokeResponse) -> std::io::Result<()> {
    print_log(response)?;
    let mut out = std::io::stdout().lock();
    out.write_all(&response.payload)?;
    writeln!(out)?;
    out.flush()?;
    writeln!(std::io::stderr(), "{}", summary(response))
}

fn print_log(response: &v1::InvokeResponse) -> std::io::Result<()> {
    let mut err = std::io::stderr().lock();
    if !response.log.is_empty() {
        writeln!(err, "--- log")?;
        err.write_all(&response.log)?;
        if !response.log.ends_with(b"\n") {
            writeln!(err)?;
        }
        writeln!(err, "---")?;
    }
    Ok(())
}

/// One line: how it started, how long each part took, what it used, where it ran.
fn summary(response: &v1::InvokeResponse) -> String {
    let mut parts = Vec::new();
    if let Some(placement) = &response.placement {
        parts.push(
            match placement.source() {
                Source::IdleContainer => "warm",
                Source::ActiveMachine => "new container in an active machine",
                Source::WarmingMachine => "machine from the warming pool",
                Source::NewMachine => "new machine",
                Source::Unspecified => "ran",
            }
            .to_owned(),
        );
    }
    if let Some(latency) = &response.latency {
        let steps: Vec<String> = [
            ("machine", latency.machine),
            ("code", latency.code),
            ("init", latency.init),
            ("run", latency.run),
        ]
        .into_iter()
        .filter(|(_, took)| took.is_some_and(|took| took.seconds != 0 || took.nanos != 0))
        .map(|(step, took)| format!("{step} {}", duration(took)))
        .collect();
        parts.push(format!("{} ({})", duration(latency.total), steps.join(", ")));
    }
    if let Some(usage) = &response.usage {
        parts.push(format!(
            "{} CPU, {} peak",
            nanos(usage.cpu_ns),
            bytes(usage.memory_peak_bytes)
        ));
    }
    if let Some(placement) = &response.placement {
        let given = placement
            .amount
            .as_ref()
            .map_or_else(String::new, |a| format!(" {}", amount(a)));
        parts.push(format!(
            "machine {} container {}{given}",
            short(&placement.machine),
            short(&placement.container)
        ));
    }
    parts.push(format!("request {}", response.request_id));
    if let Some(told) = &response.notification {
        parts.push(format!("amount: {}", notification(told)));
    }
    parts.join(" | ")
}

/// The response's JSON with its payload as the JSON that it is, and its log as text.
fn as_json(response: &v1::InvokeResponse) -> Result<Value, Failure> {
    let mut value = json("InvokeResponse", response)?;
    if let Some(fields) = value.as_object_mut() {
        let payload = serde_json::from_slice(&response.payload)
            .unwrap_or_else(|_| Value::from(String::from_utf8_lossy(&response.payload)));
        fields.insert("payload".to_owned(), payload);
        fields.insert("log".to_owned(), Value::from(String::from_utf8_lossy(&response.log)));
    }
    Ok(value)
}

/// Lambda's `errorType`, or what there is instead.
fn kind_of_error(response: &v1::InvokeResponse) -> String {
    serde_json::from_slice::<Value>(&response.payload)
        .ok()
        .and_then(|error| error.get("errorType")?.as_str().map(str::to_owned))
        .unwrap_or_else(|| response.function_error.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response() -> v1::InvokeResponse {
        let ms = |ms| {
            Some(prost_types::Duration {
                seconds: 0,
                nanos: ms * 1_000_000,
            })
        };
        v1::InvokeResponse {
            request_id: "r".into(),
            payload: r#"{"a":1}"#.into(),
            log: "hello\n".into(),
            placement: Some(v1::Placement {
                machine: "machines/M".into(),
                container: "machines/M/containers/C".into(),
                source: Source::WarmingMachine.into(),
                amount: Some(v1::Amount {
                    cpu_millis: 250,
                    memory_mib: 128,
                }),
            }),
            latency: Some(v1::Latency {
                total: ms(30),
                machine: ms(0),
                code: ms(5),
                init: ms(20),
                run: ms(5),
            }),
            usage: Some(v1::Usage {
                cpu_ns: 4_000_000,
                memory_peak_bytes: 20 << 20,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[test]
    fn the_summary_is_one_line() {
        assert_eq!(
            summary(&response()),
            "machine from the warming pool | 30.0 ms (code 5.00 ms, init 20.0 ms, run 5.00 ms) | 4.00 ms CPU, 20.0 MiB peak | \
             machine M container C 250m 128MiB | request r"
        );
    }

    #[test]
    fn json_holds_the_payload_itself() {
        let value = as_json(&response()).unwrap();
        assert_eq!(value["payload"], serde_json::json!({"a": 1}));
        assert_eq!(value["log"], "hello\n");
        assert_eq!(value["placement"]["source"], "WARMING_MACHINE");
    }
}
