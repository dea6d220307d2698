//! Figures as bars, for people.

use std::fmt;

/// Columns of the longest bar.
const WIDTH: usize = 48;

/// A column from empty to full, in eighths.
const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];

/// Figures in ms, each with what it is of, on one scale that begins at 0.
#[derive(Debug, Default)]
pub(super) struct Bars(Vec<(String, f64)>);

impl Bars {
    pub(super) fn bar(&mut self, label: String, ms: f64) {
        self.0.push((label, ms));
    }
}

impl fmt::Display for Bars {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let labels = self.0.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
        let most = self.0.iter().map(|(_, ms)| *ms).fold(0.0, f64::max);
        for (label, ms) in &self.0 {
            let part = if most > 0.0 { ms / most } else { 0.0 };
            // From 0 to the width: no figure is more than the largest, and none negative.
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
            let eighths = (part.clamp(0.0, 1.0) * (8 * WIDTH) as f64).round() as usize;
            let rest = EIGHTHS.get(eighths % 8).copied().unwrap_or_default();
            let bar = "█".repeat(eighths / 8) + rest;
            writeln!(f, "  {label:<labels$}  {bar} {ms:.2} ms")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_figures() {
        let mut bars = Bars::default();
        bars.bar("alone".into(), 0.5);
        bars.bar("among others".into(), 12.0);
        bars.bar("none".into(), 0.0);
        let full = "█".repeat(WIDTH);
        assert_eq!(
            bars.to_string(),
            format!("  alone         ██ 0.50 ms\n  among others  {full} 12.00 ms\n  none           0.00 ms\n")
        );
        bars.bar("an eighth of a column".into(), 12.0 / 48.0 / 8.0);
        assert!(
            bars.to_string().ends_with("  an eighth of a column  ▏ 0.03 ms\n"),
            "{bars}"
        );
        let mut nothing = Bars::default();
        nothing.bar("a".into(), 0.0);
        assert_eq!(nothing.to_string(), "  a   0.00 ms\n");
    }
}
