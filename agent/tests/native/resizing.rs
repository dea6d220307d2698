//! How amounts of functions are fitted, through the `Functions` service over a real Unix socket.

use stoker_proto::v1;
use stoker_proto::v1::resizing::Mode;
use tonic::{Code, Status};

use crate::common::*;
use crate::functions::fields;

fn auto() -> v1::Resizing {
    v1::Resizing {
        mode: Mode::Auto.into(),
        ..Default::default()
    }
}

async fn set(agent: &Agent, name: &str, resizing: Option<v1::Resizing>) -> Result<v1::Function, Status> {
    let request = v1::SetResizingRequest {
        name: name.to_owned(),
        resizing,
    };
    Ok(agent.functions().set_resizing(request).await?.into_inner())
}

async fn resizes(agent: &Agent, parent: &str) -> Result<Vec<v1::FunctionResize>, Status> {
    let request = v1::ListFunctionResizesRequest {
        parent: parent.to_owned(),
        ..Default::default()
    };
    let listed = agent.functions().list_function_resizes(request).await?;
    Ok(listed.into_inner().resizes)
}

#[tokio::test]
async fn settings_are_shown_changed_and_live_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let made = agent.create(function("plain"), &app()).await.unwrap();
    assert_eq!((made.resizing, made.effective_amount), (None, made.amount));
    let with = v1::Function {
        resizing: Some(auto()),
        ..function("auto")
    };
    let with = agent.create(with, &app()).await.unwrap();
    let shown = with.resizing.unwrap();
    assert_eq!(shown.mode(), Mode::Auto);
    // With all defaults.
    assert_eq!(shown.least.unwrap().memory_mib, 64);
    assert_eq!(shown.thresholds.unwrap().executions_down, Some(100));
    let changed = v1::Resizing {
        thresholds: Some(v1::ResizingThresholds {
            executions_down: Some(50),
            ..Default::default()
        }),
        ..auto()
    };
    let changed = set(&agent, &made.name, Some(changed)).await.unwrap();
    assert_eq!(changed.resizing.unwrap().thresholds.unwrap().executions_down, Some(50));
    assert!(resizes(&agent, &made.name).await.unwrap().is_empty());
    agent.stop().await;
    let agent = Agent::start(dir.path()).await;
    assert_eq!(agent.get(&made.name).await.unwrap(), changed);
    assert_eq!(agent.get(&with.name).await.unwrap(), with);
    let cleared = set(&agent, &made.name, None).await.unwrap();
    assert_eq!(cleared, made);
    agent.stop().await;
}

#[tokio::test]
async fn what_can_not_be_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let agent = Agent::start(dir.path()).await;
    let made = agent.create(function("f"), &app()).await.unwrap();
    let wrong = v1::Resizing {
        mode: 0,
        least: Some(v1::Amount {
            cpu_millis: 9,
            memory_mib: 64,
        }),
        ..Default::default()
    };
    let refused = set(&agent, &made.name, Some(wrong)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert_eq!(fields(&refused), ["resizing.mode", "resizing.least.cpu_millis"]);
    let asked = v1::Function {
        resizing: Some(v1::Resizing::default()),
        ..function("g")
    };
    let refused = agent.create(asked, &app()).await.unwrap_err();
    assert_eq!(fields(&refused), ["function.resizing.mode"]);
    // Its own amount has to be within.
    let above = v1::Resizing {
        least: Some(v1::Amount {
            cpu_millis: 250,
            memory_mib: 129,
        }),
        ..auto()
    };
    let refused = set(&agent, &made.name, Some(above)).await.unwrap_err();
    assert_eq!(fields(&refused), ["resizing"]);
    assert_eq!(agent.get(&made.name).await.unwrap(), made);
    let none = "accounts/acme/functions/none";
    assert_eq!(
        set(&agent, none, Some(auto())).await.unwrap_err().code(),
        Code::NotFound
    );
    assert_eq!(resizes(&agent, none).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(resizes(&agent, "what").await.unwrap_err().code(), Code::InvalidArgument);
    agent.stop().await;
}
