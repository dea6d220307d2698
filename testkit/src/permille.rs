//! Percentiles of what was measured.

/// Of figures in ascending order the one that so many of a thousand do not exceed, by nearest rank: 500 is the median, 990 the 99th
/// percentile. `None` of none.
#[must_use]
pub fn permille<T: Copy>(sorted: &[T], permille: usize) -> Option<T> {
    let rank = (sorted.len() * permille).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_thousand_and_of_few() {
        let thousand: Vec<_> = (1..=1000).collect();
        let at = |permille_of| permille(&thousand, permille_of);
        assert_eq!(
            [at(0), at(500), at(990), at(999), at(1000)],
            [1, 500, 990, 999, 1000].map(Some)
        );
        assert_eq!(
            (permille(&[1, 2, 3], 500), permille(&[1, 2, 3], 990)),
            (Some(2), Some(3))
        );
        assert_eq!(permille::<u64>(&[], 500), None);
    }
}
