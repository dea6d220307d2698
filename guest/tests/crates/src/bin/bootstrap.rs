//! A function that shuts down gracefully, with an internal extension that subscribes to telemetry.

use lambda_extension::{Extension, LambdaTelemetry, SharedService};
use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use serde_json::Value;

async fn telemetry(batch: Vec<LambdaTelemetry>) -> Result<(), Error> {
    for event in batch {
        println!("internal {:?}", event.record);
    }
    Ok(())
}

async fn handler(event: LambdaEvent<Value>) -> Result<Value, Error> {
    if event.payload == "sleep" {
        std::future::pending::<()>().await;
    }
    println!("called");
    Ok(event.payload)
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    lambda_runtime::spawn_graceful_shutdown_handler(|| async { println!("the hook has run") }).await;
    let internal = Extension::new()
        .with_extension_name("internal")
        .with_events(&["INVOKE"])
        .with_telemetry_types(&["platform"])
        .with_telemetry_port_number(9004)
        .with_telemetry_processor(SharedService::new(lambda_extension::service_fn(telemetry)))
        .register()
        .await?;
    tokio::spawn(internal.run());
    run(service_fn(handler)).await
}
