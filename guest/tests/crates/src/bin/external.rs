//! An external extension that subscribes to telemetry.

use lambda_extension::{Error, Extension, LambdaEvent, LambdaTelemetry, NextEvent, SharedService, service_fn};

async fn events(event: LambdaEvent) -> Result<(), Error> {
    match event.next {
        NextEvent::Invoke(event) => println!("external {event:?}"),
        NextEvent::Shutdown(event) => println!("external {event:?}"),
    }
    Ok(())
}

async fn telemetry(batch: Vec<LambdaTelemetry>) -> Result<(), Error> {
    for event in batch {
        println!("external {:?}", event.record);
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    Extension::new()
        .with_events_processor(service_fn(events))
        .with_telemetry_types(&["platform", "function"])
        .with_telemetry_processor(SharedService::new(service_fn(telemetry)))
        .run()
        .await
}
