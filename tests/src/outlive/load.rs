//! What keeps an agent busy while it is killed, and sees whether anything is lost.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;
use stoker_proto::v1;
use tonic::{Code, Status};

use super::client::{Answer, Client};
use super::{Fault, Seen};
use crate::dice::Dice;

/// How many functions there are, at the most, that nobody calls.
const KEPT: usize = 4;

/// A program and how to run it; both do as [`crate::code::COUNTS`].
#[derive(Clone, Debug)]
pub(super) struct Program {
    pub(super) runtime: &'static str,
    pub(super) handler: &'static str,
    pub(super) zip: Arc<[u8]>,
}

/// What all tasks of the load share.
#[derive(Debug)]
pub(super) struct Load {
    socket: PathBuf,
    programs: Vec<Program>,
    seen: Mutex<Seen>,
    /// Answers of each function that is called for ever.
    answers: Vec<AtomicU64>,
    /// The most ms that such a call sleeps.
    pub(super) sleep_ms: AtomicU64,
    /// The longest that such a call took, in us, asked again until it was answered.
    longest_us: AtomicU64,
    ends: AtomicBool,
    /// Whether functions come and go.
    pub(super) deploys: AtomicBool,
    requests: AtomicU64,
}

/// What a function says of a run.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    container: String,
    number: u64,
}

// === impl Load ===

impl Load {
    /// So many functions are called for ever.
    pub(super) fn new(socket: &Path, programs: Vec<Program>, steady: u32) -> Self {
        Self {
            socket: socket.to_owned(),
            programs,
            seen: Mutex::default(),
            answers: (0..steady).map(|_| AtomicU64::new(0)).collect(),
            sleep_ms: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
            ends: AtomicBool::new(false),
            deploys: AtomicBool::new(true),
            requests: AtomicU64::new(0),
        }
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every task returns once it has its answer.
    pub(super) fn end(&self) {
        self.ends.store(true, Ordering::Relaxed);
    }

    fn goes_on(&self) -> bool {
        !self.ends.load(Ordering::Relaxed)
    }

    /// How many answers each function that is called for ever has given.
    pub(super) fn answers(&self) -> Vec<u64> {
        self.answers.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    /// The longest that a caller waited for an answer since this was asked last.
    pub(super) fn longest_wait(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::Relaxed))
    }

    /// Counts what came of a question.
    fn heard<T>(&self, answer: Answer<T>) -> Result<T, Status> {
        self.seen().broken += u64::from(answer.broken > 0);
        answer.said
    }

    fn request(&self, function: &str, ms: u64) -> v1::InvokeRequest {
        let id = self.requests.fetch_add(1, Ordering::Relaxed);
        v1::InvokeRequest {
            name: function.into(),
            payload: ms.to_string().into(),
            request_id: format!("request-{id}"),
            ..Default::default()
        }
    }

    /// Calls, and has an answer of the function.
    async fn call(&self, client: &Client, request: &v1::InvokeRequest) -> Result<v1::InvokeResponse, Status> {
        let said = self.heard(client.invoke(request).await);
        self.seen().calls += 1;
        if let Ok(response) = &said
            && !response.function_error.is_empty()
        {
            self.seen()
                .fault(Fault::NoAnswer, format!("{request:?} failed: {response:?}"));
        }
        said
    }

    /// Who asks again with the same id has the same answer.
    async fn call_again(&self, client: &Client, request: &v1::InvokeRequest, first: &v1::InvokeResponse) {
        let again = self.heard(client.invoke(request).await);
        let mut seen = self.seen();
        seen.asked_again += 1;
        if again.as_ref().ok() != Some(first) {
            seen.fault(
                Fault::RanTwice,
                format!("{request:?} had {first:?}, and asked again {again:?}"),
            );
        }
    }

    /// Creates a function that runs one of the programs, and remembers it once that is acknowledged.
    async fn create(&self, client: &Client, name: &str, program: &Program) -> Option<String> {
        let function = v1::Function {
            name: name.into(),
            runtime: program.runtime.into(),
            handler: program.handler.into(),
            timeout: Some(prost_types::Duration { seconds: 60, nanos: 0 }),
            // All that a machine has.
            amount: Some(v1::Amount {
                cpu_millis: 1000,
                memory_mib: 64,
            }),
            ..Default::default()
        };
        let created = self.heard(client.create(&function, &program.zip).await);
        let mut seen = self.seen();
        seen.writes += 1;
        match created {
            Ok(function) => {
                seen.functions.insert(name.to_owned(), function.uid.clone());
                Some(function.uid)
            }
            Err(status) => {
                seen.fault(Fault::WriteLost, format!("{name} was not created: {status}"));
                None
            }
        }
    }

    async fn delete(&self, client: &Client, name: &str) {
        let deleted = self.heard(client.delete(name).await);
        let mut seen = self.seen();
        seen.writes += 1;
        match deleted {
            Ok(()) => drop(seen.functions.remove(name)),
            Err(status) => seen.fault(Fault::WriteLost, format!("{name} was not deleted: {status}")),
        }
    }

