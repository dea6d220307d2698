//! Machines that run in real time for as long as they use little.
//!
//! A thread that is scheduled in real time runs at once when it is woken, before all others of the host, and for as long as it
//! wants. So a machine that may be urgent is so while it stays within its [`Allowance`], and is scheduled as any other while it
//! does not. The kernel tells when one has used so much CPU time, by a timer on the CPU clock of its process (timer_create(2)): what
//! sleeps costs nothing. One that used too much is looked at again after a while, less and less often.
//!
//! One thread does all of it. It is more urgent than machines are, so none can keep it from running.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{SigEvent, SigSet, SigevNotify, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::timer::{Expiration, Timer, TimerSetTimeFlags};
use nix::time::{ClockId, clock_getcpuclockid, clock_gettime};
use nix::unistd::{Pid, gettid};
use stoker_ebpf::Allowance;
use stoker_linux::Cgroup;
use stoker_linux::sched::Policy;
use ulid::Ulid;

use crate::machines::cgroup::ThreadCgroups;

/// How urgent machines' threads are scheduled.
const REAL_TIME: Policy = Policy::RoundRobin { priority: 1 };

/// How the thread is that keeps them within what they may use.
const KEEPER: Policy = Policy::Fifo { priority: 2 };

/// What tells that a machine has used so much. It goes to that one thread, which has it blocked; no other ever sees it.
const ALARM: Signal = Signal::SIGXCPU;

/// When a machine that used too much is looked at again, at the soonest and at the latest.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// A machine whose threads may be urgent.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) id: Ulid,
    /// Its VMM's process.
    pub(super) vmm: u32,
    pub(super) parts: ThreadCgroups,
}

/// Keeps the machines that may be urgent, until it is dropped: then none is any more.
#[derive(Debug)]
pub(super) struct Urgent {
    commands: Option<mpsc::Sender<Command>>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Command {
    /// The machine, which has so many vCPUs now, may be urgent from now on.
    Enter(Machine, u32, mpsc::Sender<io::Result<()>>),
    /// It may not any more. Answered when it is not.
    Leave(Ulid, mpsc::Sender<io::Result<bool>>),
}

/// What the thread has.
struct Keeper {
    commands: mpsc::Receiver<Command>,
    wake: Arc<EventFd>,
    alarms: SignalFd,
    kept: HashMap<usize, Kept>,
    keys: HashMap<Ulid, usize>,
    next_key: usize,
    /// When to look at which machine that is not urgent.
    looks: BinaryHeap<Reverse<(Instant, usize)>>,
    /// vCPUs of all of them.
    vcpus: u64,
    cpus: u64,
}

/// A machine that may be urgent.
struct Kept {
    machine: Machine,
    vcpus: u32,
    clock: ClockId,
    timer: Timer,
    state: State,
}

enum State {
    /// Since then, when its alarm was set.
    Urgent(Instant),
    /// It used too much. What it uses since then, when it had used so much in all, is looked at after this pause.
    Busy(Instant, Duration, Duration),
}

// === impl Urgent ===

impl Urgent {
    /// Starts the thread.
    ///
    /// # Errors
    /// Where this process may not be scheduled in real time.
    pub(super) fn start() -> io::Result<Self> {
        let cpus = thread::available_parallelism()?.get() as u64;
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?);
        let (commands, receiver) = mpsc::channel();
        let (tell, started) = mpsc::channel();
        let of_thread = wake.clone();
        let thread = thread::Builder::new().name("urgent".into()).spawn(move || {
            match Keeper::new(receiver, of_thread, cpus) {
                Ok(mut keeper) => {
                    let _ = tell.send(Ok(()));
                    keeper.run();
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        })?;
        started.recv().map_err(io::Error::other)??;
        Ok(Self {
            commands: Some(commands),
            wake,
            thread: Some(thread),
        })
    }

    /// Lets a machine, which has so many vCPUs, be urgent for as long as it uses little. One that may be already has its threads
    /// looked for again.
    ///
    /// # Errors
    /// Where the kernel does not let its threads; it may not be urgent then.
    pub(super) fn enter(&self, machine: Machine, vcpus: u32) -> io::Result<()> {
        self.ask(|answer| Command::Enter(machine, vcpus, answer))
    }

    /// Takes that back, and says whether it could be urgent. When this returns, no thread of such a machine is.
    ///
    /// # Errors
    /// Where the kernel does not say how its threads are scheduled.
    pub(super) fn leave(&self, machine: Ulid) -> io::Result<bool> {
        self.ask(|answer| Command::Leave(machine, answer))
    }

    fn ask<T>(&self, command: impl FnOnce(mpsc::Sender<io::Result<T>>) -> Command) -> io::Result<T> {
        let (answer, answered) = mpsc::channel();
        let commands = self.commands.as_ref().ok_or(io::ErrorKind::BrokenPipe)?;
        commands.send(command(answer)).map_err(|_| io::ErrorKind::BrokenPipe)?;
        self.wake.write(1)?;
        answered
            .recv()
            .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        drop(self.commands.take());
        let woken = self.wake.write(1);
        if let (Ok(_), Some(thread)) = (woken, self.thread.take()) {
            let _ = thread.join();
        }
    }
}

// === impl Keeper ===

impl Keeper {
    fn new(commands: mpsc::Receiver<Command>, wake: Arc<EventFd>, cpus: u64) -> io::Result<Self> {
        let mut mask = SigSet::empty();
        mask.add(ALARM);
        mask.thread_block()?;
        KEEPER.apply(0)?;
        Ok(Self {
            commands,
            wake,
            alarms: SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?,
            kept: HashMap::new(),
            keys: HashMap::new(),
            next_key: 0,
            looks: BinaryHeap::new(),
            vcpus: 0,
            cpus,
        })
    }

