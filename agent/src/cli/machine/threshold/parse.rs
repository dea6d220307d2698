use std::fmt;
use std::ops::Range;

use stoker_policy::scale::Metric;
use stoker_proto::v1;
use v1::threshold::{Change, Comparison, Direction, Resource};

use crate::cli::amounts;

/// What ends a word, and is one of its own.
const SYMBOLS: [char; 4] = ['>', '<', ':', ','];

/// What is wrong with a threshold, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::cli) struct SyntaxError {
    text: String,
    /// In characters.
    at: Range<usize>,
    problem: String,
}

/// A word, a symbol, or several words, and where it begins, in bytes. At the end it is empty.
#[derive(Clone, Copy, Debug)]
struct Token<'a> {
    text: &'a str,
    at: usize,
}

/// What is read of a text, word by word.
struct Parser<'a> {
    text: &'a str,
    tokens: Vec<Token<'a>>,
    /// How many of them were read.
    read: usize,
}

/// Reads a threshold.
pub(in crate::cli) fn parse(text: &str) -> Result<v1::Threshold, SyntaxError> {
    let mut parser = Parser::new(text);
    let mut threshold = parser.crossed()?;
    parser.symbol(":", "`:` and what is changed, as `: vcpus +1`")?;
    parser.change(&mut threshold)?;
    while parser.peek().text == "," {
        parser.take();
        parser.bound(&mut threshold)?;
    }
    let rest = parser.take();
    match rest.text.is_empty() {
        true => Ok(threshold),
        false => Err(parser.expected(rest, "`,` or the end")),
    }
}

// === impl SyntaxError ===

/// With the text, and the place in it marked.
impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whatever is in it takes one column.
        let shown: String = self
            .text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect();
        let (before, marked) = (self.at.start, self.at.len().max(1));
        write!(f, "{}\n  {shown}\n  {:before$}{:^<marked$}", self.problem, "", "")
    }
}

impl std::error::Error for SyntaxError {}

