//! A machine's size against the demand, and what requests took, as a drawing (SVG 1.1).

use std::fmt::Write as _;

use serde::Deserialize;

/// What was seen, each with the time since the beginning, in s.
#[derive(Debug, Deserialize)]
pub(super) struct Seen {
    /// vCPUs that were asked for and that the guest had, and CPUs that it used, where that was known.
    looks: Vec<(f64, f64, f64, Option<f64>)>,
    /// Requests a second from then on.
    steps: Vec<(f64, f64)>,
    /// What each took, in ms.
    requests: Vec<(f64, f64)>,
}

/// All of it, in px.
const WIDTH: f64 = 800.0;
const HEIGHT: f64 = 460.0;
const LEFT: f64 = 60.0;
const RIGHT: f64 = 780.0;
const SIZE: Panel = Panel {
    top: 40.0,
    bottom: 240.0,
};
const TIMES: Panel = Panel {
    top: 300.0,
    bottom: 410.0,
};

/// Grey lines across a panel.
const LINES: usize = 4;

const USED: &str = "#3366cc";
const ASKED: &str = "#aaaaaa";
const TAKEN: &str = "#dc3912";

/// Where a diagram is drawn.
#[derive(Clone, Copy)]
struct Panel {
    top: f64,
    bottom: f64,
}

/// A diagram: where, how long, and the largest figure that has room.
struct Scale {
    panel: Panel,
    seconds: f64,
    most: f64,
}

// === impl Scale ===

impl Scale {
    fn x(&self, at: f64) -> f64 {
        LEFT + (RIGHT - LEFT) * at / self.seconds
    }

    fn y(&self, figure: f64) -> f64 {
        let Panel { top, bottom } = self.panel;
        bottom - (bottom - top) * figure / self.most
    }

    /// A line through these.
    fn line(&self, points: impl Iterator<Item = (f64, f64)>, colour: &str) -> String {
        let points: Vec<_> = points
            .map(|(at, figure)| format!("{:.1},{:.1}", self.x(at), self.y(figure)))
            .collect();
        format!(
            "<polyline fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" points=\"{}\"/>\n",
            points.join(" ")
        )
    }

    /// What stays as it is until it is another.
    fn stairs(&self, points: impl Iterator<Item = (f64, f64)>, colour: &str) -> String {
        let mut last = None;
        let points = points.flat_map(|(at, figure)| {
            let before = last.replace(figure).map(|before| (at, before));
            before.into_iter().chain([(at, figure)])
        });
        self.line(points, colour)
    }

    /// Its frame, with figures at the side.
    fn frame(&self, title: &str) -> String {
        let mut text = words(LEFT, self.panel.top - 12.0, "start", title);
        for line in 0..=LINES {
            let figure = self.most * line as f64 / LINES as f64;
            let y = self.y(figure);
            let _ = writeln!(
                text,
                "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#dddddd\"/>"
            );
            text += &words(LEFT - 8.0, y + 4.0, "end", &short(figure));
        }
        text
    }
}

