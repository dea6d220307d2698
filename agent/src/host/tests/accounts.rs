//! The `Accounts` service over a real Unix socket: what it sets holds over functions and machines whose guest is this process.

use std::net::SocketAddr;

use stoker_proto::v1::account_limit::Source as Origin;
use stoker_proto::v1::accounts_client::AccountsClient;
use stoker_proto::v1::accounts_server::AccountsServer;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::functions_server::FunctionsServer;
use stoker_proto::v1::invocations_client::InvocationsClient;
use stoker_proto::v1::invocations_server::InvocationsServer;
use stoker_proto::v1::machines_client::MachinesClient;
use stoker_proto::v1::machines_server::MachinesServer;
use tonic::Code;
use tonic::transport::Channel;
use tonic_types::StatusExt as _;

use super::service::{IMAGE, fields, image, reason, request, vcpus};
use super::*;
use crate::accounts::Accounts;
use crate::address::Address;
use crate::api::Api;
use crate::api::accounts::Accounts as AccountService;
use crate::api::functions::Functions;
use crate::api::health::Health;
use crate::api::held::Counted;
use crate::api::invocations::Invocations;
use crate::api::listen::Listeners;
use crate::api::machines::Machines;
use crate::config;

const ACME: &str = "accounts/acme";

/// An agent with functions, an image and made-up machines, and who asks it.
struct Agent {
    host: HostHandle,
    guests: InProcess,
    unix: Channel,
    tcp: SocketAddr,
    stop: CancellationToken,
    serving: tokio::task::JoinHandle<()>,
}

// === impl Agent ===

impl Agent {
    /// As the configuration has it: any account may have 5 machines, and acme 8 vCPUs and 100 functions.
    async fn start(dir: &Path) -> Self {
        let guests = InProcess::default();
        let mut deps = Fixture::deps(dir, guests.clone(), |config| {
            config.pool.warming.clear();
            config.pool.memory_mib = Some(16_384);
            config.pool.cpu_overcommit = 64.0;
            config.machines.vcpus = 4;
            config.account.machines = Some(5);
            let acme = config::Account {
                vcpus: Some(8),
                functions: Some(100),
                ..config::Account::default()
            };
            config.accounts.insert("acme".into(), acme);
            config.api.socket = dir.join("s");
            config.api.tcp = Some(SocketAddr::from(([127, 0, 0, 1], 0)));
            config.store.path = dir.join("state");
            config.limits.images_mib = Some(100);
        })
        .await;
        let config = deps.config.clone();
        let rules = crate::host::rules(&config).unwrap();
        let accounts = Accounts::open(&config, rules, deps.store.clone()).await.unwrap();
        deps.limits = accounts.all_set();
        let catalog = Catalog::open(
            deps.store.clone(),
            deps.code.clone(),
            config.limits.clone(),
            PATIENCE,
            ResizingDefaults::default(),
            accounts.may_create(),
            Arc::new(|_| {}),
        );
        let catalog = catalog.await.unwrap();
        let images = image(&config).await;
        let host = HostHandle::start(deps).await.unwrap();
        let listeners = Listeners::bind(&config.api).await.unwrap();
        let tcp = listeners.tcp.as_ref().unwrap().local_addr().unwrap();
        let invocations = InvocationsServer::new(Invocations::new(catalog.clone(), host.clone()));
        let functions = Functions::new(catalog.clone(), host.largest_amount());
        let api = Api::new()
            .unwrap()
            .with(AccountsServer::new(AccountService::new(
                accounts,
                catalog,
                host.clone(),
            )))
            .with(FunctionsServer::new(functions))
            .with(Counted::new(invocations, host.memory().clone()))
            .with(MachinesServer::new(Machines::new(host.clone(), images)));
        let stop = CancellationToken::new();
        let token = stop.clone();
        let limits = config.limits.clone();
        let serving = tokio::spawn(async move {
            let (_health, healthy) = watch::channel(Health::GOOD);
            api.serve(listeners, &limits, Duration::ZERO, token, healthy)
                .await
                .unwrap();
        });
        let unix = Address::Unix(config.api.socket).connect().await.unwrap();
        Self {
            host,
            guests,
            unix,
            tcp,
            stop,
            serving,
        }
    }

    /// Ends, with its machines.
    async fn end(self) {
        self.guests.held.send_replace(false);
        self.host.drain(PATIENCE).await;
        self.stop.cancel();
        drop(self.unix);
        self.serving.await.unwrap();
    }

    fn accounts(&self) -> AccountsClient<Channel> {
        AccountsClient::new(self.unix.clone())
    }

