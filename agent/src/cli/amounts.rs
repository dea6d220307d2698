//! Amounts of CPU and memory as people write them.

use stoker_proto::v1;

/// CPU and memory together: `500m,256MiB`.
pub(super) fn parse(text: &str) -> Result<v1::Amount, String> {
    let parts = text.split_once(',');
    let amount = parts.and_then(|(cpu_text, memory_text)| {
        Some(v1::Amount {
            cpu_millis: cpu(cpu_text)?,
            memory_mib: memory(memory_text)?,
        })
    });
    amount.ok_or_else(|| format!("{text:?} must be CPU,MEMORY as `500m,256MiB` or `1.5,2GiB`"))
}

/// CPU alone, in millicores: `500m`, or `1.5` CPUs.
pub(super) fn parse_cpu(text: &str) -> Result<u32, String> {
    cpu(text).ok_or_else(|| format!("{text:?} must be CPU as `500m` or `1.5`"))
}

/// Memory alone, in MiB: `512MiB`, `2GiB`.
pub(super) fn parse_memory(text: &str) -> Result<u32, String> {
    memory(text).ok_or_else(|| format!("{text:?} must be memory as `512MiB` or `2GiB`"))
}

/// In millicores.
pub(super) fn cpu(text: &str) -> Option<u32> {
    let text = text.trim();
    if let Some(millis) = text.strip_suffix('m') {
        return millis.parse().ok();
    }
    let cpus: f64 = text.parse().ok()?;
    let millis = (cpus * 1000.0).round();
    // Whole, and in the range of the type.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (0.0..=f64::from(u32::MAX)).contains(&millis).then_some(millis as u32)
}

/// In MiB.
pub(super) fn memory(text: &str) -> Option<u32> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor = match text.get(digits.len()..)? {
        "" | "MiB" | "Mi" | "M" | "MB" => 1,
        "GiB" | "Gi" | "G" | "GB" => 1024,
        _ => return None,
    };
    digits.trim().parse::<u32>().ok()?.checked_mul(factor)
}

/// Memory as [`memory`] reads it.
pub(super) fn memory_shown(mib: u32) -> String {
    match mib >= 1024 && mib.is_multiple_of(1024) {
        true => format!("{}GiB", mib / 1024),
        false => format!("{mib}MiB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read() {
        for (text, cpu_millis, memory_mib) in [
            ("500m,256MiB", 500, 256),
            ("1.5,2GiB", 1500, 2048),
            ("2, 512", 2000, 512),
        ] {
            assert_eq!(parse(text), Ok(v1::Amount { cpu_millis, memory_mib }));
        }
        for bad in ["", "500m", "x,1", "1,2TiB", "-1,5", "1,-5", "nan,1", "1,99999999GiB"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn memory_is_shown_as_it_is_read() {
        for (mib, text) in [(0, "0MiB"), (512, "512MiB"), (1024, "1GiB"), (1536, "1536MiB")] {
            assert_eq!((memory_shown(mib), memory(text)), (text.to_owned(), Some(mib)));
        }
    }
}
