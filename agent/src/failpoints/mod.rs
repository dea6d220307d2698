//! The moments at which a crash would leave something half-done on disk. A test ([`tests`]) kills the agent at each of them;
//! elsewhere nothing happens there.

#[cfg(test)]
pub(crate) mod tests;

/// The agent dies here where a test said so.
#[cfg(not(test))]
pub(crate) const fn reach(_: Failpoint) {}

#[cfg(test)]
pub(crate) use tests::reach;

macro_rules! failpoints {
    ($($(#[$list_doc:meta])* $list:ident { $($(#[$doc:meta])* $name:ident,)* })*) => {
        /// A moment between two steps of something that is to last.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub(crate) enum Failpoint {
            $($($(#[$doc])* $name,)*)*
        }

        #[cfg(test)]
        impl Failpoint {
            $($(#[$list_doc])* pub(crate) const $list: &[Self] = &[$(Self::$name,)*];)*
        }
    };
}

failpoints! {
    /// Those of files that outlive a host's reboot, or all machines.
    OF_FILES {
        // === the database ===
        /// A database is there, maybe without tables.
        DatabaseMade,
        /// A whole copy has no name yet, for a backup or before a migration.
        CopyMade,
        /// The copy that is kept at an upgrade has its name.
        CopyKept,
        /// One of the migrations is done, and not committed.
        Migrated,
        /// The database is up to date.
        MigrationCommitted,
        /// Values in plain text are out of the database, and maybe in its log.
        Vacuumed,
        /// They are out of that too, which is not noted.
        Purged,
        /// The host has its id.
        HostNamed,
        /// Calls are done, and not committed.
        BeforeCommit,
        /// They are committed, and not answered.
        AfterCommit,
        /// What was deleted is out of the log of changes too.
        LogEmptied,

        // === the key ===
        /// A key is written and has no name yet.
        KeyWritten,
        /// It has its name, and the other still.
        KeyNamed,
        /// A restore keeps the key that was there under another name.
        KeyKept,
        /// A new key is in its place.
        KeyReplaced,
        /// A new key that the database does not name is gone.
        KeyDiscarded,

        // === code and functions ===
        /// A zip has come in.
        ZipStaged,
        /// It is being kept.
        ZipCopied,
        /// It is kept.
        ZipKept,
        /// It is gone.
        ZipRemoved,
        /// A function is in the database, and not in memory.
        FunctionKept,
        /// It is gone from there; its code is not.
        FunctionDeleted,

        // === files of JSON: whose the code is, what a machine is ===
        /// One is written and has no name yet.
        JsonWritten,
        /// It has its name.
        JsonNamed,

        // === kept answers ===
        /// A file is begun.
        AnswersBegun,
        /// A record is written, and not known.
        AnswerWritten,
        /// A file is gone.
        AnswersRemoved,

        // === backups ===
        /// A file of an archive is written, and maybe not the last.
        EntryArchived,
        /// An archive is written and has no name yet.
        ArchiveReceived,
        /// It has its name.
        ArchiveNamed,
        /// An archive that is restored is read, and its database lies beside the one that is there.
        Unpacked,
        /// The log of changes of a database that is replaced is kept.
        LogKept,
        /// A database that is replaced has its other name too.
        DatabaseKept,
        /// The archive's database is in its place.
        DatabaseReplaced,
    }

    /// Those of a machine's folder, cgroup and process.
    OF_MACHINES {
        /// A machine has a folder.
        MachineFolderMade,
        /// It has its cgroup, which bounds it.
        MachineCgroupMade,
        /// There is a socket for its guest.
        MachineListens,
        /// Its VMM runs.
        MachineSpawned,
        /// It is killed, and its end not recorded.
        MachineEmptied,
        /// Its end is recorded, and its cgroup gone.
        MachineCgroupRemoved,
        /// A file of its folder is gone too.
        MachineFileRemoved,
    }
}
