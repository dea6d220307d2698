//! How busy the CPUs of the machine are that a function runs in.

use std::time::Duration;

use anyhow::{Context as _, bail};
use nix::time::{ClockId, clock_gettime};

/// What idle time is told in: hundredths of a second (`USER_HZ`, proc_stat(5)).
const TICK: Duration = Duration::from_millis(10);

/// For how long the machine's CPUs together were not idle since it booted. The kernel measures idle time where it stops the
/// clock of idle CPUs, as guests' kernels do.
///
/// # Errors
///
/// Where `/proc/stat` can't be read or understood.
pub fn busy() -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string("/proc/stat").context("read /proc/stat")?;
    let uptime = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME)?);
    let (cpus, idle) = idle(&stat)?;
    Ok((uptime * cpus).saturating_sub(idle))
}

/// How many CPUs there are, and for how long they were idle in all.
fn idle(stat: &str) -> anyhow::Result<(u32, Duration)> {
    let mut lines = stat.lines();
    let all = lines.next().context("/proc/stat is empty")?;
    let mut figures = all.split_whitespace().skip(4).map(str::parse::<u32>);
    let (Some(Ok(idle)), Some(Ok(waits))) = (figures.next(), figures.next()) else {
        bail!("/proc/stat tells no idle time: {all}");
    };
    let cpus = lines.take_while(|line| line.starts_with("cpu")).count();
    Ok((cpus.try_into()?, TICK * idle + TICK * waits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_of_all_cpus() {
        let stat =
            "cpu  10 20 30 400 50 1 2 3 0 0\ncpu0 5 10 15 200 25 1 1 1 0 0\ncpu1 5 10 15 200 25 0 1 2 0 0\nintr 7\n";
        assert_eq!(idle(stat).unwrap(), (2, Duration::from_millis(4500)));
        assert!(idle("cpu 1 2\n").is_err());
        assert!(idle("").is_err());
    }

    #[test]
    fn a_busy_cpu_is_seen() {
        let before = busy().unwrap();
        while busy().unwrap() < before + TICK {
            std::hint::spin_loop();
        }
    }
}
