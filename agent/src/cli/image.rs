//! `stoker image`

use std::fs::File;
use std::io::{self, BufRead as _, Read, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::{Args, Subcommand};
use stoker_proto::limits::CODE_CHUNK_BYTES;
use stoker_proto::v1;
use stoker_proto::v1::images_client::ImagesClient;
use stoker_proto::v1::import_image_request::Part;
use stoker_proto::v1::pull_image_response::Part as Answer;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::names::{Account, Image};
use super::progress::Progress;
use super::retry::retried;
use super::{Connection, Failure, MAX_MESSAGE, PAGE_SIZE, all_pages, json, print_json};
use crate::render::{Table, age, bytes, say, text};

/// How often it is looked how much was sent.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Take an image in from a file: an OCI image layout (a folder or a tar), what `docker save` or `podman save` write, or
    /// the tar of a root file system, plain or compressed by gzip or zstd
    Import(Import),
    /// Take an image in from a registry
    Pull(Pull),
    /// List images
    List {
        #[command(flatten)]
        account: Account,
        /// Those of all accounts; so it is where no account is set
        #[arg(long)]
        all: bool,
    },
    /// Show an image and how it is run
    Show {
        #[command(flatten)]
        image: Image,
    },
    /// Take a name away, and the image with its last one
    Remove {
        #[command(flatten)]
        image: Image,
    },
}

#[derive(Debug, Args)]
pub(super) struct Import {
    #[command(flatten)]
    image: Image,
    /// The file or folder, or `-` for standard input
    path: PathBuf,
    /// Of several images in it, which: its tag in an image layout, or NAME:TAG
    #[arg(long)]
    reference: Option<String>,
}

#[derive(Debug, Args)]
pub(super) struct Pull {
    #[command(flatten)]
    image: Image,
    /// REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@DIGEST; of docker.io where no registry is named
    reference: String,
    /// The user that the registry knows
    #[arg(long, requires = "password_stdin")]
    username: Option<String>,
    /// Read the user's password, or an access token, from standard input
    #[arg(long, requires = "username")]
    password_stdin: bool,
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::Import(import) => self::import(connection, import).await,
        Command::Pull(pull) => self::pull(connection, pull).await,
        Command::List { account, all } => {
            let of = if all { None } else { account.id()? };
            list(connection, format!("accounts/{}", of.as_deref().unwrap_or("-"))).await
        }
        Command::Show { image } => {
            let name = image.name()?;
            let image = client(connection)
                .await?
                .get_image(v1::GetImageRequest { name })
                .await?;
            show(connection, &image.into_inner())
        }
        Command::Remove { image } => {
            let name = image.name()?;
            let request = v1::DeleteImageRequest { name: name.clone() };
            client(connection).await?.delete_image(request).await?;
            if connection.json {
                print_json(&serde_json::json!({ "removed": name }));
            } else {
                say!("removed {name}");
            }
            Ok(())
        }
    }
}

async fn client(connection: &Connection) -> Result<ImagesClient<Channel>, Failure> {
    let client = ImagesClient::new(connection.channel().await?);
    Ok(client.max_decoding_message_size(MAX_MESSAGE))
}

// === import ===

/// Where an image is read from.
#[derive(Debug)]
enum Input {
    Stdin,
    File {
        path: PathBuf,
        /// In bytes.
        size: u64,
    },
    /// An image layout, which is sent as a tar.
    Folder(PathBuf),
}

async fn import(connection: &Connection, import: Import) -> Result<(), Failure> {
    let header = v1::ImportImageHeader {
        name: import.image.name()?,
        reference: import.reference.unwrap_or_default(),
    };
    let from = Arc::new(Input::at(&import.path)?);
    let client = client(connection).await?;
    let attempt = async || send(client.clone(), header.clone(), from.clone()).await;
    let image = match *from {
        // What was read of it can't be read again.
        Input::Stdin => attempt().await?,
        _ => retried(attempt).await?,
    };
    show(connection, &image)
}

async fn send(
    mut client: ImagesClient<Channel>,
    header: v1::ImportImageHeader,
    from: Arc<Input>,
) -> Result<v1::Image, Failure> {
    let (parts, stream) = mpsc::channel(2);
    let (done, mut sending) = oneshot::channel();
    let count = Arc::new(AtomicU64::new(0));
    let chunks = Chunks::new(parts, count.clone());
    let all = from.size();
    // Not one of the runtime's threads, which the program waits for at its end: who writes to standard input may take for ever.
    std::thread::spawn(move || {
        let mut chunks = chunks;
        let sent = chunks.send(header, &from);
        // Where something could not be read the call must not end as if all had been sent.
        let _ = done.send((sent, chunks));
    });
    let mut progress = Progress::new();
    let mut calling = pin!(client.import_image(ReceiverStream::new(stream)));
    let mut looks = tokio::time::interval(LOOK);
    let mut is_sent = false;
    loop {
        tokio::select! {
            answer = &mut calling => return Ok(answer?.into_inner()),
            sent = &mut sending, if !is_sent => {
                is_sent = true;
                if let Ok((sent, chunks)) = sent {
                    sent.map_err(|error| Failure::local(format!("can't read the image: {error}")))?;
                    drop(chunks);
                }
            }
            _ = looks.tick() => {
                let sent = bytes(count.load(Ordering::Relaxed));
                match all {
                    _ if is_sent => progress.say(format_args!("sent {sent}; the agent checks it")),
                    Some(all) => progress.say(format_args!("sent {sent} of {}", bytes(all))),
                    None => progress.say(format_args!("sent {sent}")),
                }
            }
        }
    }
}

