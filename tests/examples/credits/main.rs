//! What credits do for a machine that wakes up now and then among others that compute without pause, and what becomes of one that
//! has spent all, in real microVMs through the public API. `cargo xtask bench credits` runs it, in a host that can run them, with
//! the number of rounds, the ms of each measurement, how often credits run out, and `machines.scheduler`; it tells its progress on
//! standard error, and prints a line of JSON a result.
//!
//! | module | does |
//! |---|---|
//! | `fleet` | the machines, and what is asked of them |
//! | `wakes` | wake-ups in three settings, in turn: alone, by the kernel's default, and with credits |
//! | `spends` | how soon a machine is held back whose credits run out, and whether it has its baseline then |

mod fleet;
mod spends;
mod wakes;

use std::time::Duration;

use anyhow::{Context as _, bail};

use fleet::Fleet;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [numbers @ .., scheduler] = arguments.as_slice() else {
        bail!("say what is to be measured");
    };
    let numbers: Vec<_> = numbers.iter().map(|number| number.parse::<u32>()).collect();
    let &[Ok(rounds), Ok(ms), Ok(times)] = numbers.as_slice() else {
        bail!("say how many rounds there are to be, how many ms each measurement lasts, and how often credits run out");
    };
    let fleet = Fleet::start(scheduler).await?;
    let measured = async {
        spends::measure(&fleet, times).await.context("where credits run out")?;
        wakes::measure(&fleet, rounds, Duration::from_millis(ms.into())).await
    };
    let measured = measured.await;
    if measured.is_err() {
        eprintln!("{}", fleet.host.log());
    }
    measured?;
    fleet.host.stop().await?;
    Ok(())
}
