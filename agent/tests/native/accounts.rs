//! `stoker account` beside an agent whose accounts are made up.

use std::path::Path;
use std::sync::{Arc, Mutex};

use serde_json::Value;
use stoker_agent::api::errors::{Violations, not_found};
use stoker_proto::v1;
use stoker_proto::v1::account_limit::Source;
use stoker_proto::v1::accounts_server::{Accounts, AccountsServer};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use crate::common::socket;
use crate::programs::{stoker, stoker_of};

/// An agent with two accounts, each on a page of its own; clones are the same.
#[derive(Clone, Default)]
struct Fake(Arc<Mutex<Vec<v1::SetAccountLimitsRequest>>>);

// === impl Fake ===

impl Fake {
    fn serve(folder: &Path) -> (Self, JoinHandle<Result<(), tonic::transport::Error>>) {
        let fake = Self::default();
        let incoming = UnixListenerStream::new(UnixListener::bind(socket(folder)).unwrap());
        let router = Server::builder().add_service(AccountsServer::new(fake.clone()));
        (fake, tokio::spawn(router.serve_with_incoming(incoming)))
    }
}

fn account(name: &str) -> v1::Account {
    let limit = |value, source: Source| {
        Some(v1::AccountLimit {
            value,
            source: source.into(),
        })
    };
    v1::Account {
        name: name.into(),
        limits: Some(v1::AccountLimits {
            machines: limit(Some(4), Source::Set),
            memory_mib: limit(Some(2048), Source::Configuration),
            functions: limit(None, Source::Default),
            ..Default::default()
        }),
        r#use: Some(v1::AccountUse {
            machines: 2,
            memory_mib: 1024,
            functions: 7,
            ..Default::default()
        }),
    }
}

#[tonic::async_trait]
impl Accounts for Fake {
    async fn list_accounts(
        &self,
        request: Request<v1::ListAccountsRequest>,
    ) -> Result<Response<v1::ListAccountsResponse>, Status> {
        let (name, next) = match request.into_inner().page_token.as_str() {
            "" => ("accounts/acme", "accounts/acme"),
            _ => ("accounts/bob", ""),
        };
        Ok(Response::new(v1::ListAccountsResponse {
            accounts: vec![account(name)],
            next_page_token: next.into(),
        }))
    }

    async fn get_account(&self, request: Request<v1::GetAccountRequest>) -> Result<Response<v1::Account>, Status> {
        match request.into_inner().name.as_str() {
            name @ "accounts/acme" => Ok(Response::new(account(name))),
            other => Err(not_found("account", other)),
        }
    }

    async fn set_account_limits(
        &self,
        request: Request<v1::SetAccountLimitsRequest>,
    ) -> Result<Response<v1::Account>, Status> {
        let request = request.into_inner();
        if request.limits.unwrap_or_default().share == Some(0) {
            let mut violations = Violations::default();
            violations.add("limits.share", "0 is not 1 to 10000");
            violations.check()?;
        }
        let account = account(&request.name);
        self.0.lock().unwrap().push(request);
        Ok(Response::new(account))
    }
}

#[tokio::test]
async fn accounts_are_listed_shown_and_limited() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    let listed = stoker(dir.path(), &["account", "list"]).await;
    assert_eq!(listed.code, 0, "{}", listed.err);
    for says in ["MACHINES", "acme", "bob", "2 of 4", "1GiB of 2GiB", "7 of any"] {
        assert!(listed.out.contains(says), "{says}: {}", listed.out);
    }
    let json = stoker(dir.path(), &["--json", "account", "list"]).await;
    let json: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["accounts"].as_array().unwrap().len(), 2);

    let shown = stoker(dir.path(), &["account", "show", "acme"]).await;
    let line = |name: &str| {
        let line = shown.out.lines().find(|line| line.trim_start().starts_with(name));
        line.unwrap().split_whitespace().collect::<Vec<_>>()
    };
    assert_eq!(line("machines"), ["machines", "2", "4", "set"]);
    assert_eq!(line("memory"), ["memory", "1GiB", "2GiB", "configuration"]);
    assert_eq!(line("functions"), ["functions", "7", "any", "default"]);
    let json = stoker(dir.path(), &["--json", "account", "show", "acme"]).await;
    let json: Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["limits"]["machines"]["source"], "SET");
    let unknown = stoker(dir.path(), &["account", "show", "x"]).await;
    assert_eq!(unknown.code, 1);

    let args = [
        "account",
        "limit",
        "acme",
        "--machines",
        "8",
        "--memory",
        "32GiB",
        "--reset",
        "share",
    ];
    let limited = stoker(dir.path(), &args).await;
    assert_eq!(limited.code, 0, "{}", limited.err);
    assert!(limited.out.starts_with("accounts/acme\n"), "{}", limited.out);
    let asked = v1::SetAccountLimitsRequest {
        name: "accounts/acme".into(),
        limits: Some(v1::AccountLimitValues {
            machines: Some(8),
            memory_mib: Some(32 << 10),
            ..Default::default()
        }),
        update_mask: Some(prost_types::FieldMask {
            paths: ["machines", "memory_mib", "share"].map(str::to_owned).to_vec(),
        }),
    };
    assert_eq!(*fake.0.lock().unwrap(), [asked]);
    let refused = stoker(dir.path(), &["account", "limit", "acme", "--share", "0"]).await;
    assert_eq!(refused.code, 1);
    assert!(
        refused.err.contains("limits.share: 0 is not 1 to 10000"),
        "{}",
        refused.err
    );
    for wrong in [
        &["account", "limit", "acme"][..],
        &["account", "limit", "acme", "--reset", "disk"],
    ] {
        assert_eq!(stoker(dir.path(), wrong).await.code, 2);
    }
    assert_eq!(fake.0.lock().unwrap().len(), 1);
    serving.abort();
}

#[tokio::test]
async fn the_account_that_is_set_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let run = async |args: &[&str]| stoker_of(&dir.path().join("settings"), dir.path(), args).await;
    assert_eq!(run(&["account", "set-default", "acme"]).await.code, 0);
    let shown = run(&["account", "show"]).await;
    assert!(shown.out.starts_with("accounts/acme\n"), "{}{}", shown.out, shown.err);
    assert_eq!(run(&["account", "unset-default"]).await.code, 0);
    let nobody = run(&["account", "show"]).await;
    assert_eq!(nobody.code, 2);
    assert!(nobody.err.contains("stoker account set-default"), "{}", nobody.err);
    serving.abort();
}
