//! What Prometheus is told of this host.
//!
//! Parts of the agent count what happens in them, by [`Counters`] and [`Histograms`] of their own: a few atomic additions,
//! without a lock or an allocation, for warm calls are counted too. What there is at a moment is looked up whenever somebody
//! asks ([`gather`]). [`page`] gives all of it its name, [`serve`] answers.
//!
//! No label names an account, a function or a machine: their number has no bound. What each metric means is told in
//! `docs/metrics.md`.

mod gather;
mod instruments;
mod page;
mod process;
mod serve;

pub use gather::Sources;
pub use instruments::{Counters, Histograms, Label};
pub use serve::{PATH, serve};
