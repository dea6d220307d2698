//! Who has subscribed, what waits for them, and what is told them.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use tokio::sync::Notify;

use super::super::Identity;
use super::super::extensions::Event as Heard;
use super::super::session::Invocation;
use super::buffer::{Batch, Buffer, Dropped};
use super::event::{Ending, Event, Kind, Schema};
use super::lines::Lines;
use super::network::Network;
use super::progress::{self, Progress};
use super::subscription::{Api, Request};

/// What may wait in one container for all its subscribers, and be on its way to them, in bytes.
pub(super) const ROOM_BYTES: usize = 4 << 20;
/// What is kept of the time before they subscribe, in bytes.
const HISTORY_BYTES: usize = 64 << 10;

#[derive(Default)]
pub(super) struct State {
    pub(super) subscriptions: Vec<Subscription>,
    /// None subscribes any more.
    pub(super) closed: bool,
    /// The container is frozen: nobody in it can answer.
    pub(super) paused: bool,
    /// What waits and is on its way, in bytes.
    pub(super) bytes: usize,
    /// Where external extensions are to come: what was there before they subscribed.
    pub(super) history: Option<History>,
    pub(super) progress: Progress,
    pub(super) function: Lines,
    pub(super) extension: Lines,
}

pub(super) struct Subscription {
    pub(super) api: Api,
    /// The extension's name.
    pub(super) name: String,
    pub(super) request: Request,
    pub(super) network: Network,
    pub(super) buffer: Buffer,
    /// What is on its way, in bytes. Not 0 where something is.
    pub(super) sending: usize,
    /// There is something to be sent, or there may be.
    pub(super) wake: Arc<Notify>,
}

#[derive(Default)]
pub(super) struct History {
    pub(super) events: Vec<(Kind, [Option<Bytes>; 3])>,
    pub(super) bytes: usize,
    /// A line had no room: none of those after it is kept.
    pub(super) without_lines: bool,
}

// === impl State ===

impl State {
    pub(super) fn wants(&self, kind: Kind) -> bool {
        let mut subscriptions = self.subscriptions.iter();
        self.history.is_some() || subscriptions.any(|to| to.request.kinds.contains(&kind))
    }

    pub(super) fn lines(&mut self, kind: Kind) -> &mut Lines {
        match kind {
            Kind::Extension => &mut self.extension,
            Kind::Function | Kind::Platform => &mut self.function,
        }
    }

    pub(super) fn push_line(&mut self, kind: Kind, line: &[u8]) {
        self.push(&Event::Line(kind, &String::from_utf8_lossy(line)));
    }

    /// What was begun of a line is one.
    pub(super) fn end_line(&mut self, kind: Kind) {
        if let Some(rest) = self.lines(kind).rest() {
            self.push_line(kind, &rest);
        }
    }

    pub(super) fn push(&mut self, event: &Event<'_>) {
        let time = SystemTime::now();
        let kind = event.kind();
        // Each form is made once, where somebody has it.
        let mut forms: [Option<Option<Bytes>>; 3] = Default::default();
        let mut form = |schema: Schema| {
            let place = forms.get_mut(schema as usize)?;
            place.get_or_insert_with(|| event.render(schema, time)).clone()
        };
        if let Some(history) = &mut self.history
            && !(history.without_lines && kind != Kind::Platform)
        {
            let all = Schema::ALL.map(&mut form);
            history.keep(kind, all);
        }
        let now = Instant::now();
        for to in self
            .subscriptions
            .iter_mut()
            .filter(|to| to.request.kinds.contains(&kind))
        {
            let room = ROOM_BYTES.saturating_sub(self.bytes);
            if !to.buffer.may_hold(event.size(), room) {
                // What it would be need not be found out.
                to.buffer.lose(1, event.size());
            } else if let Some(form) = form(to.request.schema) {
                self.bytes += to.push(now, form, room);
            }
        }
    }

