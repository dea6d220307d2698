//! The history of the machine that is selected.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType};

use super::super::super::credits;
use super::super::model::{Model, Past, Row};
use crate::render::{nanos, short, some_amount};

/// From so many columns on credits have a graph beside that of use.
const BALANCE_FROM: u16 = 60;

/// What the selected machine has used, and what credits it had, up to now.
pub(super) fn draw(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let Some(row) = model.selected() else { return };
    let history: Vec<_> = model.history(&row.name).collect();
    if area.width < BALANCE_FROM {
        return use_graph(frame, model, row, &history, area);
    }
    let [of_use, of_credits] = Layout::horizontal([Constraint::Fill(3), Constraint::Fill(2)]).areas(area);
    use_graph(frame, model, row, &history, of_use);
    balance_graph(frame, model, row, &history, of_credits);
}

fn use_graph(frame: &mut Frame<'_>, model: &Model, row: &Row, history: &[Past], area: Rect) {
    let time = Time::of(model, history, area);
    let cpu = time.points(|past| Some(past.rate.cpu));
    let wait = time.points(|past| Some(past.rate.wait));
    let highest = cpu.iter().chain(&wait).map(|(_, percent)| *percent).fold(0.0, f64::max);
    // Whole CPUs: a scale that changes with every sample could not be read.
    let top = (highest / 100.0).ceil().max(1.0) * 100.0;
    let title = match row.account.as_str() {
        "" => format!(" {} {} ", short(&row.name), row.runtime),
        account => format!(" {} {account} {} ", short(&row.name), row.runtime),
    };
    let legend = Line::from(vec![
        Span::styled(" CPU ", Style::new().fg(Color::Cyan)),
        Span::styled("wait ", Style::new().fg(Color::Yellow)),
    ]);
    let block = Block::bordered()
        .title(format!("{title}{} ", some_amount(row.amount.as_ref())))
        .title_bottom(legend.right_aligned());
    let chart = Chart::new(vec![line(&wait, Color::Yellow), line(&cpu, Color::Cyan)])
        .block(block)
        .x_axis(time.axis())
        .y_axis(
            Axis::default()
                .bounds([0.0, top])
                .labels(["0%".to_owned(), format!("{top:.0}%")]),
        );
    frame.render_widget(chart, area);
}

fn balance_graph(frame: &mut Frame<'_>, model: &Model, row: &Row, history: &[Past], area: Rect) {
    let time = Time::of(model, history, area);
    let left = time.points(|past| past.left);
    let of_all = |of: fn(f64, f64) -> f64| left.iter().map(|(_, credits)| *credits).reduce(of).unwrap_or(0.0);
    // Whole credits, as with CPUs.
    let bottom = of_all(f64::min).floor();
    let top = of_all(f64::max).ceil().max(bottom + 1.0);
    let terms = row.credits.as_ref().map_or_else(String::new, |has| {
        format!(
            " baseline {} {} ",
            credits::cpu(has.baseline_millis),
            credits::mode(has)
        )
    });
    let block = Block::bordered()
        .title(Line::styled(" credits left ", Style::new().fg(Color::Green)))
        .title_bottom(Line::from(terms).right_aligned());
    let chart = Chart::new(vec![line(&left, Color::Green)])
        .block(block)
        .x_axis(time.axis())
        .y_axis(
            Axis::default()
                .bounds([bottom, top])
                .labels([format!("{bottom:.0}"), format!("{top:.0}")]),
        );
    frame.render_widget(chart, area);
}

fn line(points: &[(f64, f64)], color: Color) -> Dataset<'_> {
    Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::new().fg(color))
        .data(points)
}

/// As much of the last time as a graph has room for.
struct Time<'a> {
    history: &'a [Past],
    /// How many measurements there is room for.
    shown: usize,
    interval: Duration,
}

impl<'a> Time<'a> {
    fn of(model: &Model, history: &'a [Past], area: Rect) -> Self {
        // Two points stand in a column.
        let room = usize::from(area.width).saturating_mul(2);
        let history = history.split_at(history.len().saturating_sub(room)).1;
        Self {
            history,
            shown: history.len().max(room / 2).max(2),
            interval: model.interval,
        }
    }

    /// Each with how many measurements ago it was.
    fn points(&self, of: fn(&Past) -> Option<f64>) -> Vec<(f64, f64)> {
        let ages = (0..self.history.len()).rev().map(|age| -(age as f64));
        ages.zip(self.history)
            .filter_map(|(age, past)| Some((age, of(past)?)))
            .collect()
    }

    fn axis(&self) -> Axis<'static> {
        let intervals = self.shown - 1;
        let span = self
            .interval
            .saturating_mul(u32::try_from(intervals).unwrap_or(u32::MAX));
        let span = nanos(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX));
        Axis::default()
            .bounds([-(intervals as f64), 0.0])
            // The room that the first takes is not the graph's.
            .labels([String::new(), format!("last {span}")])
    }
}
