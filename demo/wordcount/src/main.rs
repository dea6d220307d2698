//! Counts the words of a text: the native function of `cargo xtask demo`.
//!
//! An ordinary Lambda function on the `lambda_runtime` crate, as one would deploy it to AWS.

use std::collections::HashMap;

use lambda_runtime::{Error, LambdaEvent, run, service_fn};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

#[derive(Deserialize)]
struct Request {
    text: String,
    /// How many of the most frequent words to name.
    top: usize,
}

#[derive(Serialize)]
struct Answer {
    bytes: usize,
    lines: usize,
    words: usize,
    sha256: String,
    /// The most frequent words in lower case, most frequent first, those of one count by their spelling.
    top: Vec<(String, usize)>,
}

fn count(request: &Request) -> Answer {
    let text = &request.text;
    let mut frequency: HashMap<String, usize> = HashMap::new();
    for word in text
        .split(|c: char| !c.is_ascii_alphabetic())
        .filter(|word| !word.is_empty())
    {
        *frequency.entry(word.to_ascii_lowercase()).or_default() += 1;
    }
    let mut top: Vec<_> = frequency.into_iter().collect();
    top.sort_unstable_by(|(a, m), (b, n)| n.cmp(m).then_with(|| a.cmp(b)));
    top.truncate(request.top);
    Answer {
        bytes: text.len(),
        lines: text.bytes().filter(|&byte| byte == b'\n').count(),
        words: text.split_ascii_whitespace().count(),
        sha256: Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect(),
        top,
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    run(service_fn(async |event: LambdaEvent<Request>| {
        let answer = count(&event.payload);
        println!("{}: {} words", event.context.request_id, answer.words);
        Ok::<_, Error>(answer)
    }))
    .await
}
