//! An external extension that subscribes to logs, by the older API.

use lambda_extension::{Error, Extension, LambdaLog, SharedService, service_fn};

async fn logs(batch: Vec<LambdaLog>) -> Result<(), Error> {
    for event in batch {
        println!("logs {:?}", event.record);
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    Extension::new()
        .with_log_types(&["platform", "function"])
        .with_logs_processor(SharedService::new(service_fn(logs)))
        .run()
        .await
}
