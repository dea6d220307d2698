//! The thread that owns the database.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rusqlite::{Connection, Transaction, TransactionBehavior};
use tokio::sync::mpsc;

use super::BATCH;

/// How long another program may hold the database before a call fails.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);

/// The same while it could not be written the last time: who only reads waits that long too.
const NO_PATIENCE: Duration = Duration::from_millis(100);

/// Carries out a call's work, or learns why it can't be. Says whether its changes are kept, and if not whether SQLite was
/// the reason; the closure answers the caller after the commit.
pub(super) type Job = Box<dyn FnOnce(Result<&Connection, Failed>) -> (Result<(), Option<Failed>>, Answer) + Send>;
pub(super) type Answer = Box<dyn FnOnce(Result<(), Failed>) + Send>;

/// Why a whole batch failed.
pub(super) type Failed = Arc<rusqlite::Error>;

/// Carries out what comes until all senders are gone, then closes the database. Where a call has set `purge`, what it deleted
/// is gone from the log of changes too before it is answered.
pub(super) fn run(connection: Connection, mut queue: mpsc::Receiver<Job>, purge: &AtomicBool) {
    let mut batch = Vec::with_capacity(BATCH);
    let (mut failing, mut unpurged) = (false, false);
    while queue.blocking_recv_many(&mut batch, BATCH) > 0 {
        let mut answers = Vec::with_capacity(batch.len());
        let patience = if failing { NO_PATIENCE } else { PATIENCE };
        let changes = connection.total_changes();
        let Carried { unwritable, committed } = carry_out(&connection, patience, &mut batch, &mut answers);
        // Once for each time that it fails, not for each batch; what was only read says nothing.
        match (&unwritable, failing) {
            (Some(error), false) => {
                tracing::error!(%error, "the database can't be written");
                failing = true;
            }
            (None, true) if connection.total_changes() > changes => {
                tracing::info!("the database is written again");
                failing = false;
            }
            _ => {}
        }
        if let Err(error) = &committed {
            // What was not tried fails for the same reason.
            answers.extend(batch.drain(..).map(|job| job(Err(error.clone())).1));
        } else if purge.swap(false, Ordering::Relaxed) {
            let emptied = empty_log(&connection);
            if let (Err(error), false) = (&emptied, unpurged) {
                tracing::warn!(%error, "what was deleted is still in the database's log of changes; trying again later");
            }
            unpurged = emptied.is_err();
            purge.fetch_or(unpurged, Ordering::Relaxed);
        }
        for answer in answers {
            answer(committed.clone());
        }
    }
    // Leaves one tidy file; the WAL is read again at the next start where this fails.
    if let Err(error) = empty_log(&connection) {
        tracing::warn!(%error, "the database was closed without a checkpoint");
    }
}

/// Writes the log of changes into the database itself and empties it.
pub(super) fn empty_log(connection: &Connection) -> rusqlite::Result<()> {
    // Who reads an older state, as for a backup, is not waited for.
    connection.busy_timeout(Duration::ZERO)?;
    let busy = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0))?;
    if busy {
        let busy = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_BUSY);
        return Err(rusqlite::Error::SqliteFailure(busy, None));
    }
    Ok(())
}

/// What came of a batch.
struct Carried {
    /// Why the database could not be written, where it could not; what only reads may have been answered.
    unwritable: Option<Failed>,
    /// Whether what its calls did is kept.
    committed: Result<(), Failed>,
}

/// Carries out a batch in one transaction. Where that fails, what was not tried is still in the batch.
fn carry_out(connection: &Connection, patience: Duration, batch: &mut Vec<Job>, answers: &mut Vec<Answer>) -> Carried {
    let begun = begin(connection, TransactionBehavior::Immediate, patience);
    let (transaction, unwritable) = match begun {
        Ok(transaction) => (Ok(transaction), None),
        // What only reads is answered all the same; what writes fails at once, each call with a reason of its own.
        Err(error) => (
            begin(connection, TransactionBehavior::Deferred, Duration::ZERO),
            Some(error),
        ),
    };
    let committed = transaction.and_then(|transaction| carry_out_in(transaction, batch, answers));
    Carried {
        unwritable: unwritable.or_else(|| committed.as_ref().err().cloned()),
        committed,
    }
}

fn begin(
    connection: &Connection,
    behavior: TransactionBehavior,
    patience: Duration,
) -> Result<Transaction<'_>, Failed> {
    connection.busy_timeout(patience)?;
    Ok(Transaction::new_unchecked(connection, behavior)?)
}

fn carry_out_in(
    mut transaction: Transaction<'_>,
    batch: &mut Vec<Job>,
    answers: &mut Vec<Answer>,
) -> Result<(), Failed> {
    while !batch.is_empty() {
        let savepoint = transaction.savepoint()?;
        let (kept, answer) = batch.remove(0)(Ok(&savepoint));
        answers.push(answer);
        match kept {
            Ok(()) => savepoint.commit()?,
            // By some failures, as that of a full disk, SQLite undoes the whole transaction: nothing of the batch is kept.
            Err(Some(cause)) if savepoint.is_autocommit() => return Err(cause),
            Err(_) => savepoint.finish()?,
        }
    }
    Ok(transaction.commit()?)
}
