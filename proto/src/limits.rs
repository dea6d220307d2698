//! Limits that both sides of a call keep to: the public API, the agent and its guests.

use std::ops::RangeInclusive;
use std::time::Duration;

/// The host's vsock port that a guest dials, and so the end of the name of the agent's socket.
pub const GUEST_PORT: u32 = 1024;
/// The most that an invocation may bring, in bytes: Lambda's limit.
pub const PAYLOAD_BYTES: usize = 6 << 20;
/// The most that a function may answer, in bytes: Lambda's limit.
pub const ANSWER_BYTES: usize = PAYLOAD_BYTES + 100;
/// The most that a function may stream as its answer, in bytes: Lambda's limit (AWS Lambda Developer Guide, "Response streaming
/// for Lambda functions": 200 MB since July 2025, 20 MB before).
pub const STREAMED_ANSWER_BYTES: usize = 200 << 20;
/// The most of a streamed answer that one message has, in bytes.
pub const STREAM_PART_BYTES: usize = 64 << 10;
/// The most of a streamed answer that is on its way from a guest to who reads it, in bytes: then the function has to wait.
pub const STREAM_WINDOW_BYTES: usize = 256 << 10;
/// The most of a zip or an image that one message brings, in bytes: to the agent, and of a zip from it to a guest.
pub const CODE_CHUNK_BYTES: usize = 1 << 20;
/// What is kept of one invocation's log for its answer, in bytes: half of it from the beginning, half from the end.
pub const LOG_BYTES: usize = 256 << 10;
/// The longest line of a log, in bytes; a longer one is split. Amazon CloudWatch Logs' largest event.
pub const LOG_LINE_BYTES: usize = 256 << 10;
/// The largest message of a guest about lines of logs, in bytes: a line, and as much of others as was there before it.
pub const LOG_BATCH_BYTES: usize = 512 << 10;
/// The most lines in it.
pub const LOG_BATCH_LINES: usize = 4096;
/// Room in a message for what goes with a payload or log: ids, an error's type and text, in bytes.
const AROUND_BYTES: usize = 64 << 10;
/// The largest message that a guest takes, in bytes.
pub const GUEST_REQUEST_BYTES: usize = PAYLOAD_BYTES + AROUND_BYTES;
/// The largest message that a guest sends, in bytes: an answer with its log.
pub const GUEST_ANSWER_BYTES: usize = ANSWER_BYTES + LOG_BYTES + AROUND_BYTES;
/// The most containers that one machine has at a time, and that one message of its watch tells of.
pub const CONTAINERS: usize = 1024;
/// The most that a function's environment may hold in names and values, in bytes: Lambda's limit.
pub const ENVIRONMENT_BYTES: usize = 4096;
/// What a container may be given of CPUs, in thousandths of one.
pub const CPU_MILLIS: RangeInclusive<u32> = 10..=64_000;
/// What a container may be given of memory, in MiB.
pub const MEMORY_MIB: RangeInclusive<u32> = 16..=1_048_576;
/// What `/tmp` of a container may hold, in MiB: Lambda's range of ephemeral storage. The least is what one has that asks for
/// nothing else.
pub const SCRATCH_MIB: RangeInclusive<u32> = 512..=10_240;
/// The most that the scratch drive of a machine may be, in MiB.
pub const MAX_SCRATCH_MIB: u32 = 65_536;
/// How long a guest waits at most for a drive that is to be larger, and for room on it that comes free: each time that it needs
/// some.
pub const ROOM_WAIT: Duration = Duration::from_secs(5);
/// The most layers that a function may have: Lambda's limit.
pub const LAYERS: usize = 5;
/// The longest that an invocation may take: Lambda's limit.
pub const TIMEOUT: Duration = Duration::from_secs(900);
/// How long a guest keeps the answer of an invocation that is to be kept.
pub const KEPT_ANSWER: Duration = Duration::from_secs(600);
/// The most of such answers that a guest keeps, in bytes; the oldest go first.
pub const KEPT_ANSWERS_BYTES: usize = 8 << 20;
/// The longest name of an invocation in a guest, in bytes.
pub const INVOCATION_NAME_BYTES: usize = 512;
/// The most that what is run in a launched machine may have in its command, its environment and what else it is given, in bytes.
pub const PROGRAM_BYTES: usize = 48 << 10;
/// What [`PROGRAM_BYTES`] limits: texts, each with the zero byte that ends it (execve(2)).
pub fn program_bytes<'a>(texts: impl IntoIterator<Item = &'a str>) -> usize {
    texts.into_iter().map(|text| text.len() + 1).sum()
}
/// The most of a program's input or output, or of a forwarded connection, that one message has, in bytes.
pub const STREAMED_BYTES: usize = 64 << 10;
/// The most of a program's input that is on its way to it and that it has not read, in bytes: then who sends has to wait.
pub const STDIN_WINDOW_BYTES: usize = 2 * STREAMED_BYTES;
/// The header of `Exec`'s answers that says how large this window is. Where it is missing, as with older agents and guests, nothing is
/// granted: how much may be sent is for the connection to say alone.
pub const STDIN_WINDOW_KEY: &str = "stoker-stdin-window";
/// The most programs that run in a launched machine beside its image's.
pub const EXECS: usize = 32;
/// The most connections that are forwarded to a launched machine.
pub const FORWARDED_PORTS: usize = 128;
/// How long an image's program has to end once it is asked to, where nobody says.
pub const STOP_GRACE: Duration = Duration::from_secs(10);
/// The longest that it may be given.
pub const LONGEST_STOP_GRACE: Duration = Duration::from_secs(600);