    /// What was acknowledged of a function holds; nothing is to be there where no `uid` is given.
    async fn check(&self, client: &Client, name: &str, uid: Option<&str>) {
        let found = self.heard(client.get(name).await);
        let holds = match &found {
            Ok(function) => uid == Some(function.uid.as_str()),
            Err(status) => uid.is_none() && status.code() == Code::NotFound,
        };
        if !holds {
            let what = format!("{name} is to be {uid:?}, and is {found:?}");
            self.seen().fault(Fault::WriteLost, what);
        }
    }

    /// Calls one function for ever. It has one container all the time, in which each call runs once.
    pub(super) async fn steady(self: Arc<Self>, index: usize, mut dice: Dice) {
        let client = Client::new(&self.socket);
        let name = format!("accounts/steady-{index}/functions/counts");
        let Some(program) = self.programs.get(index % self.programs.len()) else {
            return;
        };
        if self.create(&client, &name, program).await.is_none() {
            return;
        }
        let mut last: Option<Run> = None;
        while self.goes_on() {
            let request = self.request(&name, dice.below(self.sleep_ms.load(Ordering::Relaxed)));
            let began = Instant::now();
            let response = match self.call(&client, &request).await {
                Ok(response) => response,
                Err(status) => {
                    let what = format!("{} of {name}: {status}", request.request_id);
                    return self.seen().fault(Fault::NoAnswer, what);
                }
            };
            let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            self.longest_us.fetch_max(took, Ordering::Relaxed);
            let run = Run::of(&response);
            if let Some(before) = &last {
                self.compare(&name, before, &run);
            }
            last = Some(run);
            if let Some(answers) = self.answers.get(index) {
                answers.fetch_add(1, Ordering::Relaxed);
            }
            if dice.below(8) == 0 {
                self.call_again(&client, &request, &response).await;
            }
            // So that ten of them leave the processors something.
            dice.pause(200).await;
        }
    }

    fn compare(&self, name: &str, before: &Run, run: &Run) {
        if run.container != before.container {
            let what = format!("{name} was warm in {before:?} and ran in {run:?}");
            self.seen().fault(Fault::Ended, what);
        } else if run.number != before.number + 1 {
            let what = format!("{name} ran {run:?} after {before:?}");
            self.seen().fault(Fault::RanTwice, what);
        }
    }

    /// Functions that come, are called, and go in the midst of a call. Each has an account of its own, and so a machine, which
    /// ends after it.
    pub(super) async fn deployments(self: Arc<Self>, index: usize, mut dice: Dice) {
        let client = Client::new(&self.socket);
        let mut number = 0;
        while self.deploys.load(Ordering::Relaxed) {
            number += 1;
            let name = format!("accounts/brief-{index}-{number}/functions/brief-{index}-{number}");
            let Some(program) = self.programs.get(number % self.programs.len()) else {
                return;
            };
            if self.create(&client, &name, program).await.is_none() {
                return;
            }
            let request = self.request(&name, 0);
            match self.call(&client, &request).await {
                Ok(response) => self.call_again(&client, &request, &response).await,
                Err(status) => {
                    let what = format!("{} of {name}: {status}", request.request_id);
                    self.seen().fault(Fault::NoAnswer, what);
                }
            }
            let request = self.request(&name, 400);
            let deleting = async {
                dice.pause(600).await;
                self.delete(&client, &name).await;
                self.check(&client, &name, None).await;
            };
            let (answer, ()) = tokio::join!(self.call(&client, &request), deleting);
            if let Err(status) = answer
                && status.code() != Code::NotFound
            {
                let what = format!("{} of {name}, which was deleted: {status}", request.request_id);
                self.seen().fault(Fault::NoAnswer, what);
            }
            dice.pause(1000).await;
        }
    }

    /// Functions that nobody calls come, stay for a while, and go.
    pub(super) async fn writes(self: Arc<Self>, mut dice: Dice) {
        let client = Client::new(&self.socket);
        let mut kept = VecDeque::new();
        let mut number = 0;
        while self.deploys.load(Ordering::Relaxed) {
            number += 1;
            let name = format!("accounts/kept/functions/kept-{number}");
            let Some(program) = self.programs.first() else { return };
            if let Some(uid) = self.create(&client, &name, program).await {
                kept.push_back((name, uid));
            }
            for (name, uid) in &kept {
                self.check(&client, name, Some(uid.as_str())).await;
            }
            if kept.len() > KEPT
                && let Some((name, _)) = kept.pop_front()
            {
                self.delete(&client, &name).await;
                self.check(&client, &name, None).await;
            }
            dice.pause(500).await;
        }
    }
}

// === impl Run ===

impl Run {
    fn of(response: &v1::InvokeResponse) -> Self {
        let said: Value = serde_json::from_slice(&response.payload).unwrap_or_default();
        let container = said.get("container").and_then(Value::as_str).unwrap_or_default();
        Self {
            container: container.to_owned(),
            number: said.get("run").and_then(Value::as_u64).unwrap_or_default(),
        }
    }
}
