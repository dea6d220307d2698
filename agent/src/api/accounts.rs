//! The `Accounts` service.

use std::collections::BTreeSet;

use stoker_policy::AccountUse;
use stoker_proto::v1;
use stoker_proto::v1::account_limit::Source;
use stoker_proto::v1::accounts_server;
use tonic::{Request, Response, Status};

use super::caller::administrator;
use super::errors::{Violations, database, internal, invalid, unavailable};
use super::page;
use crate::accounts::{self, AccountsError, Change, InForce, Limit};
use crate::catalog::Catalog;
use crate::host::HostHandle;
use crate::names::AccountName;

/// What administrators alone do.
const CHANGE: &str = "change limits of accounts";

/// Shows what accounts have and may have, and changes that for administrators.
pub struct Accounts {
    accounts: accounts::Accounts,
    catalog: Catalog,
    host: HostHandle,
}

// === impl Accounts ===

impl Accounts {
    /// A service over these limits, functions and machines.
    pub fn new(accounts: accounts::Accounts, catalog: Catalog, host: HostHandle) -> Self {
        Self {
            accounts,
            catalog,
            host,
        }
    }

    async fn get(&self, name: &AccountName) -> Result<v1::Account, Status> {
        let used = self.host.account_use(name.account().into()).await.ok_or_else(ending)?;
        Ok(self.shown(name.account(), used))
    }

    fn shown(&self, account: &str, used: AccountUse) -> v1::Account {
        v1::Account {
            name: format!("accounts/{account}"),
            limits: Some(limits(&self.accounts.in_force(account))),
            r#use: Some(v1::AccountUse {
                machines: used.machines,
                launched_machines: used.launched,
                vcpus: u32::try_from(used.cpu_millis / 1000).unwrap_or(u32::MAX),
                memory_mib: used.memory_mib,
                cpu_millis: used.given_millis,
                functions: self.catalog.count(account),
                running: used.running,
                waiting: used.waiting,
            }),
        }
    }
}

#[tonic::async_trait]
impl accounts_server::Accounts for Accounts {
    async fn list_accounts(
        &self,
        request: Request<v1::ListAccountsRequest>,
    ) -> Result<Response<v1::ListAccountsResponse>, Status> {
        let v1::ListAccountsRequest { page_size, page_token } = request.into_inner();
        let size = page::size(page_size)?;
        let after = match page_token.as_str() {
            "" => None,
            token => {
                let name = token.parse::<AccountName>();
                Some(name.map_err(|_| invalid("page_token", "is not one that this list gave"))?)
            }
        };
        let used = self.host.accounts_use().await.ok_or_else(ending)?;
        let mut names: BTreeSet<String> = self.accounts.names();
        names.extend(self.catalog.accounts());
        names.extend(used.keys().map(|name| name.to_string()));
        // One more, by which it is known that there is another page.
        let names = names
            .iter()
            .filter(|name| after.as_ref().is_none_or(|after| name.as_str() > after.account()))
            .take(size.saturating_add(1));
        let shown = names.map(|name| self.shown(name, used.get(name.as_str()).copied().unwrap_or_default()));
        let mut accounts: Vec<_> = shown.collect();
        let more = page::cut(&mut accounts, size);
        let next_page_token = match accounts.last() {
            Some(last) if more => last.name.clone(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListAccountsResponse {
            accounts,
            next_page_token,
        }))
    }

    async fn get_account(&self, request: Request<v1::GetAccountRequest>) -> Result<Response<v1::Account>, Status> {
        let name = account_name(&request.into_inner().name)?;
        self.get(&name).await.map(Response::new)
    }

    async fn set_account_limits(
        &self,
        request: Request<v1::SetAccountLimitsRequest>,
    ) -> Result<Response<v1::Account>, Status> {
        let by = administrator(&request, CHANGE)?;
        let v1::SetAccountLimitsRequest {
            name,
            limits,
            update_mask,
        } = request.into_inner();
        let name = account_name(&name)?;
        let paths = update_mask.map(|mask| mask.paths).unwrap_or_default();
        let change = change(&limits.unwrap_or_default(), &paths)?;
        let set = self.accounts.set(self.host.clone(), name.clone(), change, by).await;
        set.map_err(|error| match &error {
            AccountsError::Store(store) => database(store),
            AccountsError::Panicked(_) => internal("set limits of an account", &error),
        })?;
        self.get(&name).await.map(Response::new)
    }
}

