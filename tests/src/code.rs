//! Program code for tests.

use anyhow::Context as _;
use stoker_testkit::elf::elf;
use stoker_testkit::zip::zip;

/// The code of the example `echo`, which lies beside the example that asks for it.
///
/// # Errors
///
/// Where it is not there.
pub fn echo() -> anyhow::Result<Vec<u8>> {
    example("echo")
}

/// The same of the example `hostile`.
///
/// # Errors
///
/// Where it is not there.
pub fn hostile() -> anyhow::Result<Vec<u8>> {
    example("hostile")
}

/// The same of the example `wakes`.
///
/// # Errors
///
/// Where it is not there.
pub fn wakes() -> anyhow::Result<Vec<u8>> {
    example("wakes")
}

fn example(name: &str) -> anyhow::Result<Vec<u8>> {
    let me = std::env::current_exe().context("find this program")?;
    let program = me.with_file_name(name);
    let program = std::fs::read(&program).with_context(|| format!("read {}", program.display()))?;
    Ok(zip(&[("bootstrap", 0o755, &program)])?)
}

/// A Python function: `app.py` with this text.
///
/// # Errors
///
/// As [`zip`].
pub fn python(text: &str) -> anyhow::Result<Vec<u8>> {
    Ok(zip(&[("app.py", 0o644, text.as_bytes())])?)
}

/// A Python function that answers with what it was given and where it ran.
pub const ECHO: &str = r#"
import os
calls = 0

def handler(event, context):
    global calls
    calls += 1
    print("echo of", context.aws_request_id)
    return {"event": event, "calls": calls, "pid": os.getpid(), "memory": context.memory_limit_in_mb}
"#;

/// A handler that sleeps so many seconds, and answers with the number of calls that its process has had.
pub const COUNTER: &str = "\
import time
count = 0
def handler(event, context):
    global count
    count += 1
    time.sleep(event)
    return count
";

/// A `provided` function that streams: `{"parts", "bytes", "end"}` says how many parts of how many bytes, each of one letter,
/// and what then: `answer`, `fail` (by trailers), `break` the connection off, `exit`, or `hang`.
///
/// # Errors
///
/// As [`zip`].
pub fn streams() -> anyhow::Result<Vec<u8>> {
    Ok(zip(&[("bootstrap", 0o755, STREAMS.as_bytes())])?)
}

const STREAMS: &str = r#"#!/usr/bin/python3
import base64
import http.client
import json
import os
import time

API = os.environ["AWS_LAMBDA_RUNTIME_API"]
CALLS = "/2018-06-01/runtime/invocation/"
ERROR = base64.b64encode(b'{"errorType": "Broke", "errorMessage": "in the middle"}')

def call(method, path):
    connection = http.client.HTTPConnection(API)
    connection.putrequest(method, CALLS + path)
    return connection

def stream(request, event):
    connection = call("POST", request + "/response")
    connection.putheader("Lambda-Runtime-Function-Response-Mode", "streaming")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.putheader("Trailer", "Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body")
    connection.endheaders()
    for part in range(event["parts"]):
        letters = bytes([97 + part % 26]) * event["bytes"]
        connection.send(b"%x\r\n%s\r\n" % (len(letters), letters))
    end = event["end"]
    if end == "hang":
        time.sleep(1000)
    if end == "exit":
        os._exit(3)
    if end == "break":
        return connection.close()
    if end == "fail":
        names = b"Lambda-Runtime-Function-Error-Type: Function.Broke\r\nLambda-Runtime-Function-Error-Body: "
        connection.send(b"0\r\n" + names + ERROR + b"\r\n\r\n")
    else:
        connection.send(b"0\r\n\r\n")
    connection.getresponse().read()

while True:
    connection = call("GET", "next")
    connection.endheaders()
    work = connection.getresponse()
    if work.status != 200:
        # What it broke off is still being read.
        work.read()
        time.sleep(0.05)
        continue
    stream(work.headers["Lambda-Runtime-Aws-Request-Id"], json.loads(work.read()))
"#;

/// A Python function that sleeps for as many ms as it is asked to, and answers with its container, by an id that it made for
/// itself, and how many times it has run in it.
pub const COUNTS: &str = r#"
import os
import time
container = os.urandom(8).hex()
run = 0

def handler(event, context):
    global run
    run += 1
    this = run
    time.sleep(event / 1000)
    return {"container": container, "run": this}
"#;

/// An ELF program that powers the machine off, as its process 1 may: `reboot(RB_POWER_OFF)` (reboot(2)).
pub fn power_off() -> Vec<u8> {
    // mov eax, 169 (reboot); mov edi, 0xfee1dead; mov esi, 672274793; mov edx, 0x4321fedc; syscall; a loop
    elf(
        0x40_0078,
        &[
            0xb8, 169, 0, 0, 0, 0xbf, 0xad, 0xde, 0xe1, 0xfe, 0xbe, 0x69, 0x19, 0x12, 0x28, 0xba, 0xdc, 0xfe, 0x21,
            0x43, 0x0f, 0x05, 0xeb, 0xfe,
        ],
    )
}

/// An ELF program that does nothing for ever: `for (;;) pause();`.
pub fn sleeper() -> Vec<u8> {
    // mov eax, 34 (pause); syscall; jmp to the start
    elf(0x40_0078, &[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7])
}

/// A handler that answers with its clock, in s since 1970.
pub const TELLS_TIME: &str = "\
import time

def handler(event, context):
    return time.time()
";
