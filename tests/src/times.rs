//! What examples that measure tell of the times that they took.

use std::time::Duration;

/// The time that so many of a thousand do not exceed, of times in ascending order: 500 is the median, 990 the 99th percentile.
/// Zero of none.
pub fn permille(sorted: &[Duration], permille: usize) -> Duration {
    let index = (sorted.len() * permille / 1000).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_thousand_and_of_few() {
        let times: Vec<_> = (0..1000).map(Duration::from_millis).collect();
        let ms = |permille_of| permille(&times, permille_of).as_millis();
        assert_eq!([ms(0), ms(500), ms(990), ms(1000)], [0, 500, 990, 999]);
        let few = [1, 2, 3].map(Duration::from_secs);
        assert_eq!(permille(&few, 500), few[1]);
        assert_eq!(permille(&few, 990), few[2]);
        assert_eq!(permille(&[], 500), Duration::ZERO);
    }
}