    async fn get(&self, name: &str) -> v1::Account {
        let request = v1::GetAccountRequest { name: name.into() };
        self.accounts().get_account(request).await.unwrap().into_inner()
    }

    async fn used(&self) -> v1::AccountUse {
        self.get(ACME).await.r#use.unwrap()
    }

    async fn set(&self, values: v1::AccountLimitValues, paths: &[&str]) -> Result<v1::AccountLimits, Status> {
        let set = self.accounts().set_account_limits(ask(ACME, values, paths)).await?;
        Ok(set.into_inner().limits.unwrap())
    }

    async fn list(&self, page_size: i32, page_token: &str) -> Result<(Vec<String>, String), Status> {
        let request = v1::ListAccountsRequest {
            page_size,
            page_token: page_token.into(),
        };
        let page = self.accounts().list_accounts(request).await?.into_inner();
        let names = page.accounts.into_iter().map(|account| account.name);
        Ok((names.collect(), page.next_page_token))
    }

    async fn create(&self, account: &str, function: &str, request_id: &str) -> Result<v1::Function, Status> {
        let header = v1::CreateFunctionHeader {
            function: Some(v1::Function {
                name: format!("accounts/{account}/functions/{function}"),
                runtime: "python3.11".into(),
                handler: "app.handler".into(),
                ..Default::default()
            }),
            request_id: request_id.into(),
        };
        let zip = stoker_testkit::zip::zip(&[("app.py", 0o644, b"")]).unwrap();
        let parts = [Part::Header(header), Part::Chunk(zip.into())];
        let parts = parts.map(|part| v1::CreateFunctionRequest { part: Some(part) });
        let mut client = FunctionsClient::new(self.unix.clone());
        Ok(client.create_function(tokio_stream::iter(parts)).await?.into_inner())
    }

    async fn delete(&self, name: &str) {
        let request = v1::DeleteFunctionRequest { name: name.into() };
        let deleted = FunctionsClient::new(self.unix.clone()).delete_function(request).await;
        deleted.unwrap();
    }

    async fn invoke(&self, name: &str) -> Result<v1::InvokeResponse, Status> {
        let request = v1::InvokeRequest {
            name: name.into(),
            payload: "1".into(),
            ..Default::default()
        };
        let answer = InvocationsClient::new(self.unix.clone()).invoke(request).await?;
        Ok(answer.into_inner())
    }

    async fn launch(&self) -> Result<v1::Machine, Status> {
        let launched = MachinesClient::new(self.unix.clone()).launch_machine(request()).await?;
        Ok(launched.into_inner())
    }

    async fn resize(&self, name: &str, size: v1::MachineSize) -> Result<v1::Resize, Status> {
        let request = v1::ResizeMachineRequest {
            name: name.into(),
            size: Some(size),
            timeout: None,
        };
        let resized = MachinesClient::new(self.unix.clone()).resize_machine(request).await?;
        Ok(resized.into_inner().resize.unwrap())
    }
}

fn ask(name: &str, limits: v1::AccountLimitValues, paths: &[&str]) -> v1::SetAccountLimitsRequest {
    v1::SetAccountLimitsRequest {
        name: name.into(),
        limits: Some(limits),
        update_mask: Some(prost_types::FieldMask {
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }),
    }
}

fn machines(n: u32) -> v1::AccountLimitValues {
    v1::AccountLimitValues {
        machines: Some(n),
        ..Default::default()
    }
}

fn functions(n: u32) -> v1::AccountLimitValues {
    v1::AccountLimitValues {
        functions: Some(n),
        ..Default::default()
    }
}

fn limit(value: Option<u64>, source: Origin) -> Option<v1::AccountLimit> {
    Some(v1::AccountLimit {
        value,
        source: source.into(),
    })
}

/// Whose limit is in the way.
fn subject(status: &Status) -> String {
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    let details = status.get_error_details();
    details.quota_failure().unwrap().violations[0].subject.clone()
}