// === impl Input ===

impl Input {
    fn at(path: &Path) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return Ok(Self::Stdin);
        }
        let found = std::fs::metadata(path);
        let found = found.map_err(|error| Failure::local(format!("can't read {}: {error}", path.display())))?;
        if !found.is_dir() {
            return Ok(Self::File {
                path: path.to_owned(),
                size: found.len(),
            });
        }
        if !path.join("oci-layout").exists() {
            return Err(Failure::local(format!(
                "{} is no OCI image layout, for it has no file `oci-layout`; a root file system is imported as a tar, which keeps \
                 its owners",
                path.display()
            )));
        }
        Ok(Self::Folder(path.to_owned()))
    }

    /// Bytes of it, where that is known.
    fn size(&self) -> Option<u64> {
        match self {
            Self::File { size, .. } if *size > 0 => Some(*size),
            _ => None,
        }
    }
}

/// Sends what is written to it, in pieces that are worth a message.
struct Chunks {
    parts: mpsc::Sender<v1::ImportImageRequest>,
    chunk: BytesMut,
    /// Bytes that were sent.
    count: Arc<AtomicU64>,
}

// === impl Chunks ===

impl Chunks {
    fn new(parts: mpsc::Sender<v1::ImportImageRequest>, count: Arc<AtomicU64>) -> Self {
        Self {
            parts,
            chunk: BytesMut::with_capacity(CODE_CHUNK_BYTES),
            count,
        }
    }

    /// Sends header and image; ends early where the agent has answered already.
    fn send(&mut self, header: v1::ImportImageHeader, from: &Input) -> io::Result<()> {
        let sent = self.part(Part::Header(header)).and_then(|()| self.content(from));
        match sent {
            Err(_) if self.parts.is_closed() => Ok(()),
            other => other,
        }
    }

    fn content(&mut self, from: &Input) -> io::Result<()> {
        match from {
            Input::Stdin => self.copy(io::stdin().lock())?,
            Input::File { path, .. } => self.copy(File::open(path)?)?,
            Input::Folder(path) => {
                let mut tar = tar::Builder::new(&mut *self);
                // A link may lead out of the folder, and nothing else is meant to be sent.
                tar.follow_symlinks(false);
                tar.append_dir_all("", path)?;
                tar.finish()?;
            }
        }
        self.flush()
    }

    fn copy(&mut self, mut from: impl Read) -> io::Result<()> {
        io::copy(&mut from, self).map(drop)
    }

