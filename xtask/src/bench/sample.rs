//! What was measured of one thing, run by run.

use std::fmt;

use anyhow::ensure;
use serde::{Deserialize, Serialize};

/// One figure a run, in ascending order; at least one.
#[derive(Debug, Serialize, Deserialize)]
#[serde(try_from = "Vec<f64>", into = "Vec<f64>")]
#[derive(Clone)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    /// From the figures in any order.
    ///
    /// # Errors
    ///
    /// Where there are none, or one is no number.
    pub(crate) fn new(mut figures: Vec<f64>) -> anyhow::Result<Self> {
        ensure!(!figures.is_empty(), "nothing was measured");
        ensure!(
            figures.iter().all(|figure| figure.is_finite()),
            "not a number among {figures:?}"
        );
        figures.sort_by(f64::total_cmp);
        Ok(Self(figures))
    }

    pub(crate) fn median(&self) -> f64 {
        let at = |index: usize| self.0.get(index).copied().unwrap_or(f64::NAN);
        (at((self.0.len() - 1) / 2) + at(self.0.len() / 2)) / 2.0
    }
}

impl TryFrom<Vec<f64>> for Sample {
    type Error = anyhow::Error;

    fn try_from(figures: Vec<f64>) -> Result<Self, Self::Error> {
        Self::new(figures)
    }
}

impl From<Sample> for Vec<f64> {
    fn from(sample: Sample) -> Self {
        sample.0
    }
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let least = self.0.first().copied().unwrap_or(f64::NAN);
        let most = self.0.last().copied().unwrap_or(f64::NAN);
        let whole = self.0.iter().all(|figure| figure.fract() == 0.0);
        let digits = if whole || self.median() >= 100.0 { 0 } else { 2 };
        write!(f, "{:.digits$}", self.median())?;
        // Of one run, say, there is only one.
        if least < most {
            write!(f, " ({least:.digits$} to {most:.digits$})")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_and_even_counts() {
        assert_eq!(Sample::new(vec![3.0, 1.0, 2.0]).unwrap().median(), 2.0);
        assert_eq!(Sample::new(vec![4.0, 1.0, 2.0, 3.0]).unwrap().median(), 2.5);
        assert!(Sample::new(vec![]).is_err());
        assert!(Sample::new(vec![f64::NAN]).is_err());
    }

    #[test]
    fn whole_figures_are_shown_whole_and_one_alone() {
        let shown = |figures: &[f64]| Sample::new(figures.to_vec()).unwrap().to_string();
        assert_eq!(shown(&[1.5, 2.0, 3.0]), "2.00 (1.50 to 3.00)");
        assert_eq!(shown(&[300.0, 100.4]), "200 (100 to 300)");
        assert_eq!(shown(&[0.0]), "0");
    }
}
