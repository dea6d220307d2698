//! Loads a runtime into a machine ahead of need: makes a container without any code of a customer, waits until it has
//! initialised and stops it. What the first real one needs of the image has been read by then and stays in the page cache.

use std::collections::BTreeMap;
use std::time::Duration;

use stoker_proto::v1::Amount;

use super::{Containers, Function, Runtime};
use crate::code::CodeStore;

/// Ids of real containers are ULIDs.
const ID: &str = "warm-up";
/// Of any Python; its module is part of the interpreter's start.
const HANDLER: &str = "os.getcwd";
const AMOUNT: Amount = Amount {
    cpu_millis: 1000,
    memory_mib: 96,
};
/// Generous: hosts may be emulated and busy. Whoever waits for the machine has a limit of his own.
const TIMEOUT: Duration = Duration::from_secs(120);

// === impl Containers ===

impl Containers {
    /// Loads the runtime, once.
    ///
    /// # Errors
    ///
    /// Why the runtime does not start.
    pub(crate) async fn load_runtime(&self, runtime: Runtime, code: &CodeStore) -> Result<(), String> {
        let function = match runtime {
            Runtime::Python311 => function(runtime, HANDLER),
            // All of it is the customer's.
            Runtime::Provided => return Ok(()),
        };
        let mut loaded_runtimes = self.loaded_runtimes().await;
        if loaded_runtimes.contains(&runtime) {
            return Ok(());
        }
        let nothing = code.nothing().map_err(|error| error.to_string())?;
        let made = self
            .create(ID.to_owned(), function, nothing, None, std::future::pending())
            .await;
        let made = made.map_err(|error| error.to_string())?;
        if let Err(failure) = made.result {
            let log = String::from_utf8_lossy(&made.log.into_bytes()).into_owned();
            return Err(format!("{}: {}\n{log}", failure.name, failure.message));
        }
        if let Some(container) = self.get(ID) {
            container.stop().await;
        }
        loaded_runtimes.push(runtime);
        Ok(())
    }
}

fn function(runtime: Runtime, handler: &str) -> Function {
    Function {
        name: ID.to_owned(),
        account: ID.to_owned(),
        runtime,
        handler: handler.to_owned(),
        environment: BTreeMap::new(),
        amount: AMOUNT,
        init_timeout: TIMEOUT,
        freeze: false,
    }
}
