//! `stoker doctor`

use clap::Args;

use super::admin::ConfigFile;
use super::{Connection, Failure, print_json};
use crate::config::Config;
use crate::doctor::{Facts, Finding, Verdict, judge};
use crate::render::say;

/// Checks whether this host is fit to run machines, and says what to do where it is not. Changes nothing; an agent may run.
#[derive(Debug, Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    config: ConfigFile,
}

pub(super) async fn run(connection: &Connection, doctor: Doctor) -> Result<(), Failure> {
    let examining = tokio::task::spawn_blocking(move || examine(doctor.config));
    let findings = examining.await.map_err(|error| Failure::local(error.to_string()))?;
    if connection.json {
        print_json(&serde_json::json!({ "findings": findings }));
    } else {
        let width = terminal_size::terminal_size_of(std::io::stdout()).map_or(usize::MAX, |(width, _)| width.0.into());
        for line in findings.iter().flat_map(|finding| lines(finding, width)) {
            say!("{line}");
        }
    }
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    match (count(Verdict::Fail), count(Verdict::Warn)) {
        (0, _) => Ok(()),
        (failed, warned) => Err(Failure::Failed(format!(
            "{failed} of {} checks failed, {warned} warn",
            findings.len()
        ))),
    }
}

/// Where the configuration is wrong the rest is judged with the defaults.
fn examine(config: ConfigFile) -> Vec<Finding> {
    let (config, wrong) = match config.load() {
        Ok(config) => (config, None),
        Err(Failure::Local(message)) => (Config::default(), Some(message)),
        Err(failure) => (Config::default(), Some(failure.to_string())),
    };
    let configuration = Finding {
        check: "configuration",
        verdict: if wrong.is_some() { Verdict::Fail } else { Verdict::Ok },
        remedy: wrong
            .is_some()
            .then(|| "`stokerd --print-config` shows every key; what follows is with the defaults".to_owned()),
        detail: wrong.unwrap_or_else(|| "is right".to_owned()),
    };
    let mut findings = vec![configuration];
    findings.extend(judge(&Facts::read(&config), &config));
    findings
}

/// What was found, and below it what to do; words go to a new line where they are wider than the terminal.
fn lines(finding: &Finding, width: usize) -> Vec<String> {
    let verdict = match finding.verdict {
        Verdict::Ok => "ok",
        Verdict::Warn => "warn",
        Verdict::Fail => "FAIL",
    };
    let head = format!("{verdict:<5} {:<17} ", finding.check);
    let remedy = finding.remedy.as_ref().map(|remedy| format!("-> {remedy}"));
    let texts = [Some(finding.detail.clone()), remedy];
    let wrapped = texts
        .into_iter()
        .flatten()
        .flat_map(|text| wrap(&text, width.saturating_sub(head.len())));
    let indent = " ".repeat(head.len());
    wrapped
        .enumerate()
        .map(|(line, text)| format!("{}{text}", if line == 0 { &head } else { &indent }))
        .collect()
}

/// Breaks the lines of a text that are longer than `width` between words.
fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for whole in text.lines() {
        let mut line = String::new();
        for word in whole.split_inclusive(' ') {
            if !line.is_empty() && (line.len() + word.len()) > width {
                lines.push(std::mem::take(&mut line));
            }
            line.push_str(word);
        }
        lines.push(line);
    }
    lines.iter().map(|line| line.trim_end().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_line_with_its_remedy_below() {
        let mut finding = Finding {
            check: "swap",
            verdict: Verdict::Ok,
            detail: "off".into(),
            remedy: None,
        };
        assert_eq!(lines(&finding, 80), ["ok    swap              off"]);
        finding.verdict = Verdict::Warn;
        finding.remedy = Some("swapoff -a".into());
        assert_eq!(lines(&finding, 80)[1], "                        -> swapoff -a");
        assert_eq!(
            lines(&finding, 35)[1..],
            ["                        -> swapoff", "                        -a"]
        );
    }
}
