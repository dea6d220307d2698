//! A table for people.

use std::fmt;

/// Rows of cells under headings; each column is as wide as its widest cell.
pub(super) struct Table {
    rows: Vec<Vec<String>>,
    /// Columns from this one on hold figures and are set to the right.
    figures_from: usize,
}

impl Table {
    pub(super) fn new(headings: &[&str], figures_from: usize) -> Self {
        Self {
            rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()],
            figures_from,
        }
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        for row in &self.rows {
            let mut line = String::from("  ");
            for ((column, cell), width) in row.iter().enumerate().zip(&widths) {
                line += &match column < self.figures_from {
                    true => format!("{cell:<width$}  "),
                    false => format!("{cell:>width$}  "),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["name", "ms"], 1);
        table.row(vec!["a longer name".into(), "5".into()]);
        table.row(vec!["b".into(), "1234".into()]);
        assert_eq!(
            table.to_string(),
            "  name             ms\n  a longer name     5\n  b              1234\n"
        );
    }
}
