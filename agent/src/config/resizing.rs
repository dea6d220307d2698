//! How amounts of functions are fitted to their use that say nothing of it themselves.

use serde::{Deserialize, Serialize};
use stoker_policy::ResizeMode;

/// What is done about an amount that does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resizing {
    /// Executions are not looked at.
    Off,
    /// The account is told.
    Advise,
    /// The account is told, and the amount changes.
    Auto,
}

impl From<Resizing> for ResizeMode {
    fn from(resizing: Resizing) -> Self {
        match resizing {
            Resizing::Off => Self::Off,
            Resizing::Advise => Self::Advise,
            Resizing::Auto => Self::Auto,
        }
    }
}
