//! Signals by the names that images have for them.

use std::str::FromStr as _;

use nix::sys::signal::Signal;

/// The first and the last real-time signal, as programs on glibc have them: the kernel's are from 32, of which two are glibc's.
const REAL_TIME: [i32; 2] = [34, 64];

/// The number of `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3` or `RTMAX-1`.
pub(crate) fn number(name: &str) -> Option<i32> {
    let [first, last] = REAL_TIME;
    if let Ok(number) = name.parse::<u8>() {
        return Some(i32::from(number)).filter(|number| (1..=last).contains(number));
    }
    let name = name.to_ascii_uppercase();
    let name = name.strip_prefix("SIG").unwrap_or(&name);
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        _ => rest.strip_prefix(sign)?.parse::<u8>().ok().map(i32::from),
    };
    let number = if let Some(rest) = name.strip_prefix("RTMIN") {
        first + offset(rest, '+')?
    } else if let Some(rest) = name.strip_prefix("RTMAX") {
        last - offset(rest, '-')?
    } else {
        return Signal::from_str(&format!("SIG{name}")).ok().map(|signal| signal as i32);
    };
    Some(number).filter(|number| (first..=last).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (name, expected) in [
            ("SIGTERM", Some(15)),
            ("term", Some(15)),
            ("SIGWINCH", Some(28)),
            ("9", Some(9)),
            ("SIGRTMIN", Some(34)),
            ("SIGRTMIN+3", Some(37)),
            ("RTMAX-1", Some(63)),
            ("SIGRTMIN+31", None),
            ("RTMAX-31", None),
            ("SIGRTMIN-1", None),
            ("0", None),
            ("65", None),
            ("-1", None),
            ("SIG", None),
            ("", None),
        ] {
            assert_eq!(number(name), expected, "{name}");
        }
    }
}
