//! The `Credits` service.

use std::sync::Arc;

use stoker_credits::{Credits as Amount, Mode};
use stoker_policy::{MachineId, PlanError};
use stoker_proto::v1;
use stoker_proto::v1::credits_server;
use tonic::{Request, Response, Status};
use ulid::Ulid;

use super::caller::may_change_credits;
use super::errors::{internal, invalid, not_found, precondition};
use super::page;
use crate::host::{CreditsChange, CreditsError, HostHandle};
use crate::names::AccountName;

/// The most credits that are given at once.
const MOST: f64 = 1_000_000.0;

/// Shows machines' credits, and changes them for administrators.
#[derive(Debug)]
pub struct Credits {
    host: HostHandle,
}

// === impl Credits ===

impl Credits {
    /// A service over these machines.
    pub fn new(host: HostHandle) -> Self {
        Self { host }
    }

    async fn find(&self, name: &str) -> Result<v1::MachineCredits, Status> {
        let mut all = self.host.credits().await.into_iter();
        all.find(|credits| credits.name == name)
            .ok_or_else(|| not_found("account of credits", name))
    }

    async fn change(&self, name: &str, change: CreditsChange, by: Arc<str>) -> Result<v1::MachineCredits, Status> {
        let machine = machine_of(name)?;
        match self.host.change_credits(machine, change, by).await {
            Ok(()) => self.find(name).await,
            Err(CreditsError::Plan(PlanError::Unknown)) => Err(not_found("account of credits", name)),
            Err(CreditsError::Plan(error @ PlanError::State)) => {
                Err(precondition("MACHINE_NOT_READY", error.to_string()))
            }
            Err(CreditsError::Plan(error @ PlanError::Baselines { .. })) => {
                Err(precondition("BASELINES_FULL", error.to_string()))
            }
            Err(CreditsError::Plan(PlanError::Terms(error))) => Err(invalid("machine_credits", error.to_string())),
            Err(error @ CreditsError::Failed) => Err(internal("changing a machine's credits", &error)),
        }
    }
}

#[tonic::async_trait]
impl credits_server::Credits for Credits {
    async fn get_machine_credits(
        &self,
        request: Request<v1::GetMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        let name = request.into_inner().name;
        machine_of(&name)?;
        self.find(&name).await.map(Response::new)
    }

    async fn list_machine_credits(
        &self,
        request: Request<v1::ListMachineCreditsRequest>,
    ) -> Result<Response<v1::ListMachineCreditsResponse>, Status> {
        let request = request.into_inner();
        let size = page::size(request.page_size)?;
        let account = match request.parent.as_str() {
            "machines/-" => None,
            account => {
                let name: AccountName = account
                    .parse()
                    .map_err(|_| invalid("parent", "must be `machines/-`, or of the form `accounts/{account}`"))?;
                Some(name.to_string())
            }
        };
        let mut all = self.host.credits().await;
        all.retain(|credits| account.as_ref().is_none_or(|account| credits.account == *account));
        let (machine_credits, next_page_token) =
            page::of(all, size, &request.page_token, "machines/", |credits| &credits.name)?;
        Ok(Response::new(v1::ListMachineCreditsResponse {
            machine_credits,
            next_page_token,
        }))
    }

    async fn update_machine_credits(
        &self,
        request: Request<v1::UpdateMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        let by = may_change_credits(&request)?;
        let v1::UpdateMachineCreditsRequest {
            machine_credits,
            update_mask,
        } = request.into_inner();
        let credits = machine_credits.ok_or_else(|| invalid("machine_credits", "is missing"))?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let change = update(&credits, &paths)?;
        self.change(&credits.name, change, by).await.map(Response::new)
    }

    async fn grant_machine_credits(
        &self,
        request: Request<v1::GrantMachineCreditsRequest>,
    ) -> Result<Response<v1::MachineCredits>, Status> {
        let by = may_change_credits(&request)?;
        let v1::GrantMachineCreditsRequest { name, credits } = request.into_inner();
        let change = CreditsChange::Grant(amount(credits)?);
        self.change(&name, change, by).await.map(Response::new)
    }
}

/// What is to be changed.
fn update(credits: &v1::MachineCredits, paths: &[String]) -> Result<CreditsChange, Status> {
    let (mut baseline_millis, mut mode) = (None, None);
    for path in paths {
        match path.as_str() {
            "baseline_millis" => baseline_millis = Some(credits.baseline_millis),
            "mode" => {
                mode = Some(match credits.mode() {
                    v1::machine_credits::Mode::Standard => Mode::Standard,
                    v1::machine_credits::Mode::Unlimited => Mode::Unlimited,
                    v1::machine_credits::Mode::Unspecified => {
                        return Err(invalid("machine_credits.mode", "must be STANDARD or UNLIMITED"));
                    }
                });
            }
            other => {
                return Err(invalid(
                    "update_mask",
                    format!("{other:?} can't be changed; `baseline_millis` and `mode` can"),
                ));
            }
        }
    }
    if paths.is_empty() {
        return Err(invalid("update_mask", "must name `baseline_millis`, `mode`, or both"));
    }
    Ok(CreditsChange::Plan { baseline_millis, mode })
}

/// Credits to the thousandth.
fn amount(credits: f64) -> Result<Amount, Status> {
    // In this range it is far from what a u64 holds.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let millis = (0.001..=MOST)
        .contains(&credits)
        .then(|| (credits * 1000.0).round() as u64);
    let millis = millis.ok_or_else(|| invalid("credits", format!("{credits} is not 0.001 to {MOST}")))?;
    Ok(Amount::from_millis(millis))
}

fn machine_of(name: &str) -> Result<MachineId, Status> {
    let id = name
        .strip_prefix("machines/")
        .and_then(|rest| rest.strip_suffix("/credits"));
    let id = id.and_then(|id| Ulid::from_string(id).ok());
    id.map(MachineId)
        .ok_or_else(|| invalid("name", "must be of the form `machines/{machine}/credits`"))
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn what_is_changed_is_named() {
        let credits = v1::MachineCredits {
            baseline_millis: 300,
            mode: v1::machine_credits::Mode::Unlimited.into(),
            ..Default::default()
        };
        let of = |paths: &[&str]| {
            update(
                &credits,
                &paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>(),
            )
        };
        let both = CreditsChange::Plan {
            baseline_millis: Some(300),
            mode: Some(Mode::Unlimited),
        };
        assert_eq!(of(&["mode", "baseline_millis"]).unwrap(), both);
        let one = CreditsChange::Plan {
            baseline_millis: Some(300),
            mode: None,
        };
        assert_eq!(of(&["baseline_millis"]).unwrap(), one);
        for wrong in [&[][..], &["balance"], &["mode", "cap"]] {
            assert_eq!(of(wrong).unwrap_err().code(), Code::InvalidArgument, "{wrong:?}");
        }
        let unspecified = v1::MachineCredits::default();
        assert!(update(&unspecified, &["mode".to_owned()]).is_err());
    }

    #[test]
    fn amounts_and_names_have_their_forms() {
        assert_eq!(amount(0.5).unwrap(), Amount::from_millis(500));
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e7, 0.0001] {
            assert!(amount(wrong).is_err(), "{wrong}");
        }
        assert!(machine_of("machines/01ARZ3NDEKTSV4RRFFQ69G5FAV/credits").is_ok());
        for wrong in [
            "",
            "machines/01ARZ3NDEKTSV4RRFFQ69G5FAV",
            "machines/-/credits",
            "machines/x/credits",
        ] {
            assert!(machine_of(wrong).is_err(), "{wrong}");
        }
    }
}
