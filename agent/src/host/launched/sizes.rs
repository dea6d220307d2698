//! Asks a machine's devices for what was decided, and tells the loop what its guest has of it. Nobody waits for a guest.

use std::time::Duration;

use stoker_policy::MachineId;
use stoker_policy::scale::Size;
use tokio::sync::{mpsc, watch};

use super::Order;
use crate::host::message::Message;
use crate::machines::{ResizeError, Resizer};

/// How long to wait before devices that failed are asked again, at first and at last.
const AGAIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

/// What a machine is to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::host) struct Asked {
    /// The number of the request, 0 before the first of this agent.
    pub(in crate::host) number: u64,
    /// What was decided last.
    pub(in crate::host) size: Size,
}

/// Does what is asked, and then the last that was asked meanwhile, until nobody can ask any more.
pub(in crate::host) async fn follow(
    machine: MachineId,
    resizer: Resizer,
    mut asked: watch::Receiver<Asked>,
    inbox: mpsc::Sender<Message>,
) {
    let mut again = AGAIN.0;
    loop {
        let now = *asked.borrow_and_update();
        let failed = take(machine, &resizer, now, &mut asked, &inbox).await.err();
        let wait = async {
            match failed {
                Some(error) => {
                    tokio::time::sleep(again).await;
                    // It was not for the machine's end.
                    tracing::warn!(%machine, %error, size = %now.size, "a machine does not have the size that was decided");
                    again = (2 * again).min(AGAIN.1);
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            heard = asked.changed() => match heard {
                Ok(()) => again = AGAIN.0,
                Err(_) => return,
            },
            () = wait => {}
        }
    }
}

/// Asks for a size, and follows what the guest takes until it has all of it or something else is asked for.
async fn take(
    machine: MachineId,
    resizer: &Resizer,
    now: Asked,
    asked: &mut watch::Receiver<Asked>,
    inbox: &mpsc::Sender<Message>,
) -> Result<(), ResizeError> {
    resizer.resize(now.size).await?;
    let mut taking = resizer.taking();
    loop {
        let (amounts, is_news) = taking.look().await?;
        if is_news {
            let order = Order::Resized {
                machine,
                number: now.number,
                taken: amounts.taken,
            };
            // Without a loop nobody needs to know.
            let _ = inbox.send(Message::Launched(order)).await;
        }
        if amounts.are_taken() || asked.has_changed().unwrap_or(true) {
            return Ok(());
        }
        tokio::select! {
            () = taking.pause() => {}
            changed = asked.changed() => {
                // Who called this is to see it too.
                if changed.is_ok() {
                    asked.mark_changed();
                }
                return Ok(());
            }
        }
    }
}
