//! The gate at which vCPUs stop.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a vCPU that does not stop is signalled again.
const KICK_AGAIN: Duration = Duration::from_millis(10);

/// vCPUs that do not stop: one is in a device's access that takes long.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{running} vCPUs did not stop within {waited:?}: a device keeps them; try again")]
pub struct StopTimeout {
    running: usize,
    waited: Duration,
}

/// What the vCPUs are to do, and how many of them do it. It begins closed.
#[derive(Default)]
pub(super) struct Gate {
    open: AtomicBool,
    exits: AtomicU64,
    threads: Mutex<Threads>,
    changed: Condvar,
}

/// Threads of vCPUs, which come and go.
#[derive(Default)]
struct Threads {
    all: usize,
    /// Those that stand still.
    stopped: usize,
}

// === impl Gate ===

impl Gate {
    /// Lets them run.
    pub(super) fn open(&self) {
        let _threads = self.lock();
        self.open.store(true, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Stops them, and returns when none runs any more. `kick` makes those that are in the guest look at the gate.
    ///
    /// # Errors
    /// Where one does not stop within `patience`; then all run on.
    pub(super) fn close(&self, patience: Duration, kick: impl Fn()) -> Result<(), StopTimeout> {
        self.open.store(false, Ordering::SeqCst);
        let start = Instant::now();
        let mut threads = self.lock();
        while threads.stopped < threads.all {
            if start.elapsed() >= patience {
                let running = threads.all - threads.stopped;
                drop(threads);
                self.open();
                return Err(StopTimeout {
                    running,
                    waited: patience,
                });
            }
            kick();
            threads = self
                .changed
                .wait_timeout(threads, KICK_AGAIN)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        Ok(())
    }

    /// Whether the vCPUs are to run.
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::SeqCst)
    }

    /// Stands still until the vCPUs are to run, or this one is not wanted any more.
    pub(super) fn wait(&self, wanted: impl Fn() -> bool) {
        let mut threads = self.lock();
        if self.is_open() || !wanted() {
            return;
        }
        threads.stopped += 1;
        self.changed.notify_all();
        while !self.is_open() && wanted() {
            threads = self.changed.wait(threads).unwrap_or_else(PoisonError::into_inner);
        }
        threads.stopped -= 1;
    }

    /// Has those that stand still look whether they are wanted.
    pub(super) fn look_again(&self) {
        let _threads = self.lock();
        self.changed.notify_all();
    }

    /// Counts a vCPU before its thread runs it.
    pub(super) fn enter(&self) {
        self.lock().all += 1;
    }

    /// Counts one out that will not run again.
    pub(super) fn leave(&self) {
        self.lock().all -= 1;
        self.changed.notify_all();
    }

    /// Counts an exit to user space.
    pub(super) fn count_exit(&self) {
        self.exits.fetch_add(1, Ordering::Relaxed);
    }

    /// Exits to user space so far.
    pub(super) fn exits(&self) -> u64 {
        self.exits.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, Threads> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    /// A thread that does what a vCPU's does, without a guest.
    fn runner(gate: &Arc<Gate>, wanted: &Arc<AtomicBool>) -> thread::JoinHandle<()> {
        let (gate, wanted) = (gate.clone(), wanted.clone());
        gate.enter();
        thread::spawn(move || {
            while wanted.load(Ordering::SeqCst) {
                match gate.is_open() {
                    true => gate.count_exit(),
                    false => gate.wait(|| wanted.load(Ordering::SeqCst)),
                }
                thread::yield_now();
            }
            gate.leave();
        })
    }

    #[test]
    fn threads_come_and_go_while_others_are_stopped() {
        let gate = Arc::new(Gate::default());
        let mut threads = Vec::new();
        for round in 0..50 {
            let wanted = Arc::new(AtomicBool::new(true));
            threads.push((runner(&gate, &wanted), wanted));
            if round % 3 == 0 {
                gate.open();
            }
            // One that has just come counts, whether or not it has begun.
            gate.close(PATIENCE, || {}).unwrap();
            let exits = gate.exits();
            if round % 2 == 0 {
                // One ends while it stands still.
                let (thread, wanted) = threads.remove(0);
                wanted.store(false, Ordering::SeqCst);
                gate.look_again();
                thread.join().unwrap();
            }
            gate.close(PATIENCE, || {}).unwrap();
            assert_eq!(gate.exits(), exits, "one ran while all were stopped");
        }
        gate.open();
        for (thread, wanted) in threads {
            wanted.store(false, Ordering::SeqCst);
            thread.join().unwrap();
        }
        let counted = gate.lock();
        assert_eq!((counted.all, counted.stopped), (0, 0));
    }

    #[test]
    fn one_that_does_not_stop_is_told() {
        let gate = Gate::default();
        gate.open();
        gate.enter();
        let error = gate.close(Duration::ZERO, || {}).unwrap_err();
        assert!(error.to_string().starts_with("1 vCPUs did not stop"), "{error}");
        assert!(gate.is_open(), "all run on");
        gate.leave();
        gate.close(Duration::ZERO, || {}).unwrap();
    }
}