    fn part(&self, part: Part) -> io::Result<()> {
        let sent = self.parts.blocking_send(v1::ImportImageRequest { part: Some(part) });
        sent.map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Chunks {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let room = CODE_CHUNK_BYTES - self.chunk.len();
        let part = from.get(..from.len().min(room)).unwrap_or(from);
        self.chunk.extend_from_slice(part);
        if self.chunk.len() == CODE_CHUNK_BYTES {
            self.flush()?;
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.chunk.is_empty() {
            return Ok(());
        }
        let chunk: Bytes = self.chunk.split().freeze();
        let count = chunk.len() as u64;
        self.part(Part::Chunk(chunk))?;
        self.chunk.reserve(CODE_CHUNK_BYTES);
        self.count.fetch_add(count, Ordering::Relaxed);
        Ok(())
    }
}

// === pull ===

async fn pull(connection: &Connection, pull: Pull) -> Result<(), Failure> {
    let mut password = String::new();
    if pull.password_stdin {
        let read = io::stdin().lock().read_line(&mut password);
        read.map_err(|error| Failure::local(format!("can't read the password: {error}")))?;
    }
    let request = v1::PullImageRequest {
        name: pull.image.name()?,
        reference: pull.reference,
        username: pull.username.unwrap_or_default(),
        password: password.trim_end_matches(['\r', '\n']).to_owned(),
    };
    let client = client(connection).await?;
    let image = retried(async || follow(client.clone(), request.clone()).await).await?;
    show(connection, &image)
}

async fn follow(mut client: ImagesClient<Channel>, request: v1::PullImageRequest) -> Result<v1::Image, Failure> {
    let mut answers = client.pull_image(request).await?.into_inner();
    let mut progress = Progress::new();
    while let Some(answer) = answers.message().await? {
        match answer.part {
            Some(Answer::Image(image)) => return Ok(image),
            Some(Answer::Progress(v1::PullProgress {
                pulled_bytes,
                total_bytes,
            })) => {
                let (pulled, total) = (bytes(pulled_bytes), bytes(total_bytes));
                if pulled_bytes < total_bytes {
                    progress.say(format_args!("pulled {pulled} of {total}"));
                } else {
                    progress.say(format_args!("pulled {total}; the agent checks it"));
                }
            }
            None => {}
        }
    }
    Err(Failure::Failed("the agent ended the call without an answer".to_owned()))
}

// === list and show ===

async fn list(connection: &Connection, parent: String) -> Result<(), Failure> {
    let mut client = client(connection).await?;
    let images = all_pages(async |page_token| {
        let request = v1::ListImagesRequest {
            parent: parent.clone(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_images(request).await?.into_inner();
        Ok((page.images, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListImagesResponse {
            images,
            next_page_token: String::new(),
        };
        print_json(&json("ListImagesResponse", &all)?);
        return Ok(());
    }
    if images.is_empty() {
        match parent.strip_prefix("accounts/-") {
            Some(_) => say!("no images; `stoker image import` and `stoker image pull` take one in"),
            None => say!("no images of {parent}; --all lists those of all accounts"),
        }
        return Ok(());
    }
    let mut table = Table::new(&["IMAGE", "DIGEST", ">SIZE", ">AGE"]);
    for image in images {
        table.row([
            image.name,
            short_digest(&image.digest).to_owned(),
            match image.damaged {
                true => "damaged".to_owned(),
                false => bytes(image.size_bytes),
            },
            age(image.create_time),
        ]);
    }
    table.print();
    Ok(())
}

/// The start of a digest, as Docker shows it.
fn short_digest(digest: &str) -> &str {
    let hex = digest.strip_prefix("sha256:").unwrap_or(digest);
    hex.get(..12).unwrap_or(hex)
}

fn show(connection: &Connection, image: &v1::Image) -> Result<(), Failure> {
    if connection.json {
        print_json(&json("Image", image)?);
        return Ok(());
    }
    say!("{}", image.name);
    let config = image.config.clone().unwrap_or_default();
    let user = config.user.unwrap_or_default();
    let created = image.create_time.map(|time| time.to_string());
    let mut lines = vec![
        ("digest", image.digest.clone()),
        ("size", bytes(image.size_bytes)),
        ("created", created.unwrap_or_else(|| "-".to_owned())),
        ("entrypoint", words(&config.entrypoint)),
        ("command", words(&config.command)),
        ("folder", format!("{:?}", config.working_dir)),
        ("user", format!("{}:{}, with home {:?}", user.uid, user.gid, user.home)),
        ("ports", text(&config.exposed_ports.join(" "))),
        ("stopped by", format!("signal {}", config.stop_signal)),
    ];
    lines.extend(
        config
            .environment
            .iter()
            .map(|variable| ("env", format!("{variable:?}"))),
    );
    for (key, value) in lines {
        say!("  {key:<10} {value}");
    }
    Ok(())
}

/// Words of a command line, which may have anything in them, orders to a terminal too.
fn words(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|word| format!("{word:?}")).collect();
    text(&words.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_sent_in_whole_pieces() {
        let (parts, mut stream) = mpsc::channel(16);
        let count = Arc::new(AtomicU64::new(0));
        let mut chunks = Chunks::new(parts, count.clone());
        let file = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..2 * CODE_CHUNK_BYTES + 7).map(|i| (i * 31) as u8).collect();
        std::fs::write(file.path(), &content).unwrap();
        chunks
            .send(v1::ImportImageHeader::default(), &Input::at(file.path()).unwrap())
            .unwrap();
        drop(chunks);
        let mut sent = Vec::new();
        while let Some(request) = stream.blocking_recv() {
            sent.push(request.part.unwrap());
        }
        let mut received = Vec::new();
        assert!(matches!(sent.remove(0), Part::Header(_)));
        for (part, size) in sent.into_iter().zip([CODE_CHUNK_BYTES, CODE_CHUNK_BYTES, 7]) {
            let Part::Chunk(chunk) = part else { panic!("{part:?}") };
            assert_eq!(chunk.len(), size);
            received.extend(chunk);
        }
        assert!(received == content);
        assert_eq!(count.load(Ordering::Relaxed), content.len() as u64);
    }

    #[test]
    fn what_the_agent_does_not_want_is_not_read_on() {
        let (parts, stream) = mpsc::channel(1);
        drop(stream);
        let mut chunks = Chunks::new(parts, Arc::default());
        let endless = Input::File {
            path: "/dev/zero".into(),
            size: 0,
        };
        chunks.send(v1::ImportImageHeader::default(), &endless).unwrap();
        assert_eq!(chunks.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn a_folder_is_an_image_layout() {
        let folder = tempfile::tempdir().unwrap();
        let refused = Input::at(folder.path()).unwrap_err().to_string();
        assert!(refused.contains("oci-layout"), "{refused}");
        std::fs::write(folder.path().join("oci-layout"), "{}").unwrap();
        assert!(matches!(Input::at(folder.path()), Ok(Input::Folder(_))));
        assert!(Input::at(&folder.path().join("missing")).is_err());
    }
}
