//! Pressure: for how long something waited for a resource (PSI, Documentation/accounting/psi.rst). Kernels that count none have
//! no such files, or refuse to open them.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::time::Duration;

/// For how long something waited for `cpu`, `memory` or `io` since the kernel started: `total` of `some`.
///
/// # Errors
/// Where the kernel does not count it.
pub fn waited(resource: &str) -> io::Result<Duration> {
    let path = path(resource);
    let us = some_total(&fs::read_to_string(&path)?);
    let us = us.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{path} has no total of some")))?;
    Ok(Duration::from_micros(us))
}

/// A file that is ready for `POLLPRI` once something waited for a resource for `least` of a `window`, at most once in each. A window
/// is 0.5 to 10 s. The trigger is gone with the file.
///
/// # Errors
/// Where the kernel does not count it, or refuses that.
pub fn trigger(resource: &str, least: Duration, window: Duration) -> io::Result<File> {
    let mut file = File::options().read(true).write(true).open(path(resource))?;
    // The kernel takes it whole, with the 0 at its end.
    file.write_all(format!("some {} {}\0", least.as_micros(), window.as_micros()).as_bytes())?;
    Ok(file)
}

fn path(resource: &str) -> String {
    format!("/proc/pressure/{resource}")
}

/// In us.
fn some_total(told: &str) -> Option<u64> {
    let some = told.lines().find_map(|line| line.strip_prefix("some "))?;
    some.split(' ')
        .find_map(|figure| figure.strip_prefix("total="))?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_a_sum() {
        let told = "some avg10=0.12 avg60=0.05 avg300=0.01 total=123456\n\
                    full avg10=0.00 avg60=0.00 avg300=0.00 total=99\n";
        assert_eq!(some_total(told), Some(123_456));
        for other in ["", "full total=1\n", "some avg10=0.00\n", "some total=x\n"] {
            assert_eq!(some_total(other), None, "{other:?}");
        }
        assert!(waited("nothing").is_err());
    }

    #[test]
    fn a_trigger_the_kernel_can_not_keep_is_refused() {
        let second = Duration::from_secs(1);
        assert!(trigger("nothing", second / 10, second).is_err());
        assert!(trigger("memory", 2 * second, second).is_err(), "more than the window");
    }
}
