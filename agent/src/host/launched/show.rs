//! Machines that were launched, as the API shows them.

use std::collections::BTreeMap;
use std::time::Duration;

use prost::Message as _;
use sha2::{Digest as _, Sha256};
use stoker_policy::scale::{Change, Comparison, Direction, Metric, Resource, Size, Taken, Threshold};
use stoker_policy::{Launched, MachineState};
use stoker_proto::v1;
use stoker_proto::v1::threshold;

use crate::hex::hex;
use crate::host::listing;
use crate::machines::{LaunchRequest, ResizeRecord};
use crate::names::ImageName;

/// How many digits of a hash tell thresholds apart: nobody gains by two of his own that are taken for the same.
const ETAG: usize = 16;

/// One as it stands.
pub(in crate::host) fn launched(
    known: &Launched,
    state: MachineState,
    image: &ImageName,
    digest: &str,
    request: Option<&LaunchRequest>,
    program_ran: bool,
) -> v1::Launched {
    let runs = state == MachineState::Active;
    v1::Launched {
        image: image.to_string(),
        digest: digest.to_owned(),
        size: Some(size(known.asked)),
        taken: Some(taken(known.taken, known.asked)),
        ceiling: Some(size(known.ceiling)),
        balloon_mib: known.balloon.taken_mib,
        thresholds: known.thresholds.iter().map(threshold).collect(),
        metrics: match runs {
            true => metrics(known).into_iter().collect(),
            false => Default::default(),
        },
        unsupported_metrics: known
            .unsupported_metrics()
            .map(|metric| metric.name().to_owned())
            .collect(),
        thresholds_etag: etag(known),
        request_id: request.map(|request| request.id.clone()).unwrap_or_default(),
        request_sha256: String::new(),
        program_ran,
    }
}

/// What its thresholds are known by: their content, so that the next agent knows them by the same.
pub(in crate::host) fn etag(known: &Launched) -> String {
    let mut hash = Sha256::new();
    for threshold in known.thresholds.iter().map(threshold) {
        hash.update(threshold.encode_length_delimited_to_vec());
    }
    let mut etag = hex(&hash.finalize());
    etag.truncate(ETAG);
    etag
}

/// What was measured of a machine last, by the names of metrics, in percent or credits.
pub(in crate::host) fn metrics(known: &Launched) -> BTreeMap<String, f64> {
    let named = known
        .metrics()
        .map(|(metric, value)| (metric.name().to_owned(), shown(metric, value)));
    named.collect()
}

/// A change of a machine's size.
pub(in crate::host) fn resize(resize: &ResizeRecord) -> v1::Resize {
    v1::Resize {
        time: Some(listing::timestamp(resize.at)),
        before: Some(size(resize.before)),
        asked: Some(size(resize.asked)),
        taken: Some(taken(resize.taken, resize.asked)),
        duration: resize.took.and_then(duration),
        reason: resize.reason.clone(),
        metrics: resize.metrics.clone().into_iter().collect(),
    }
}

fn size(size: Size) -> v1::MachineSize {
    v1::MachineSize {
        vcpus: size.vcpus,
        cpu_millis: size.cpu_millis,
        memory_mib: size.memory_mib,
    }
}

/// The CPU share is the host's to give: it holds at once, for as many vCPUs as the guest has.
fn taken(taken: Taken, asked: Size) -> v1::MachineSize {
    v1::MachineSize {
        vcpus: taken.vcpus,
        cpu_millis: asked.cpu_millis.min(taken.vcpus.saturating_mul(1000)),
        memory_mib: taken.memory_mib,
    }
}

fn threshold(threshold: &Threshold) -> v1::Threshold {
    let change = match threshold.change() {
        Change::By(by) => threshold::Change::By(by),
        Change::ByPart(part) => threshold::Change::ByPercent(f64::from(part) / 100.0),
        Change::To(to) => threshold::Change::To(to),
    };
    let comparison = match threshold.comparison() {
        Comparison::Above => threshold::Comparison::Above,
        Comparison::Below => threshold::Comparison::Below,
    };
    let resource = match threshold.resource() {
        Resource::Vcpus => threshold::Resource::Vcpus,
        Resource::CpuShare => threshold::Resource::CpuShare,
        Resource::Memory => threshold::Resource::Memory,
    };
    let direction = match threshold.direction() {
        Direction::Grow => threshold::Direction::Grow,
        Direction::Shrink => threshold::Direction::Shrink,
    };
    v1::Threshold {
        metric: threshold.metric().name().to_owned(),
        comparison: comparison.into(),
        value: shown(threshold.metric(), threshold.value()),
        held: duration(threshold.held()),
        resource: resource.into(),
        direction: direction.into(),
        change: Some(change),
        least: Some(threshold.least()),
        most: Some(threshold.most()),
        cooldown: duration(threshold.cooldown()),
    }
}

/// A metric's value in the API's unit: percent, or credits.
fn shown(metric: Metric, value: u64) -> f64 {
    let parts = match metric {
        Metric::Credits => 1000.0,
        _ => 100.0,
    };
    value as f64 / parts
}

fn duration(duration: Duration) -> Option<prost_types::Duration> {
    duration.try_into().ok()
}

#[cfg(test)]
mod tests {
    use stoker_policy::scale::{Bounds, ChangeSpec, ThresholdSpec, check};

    use super::*;

    #[test]
    fn a_threshold_is_shown_as_it_was_asked_for() {
        let all = Size::whole(8, 8192);
        let bounds = Bounds {
            host: all,
            account: all,
            machine: all,
            base_mib: 256,
            credits: true,
        };
        let spec = |metric: &str, value, change| ThresholdSpec {
            metric: metric.to_owned(),
            comparison: Comparison::Above,
            value,
            held: Some(Duration::from_millis(1500)),
            resource: Resource::Memory,
            direction: Direction::Grow,
            change,
            least: None,
            most: Some(4096),
            cooldown: None,
        };
        let specs = [
            spec("memory_use", 81.25, ChangeSpec::ByPercent(12.5)),
            spec("credits", 1.5, ChangeSpec::To(2048)),
        ];
        let checked = check(&specs, &bounds).unwrap();
        let shown: Vec<_> = checked.iter().map(threshold).collect();
        assert_eq!((&*shown[0].metric, shown[0].value), ("memory_use", 81.25));
        assert_eq!(shown[0].change, Some(threshold::Change::ByPercent(12.5)));
        assert_eq!((shown[0].least, shown[0].most), (Some(256), Some(4096)));
        assert_eq!(shown[0].held, duration(Duration::from_millis(1500)));
        assert_eq!(shown[0].cooldown, duration(Duration::from_secs(60)));
        assert_eq!(
            (shown[1].value, shown[1].change),
            (1.5, Some(threshold::Change::To(2048)))
        );
        assert_eq!(shown[0].direction(), threshold::Direction::Grow);
        assert_eq!(shown[0].resource(), threshold::Resource::Memory);
    }
}
