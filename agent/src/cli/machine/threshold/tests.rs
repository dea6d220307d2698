use proptest::prelude::*;

use super::*;

fn seconds(seconds: i64) -> Option<prost_types::Duration> {
    Some(prost_types::Duration { seconds, nanos: 0 })
}

#[test]
fn a_threshold_is_read_and_shown_in_the_same_words() {
    let text = "cpu_use > 80% for 10s: vcpus +1, at most 4, every 1m";
    let threshold = v1::Threshold {
        metric: "cpu_use".into(),
        comparison: Comparison::Above.into(),
        value: 80.0,
        held: seconds(10),
        resource: Resource::Vcpus.into(),
        direction: Direction::Grow.into(),
        change: Some(Change::By(1)),
        least: None,
        most: Some(4),
        cooldown: seconds(60),
    };
    assert_eq!(parse(text), Ok(threshold.clone()));
    assert_eq!(shown(&threshold), text);
}

#[test]
fn words_and_spaces_are_free() {
    for (text, same) in [
        ("cpu_use>80%:vcpus +1", "cpu_use > 80%: vcpus +1"),
        (
            " memory_use  below 12.5 % : memory - 512 MiB ",
            "memory_use < 12.5%: memory -512MiB",
        ),
        (
            "credits < 2.5 for 1h 30m: cpu shrink to 0.5, every 300s",
            "credits < 2.5 for 1h 30m: cpu shrink to 500m, every 5m",
        ),
        (
            "memory_pressure above 5%: memory +25%, every 1s, at least 512, at most 4GiB",
            "memory_pressure > 5%: memory +25%, at least 512MiB, at most 4GiB, every 1s",
        ),
        ("cpu_wait > 10%: cpu grow to 1500m", "cpu_wait > 10%: cpu grow to 1500m"),
    ] {
        let read = parse(text).map(|threshold| shown(&threshold));
        assert_eq!(read.as_deref(), Ok(same), "{text}");
    }
}

#[test]
fn what_is_wrong_is_pointed_at() {
    for (text, problem, marked) in [
        ("", "is missing", ""),
        ("load > 80%: vcpus +1", "\"load\" is not a metric (cpu_use, ", "load"),
        ("cpu_use = 80%: vcpus +1", "\"=\" is not `>` or `<`", "="),
        ("cpu_use > 80: vcpus +1", "\"80\" is not a percentage, as `80%`", "80"),
        ("cpu_use > -5%: vcpus +1", "is not a percentage", "-5%"),
        ("cpu_use > NaN%: vcpus +1", "is not a percentage", "NaN%"),
        ("cpu_use > 1e3%: vcpus +1", "is not a percentage", "1e3%"),
        ("credits < 5%: vcpus -1", "is not a number of credits", "5%"),
        ("cpu_use > 80% for ever: vcpus +1", "\"ever\" is not a time", "ever"),
        ("cpu_use > 80%", "`:` and what is changed", ""),
        ("cpu_use > 80%: disk +1", "is not `vcpus`, `cpu` or `memory`", "disk"),
        ("cpu_use > 80%: vcpus 1", "\"1\" is not a change, as `+1`", "1"),
        ("cpu_use > 80%: vcpus ++1", "is not a change", "++1"),
        ("cpu_use > 80%: vcpus +1.5", "is not a change", "+1.5"),
        ("memory_use > 80%: memory +1TiB", "as `+512MiB`", "+1TiB"),
        (
            "memory_use > 80%: memory +99999999GiB",
            "is not a change",
            "+99999999GiB",
        ),
        ("cpu_use > 80%: vcpus grow 4", "is not `to` and an amount", "4"),
        ("cpu_use > 80%: vcpus grow to", "an amount, as `1` is missing", ""),
        (
            "cpu_use > 80%: vcpus +1, up to 4",
            "is not `at least`, `at most` or `every`",
            "up",
        ),
        ("cpu_use > 80%: vcpus +1, at 4", "is not `least` or `most`", "4"),
        ("cpu_use > 80%: vcpus +1, at most many", "is not an amount", "many"),
        ("cpu_use > 80%: vcpus +1, every 5", "is not a time", "5"),
        ("cpu_use > 80%: vcpus +1,", "is missing", ""),
        ("cpu_use > 80%: vcpus +1, every 1s, every 2s", "is given twice", "every"),
        ("cpu_use > 80%: vcpus +1 : 2", "is not `,` or the end", ":"),
    ] {
        let error = parse(text).unwrap_err().to_string();
        let lines: Vec<_> = error.lines().collect();
        let [said, shown, marks] = lines[..] else {
            panic!("{text}: {error}");
        };
        assert!(said.contains(problem), "{text}: {said}");
        assert_eq!(shown, format!("  {text}"));
        let (start, end) = (marks.find('^').unwrap(), marks.len());
        assert!(marks[start..].chars().all(|c| c == '^'), "{error}");
        match marked {
            "" => assert_eq!((start, end), (text.len() + 2, text.len() + 3), "{error}"),
            marked => assert_eq!(&shown[start..end], marked, "{error}"),
        }
    }
}

