//! Who gets how much of a host's CPUs, where not all have what they want.

/// What a machine wants and may use, in millicores of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Want {
    /// No more than it may use.
    pub(crate) millis: u32,
    pub(crate) baseline_millis: u32,
    /// It comes before others.
    pub(crate) high: bool,
}

/// Gives each its baseline first, as far as it wants that; of what is left those of the class high have what they want, then all
/// others, each group with the same for each where there is too little.
pub(crate) fn share(cpu_millis: u64, wants: &[Want], got: &mut Vec<u32>) {
    got.clear();
    got.extend(wants.iter().map(|want| want.millis.min(want.baseline_millis)));
    let given: u64 = got.iter().map(|millis| u64::from(*millis)).sum();
    let mut left = cpu_millis.saturating_sub(given);
    for high in [true, false] {
        let lacks = |want: &Want, has: u32| if want.high == high { want.millis - has } else { 0 };
        let all = || wants.iter().zip(got.iter()).map(|(want, has)| lacks(want, *has));
        let missing: u64 = all().map(u64::from).sum();
        let level = match missing <= left {
            true => u32::MAX,
            false => highest(left, all().max().unwrap_or(0), |level| {
                all().map(|lacks| u64::from(lacks.min(level))).sum()
            }),
        };
        for (want, has) in wants.iter().zip(got.iter_mut()) {
            let more = lacks(want, *has).min(level);
            *has += more;
            left = left.saturating_sub(more.into());
        }
    }
}

/// The highest level, up to `most`, at which no more is taken than there is.
fn highest(left: u64, most: u32, taken: impl Fn(u32) -> u64) -> u32 {
    let (mut low, mut high) = (0, most);
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        if taken(middle) <= left {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    low
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn want(millis: u32, high: bool) -> Want {
        Want {
            millis,
            baseline_millis: 200,
            high,
        }
    }

    fn shared(cpu_millis: u64, wants: &[Want]) -> Vec<u32> {
        let mut got = Vec::new();
        share(cpu_millis, wants, &mut got);
        got
    }

    #[test]
    fn with_enough_for_all_each_has_what_it_wants() {
        assert_eq!(
            shared(4000, &[want(1500, false), want(100, false), want(2000, true)]),
            [1500, 100, 2000]
        );
    }

    #[test]
    fn one_with_credits_comes_first_and_the_rest_is_shared() {
        let wants = [want(2000, false), want(2000, false), want(1200, true), want(50, false)];
        assert_eq!(shared(2000, &wants), [375, 375, 1200, 50]);
    }

    #[test]
    fn nobody_has_less_than_its_baseline() {
        let wants = [want(2000, true), want(2000, true), want(2000, false)];
        assert_eq!(shared(1000, &wants), [400, 400, 200]);
    }

    proptest! {
        #[test]
        fn no_more_is_given_than_there_is_or_is_wanted(
            all in prop::collection::vec((0..4000_u32, 0..1000_u32, any::<bool>()), 0..50),
            more in 0..50_000_u64,
        ) {
            let wants: Vec<_> = all
                .into_iter()
                .map(|(millis, baseline_millis, high)| Want { millis, baseline_millis, high })
                .collect();
            let baselines: u64 = wants.iter().map(|want| u64::from(want.baseline_millis)).sum();
            let cpu_millis = baselines + more;
            let got = shared(cpu_millis, &wants);
            let given: u64 = got.iter().map(|millis| u64::from(*millis)).sum();
            prop_assert!(given <= cpu_millis);
            for (want, got) in wants.iter().zip(&got) {
                prop_assert!(*got <= want.millis && *got >= want.millis.min(want.baseline_millis));
            }
            // Nothing lies idle that somebody wants, but for what can't be divided.
            let wanted: u64 = wants.iter().map(|want| u64::from(want.millis)).sum();
            prop_assert!(given + wants.len() as u64 >= wanted.min(cpu_millis));
        }
    }
}
