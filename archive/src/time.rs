//! When the files in a zip were last changed.

use std::io::Read;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zip::ExtraField;
use zip::read::ZipFile;

/// From 1601, where Windows counts from, to 1970.
const WINDOWS_EPOCH: Duration = Duration::from_secs(11_644_473_600);
/// What Windows counts in.
const WINDOWS_TICK_NS: u32 = 100;

/// When a file was last changed, as exactly as the zip tells: by seconds since 1970 (Info-ZIP's "UT" field, 0x5455), by
/// NTFS's time (PKWARE's field 0x000a, APPNOTE 4.5.5), or by the date that every entry has. That one is even and in no
/// time zone: it is taken for UTC, as on Lambda. `None` where there is no possible date.
pub(crate) fn modified<R: Read>(entry: &ZipFile<'_, R>) -> Option<SystemTime> {
    let exact = entry.extra_data_fields().find_map(|field| match field {
        ExtraField::ExtendedTimestamp(times) => times.mod_time().map(|seconds| Duration::from_secs(seconds.into())),
        ExtraField::Ntfs(times) => of_windows(times.mtime()),
        _ => None,
    });
    let since_1970 = exact.or_else(|| {
        let date = chrono::NaiveDateTime::try_from(entry.last_modified()?).ok()?;
        let seconds = date.and_utc().timestamp().try_into().ok()?;
        Some(Duration::from_secs(seconds))
    });
    UNIX_EPOCH.checked_add(since_1970?)
}

fn of_windows(ticks: u64) -> Option<Duration> {
    let per_second = u64::from(1_000_000_000 / WINDOWS_TICK_NS);
    let rest = u32::try_from(ticks % per_second).ok()?;
    Duration::new(ticks / per_second, rest * WINDOWS_TICK_NS).checked_sub(WINDOWS_EPOCH)
}
