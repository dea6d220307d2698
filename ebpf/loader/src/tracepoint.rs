//! Where a tracepoint has its fields, from its `format` file in tracefs.

use std::fs;
use std::io;
use std::path::Path;

use stoker_ebpf_types::{KvmExitFields, RssStatFields};

use crate::error::LoadError;

/// Where tracefs is, on systems that mount it by itself and on those that reach it through debugfs.
const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

const RSS_STAT: &str = "kmem:rss_stat";
const KVM_ENTRY: &str = "kvm:kvm_entry";
const KVM_EXIT: &str = "kvm:kvm_exit";

/// Looks `kmem:rss_stat` up.
pub(crate) fn rss_stat() -> Result<RssStatFields, LoadError> {
    rss_stat_fields(&format(RSS_STAT)?)
}

/// Looks `kvm:kvm_exit` up, and sees that `kvm:kvm_entry` is there too.
pub(crate) fn kvm_exit() -> Result<KvmExitFields, LoadError> {
    format(KVM_ENTRY)?;
    kvm_exit_fields(&format(KVM_EXIT)?)
}

/// The `format` file of a tracepoint, `group:event`.
fn format(name: &'static str) -> Result<String, LoadError> {
    let mut format = Err(LoadError::Tracefs);
    for mount in TRACEFS {
        let events = Path::new(mount).join("events");
        // A tracefs that may not be looked at is there too.
        let mounted = !matches!(fs::metadata(&events), Err(error) if error.kind() == io::ErrorKind::NotFound);
        if mounted {
            let file = events.join(name.replace(':', "/")).join("format");
            format = fs::read_to_string(file).map_err(|source| match source.kind() {
                io::ErrorKind::PermissionDenied => LoadError::Permission(source.into()),
                _ => LoadError::NoTracepoint { name, source },
            });
            break;
        }
    }
    format
}

fn rss_stat_fields(format: &str) -> Result<RssStatFields, LoadError> {
    let offset = |field, size| field_of(RSS_STAT, format, field, size);
    Ok(RssStatFields {
        mm_id: offset("mm_id", 4)?,
        curr: offset("curr", 4)?,
        member: offset("member", 4)?,
        size: offset("size", 8)?,
    })
}

fn kvm_exit_fields(format: &str) -> Result<KvmExitFields, LoadError> {
    let offset = |field| field_of(KVM_EXIT, format, field, 4);
    Ok(KvmExitFields {
        reason: offset("exit_reason")?,
        isa: offset("isa")?,
    })
}

fn field_of(name: &'static str, format: &str, field: &'static str, size: u32) -> Result<u32, LoadError> {
    offset(format, field, size).ok_or(LoadError::Format { name, field, size })
}

/// The offset in bytes of the field of this name and size. A line reads
/// `field:unsigned int mm_id; offset:8; size:4; signed:0;`.
fn offset(format: &str, field: &str, size: u32) -> Option<u32> {
    format.lines().find_map(|line| {
        let mut parts = line.split(';').map(str::trim);
        let declaration = parts.next()?.strip_prefix("field:")?;
        if declaration.rsplit([' ', '*']).next() != Some(field) {
            return None;
        }
        let mut number = |name| {
            let (key, value) = parts.next()?.split_once(':')?;
            if key == name { value.parse::<u32>().ok() } else { None }
        };
        let offset = number("offset")?;
        (number("size")? == size).then_some(offset)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a 6.18 kernel; 6.1 and 6.12 read the same.
    const FORMAT: &str = "name: rss_stat
ID: 646
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned int mm_id;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned int curr;\toffset:12;\tsize:4;\tsigned:0;
\tfield:int member;\toffset:16;\tsize:4;\tsigned:1;
\tfield:long size;\toffset:24;\tsize:8;\tsigned:1;

print fmt: \"mm_id=%u curr=%d type=%s size=%ldB\", REC->mm_id, REC->curr
";

    #[test]
    fn reads_the_known_layout() {
        assert_eq!(rss_stat_fields(FORMAT).unwrap(), RssStatFields::DEFAULT);
    }

    #[test]
    fn reads_a_layout_with_more_common_fields() {
        let shifted = FORMAT
            .replace("offset:8;", "offset:12;")
            .replace("curr;\toffset:12;", "curr;\toffset:16;")
            .replace("member;\toffset:16;", "member;\toffset:20;");
        assert_eq!(
            rss_stat_fields(&shifted).unwrap(),
            RssStatFields {
                mm_id: 12,
                curr: 16,
                member: 20,
                size: 24
            }
        );
    }

    /// Of a 6.12 kernel.
    const KVM_EXIT_FORMAT: &str = "name: kvm_exit
ID: 1745
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned int exit_reason;\toffset:8;\tsize:4;\tsigned:0;
\tfield:unsigned long guest_rip;\toffset:16;\tsize:8;\tsigned:0;
\tfield:u32 isa;\toffset:24;\tsize:4;\tsigned:0;
\tfield:u64 info1;\toffset:32;\tsize:8;\tsigned:0;
";

    #[test]
    fn reads_why_a_guest_is_left() {
        let fields = kvm_exit_fields(KVM_EXIT_FORMAT).unwrap();
        assert_eq!(fields, KvmExitFields { reason: 8, isa: 24 });
        let error = kvm_exit_fields(FORMAT).unwrap_err();
        assert!(matches!(error, LoadError::Format { name: KVM_EXIT, .. }), "{error}");
    }

    #[test]
    fn refuses_what_it_does_not_know() {
        for (from, to) in [
            ("mm_id;", "mm;"),
            ("long size;\toffset:24;\tsize:8", "int size;\toffset:24;\tsize:4"),
            ("offset:12;", "offset:x;"),
        ] {
            let error = rss_stat_fields(&FORMAT.replace(from, to)).unwrap_err();
            assert!(matches!(error, LoadError::Format { .. }), "{from}: {error}");
        }
    }
}
