//! A native function's side of AWS Lambda's Runtime API (AWS Lambda Developer Guide, "Using the Lambda runtime API for custom
//! runtimes"), for the examples that are functions: the least that such a client can be, over one kept connection.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

use anyhow::{Context as _, ensure};

/// The path of all calls about invocations.
pub const INVOCATION: &str = "/2018-06-01/runtime/invocation/";

/// Where a function finds the Runtime API: host and port.
///
/// # Errors
///
/// Where this is no function.
pub fn address() -> anyhow::Result<String> {
    std::env::var("AWS_LAMBDA_RUNTIME_API").context("AWS_LAMBDA_RUNTIME_API is not set")
}

/// A connection to the Runtime API.
pub struct RuntimeApi {
    address: String,
    to: TcpStream,
    from: BufReader<TcpStream>,
}

/// What a function is to do.
pub struct Invocation {
    /// Its request id.
    pub id: String,
    /// What it was given.
    pub payload: Vec<u8>,
}

// === impl RuntimeApi ===

impl RuntimeApi {
    /// Connects to the API of the container that this runs in.
    ///
    /// # Errors
    ///
    /// Where this is no function, or nobody answers.
    pub fn connect() -> anyhow::Result<Self> {
        let address = address()?;
        let to = TcpStream::connect(&address).context("connect to the Runtime API")?;
        to.set_nodelay(true)?;
        let from = BufReader::new(to.try_clone()?);
        Ok(Self { address, to, from })
    }

    /// Waits for the next invocation.
    ///
    /// # Errors
    ///
    /// Where the connection breaks.
    pub fn next_invocation(&mut self) -> anyhow::Result<Invocation> {
        let request = format!("GET {INVOCATION}next HTTP/1.1\r\nHost: {}\r\n\r\n", self.address);
        self.to.write_all(request.as_bytes())?;
        let (id, payload) = self.response()?;
        Ok(Invocation { id, payload })
    }

    /// Answers an invocation.
    ///
    /// # Errors
    ///
    /// Where the connection breaks.
    pub fn answer(&mut self, id: &str, payload: &[u8]) -> anyhow::Result<()> {
        let head = format!(
            "POST {INVOCATION}{id}/response HTTP/1.1\r\nHost: {}\r\nContent-Length: {}\r\n\r\n",
            self.address,
            payload.len()
        );
        self.to.write_all(&[head.as_bytes(), payload].concat())?;
        self.response()?;
        Ok(())
    }

    /// The request id that a response tells, if it does, and its body.
    fn response(&mut self) -> anyhow::Result<(String, Vec<u8>)> {
        let (mut id, mut length) = (String::new(), 0);
        loop {
            let mut line = String::new();
            ensure!(self.from.read_line(&mut line)? > 0, "the Runtime API hung up");
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
        self.from.read_exact(&mut body)?;
        Ok((id, body))
    }
}