    /// Tells the youngest subscriber what was before.
    pub(super) fn replay(&mut self, identity: &Identity) {
        let Some(to) = self.subscriptions.last_mut() else {
            return;
        };
        let schema = to.request.schema;
        let start = Event::InitStart {
            function: &identity.name,
            version: &identity.version,
        };
        let start = [(Kind::Platform, start.render(schema, self.progress.created()))];
        let history = self.history.iter().flat_map(|history| &history.events);
        let history = history.map(|(kind, forms)| (*kind, forms.get(schema as usize).cloned().flatten()));
        let now = Instant::now();
        for (kind, event) in start.into_iter().chain(history) {
            if let Some(event) = event.filter(|_| to.request.kinds.contains(&kind)) {
                self.bytes += to.push(now, event, ROOM_BYTES.saturating_sub(self.bytes));
            }
        }
    }

    pub(super) fn init_runtime_done(&mut self, ending: Ending) {
        if self.progress.init_runtime_done(&ending) {
            self.push(&Event::InitRuntimeDone(&ending));
        }
    }

    /// Init is over, if it was not.
    pub(super) fn init_over(&mut self, ending: Ending, extensions: &[(String, String, Vec<Heard>)]) {
        self.init_runtime_done(ending);
        let Some((ending, duration)) = self.progress.init_over() else {
            return;
        };
        self.closed = true;
        self.history = None;
        for (name, state, events) in extensions {
            self.push(&Event::Extension { name, state, events });
        }
        self.push(&Event::InitReport {
            ending: &ending,
            duration,
        });
    }

    pub(super) fn begin(&mut self, identity: &Identity, invocation: &Invocation) {
        let trace = invocation.trace_id();
        self.push(&Event::Start {
            request: &invocation.id,
            version: &identity.version,
            trace: &trace,
        });
        self.progress.begin(invocation.id.clone(), trace);
    }

    /// The runtime is done with its init, or with an invocation that it has answered.
    pub(super) fn runtime_done(&mut self) {
        self.init_runtime_done(progress::success());
        if let Some(done) = self.progress.runtime_done() {
            self.end_line(Kind::Function);
            self.push(&done.event());
        }
    }

    /// An invocation is over.
    pub(super) fn report(&mut self, identity: &Identity, memory_peak_bytes: u64) {
        if let Some(report) = self.progress.report() {
            self.push(&Event::End {
                request: &report.request,
            });
            self.push(&report.event(identity.memory_mib, memory_peak_bytes));
        }
    }

    pub(super) fn flush(&mut self) {
        for to in &mut self.subscriptions {
            to.buffer.flush();
            to.wake.notify_one();
        }
    }

    pub(super) fn wake(&self) {
        for to in &self.subscriptions {
            to.wake.notify_one();
        }
    }

    pub(super) fn is_sent(&self) -> bool {
        let mut subscriptions = self.subscriptions.iter();
        subscriptions.all(|to| to.sending == 0 && !to.buffer.is_flushed())
    }

    /// What waits for a subscriber, with a word of what it missed.
    pub(super) fn take(&mut self, index: usize) -> Option<Batch> {
        let to = self.subscriptions.get_mut(index)?;
        let mut batch = to.buffer.take();
        to.sending = batch.bytes.max(1);
        if batch.dropped != Dropped::default() {
            let dropped = Event::LogsDropped {
                records: batch.dropped.records,
                bytes: batch.dropped.bytes,
            };
            batch
                .events
                .extend(dropped.render(to.request.schema, SystemTime::now()));
        }
        Some(batch)
    }
}

// === impl Subscription ===

impl Subscription {
    /// What it takes, in bytes.
    pub(super) fn push(&mut self, now: Instant, event: Bytes, room: usize) -> usize {
        let before = self.buffer.due(now);
        let taken = self.buffer.push(now, event, room);
        if self.buffer.due(now) != before {
            self.wake.notify_one();
        }
        taken
    }
}

// === impl History ===

impl History {
    /// The first of what is there.
    pub(super) fn keep(&mut self, kind: Kind, forms: [Option<Bytes>; 3]) {
        let bytes: usize = forms.iter().flatten().map(Bytes::len).sum();
        if self.bytes + bytes <= HISTORY_BYTES {
            self.bytes += bytes;
            self.events.push((kind, forms));
        } else {
            self.without_lines |= kind != Kind::Platform;
        }
    }
}
