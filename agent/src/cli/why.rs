//! `stoker why`

use clap::Args;
use stoker_proto::v1;
use stoker_proto::v1::decisions_client::DecisionsClient;

use super::{Connection, Failure, MAX_MESSAGE, PAGE_SIZE, all_pages, json, print_json};
use crate::render::{Table, say, short};

/// Shows what was decided about a machine, a container or a request, and why, in the order of time.
#[derive(Debug, Args)]
pub(super) struct Why {
    /// machines/MACHINE, machines/MACHINE/containers/CONTAINER, requests/REQUEST, or the id alone; of a request also the id
    /// that its caller gave
    #[arg(value_parser = clap::builder::NonEmptyStringValueParser::new())]
    subject: String,
}

pub(super) async fn run(connection: &Connection, why: Why) -> Result<(), Failure> {
    let mut client = DecisionsClient::new(connection.channel().await?).max_decoding_message_size(MAX_MESSAGE);
    let mut lost = 0;
    let decisions = all_pages(async |page_token| {
        let request = v1::ListDecisionsRequest {
            subject: why.subject.clone(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_decisions(request).await?.into_inner();
        lost = page.lost;
        Ok((page.decisions, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListDecisionsResponse {
            decisions,
            next_page_token: String::new(),
            lost,
        };
        print_json(&json("ListDecisionsResponse", &all)?);
        return Ok(());
    }
    if decisions.is_empty() {
        return Err(Failure::local(format!(
            "no decision about {} is remembered",
            why.subject
        )));
    }
    for line in table(&why.subject, &decisions).lines(None) {
        say!("{line}");
    }
    if lost > 0 {
        eprintln!(
            "{lost} decisions of this host could not be kept on disk; some about {} may be among them",
            why.subject
        );
    }
    Ok(())
}

/// A line a decision: when, what, what else it is about, and why.
fn table(subject: &str, decisions: &[v1::Decision]) -> Table {
    let mut table = Table::new(&["TIME", "WHAT", "ABOUT", "WHY"]);
    let id = subject.rsplit('/').next().unwrap_or(subject);
    for decision in decisions {
        let also: Vec<String> = [
            ("machine", &decision.machine),
            ("container", &decision.container),
            ("request", &decision.request),
        ]
        .into_iter()
        .filter(|(_, name)| !name.is_empty() && !name.ends_with(id))
        .map(|(kind, name)| format!("{kind} {}", short(name)))
        .chain((!decision.account.is_empty()).then(|| decision.account.clone()))
        .collect();
        table.row([
            time(decision),
            decision.command.clone(),
            also.join(", "),
            decision.detail.clone(),
        ]);
    }
    table
}

/// To the ms, in UTC.
fn time(decision: &v1::Decision) -> String {
    let time = decision.time.map_or_else(String::new, |time| time.to_string());
    let (date, time) = (time.get(..10), time.trim_end_matches('Z').get(11..));
    match (date, time) {
        (Some(date), Some(time)) => format!("{date} {}", time.get(..12).unwrap_or(time)),
        _ => "-".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_decision_is_a_line() {
        let decision = |seconds, command: &str, container: &str, detail: &str| v1::Decision {
            time: Some(prost_types::Timestamp {
                seconds,
                nanos: 120_000_000,
            }),
            command: command.into(),
            machine: "machines/MA".into(),
            container: container.into(),
            detail: detail.into(),
            ..Default::default()
        };
        let decisions = [
            decision(0, "boot machine", "", "0 machines are ready"),
            decision(61, "stop container", "machines/MA/containers/CA", "nobody wanted it"),
        ];
        assert_eq!(
            table("machines/MA", &decisions).lines(None),
            [
                "TIME                     WHAT            ABOUT         WHY",
                "1970-01-01 00:00:00.120  boot machine                  0 machines are ready",
                "1970-01-01 00:01:01.120  stop container  container CA  nobody wanted it",
            ]
        );
    }
}