#[test]
fn places_are_counted_in_characters() {
    let error = parse("cpu_use > ä\tö: vcpus +1").unwrap_err().to_string();
    assert!(error.ends_with("  cpu_use > ä ö: vcpus +1\n            ^^^"), "{error}");
}

#[test]
fn what_is_not_known_is_shown_as_such() {
    let shown = shown(&v1::Threshold {
        metric: "new".into(),
        ..Default::default()
    });
    assert_eq!(shown, "new ? 0%: ? ?");
}

fn time() -> impl Strategy<Value = Option<prost_types::Duration>> {
    let times = (0..1_000_000i64, 0..1_000_000_000i32);
    proptest::option::of(times.prop_map(|(seconds, nanos)| prost_types::Duration { seconds, nanos }))
}

fn threshold() -> impl Strategy<Value = v1::Threshold> {
    let metric = proptest::sample::select(Metric::ALL.map(Metric::name).to_vec());
    let number = || prop_oneof![0.0..1e9f64, (0..1000u32).prop_map(f64::from)];
    let change = prop_oneof![
        any::<u32>().prop_map(Change::By),
        number().prop_map(Change::ByPercent),
        any::<u32>().prop_map(Change::To),
    ];
    let parts = (metric, 1..3i32, number(), time(), 1..4i32, 1..3i32, change);
    let bounds = (any::<Option<u32>>(), any::<Option<u32>>(), time());
    (parts, bounds).prop_map(
        |((metric, comparison, value, held, resource, direction, change), (least, most, cooldown))| v1::Threshold {
            metric: metric.to_owned(),
            comparison,
            value,
            held,
            resource,
            direction,
            change: Some(change),
            least,
            most,
            cooldown,
        },
    )
}

proptest! {
    #[test]
    fn whatever_is_shown_is_read_as_the_same(threshold in threshold()) {
        let text = shown(&threshold);
        prop_assert_eq!(parse(&text), Ok(threshold), "{}", text);
    }

    #[test]
    fn whatever_is_written_is_read_or_refused(text in "[a-z_0-9<>:,%+. -]{0,60}|\\PC{0,40}") {
        if let Ok(threshold) = parse(&text) {
            prop_assert_eq!(parse(&shown(&threshold)), Ok(threshold));
        }
    }

    #[test]
    fn what_is_nearly_right_is_read_or_refused(threshold in threshold(), at in any::<proptest::sample::Index>(), c in any::<char>()) {
        let mut chars: Vec<char> = shown(&threshold).chars().collect();
        let at = at.index(chars.len());
        chars[at] = c;
        let text: String = chars.into_iter().collect();
        match parse(&text) {
            Ok(threshold) => prop_assert_eq!(parse(&shown(&threshold)), Ok(threshold)),
            Err(error) => prop_assert!(error.to_string().contains('^')),
        }
    }
}
