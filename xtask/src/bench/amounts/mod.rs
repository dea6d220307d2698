//! Amounts that fit: how soon machines are plugged, how functions come to what they need, how a web server's machine follows its load,
//! and what deciding costs.

mod functions;
mod machines;
mod plot;
mod plug;
mod policy;

use std::path::Path;

use anyhow::{Result, bail};
use serde::de::DeserializeOwned;

use super::{Bar, Options, PartName};
use crate::{cache::Cache, lab, web_image};

pub(super) use machines::PLOT;
pub(super) use policy::bars as policy;

/// A part of the bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Plug,
    Functions,
    Machines,
    Policy,
}

/// In the order in which they are measured.
const ALL: [Part; 4] = [Part::Policy, Part::Plug, Part::Functions, Part::Machines];

impl Part {
    /// Those that are asked for.
    pub(super) fn of(options: &Options) -> Result<Vec<Self>> {
        Ok(match options.part {
            None => ALL.to_vec(),
            Some(PartName::Plug) => vec![Self::Plug],
            Some(PartName::Functions) => vec![Self::Functions],
            Some(PartName::Machines) => vec![Self::Machines],
            Some(PartName::Policy) => vec![Self::Policy],
            Some(other) => bail!("`amounts` has no part {other:?}"),
        })
    }

    /// Whether it takes a host.
    pub(super) fn is_of_a_host(self) -> bool {
        self != Self::Policy
    }
}

/// What must be made before.
pub(super) const STEPS: &[&crate::setup::Step] = &[&lab::QEMU, &web_image::NGINX];

/// Measures a part in this host, where it is asked for.
fn of(part: Part, options: &Options, measure: impl FnOnce() -> Result<Vec<Bar>>) -> Result<Vec<Bar>> {
    match Part::of(options)?.contains(&part) {
        true => measure(),
        false => Ok(Vec::new()),
    }
}

pub(super) fn plug(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    of(Part::Plug, options, || plug::bars(cache, binaries, options))
}

pub(super) fn functions(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    of(Part::Functions, options, || functions::bars(cache, binaries, options))
}

pub(super) fn machines(cache: &Cache, binaries: &Path, options: &Options) -> Result<Vec<Bar>> {
    of(Part::Machines, options, || machines::bars(cache, binaries, options))
}

/// Runs the example with these arguments.
fn example<T: DeserializeOwned>(cache: &Cache, binaries: &Path, arguments: &[String]) -> Result<Vec<T>> {
    super::example(cache, binaries, "amounts", arguments)
}
