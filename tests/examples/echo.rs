//! A `provided` function that answers what it is asked, by AWS Lambda's Runtime API over one kept connection: the least that
//! a function can be, so that what is measured with it is everything else. With the handler `exit-at-init`, `exit-in-call` or
//! `exit-after-answer` it ends there. With `counts` it does as [`stoker_tests::code::COUNTS`].

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;

fn main() -> anyhow::Result<()> {
    let handler = std::env::var("_HANDLER").unwrap_or_default();
    if handler == "exit-at-init" {
        return Ok(());
    }
    let api = std::env::var("AWS_LAMBDA_RUNTIME_API").context("AWS_LAMBDA_RUNTIME_API is not set")?;
    let mut to = TcpStream::connect(&api).context("connect to the Runtime API")?;
    to.set_nodelay(true)?;
    let mut from = BufReader::new(to.try_clone()?);
    let (container, mut run) = (SystemTime::UNIX_EPOCH.elapsed()?.as_nanos(), 0);
    loop {
        let next = format!("GET /2018-06-01/runtime/invocation/next HTTP/1.1\r\nHost: {api}\r\n\r\n");
        to.write_all(next.as_bytes())?;
        let (id, mut payload) = response(&mut from)?;
        if handler == "exit-in-call" {
            return Ok(());
        }
        if handler == "counts" {
            run += 1;
            let ms = std::str::from_utf8(&payload)?.parse()?;
            std::thread::sleep(Duration::from_millis(ms));
            payload = format!(r#"{{"container": "{container}", "run": {run}}}"#).into_bytes();
        }
        let mut answer = format!(
            "POST /2018-06-01/runtime/invocation/{id}/response HTTP/1.1\r\nHost: {api}\r\nContent-Length: {}\r\n\r\n",
            payload.len()
        )
        .into_bytes();
        answer.extend_from_slice(&payload);
        to.write_all(&answer)?;
        response(&mut from)?;
        if handler == "exit-after-answer" {
            return Ok(());
        }
    }
}

/// The request id that a response tells, if it does, and its body.
fn response(from: &mut BufReader<TcpStream>) -> anyhow::Result<(String, Vec<u8>)> {
    let (mut id, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        anyhow::ensure!(from.read_line(&mut line)? > 0, "the Runtime API hung up");
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let Some((name, value)) = line.split_once(": ") else {
            continue;
        };
        match name.to_ascii_lowercase().as_str() {
            "lambda-runtime-aws-request-id" => value.clone_into(&mut id),
            "content-length" => length = value.parse().context("a length that is no number")?,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    from.read_exact(&mut body)?;
    Ok((id, body))
}