    fn run(&mut self) {
        while let Ok(()) = self.wait() {
            let _ = self.wake.read();
            loop {
                match self.commands.try_recv() {
                    Ok(command) => self.obey(command),
                    Err(mpsc::TryRecvError::Empty) => break,
                    Err(mpsc::TryRecvError::Disconnected) => return self.release_all(),
                }
            }
            while let Ok(Some(alarm)) = self.alarms.read_signal() {
                self.alarmed(alarm.ssi_ptr as usize);
            }
            self.look_at_due();
        }
        // Rather nobody is urgent than one whom nobody holds to what it may use.
        tracing::error!("can't wait for what machines use: none is urgent any more");
        self.release_all();
    }

    /// Waits until there is something to do.
    fn wait(&self) -> nix::Result<()> {
        let due = self.looks.peek().map(|Reverse((due, _))| *due);
        let timeout = due.map_or(PollTimeout::NONE, |due| {
            // Up to the next ms: a moment too early there is nothing to do.
            let left = due.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO)
        });
        let mut waits = [self.wake.as_fd(), self.alarms.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        match poll(&mut waits, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn obey(&mut self, command: Command) {
        // Who asked may have gone.
        match command {
            Command::Enter(machine, vcpus, answer) => {
                let entered = self.enter(machine, vcpus);
                let _ = answer.send(entered);
            }
            Command::Leave(id, answer) => {
                let left = self.leave(id);
                let _ = answer.send(left);
            }
        }
    }

    fn enter(&mut self, machine: Machine, vcpus: u32) -> io::Result<()> {
        let id = machine.id;
        let key = match self.keys.get(&id) {
            Some(key) => *key,
            None => self.keep(machine)?,
        };
        if let Some(kept) = self.kept.get_mut(&key) {
            self.vcpus -= u64::from(std::mem::replace(&mut kept.vcpus, vcpus));
            self.vcpus += u64::from(vcpus);
        }
        let entered = match self.kept.get(&key).map(|kept| &kept.state) {
            Some(State::Urgent(_)) => self.hurry(key),
            _ => Ok(()),
        };
        if entered.is_err() {
            // The first error is the one to tell.
            let _ = self.leave(id);
        }
        entered
    }

    /// Keeps a machine that is not urgent yet.
    fn keep(&mut self, machine: Machine) -> io::Result<usize> {
        let key = self.next_key;
        // 0 would be this process itself.
        let pid = i32::try_from(machine.vmm).ok().filter(|pid| *pid > 0);
        let pid = pid.ok_or(io::ErrorKind::NotFound)?;
        let clock = clock_getcpuclockid(Pid::from_raw(pid))?;
        let event = SigEvent::new(SigevNotify::SigevThreadId {
            signal: ALARM,
            thread_id: gettid().as_raw(),
            si_value: key.cast_signed(),
        });
        let timer = Timer::new(clock, event)?;
        self.next_key += 1;
        self.keys.insert(machine.id, key);
        let state = State::Urgent(Instant::now());
        self.kept.insert(
            key,
            Kept {
                machine,
                vcpus: 0,
                clock,
                timer,
                state,
            },
        );
        Ok(key)
    }

    fn leave(&mut self, id: Ulid) -> io::Result<bool> {
        let Some(kept) = self.keys.remove(&id).and_then(|key| self.kept.remove(&key)) else {
            return Ok(false);
        };
        self.vcpus -= u64::from(kept.vcpus);
        kept.machine.schedule(Policy::DEFAULT).map(|()| true)
    }

    /// Makes a machine urgent, up to its next alarm.
    fn hurry(&mut self, key: usize) -> io::Result<()> {
        let (all, cpus) = (self.vcpus, self.cpus);
        let Some(kept) = self.kept.get_mut(&key) else {
            return Ok(());
        };
        let burst = Duration::from_nanos(Allowance::new(kept.vcpus, all, cpus).burst_ns);
        kept.timer
            .set(Expiration::OneShot(burst.into()), TimerSetTimeFlags::empty())?;
        kept.state = State::Urgent(Instant::now());
        kept.machine.schedule(REAL_TIME)
    }

    /// A machine has used up its burst.
    fn alarmed(&mut self, key: usize) {
        let (all, cpus) = (self.vcpus, self.cpus);
        let Some(kept) = self.kept.get_mut(&key) else {
            return;
        };
        let State::Urgent(since) = kept.state else {
            return;
        };
        let allowance = Allowance::new(kept.vcpus, all, cpus);
        let done = if allowance.covers(allowance.burst_ns, ns(since.elapsed())) {
            self.hurry(key)
        } else {
            self.hold_back(key, since, allowance)
        };
        self.give_up_on_error(key, done);
    }

    /// Looks at the machines that used too much and whose pause is over.
    fn look_at_due(&mut self) {
        let now = Instant::now();
        while let Some(Reverse((due, key))) = self.looks.peek().copied() {
            if due > now {
                break;
            }
            self.looks.pop();
            let done = self.look_at(key);
            self.give_up_on_error(key, done);
        }
    }

    fn look_at(&mut self, key: usize) -> io::Result<()> {
        let Some(kept) = self.kept.get(&key) else {
            return Ok(());
        };
        let State::Busy(since, used_then, pause) = kept.state else {
            return Ok(());
        };
        let used = kept.used()?;
        let allowance = Allowance::new(kept.vcpus, self.vcpus, self.cpus);
        if allowance.covers(ns(used.saturating_sub(used_then)), ns(since.elapsed())) {
            return self.hurry(key);
        }
        self.look_after(key, Instant::now(), used, 2 * pause);
        Ok(())
    }

    /// Schedules a machine as any other that has used up its burst since then, until that is no more than it may use.
    fn hold_back(&mut self, key: usize, since: Instant, allowance: Allowance) -> io::Result<()> {
        let Some(kept) = self.kept.get(&key) else {
            return Ok(());
        };
        let held_back = kept.machine.schedule(Policy::DEFAULT);
        let burst = Duration::from_nanos(allowance.burst_ns);
        let used_then = kept.used()?.saturating_sub(burst);
        let covered = Duration::from_nanos(allowance.covered_after_ns(allowance.burst_ns));
        self.look_after(key, since, used_then, covered.saturating_sub(since.elapsed()));
        held_back
    }

    /// Looks after a pause at what a machine has used since then.
    fn look_after(&mut self, key: usize, since: Instant, used_then: Duration, pause: Duration) {
        let pause = pause.clamp(SHORTEST_PAUSE, LONGEST_PAUSE);
        if let Some(kept) = self.kept.get_mut(&key) {
            kept.state = State::Busy(since, used_then, pause);
            self.looks.push(Reverse((Instant::now() + pause, key)));
        }
    }

    /// One of which the kernel does not say what it uses, as when it has ended, is not urgent any more.
    fn give_up_on_error(&mut self, key: usize, done: io::Result<()>) {
        let Err(error) = done else { return };
        let Some(id) = self.kept.get(&key).map(|kept| kept.machine.id) else {
            return;
        };
        tracing::debug!(machine = %id, %error, "not urgent any more");
        if let Err(error) = self.leave(id) {
            tracing::warn!(machine = %id, %error, "it may still be urgent");
        }
    }

    fn release_all(&mut self) {
        let ids: Vec<_> = self.keys.keys().copied().collect();
        for id in ids {
            if let Err(error) = self.leave(id) {
                tracing::warn!(machine = %id, %error, "it may still be urgent");
            }
        }
    }
}

// === impl Kept ===

impl Kept {
    /// The CPU time that it has used so far.
    fn used(&self) -> io::Result<Duration> {
        Ok(clock_gettime(self.clock)?.into())
    }
}

// === impl Machine ===

impl Machine {
    /// Schedules all its threads so: of vCPUs and of devices.
    pub(super) fn schedule(&self, policy: Policy) -> io::Result<()> {
        self.schedule_parts(policy, policy)
    }

    /// Schedules the threads of its vCPUs so, and those of its devices.
    pub(super) fn schedule_parts(&self, vcpus: Policy, devices: Policy) -> io::Result<()> {
        schedule(&self.parts.vcpus, vcpus).and(schedule(&self.parts.vmm, devices))
    }
}

/// Schedules all threads of a cgroup so, those that can be.
fn schedule(part: &Cgroup, policy: Policy) -> io::Result<()> {
    let threads = match part.threads() {
        // Gone, and with it its threads.
        Err(error) if error.is_not_found() => return Ok(()),
        threads => threads.map_err(io::Error::other)?,
    };
    let mut done = Ok(());
    for thread in threads {
        match policy.apply(thread) {
            // It has ended.
            Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => {}
            Err(error) => done = Err(error),
            Ok(()) => {}
        }
    }
    done
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether the machine's threads are urgent now.
#[cfg(test)]
pub(super) fn is_urgent(machine: &Machine) -> bool {
    let threads = machine.parts.all().map(|part| part.threads().unwrap()).concat();
    let urgent = threads
        .iter()
        .filter(|thread| Policy::of(**thread).unwrap() == REAL_TIME);
    let urgent = urgent.count();
    assert!(urgent == 0 || urgent == threads.len(), "a part of its threads is");
    urgent > 0
}