/// What is to become of the limits that are named.
fn change(values: &v1::AccountLimitValues, paths: &[String]) -> Result<Change, Status> {
    let mut violations = Violations::default();
    let mut change = Change::new();
    for path in paths {
        match Limit::named(path) {
            Some(limit) => {
                change.insert(limit, given(limit, values));
            }
            None => violations.add(
                "update_mask",
                format!("there is no limit {path:?}; there are {}", names()),
            ),
        }
    }
    if paths.is_empty() {
        violations.add("update_mask", format!("must name at least one of {}", names()));
    }
    for limit in Limit::ALL {
        let field = format!("limits.{}", limit.name());
        match (given(limit, values), change.contains_key(&limit)) {
            (Some(_), false) if !paths.is_empty() => violations.add(field, "is not named in `update_mask`"),
            (Some(value), _) => {
                if let Some(problem) = limit.problem(value) {
                    violations.add(field, problem);
                }
            }
            (None, _) => {}
        }
    }
    violations.check()?;
    Ok(change)
}

fn names() -> String {
    Limit::ALL.map(Limit::name).join(", ")
}

fn given(limit: Limit, values: &v1::AccountLimitValues) -> Option<u64> {
    match limit {
        Limit::Machines => values.machines.map(u64::from),
        Limit::Vcpus => values.vcpus.map(u64::from),
        Limit::MemoryMib => values.memory_mib,
        Limit::Functions => values.functions.map(u64::from),
        Limit::Concurrency => values.concurrency.map(u64::from),
        Limit::Waiting => values.waiting.map(u64::from),
        Limit::Share => values.share.map(u64::from),
    }
}

fn limits(in_force: &[InForce]) -> v1::AccountLimits {
    let mut limits = v1::AccountLimits::default();
    for InForce { limit, value, source } in in_force {
        let source = match source {
            accounts::Source::Default => Source::Default,
            accounts::Source::Configuration => Source::Configuration,
            accounts::Source::Set => Source::Set,
        };
        let place = match limit {
            Limit::Machines => &mut limits.machines,
            Limit::Vcpus => &mut limits.vcpus,
            Limit::MemoryMib => &mut limits.memory_mib,
            Limit::Functions => &mut limits.functions,
            Limit::Concurrency => &mut limits.concurrency,
            Limit::Waiting => &mut limits.waiting,
            Limit::Share => &mut limits.share,
        };
        *place = Some(v1::AccountLimit {
            value: *value,
            source: source.into(),
        });
    }
    limits
}

fn account_name(name: &str) -> Result<AccountName, Status> {
    name.parse()
        .map_err(|error: crate::names::NameError| invalid("name", error.to_string()))
}

fn ending() -> Status {
    unavailable("DRAINING", "the agent is ending; try again later")
}

#[cfg(test)]
mod tests {
    use tonic::Code;
    use tonic_types::StatusExt as _;

    use super::*;

    fn of(values: v1::AccountLimitValues, paths: &[&str]) -> Result<Change, Vec<String>> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        change(&values, &paths).map_err(|status| {
            assert_eq!(status.code(), Code::InvalidArgument);
            let details = status.get_error_details();
            let violations = &details.bad_request().unwrap().field_violations;
            violations.iter().map(|violation| violation.field.clone()).collect()
        })
    }

    #[test]
    fn a_limit_that_is_named_has_a_value_or_is_as_configured() {
        let values = v1::AccountLimitValues {
            machines: Some(3),
            memory_mib: Some(1 << 30),
            waiting: Some(0),
            ..Default::default()
        };
        let change = of(values, &["waiting", "machines", "memory_mib", "share"]).unwrap();
        let expected = [
            (Limit::Machines, Some(3)),
            (Limit::MemoryMib, Some(1 << 30)),
            (Limit::Waiting, Some(0)),
            (Limit::Share, None),
        ];
        assert_eq!(change, Change::from(expected));
    }

    #[test]
    fn all_that_is_wrong_is_named() {
        let none = v1::AccountLimitValues::default();
        assert_eq!(of(none, &[]).unwrap_err(), ["update_mask"]);
        assert_eq!(of(none, &["cpu", "machines"]).unwrap_err(), ["update_mask"]);
        let values = v1::AccountLimitValues {
            machines: Some(0),
            vcpus: Some(1_000_001),
            memory_mib: Some(u64::MAX),
            functions: Some(u32::MAX),
            concurrency: Some(0),
            waiting: Some(1_000_001),
            share: Some(0),
        };
        let all = Limit::ALL.map(Limit::name);
        assert_eq!(of(values, &all).unwrap_err(), all.map(|name| format!("limits.{name}")));
        // What is given and not named would be lost without a word.
        let forgotten = v1::AccountLimitValues {
            machines: Some(3),
            share: Some(2),
            ..none
        };
        assert_eq!(of(forgotten, &["machines"]).unwrap_err(), ["limits.share"]);
    }
}