#[tokio::test]
async fn limits_say_where_they_come_from_and_hold_over_a_restart_until_they_are_reset() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let configured = v1::AccountLimits {
        machines: limit(Some(5), Origin::Configuration),
        vcpus: limit(Some(8), Origin::Configuration),
        memory_mib: limit(Some(16_384), Origin::Default),
        functions: limit(Some(100), Origin::Configuration),
        concurrency: limit(None, Origin::Default),
        waiting: limit(Some(250), Origin::Default),
        share: limit(Some(1), Origin::Default),
    };
    let acme = agent.get(ACME).await;
    assert_eq!(
        (acme.limits, acme.r#use),
        (Some(configured), Some(v1::AccountUse::default()))
    );
    let other = agent.get("accounts/other").await.limits.unwrap();
    assert_eq!(other.vcpus, limit(None, Origin::Default));
    let values = v1::AccountLimitValues {
        machines: Some(2),
        memory_mib: Some(2048),
        waiting: Some(0),
        ..Default::default()
    };
    let changed = v1::AccountLimits {
        machines: limit(Some(2), Origin::Set),
        memory_mib: limit(Some(2048), Origin::Set),
        waiting: limit(Some(0), Origin::Set),
        ..configured
    };
    let paths = ["machines", "memory_mib", "waiting", "share"];
    assert_eq!(agent.set(values, &paths).await.unwrap(), changed);
    assert_eq!(agent.get(ACME).await.limits, Some(changed));
    assert_eq!(agent.get("accounts/other").await.limits, Some(other));
    let said = agent.host.decisions(None, 0, 1000).await.unwrap();
    let said = said.iter().find(|decision| decision.command == "set limits").unwrap();
    assert_eq!((said.account.as_str(), said.reason.as_str()), (ACME, "Asked"));
    assert!(
        said.detail.starts_with("user ") && said.figures["limits.machines"] == "2",
        "{said:?}"
    );
    agent.end().await;

    let agent = Agent::start(dir.path()).await;
    assert_eq!(agent.get(ACME).await.limits, Some(changed));
    agent.launch().await.unwrap();
    agent.launch().await.unwrap();
    assert_eq!(subject(&agent.launch().await.unwrap_err()), ACME);
    let left = v1::AccountLimits {
        waiting: changed.waiting,
        ..configured
    };
    let none = v1::AccountLimitValues::default();
    assert_eq!(agent.set(none, &["machines", "memory_mib"]).await.unwrap(), left);
    agent.launch().await.unwrap();
    assert_eq!(agent.set(none, &["waiting"]).await.unwrap(), configured);
    agent.end().await;
}

#[tokio::test]
async fn an_account_has_no_more_functions_than_it_may() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    agent.set(functions(2), &["functions"]).await.unwrap();
    let first = agent.create("acme", "a", "once").await.unwrap();
    agent.create("acme", "b", "").await.unwrap();
    let refused = agent.create("acme", "c", "").await.unwrap_err();
    assert_eq!(subject(&refused), ACME);
    assert_eq!(
        refused.message(),
        "the account has 2 functions, and may have 2: delete one, or have the limit raised (`stoker account limit`)"
    );
    assert_eq!(agent.used().await.functions, 2);
    // What was made is answered again, a name that is taken is told of, and others have limits of their own.
    assert_eq!(agent.create("acme", "a", "once").await.unwrap().uid, first.uid);
    assert_eq!(
        agent.create("acme", "a", "").await.unwrap_err().code(),
        Code::AlreadyExists
    );
    agent.create("other", "c", "").await.unwrap();
    agent.delete(&first.name).await;
    agent.create("acme", "c", "").await.unwrap();
    // Less than it has takes none away.
    agent.set(functions(1), &["functions"]).await.unwrap();
    assert_eq!(agent.used().await.functions, 2);
    assert_eq!(subject(&agent.create("acme", "d", "").await.unwrap_err()), ACME);
    agent.set(functions(3), &["functions"]).await.unwrap();
    agent.create("acme", "d", "").await.unwrap();
    agent.end().await;
}

