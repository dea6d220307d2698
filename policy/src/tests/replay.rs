//! A recording gives the same decisions again.

use proptest::prelude::*;

use super::driver::Driver;
use super::properties::op_or_restart;
use super::{rules, with_drives};
use crate::{Decision, Event, Host, Ids, Now};

proptest! {
    #![proptest_config(ProptestConfig { cases: 50, ..ProptestConfig::default() })]

    #[test]
    fn what_was_written_down_replays_to_the_same_decisions(
        ops in prop::collection::vec(op_or_restart(), 1..150),
        disk in any::<bool>(),
    ) {
        let mut driver = Driver::new(if disk { with_drives(rules()) } else { rules() });
        for op in ops {
            driver.apply(op);
        }
        let written: Vec<String> = driver.record.iter().map(|line| serde_json::to_string(line).unwrap()).collect();
        let mut host = Host::new(driver.rules.clone(), Ids::new(driver.seed));
        for line in written {
            let (now, event, decisions): (Now, Event, Vec<Decision>) = serde_json::from_str(&line).unwrap();
            prop_assert_eq!(host.step(now, event), decisions);
        }
    }
}