// === impl Parser ===

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self {
            text,
            tokens: tokens(text),
            read: 0,
        }
    }

    fn peek(&self) -> Token<'a> {
        let end = Token {
            text: "",
            at: self.text.len(),
        };
        self.tokens.get(self.read).copied().unwrap_or(end)
    }

    fn take(&mut self) -> Token<'a> {
        let token = self.peek();
        self.read += 1;
        token
    }

    /// All words up to a symbol, the end, or the word `until`; empty where there is none.
    fn words(&mut self, until: &str) -> Token<'a> {
        let first = self.peek();
        let mut end = first.at;
        loop {
            let token = self.peek();
            if token.text.is_empty() || token.text == until || token.text.starts_with(SYMBOLS) {
                break;
            }
            end = token.at + token.text.len();
            self.take();
        }
        Token {
            text: self.text.get(first.at..end).unwrap_or_default(),
            at: first.at,
        }
    }

    fn wrong(&self, token: Token<'_>, problem: String) -> SyntaxError {
        let chars = |bytes: usize| self.text.get(..bytes).unwrap_or(self.text).chars().count();
        SyntaxError {
            text: self.text.to_owned(),
            at: chars(token.at)..chars(token.at + token.text.len()),
            problem,
        }
    }

    fn expected(&self, token: Token<'_>, what: &str) -> SyntaxError {
        let problem = match token.text {
            "" => format!("{what} is missing"),
            text => format!("{text:?} is not {what}"),
        };
        self.wrong(token, problem)
    }

    fn symbol(&mut self, symbol: &str, what: &str) -> Result<(), SyntaxError> {
        let token = self.take();
        match token.text == symbol {
            true => Ok(()),
            false => Err(self.expected(token, what)),
        }
    }

    /// What is measured, and when the threshold is crossed.
    fn crossed(&mut self) -> Result<v1::Threshold, SyntaxError> {
        let name = self.take();
        let metric = Metric::of(name.text).ok_or_else(|| {
            let all: Vec<_> = Metric::ALL.iter().map(|metric| metric.name()).collect();
            self.expected(name, &format!("a metric ({})", all.join(", ")))
        })?;
        let token = self.take();
        let comparison = match token.text {
            ">" | "above" => Comparison::Above,
            "<" | "below" => Comparison::Below,
            _ => return Err(self.expected(token, "`>` or `<`")),
        };
        let token = self.words("for");
        let value = match metric {
            Metric::Credits => number(token.text).ok_or_else(|| self.expected(token, "a number of credits, as `2.5`")),
            _ => percent(token.text).ok_or_else(|| self.expected(token, "a percentage, as `80%`")),
        }?;
        let held = match self.peek().text {
            "for" => {
                self.take();
                Some(self.time()?)
            }
            _ => None,
        };
        Ok(v1::Threshold {
            metric: metric.name().to_owned(),
            comparison: comparison.into(),
            value,
            held,
            ..Default::default()
        })
    }

    fn change(&mut self, threshold: &mut v1::Threshold) -> Result<(), SyntaxError> {
        let token = self.take();
        let resource = match token.text {
            "vcpus" => Resource::Vcpus,
            "cpu" => Resource::CpuShare,
            "memory" => Resource::Memory,
            _ => return Err(self.expected(token, "`vcpus`, `cpu` or `memory`")),
        };
        threshold.set_resource(resource);
        let (direction, change) = match self.peek().text {
            "grow" => (Direction::Grow, self.to(resource)?),
            "shrink" => (Direction::Shrink, self.to(resource)?),
            _ => self.by(resource)?,
        };
        threshold.set_direction(direction);
        threshold.change = Some(change);
        Ok(())
    }

    fn to(&mut self, resource: Resource) -> Result<Change, SyntaxError> {
        self.take();
        self.symbol("to", "`to` and an amount, as `grow to 4`")?;
        Ok(Change::To(self.amount(resource)?))
    }

    fn by(&mut self, resource: Resource) -> Result<(Direction, Change), SyntaxError> {
        let token = self.words("");
        let signed = [("+", Direction::Grow), ("-", Direction::Shrink)]
            .into_iter()
            .find_map(|(sign, direction)| Some((direction, token.text.strip_prefix(sign)?.trim_start())));
        let Some((direction, by)) = signed else {
            let what = format!("a change, as `+{0}`, `-25%` or `grow to {0}`", example(resource));
            return Err(self.expected(token, &what));
        };
        let change = match by.ends_with('%') {
            true => percent(by).map(Change::ByPercent),
            false => of(resource, by).map(Change::By),
        };
        let change = change.ok_or_else(|| {
            let what = format!("a change, as `+{}` or `-25%`", example(resource));
            self.expected(token, &what)
        })?;
        Ok((direction, change))
    }

    fn bound(&mut self, threshold: &mut v1::Threshold) -> Result<(), SyntaxError> {
        const WHAT: &str = "`at least`, `at most` or `every`";
        let first = self.take();
        let is_given = match first.text {
            "every" => {
                let time = self.time()?;
                threshold.cooldown.replace(time).is_some()
            }
            "at" => {
                let second = self.take();
                let resource = threshold.resource();
                let bound = match second.text {
                    "least" => &mut threshold.least,
                    "most" => &mut threshold.most,
                    _ => return Err(self.expected(second, "`least` or `most`")),
                };
                bound.replace(self.amount(resource)?).is_some()
            }
            _ => return Err(self.expected(first, WHAT)),
        };
        match is_given {
            true => Err(self.wrong(first, "is given twice".to_owned())),
            false => Ok(()),
        }
    }

    fn amount(&mut self, resource: Resource) -> Result<u32, SyntaxError> {
        let token = self.words("");
        of(resource, token.text).ok_or_else(|| {
            let what = format!("an amount, as `{}`", example(resource));
            self.expected(token, &what)
        })
    }

    fn time(&mut self) -> Result<prost_types::Duration, SyntaxError> {
        let token = self.words("");
        let time = humantime::parse_duration(token.text).ok();
        let time = time.and_then(|time| prost_types::Duration::try_from(time).ok());
        time.ok_or_else(|| self.expected(token, "a time, as `10s` or `5m`"))
    }
}

fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut push = |range: Range<usize>| {
        if let Some(word) = text.get(range.clone()).filter(|word| !word.is_empty()) {
            tokens.push(Token {
                text: word,
                at: range.start,
            });
        }
    };
    let mut begun = 0;
    for (at, c) in text.char_indices() {
        let next = at + c.len_utf8();
        if SYMBOLS.contains(&c) {
            push(begun..at);
            push(at..next);
            begun = next;
        } else if c.is_whitespace() {
            push(begun..at);
            begun = next;
        }
    }
    push(begun..text.len());
    tokens
}

/// An amount of a resource, in its unit.
fn of(resource: Resource, text: &str) -> Option<u32> {
    // Numbers as programs read them may have a sign.
    let text = Some(text).filter(|text| text.starts_with(|c: char| c.is_ascii_digit()))?;
    match resource {
        Resource::Vcpus | Resource::Unspecified => text.parse().ok(),
        Resource::CpuShare => amounts::cpu(text),
        Resource::Memory => amounts::memory(text),
    }
}

fn percent(text: &str) -> Option<f64> {
    number(text.strip_suffix('%')?.trim_end())
}

/// Digits with a point among them, at most.
fn number(text: &str) -> Option<f64> {
    let is_number =
        text.starts_with(|c: char| c.is_ascii_digit()) && text.chars().all(|c| c.is_ascii_digit() || c == '.');
    let number = is_number.then(|| text.parse::<f64>().ok()).flatten()?;
    number.is_finite().then_some(number)
}

/// An amount of a resource, for who has written it wrongly.
fn example(resource: Resource) -> &'static str {
    match resource {
        Resource::Vcpus | Resource::Unspecified => "1",
        Resource::CpuShare => "500m",
        Resource::Memory => "512MiB",
    }
}