#[tokio::test]
async fn functions_launched_machines_and_resizes_have_one_limit_and_nothing_that_runs_ends_by_it() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let function = agent.create("acme", "f", "").await.unwrap().name;
    agent.invoke(&function).await.unwrap();
    let machine = agent.launch().await.unwrap();
    let used = agent.used().await;
    assert_eq!((used.machines, used.launched_machines, used.vcpus), (2, 1, 5));
    assert_eq!((used.memory_mib, used.functions), (1024, 1));
    agent.set(machines(1), &["machines"]).await.unwrap();
    assert_eq!(subject(&agent.launch().await.unwrap_err()), ACME);
    // What is there serves on, and may grow in what is not over.
    agent.invoke(&function).await.unwrap();
    agent.resize(&machine.name, vcpus(2)).await.unwrap();
    let values = v1::AccountLimitValues {
        vcpus: Some(5),
        memory_mib: Some(1024),
        ..Default::default()
    };
    agent.set(values, &["vcpus", "memory_mib"]).await.unwrap();
    let memory = v1::MachineSize {
        memory_mib: 514,
        ..Default::default()
    };
    for larger in [vcpus(3), memory] {
        let refused = agent.resize(&machine.name, larger).await.unwrap_err();
        assert_eq!(
            (refused.code(), &*reason(&refused)),
            (Code::FailedPrecondition, "SIZE_IN_THE_WAY")
        );
        assert!(refused.message().contains("the limits of its account"), "{refused:?}");
    }
    let used = agent.used().await;
    assert_eq!((used.machines, used.vcpus, used.memory_mib), (2, 6, 1024));
    // What waits for a machine goes on once it may have one.
    agent.guests.held.send_replace(true);
    let values = v1::AccountLimitValues {
        machines: Some(2),
        vcpus: Some(6),
        memory_mib: Some(4096),
        ..Default::default()
    };
    agent.set(values, &["machines", "vcpus", "memory_mib"]).await.unwrap();
    let calls: Vec<_> = (0..6)
        .map(|_| {
            let (name, unix) = (function.clone(), agent.unix.clone());
            let request = v1::InvokeRequest {
                name,
                payload: "1".into(),
                ..Default::default()
            };
            tokio::spawn(async move { InvocationsClient::new(unix).invoke(request).await })
        })
        .collect();
    eventually("calls to wait", async || {
        let used = agent.used().await;
        used.waiting > 0 && used.running + used.waiting == 6
    })
    .await;
    assert_eq!(agent.used().await.machines, 2);
    let values = v1::AccountLimitValues {
        machines: Some(3),
        vcpus: Some(10),
        ..Default::default()
    };
    agent.set(values, &["machines", "vcpus"]).await.unwrap();
    eventually("another machine", async || agent.used().await.machines == 3).await;
    agent.guests.held.send_replace(false);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    let state = agent.host.machines(false).await;
    assert!(state.iter().any(|found| found.name == machine.name), "it runs on");
    agent.end().await;
}

#[tokio::test]
async fn what_can_not_be_is_refused_whole_and_others_may_not() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let before = agent.get(ACME).await;
    let wrong = v1::AccountLimitValues {
        machines: Some(0),
        memory_mib: Some(u64::MAX),
        share: Some(3),
        ..Default::default()
    };
    let refused = agent
        .set(wrong, &["machines", "memory_mib", "share"])
        .await
        .unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(fields(&refused), ["limits.machines", "limits.memory_mib"]);
    assert!(refused.message().contains("0 is not 1 to 100000"), "{refused:?}");
    for paths in [&["disk"][..], &[]] {
        let refused = agent.set(machines(3), paths).await.unwrap_err();
        assert!(fields(&refused).contains(&"update_mask".to_owned()), "{refused:?}");
    }
    let nobody = ask("accounts/Acme", machines(3), &["machines"]);
    let refused = agent.accounts().set_account_limits(nobody).await.unwrap_err();
    assert_eq!(fields(&refused), ["name"]);
    // Nobody vouches for who calls over TCP.
    let tcp = Address::Tcp(agent.tcp.to_string()).connect().await.unwrap();
    let mut over_tcp = AccountsClient::new(tcp);
    let refused = over_tcp.set_account_limits(ask(ACME, machines(3), &["machines"])).await;
    let refused = refused.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("change limits of accounts"), "{refused:?}");
    let name = ACME.to_owned();
    let seen = over_tcp.get_account(v1::GetAccountRequest { name }).await.unwrap();
    assert_eq!(
        seen.into_inner(),
        before,
        "nothing was changed, and everybody may see that"
    );
    agent.end().await;
}

#[tokio::test]
async fn accounts_are_listed_page_by_page() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    // One is configured, one has a function, one had its limits set.
    agent.create("bob", "f", "").await.unwrap();
    let eve = ask("accounts/eve", machines(3), &["machines"]);
    agent.accounts().set_account_limits(eve).await.unwrap();
    let all = ["accounts/acme", "accounts/bob", "accounts/eve"].map(str::to_owned);
    assert_eq!(agent.list(0, "").await.unwrap(), (all.to_vec(), String::new()));
    let (first, token) = agent.list(2, "").await.unwrap();
    assert_eq!((&first[..], token.as_str()), (&all[..2], "accounts/bob"));
    assert_eq!(agent.list(2, &token).await.unwrap(), (all[2..].to_vec(), String::new()));
    for (size, token) in [(2, "bob"), (-1, "")] {
        let refused = agent.list(size, token).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
    }
    // One that launched a machine has something, as long as it is there.
    let machine = agent.launch().await.unwrap();
    assert_eq!(machine.launched.unwrap().image, IMAGE);
    assert_eq!(agent.used().await.launched_machines, 1);
    agent.end().await;
}
