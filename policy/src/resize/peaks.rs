//! Peaks of memory, as a histogram of a fixed size: eight buckets for each doubling, as HdrHistogram has them.

/// Bits of a peak in MiB that are told apart: beyond 128 GiB all are one.
const BITS: u32 = 17;

/// Buckets for each doubling are 2 to the power of this: what is said is at most an eighth too large.
const FINE: u32 = 3;

const BUCKETS: usize = (BITS << FINE) as usize;

/// How many executions took how much memory.
#[derive(Clone, Debug)]
pub(crate) struct Peaks {
    counts: [u32; BUCKETS],
    executions: u64,
    largest_mib: u32,
}

// === impl Peaks ===

impl Default for Peaks {
    fn default() -> Self {
        Self {
            counts: [0; BUCKETS],
            executions: 0,
            largest_mib: 0,
        }
    }
}

impl Peaks {
    pub(crate) fn add(&mut self, mib: u32) {
        if let Some(count) = self.counts.get_mut(bucket(mib)) {
            *count = count.saturating_add(1);
        }
        self.executions += 1;
        self.largest_mib = self.largest_mib.max(mib);
    }

    pub(crate) fn executions(&self) -> u64 {
        self.executions
    }

    /// The largest, in MiB; 0 where there is none.
    pub(crate) fn largest_mib(&self) -> u32 {
        self.largest_mib
    }

    /// What this many of a thousand do not exceed, in MiB, rounded up to the end of its bucket and no more than the largest.
    pub(crate) fn quantile_mib(&self, permille: u32) -> u32 {
        let above = self.executions * u64::from(1000_u32.saturating_sub(permille)) / 1000;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate().rev() {
            seen += u64::from(*count);
            if seen > above {
                return end(bucket).min(self.largest_mib);
            }
        }
        self.largest_mib
    }
}

fn bucket(mib: u32) -> usize {
    let mib = mib.clamp(1, (1 << BITS) - 1);
    let doubling = mib.ilog2();
    let part = (mib << FINE >> doubling) & ((1 << FINE) - 1);
    (doubling << FINE | part) as usize
}

/// The largest that is in a bucket.
fn end(bucket: usize) -> u32 {
    let bucket = u32::try_from(bucket).unwrap_or(u32::MAX);
    let (doubling, part) = (bucket >> FINE, bucket & ((1 << FINE) - 1));
    let after = ((1 << FINE) + part + 1) << doubling;
    (after - 1) >> FINE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_bucket_ends_where_the_next_begins() {
        for mib in 1..(1 << BITS) {
            let of = bucket(mib);
            assert!(
                end(of) >= mib && end(of) <= mib + mib / 8,
                "{mib} in {of} up to {}",
                end(of)
            );
            assert!(of + 1 >= BUCKETS || bucket(end(of) + 1) > of);
        }
        assert_eq!(bucket(u32::MAX), BUCKETS - 1);
        assert_eq!(bucket(0), bucket(1));
    }

    proptest! {
        #[test]
        fn a_quantile_is_what_sorting_gives_and_at_most_an_eighth_more(
            mut mibs in prop::collection::vec(1..100_000_u32, 1..2000),
            permille in 500..=1000_u32,
        ) {
            let mut peaks = Peaks::default();
            mibs.iter().for_each(|mib| peaks.add(*mib));
            mibs.sort_unstable();
            let above = mibs.len() * (1000 - permille) as usize / 1000;
            let exact = mibs[(mibs.len() - 1).saturating_sub(above)];
            let told = peaks.quantile_mib(permille);
            prop_assert!(told >= exact && told <= exact + exact / 8, "{told} for {exact}");
            prop_assert_eq!(peaks.largest_mib(), *mibs.last().unwrap());
        }
    }
}