/// Draws it.
pub(super) fn svg(seen: &Seen) -> String {
    let last = |times: &[f64]| times.iter().copied().fold(1.0, f64::max);
    let seconds = last(&seen.looks.iter().map(|look| look.0).collect::<Vec<_>>());
    let figures = seen
        .looks
        .iter()
        .flat_map(|look| [look.1, look.2, look.3.unwrap_or(0.0)]);
    let size = Scale {
        panel: SIZE,
        seconds,
        most: last(&figures.collect::<Vec<_>>()).ceil() + 1.0,
    };
    let p99 = by_second(&seen.requests);
    let times = Scale {
        panel: TIMES,
        seconds,
        most: last(&p99.iter().map(|of| of.1).collect::<Vec<_>>()) * 1.1,
    };
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    text += &size.frame("vCPUs");
    text += &size.stairs(seen.looks.iter().map(|look| (look.0, look.1)), ASKED);
    text += &size.stairs(seen.looks.iter().map(|look| (look.0, look.2)), TAKEN);
    text += &size.line(seen.looks.iter().filter_map(|look| Some((look.0, look.3?))), USED);
    for (number, (name, colour)) in [("asked for", ASKED), ("the guest has", TAKEN), ("it uses", USED)]
        .iter()
        .enumerate()
    {
        let x = RIGHT - 330.0 + 115.0 * number as f64;
        let _ = writeln!(
            text,
            "<rect x=\"{x}\" y=\"20\" width=\"14\" height=\"4\" fill=\"{colour}\"/>"
        );
        text += &words(x + 20.0, 28.0, "start", name);
    }
    text += &times.frame("requests: p99 of each second, in ms");
    text += &times.line(p99.into_iter(), USED);
    for (at, a_second) in &seen.steps {
        let x = size.x(*at);
        let _ = writeln!(
            text,
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{}\" stroke=\"#888888\" stroke-dasharray=\"4 3\"/>",
            SIZE.top, TIMES.bottom
        );
        text += &words(x + 4.0, SIZE.bottom + 18.0, "start", &format!("{}/s", short(*a_second)));
    }
    for part in 0..=LINES {
        let at = seconds * part as f64 / LINES as f64;
        text += &words(size.x(at), TIMES.bottom + 20.0, "middle", &format!("{at:.0} s"));
    }
    text + "</svg>\n"
}

/// The longest of each second but for one in a hundred.
fn by_second(requests: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut seconds: std::collections::BTreeMap<u64, Vec<f64>> = Default::default();
    for (at, ms) in requests {
        // Of a time of minutes.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        seconds.entry(at.max(0.0) as u64).or_default().push(*ms);
    }
    let p99 = seconds.into_iter().filter_map(|(second, mut ms)| {
        ms.sort_by(f64::total_cmp);
        Some((second as f64 + 0.5, stoker_testkit::permille::permille(&ms, 990)?))
    });
    p99.collect()
}

fn words(x: f64, y: f64, anchor: &str, text: &str) -> String {
    format!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>\n")
}

/// A figure in as few digits as say it.
fn short(figure: f64) -> String {
    let text = match figure {
        figure if figure >= 100.0 => format!("{figure:.0}"),
        figure => format!("{figure:.1}"),
    };
    text.trim_end_matches(".0").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_and_demand_are_drawn_to_scale() {
        let seen = Seen {
            looks: vec![
                (0.0, 1.0, 1.0, None),
                (5.0, 3.0, 1.0, Some(1.0)),
                (10.0, 3.0, 3.0, Some(2.0)),
            ],
            steps: vec![(0.0, 3.25), (5.0, 120.4)],
            requests: vec![(0.1, 5.0), (0.9, 10.0), (9.0, 100.0)],
        };
        let svg = svg(&seen);
        // Four vCPUs have room in 200 px; what is asked for goes up at once.
        assert!(
            svg.contains("points=\"60.0,190.0 420.0,190.0 420.0,90.0 780.0,90.0 780.0,90.0\""),
            "{svg}"
        );
        assert!(svg.contains("points=\"420.0,190.0 780.0,140.0\""), "{svg}");
        // 110 ms have room in 110 px.
        assert!(svg.contains("points=\"96.0,400.0 744.0,310.0\""), "{svg}");
        assert!(
            svg.contains(">3.2/s<") && svg.contains(">120/s<") && svg.contains(">10 s<"),
            "{svg}"
        );
        assert_eq!(
            svg.matches("<svg").count() + svg.matches("<text").count(),
            svg.matches("</").count()
        );
    }

    #[test]
    fn nothing_is_drawn_of_nothing() {
        let svg = svg(&Seen {
            looks: Vec::new(),
            steps: Vec::new(),
            requests: Vec::new(),
        });
        assert!(svg.ends_with("</svg>\n") && !svg.contains("NaN"), "{svg}");
    }
}
