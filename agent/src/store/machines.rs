//! Machine records: what a later start needs to find or clear away the machines of an earlier one.

use prost::Message as _;
use stoker_proto::v1;

use super::{Fault, Store, StoreError};

impl Store {
    /// Keeps a machine's record in place of an earlier one of the same name.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn save_machine(&self, machine: &v1::Machine) -> Result<(), StoreError> {
        let (name, record) = (machine.name.clone(), machine.encode_to_vec());
        self.call("save a machine", move |c| {
            c.prepare_cached("INSERT OR REPLACE INTO machines (name, record) VALUES (?1, ?2)")?
                .execute((name, record))?;
            Ok(())
        })
        .await
    }

    /// Forgets a machine; one that isn't there is forgotten already.
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails.
    pub async fn remove_machine(&self, name: String) -> Result<(), StoreError> {
        self.call("forget a machine", move |c| {
            c.prepare_cached("DELETE FROM machines WHERE name = ?1")?
                .execute([name])?;
            Ok(())
        })
        .await
    }

    /// All machine records, in the order of their names (ULIDs: of their making).
    ///
    /// # Errors
    ///
    /// [`StoreError`] where the database fails or a record is damaged.
    pub async fn machines(&self) -> Result<Vec<v1::Machine>, StoreError> {
        self.call("list machines", |c| {
            let mut statement = c.prepare_cached("SELECT record FROM machines ORDER BY name")?;
            let records = statement.query_map([], |row| row.get::<_, Vec<u8>>(0))?;
            records
                .map(|record| {
                    v1::Machine::decode(record?.as_slice())
                        .map_err(|error| Fault::Corrupt(format!("a machine record: {error}")))
                })
                .collect()
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn machines_are_kept_replaced_and_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let mut machine = v1::Machine {
            name: "machines/01".into(),
            pid: 7,
            ..Default::default()
        };
        store.save_machine(&machine).await.unwrap();
        machine.pid = 8;
        store.save_machine(&machine).await.unwrap();
        assert_eq!(store.machines().await.unwrap(), [machine.clone()]);
        store.remove_machine(machine.name.clone()).await.unwrap();
        store.remove_machine(machine.name).await.unwrap();
        assert_eq!(store.machines().await.unwrap(), []);
    }
}
