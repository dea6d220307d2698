//! The last decisions that are not routine: what was done, and why, over restarts too.

use prost::Message as _;
use rusqlite::types::Value;
use stoker_proto::v1;
use ulid::Ulid;

use super::{Fault, Store, StoreError};

/// How many are kept.
const KEPT: i64 = 100_000;

/// A decision to keep, and what it is about.
#[derive(Debug, Clone)]
pub struct StoredDecision {
    /// The machine that it is about, if it is about one.
    pub machine: Option<Ulid>,
    /// The container that it is about, if it is about one.
    pub container: Option<Ulid>,
    /// The request that it is about, if it is about one.
    pub request: Option<Ulid>,
    /// The whole of it.
    pub decision: v1::Decision,
}

impl Store {
    /// Keeps decisions, in their order; the oldest go where there are more than 100,000. Those that can't be kept are
    /// counted ([`Self::decisions_lost`]).
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails; none is kept then.
    pub async fn append_decisions(&self, decisions: Vec<StoredDecision>) -> Result<(), StoreError> {
        let (count, lost) = (decisions.len(), self.decisions_lost());
        let kept = self.call("keep decisions", move |c| {
            let mut insert = c.prepare_cached(
                "INSERT INTO decisions (sequence, machine, container, request, decision) VALUES (?1, ?2, ?3, ?4, ?5)",
            )?;
            for StoredDecision {
                machine,
                container,
                request,
                decision,
            } in decisions
            {
                let [machine, container, request] = [machine, container, request].map(|id| id.map(|id| id.to_string()));
                let sequence = number(decision.sequence);
                insert.execute((sequence, machine, container, request, decision.encode_to_vec()))?;
            }
            c.prepare_cached("DELETE FROM decisions WHERE id <= (SELECT max(id) FROM decisions) - ?1")?
                .execute([KEPT])?;
            c.prepare_cached("UPDATE counters SET value = ?1 WHERE key = 'lost_decisions' AND value < ?1")?
                .execute([number(lost)])?;
            Ok(())
        });
        let kept = kept.await;
        if kept.is_err() {
            self.lost_decisions(count);
        }
        kept
    }

    /// The highest number of those that are kept; 0 where there is none.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn newest_decision(&self) -> Result<u64, StoreError> {
        self.call("look up the newest decision", |c| {
            let newest = c.query_row("SELECT coalesce(max(sequence), 0) FROM decisions", (), |row| {
                row.get::<_, i64>(0)
            })?;
            Ok(u64::try_from(newest).unwrap_or(0))
        })
        .await
    }

    /// The first decisions about a machine, container or request, or all, whose number is more than `after` and less than
    /// `before`, at most `limit`, in their order.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a decision is damaged.
    pub async fn decisions(
        &self,
        about: Option<Ulid>,
        after: u64,
        before: u64,
        limit: usize,
    ) -> Result<Vec<v1::Decision>, StoreError> {
        self.call("list decisions", move |c| {
            let about = about.map(|id| id.to_string());
            let which = match about {
                Some(_) => "(machine = ?4 OR container = ?4 OR request = ?4)",
                None => "?4 IS NULL",
            };
            let mut statement = c.prepare_cached(&format!(
                "SELECT decision FROM decisions WHERE sequence > ?1 AND sequence < ?2 AND {which} ORDER BY sequence LIMIT ?3"
            ))?;
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let about = about.map_or(Value::Null, Value::Text);
            let rows = statement.query_map((number(after), number(before), limit, about), |row| {
                row.get::<_, Vec<u8>>(0)
            })?;
            rows.map(|row| {
                v1::Decision::decode(row?.as_slice()).map_err(|error| Fault::Corrupt(format!("a decision: {error}")))
            })
            .collect()
        })
        .await
    }
}

fn number(sequence: u64) -> i64 {
    i64::try_from(sequence).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(sequence: u64, machine: u128, request: Option<u128>) -> StoredDecision {
        StoredDecision {
            machine: Some(Ulid(machine)),
            container: None,
            request: request.map(Ulid),
            decision: v1::Decision {
                sequence,
                ..Default::default()
            },
        }
    }

    fn numbers(decisions: &[v1::Decision]) -> Vec<u64> {
        decisions.iter().map(|decision| decision.sequence).collect()
    }

    #[tokio::test]
    async fn decisions_are_found_by_what_they_are_about_over_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.newest_decision().await.unwrap(), 0);
        let all = vec![decision(1, 7, None), decision(2, 8, Some(9)), decision(3, 7, Some(9))];
        store.append_decisions(all).await.unwrap();
        drop(store);
        let store = Store::open(dir.path()).unwrap();
        let find = async |about, after, before, limit| {
            let found = store.decisions(about, after, before, limit).await.unwrap();
            numbers(&found)
        };
        assert_eq!(store.newest_decision().await.unwrap(), 3);
        assert_eq!(find(Some(Ulid(7)), 0, u64::MAX, 9).await, [1, 3]);
        assert_eq!(find(Some(Ulid(9)), 0, u64::MAX, 9).await, [2, 3]);
        assert_eq!(find(Some(Ulid(5)), 0, u64::MAX, 9).await, [0; 0]);
        assert_eq!(find(None, 1, 3, 9).await, [2]);
        assert_eq!(find(None, 0, u64::MAX, 2).await, [1, 2]);
    }

    #[tokio::test]
    async fn the_oldest_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let many = (1..=u64::try_from(KEPT).unwrap() + 5).map(|n| decision(n, 7, None));
        store.append_decisions(many.collect()).await.unwrap();
        assert_eq!(numbers(&store.decisions(None, 0, u64::MAX, 1).await.unwrap()), [6]);
    }
}
