//! `stoker function`

use std::fmt::Display;
use std::fs::File;
use std::io::{BufWriter, Read as _, Seek as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use clap::{Args, Subcommand};
use stoker_proto::limits::CODE_CHUNK_BYTES;
use stoker_proto::v1;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_client::FunctionsClient;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::amounts;
use super::names::{Account, Function};
use super::resizing::{self, SetResizing};
use super::retry::retried;
use super::{Connection, Failure, PAGE_SIZE, all_pages, json, parse_env, print_json};
use crate::render::{Table, age, bytes, duration, say, some_amount};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Deploy a function from a zip, or from a folder that is zipped
    Create(Create),
    /// Show a function
    Get {
        #[command(flatten)]
        function: Function,
        /// Show the values of environment variables too
        #[arg(long)]
        show_values: bool,
    },
    /// List functions
    List {
        #[command(flatten)]
        account: Account,
        /// Those of all accounts; so it is where no account is set
        #[arg(long)]
        all: bool,
        /// With --json, show the values of environment variables too
        #[arg(long, requires = "json")]
        show_values: bool,
    },
    /// Change how a function's amount is fitted to what its executions use; what is not given stays as it is
    SetResizing(SetResizing),
    /// Show what was changed of a function's amount, and why
    ResizeHistory {
        #[command(flatten)]
        function: Function,
    },
    /// Delete a function and its code
    Delete {
        #[command(flatten)]
        function: Function,
    },
}

#[derive(Debug, Args)]
pub(super) struct Create {
    #[command(flatten)]
    function: Function,
    /// A zip, or a folder with what is to be in it
    code: PathBuf,
    /// `python3.11`, or `provided` for an executable `bootstrap`
    #[arg(long)]
    runtime: String,
    /// `module.function` for Python, as `app.handler`
    #[arg(long, default_value = "")]
    handler: String,
    /// An environment variable, NAME=VALUE; may be given again
    #[arg(long = "env", value_parser = parse_env)]
    environment: Vec<(String, String)>,
    /// How long one invocation may take, as `30s`; 3s where not given
    #[arg(long, value_parser = humantime::parse_duration)]
    timeout: Option<Duration>,
    /// The first amount of resources, as `500m,256MiB`; 250m,128MiB where not given
    #[arg(long, value_parser = amounts::parse)]
    amount: Option<v1::Amount>,
    /// A zip, or a folder, whose content the function finds in /opt; may be given again, up to five times, and a later one
    /// lies over those before
    #[arg(long = "layer", value_name = "DIR_OR_ZIP")]
    layers: Vec<PathBuf>,
    /// What /tmp holds, in MiB, 512 to 10240; 512 where not given
    #[arg(long, value_name = "MIB")]
    ephemeral_storage: Option<u32>,
    /// Let the function run on between calls, and be charged for it; else it is frozen, as on AWS Lambda
    #[arg(long)]
    no_freeze: bool,
    /// How its amount is fitted to what its executions use; as its account has it where not given
    #[arg(long, value_name = "MODE")]
    resizing: Option<resizing::Mode>,
    /// Makes trying again safe: the same id and content are answered the same way
    #[arg(long)]
    request_id: Option<String>,
}

pub(super) async fn run(connection: &Connection, command: Command) -> Result<(), Failure> {
    match command {
        Command::Create(create) => self::create(connection, create).await,
        Command::Get { function, show_values } => {
            let name = function.name()?;
            let mut client = FunctionsClient::new(connection.channel().await?);
            let view = view(show_values);
            let request = v1::GetFunctionRequest {
                name,
                view: view.into(),
            };
            let function = client.get_function(request).await?.into_inner();
            show(connection, &function, view)
        }
        Command::List {
            account,
            all,
            show_values,
        } => {
            let of = if all { None } else { account.id()? };
            let parent = format!("accounts/{}", of.as_deref().unwrap_or("-"));
            list(connection, parent, view(show_values)).await
        }
        Command::SetResizing(set) => {
            let function = resizing::set(connection, set).await?;
            show(connection, &function, v1::FunctionView::Basic)
        }
        Command::ResizeHistory { function } => resizing::history(connection, function).await,
        Command::Delete { function } => {
            let name = function.name()?;
            let mut client = FunctionsClient::new(connection.channel().await?);
            client
                .delete_function(v1::DeleteFunctionRequest { name: name.clone() })
                .await?;
            if connection.json {
                print_json(&serde_json::json!({ "deleted": name }));
            } else {
                say!("deleted {name}");
            }
            Ok(())
        }
    }
}

fn view(show_values: bool) -> v1::FunctionView {
    if show_values {
        v1::FunctionView::Full
    } else {
        v1::FunctionView::Basic
    }
}

async fn create(connection: &Connection, create: Create) -> Result<(), Failure> {
    let header = v1::CreateFunctionHeader {
        function: Some(v1::Function {
            name: create.function.name()?,
            runtime: create.runtime,
            handler: create.handler,
            environment: create.environment.into_iter().collect(),
            timeout: create
                .timeout
                .map(prost_types::Duration::try_from)
                .transpose()
                .map_err(|error| Failure::local(format!("--timeout: {error}")))?,
            amount: create.amount,
            freeze: Some(!create.no_freeze),
            ephemeral_storage_mib: create.ephemeral_storage.unwrap_or_default(),
            resizing: create.resizing.map(resizing::Mode::resizing),
            ..Default::default()
        }),
        request_id: create.request_id.unwrap_or_else(|| ulid::Ulid::generate().to_string()),
    };
    let paths: Vec<PathBuf> = std::iter::once(create.code).chain(create.layers).collect();
    let opening = tokio::task::spawn_blocking(move || paths.iter().map(|path| open(path)).collect::<Result<_, _>>());
    let opened = opening.await.map_err(|error| Failure::local(error.to_string()))?;
    let zips: Arc<[File]> = opened?;
    let client = FunctionsClient::new(connection.channel().await?);
    let created = retried(async || attempt(client.clone(), header.clone(), zips.clone()).await).await?;
    show(connection, &created, v1::FunctionView::Basic)
}

/// Opens a zip, or makes one of a folder, which is gone when the handle is.
fn open(code: &Path) -> Result<File, Failure> {
    if !code.is_dir() {
        return File::open(code).map_err(|error| Failure::local(format!("can't read {}: {error}", code.display())));
    }
    let failed = |error: &dyn Display| Failure::local(format!("can't zip {}: {error}", code.display()));
    let file = tempfile::tempfile().map_err(|error| failed(&error))?;
    let zip = stoker_archive::pack(code, BufWriter::new(file)).map_err(|error| failed(&error))?;
    let mut zip = zip.into_inner().map_err(|error| failed(&error))?;
    zip.rewind().map_err(|error| failed(&error))?;
    Ok(zip)
}

async fn attempt(
    mut client: FunctionsClient<Channel>,
    header: v1::CreateFunctionHeader,
    zips: Arc<[File]>,
) -> Result<v1::Function, Failure> {
    let (parts, stream) = mpsc::channel(2);
    let sending = tokio::task::spawn_blocking(move || send(header, &zips, &parts));
    let created = client.create_function(ReceiverStream::new(stream)).await;
    // What can't be read here is why the agent got no whole zip.
    match sending.await {
        Ok(sent) => sent.map_err(|error| Failure::local(format!("can't read the zip: {error}")))?,
        Err(error) => return Err(Failure::local(error.to_string())),
    }
    Ok(created?.into_inner())
}

/// Sends header and zips, the function's own before its layers; ends early where the agent has answered already.
fn send(
    header: v1::CreateFunctionHeader,
    zips: &[File],
    parts: &mpsc::Sender<v1::CreateFunctionRequest>,
) -> std::io::Result<()> {
    let send = |part| {
        parts
            .blocking_send(v1::CreateFunctionRequest { part: Some(part) })
            .is_ok()
    };
    let begins = std::iter::once(Part::Header(header)).chain(std::iter::repeat(Part::Layer(v1::LayerHeader {})));
    for (mut zip, begin) in zips.iter().zip(begins) {
        zip.rewind()?;
        let mut next = Some(begin);
        while let Some(part) = next {
            if !send(part) {
                return Ok(());
            }
            let chunk = chunk(zip)?;
            next = (!chunk.is_empty()).then_some(Part::Chunk(chunk));
        }
    }
    Ok(())
}

fn chunk(mut zip: &File) -> std::io::Result<Bytes> {
    let mut chunk = BytesMut::zeroed(CODE_CHUNK_BYTES);
    let read = zip.read(&mut chunk)?;
    chunk.truncate(read);
    Ok(chunk.freeze())
}

async fn list(connection: &Connection, parent: String, view: v1::FunctionView) -> Result<(), Failure> {
    let mut client = FunctionsClient::new(connection.channel().await?);
    let functions = all_pages(async |page_token| {
        let request = v1::ListFunctionsRequest {
            parent: parent.clone(),
            page_size: PAGE_SIZE,
            page_token,
            view: view.into(),
        };
        let page = client.list_functions(request).await?.into_inner();
        Ok((page.functions, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListFunctionsResponse {
            functions,
            next_page_token: String::new(),
        };
        print_json(&json("ListFunctionsResponse", &all)?);
        return Ok(());
    }
    if functions.is_empty() {
        match parent.strip_prefix("accounts/-") {
            Some(_) => say!("no functions; `stoker function create` deploys one"),
            None => say!("no functions of {parent}; --all lists those of all accounts"),
        }
        return Ok(());
    }
    let mut table = Table::new(&[
        "FUNCTION", "RUNTIME", ">VERSION", ">AMOUNT", ">TIMEOUT", ">CODE", ">AGE",
    ]);
    for function in functions {
        table.row([
            function.name,
            function.runtime,
            function.version.to_string(),
            some_amount(function.amount.as_ref()),
            duration(function.timeout),
            bytes(function.code_size_bytes),
            age(function.create_time),
        ]);
    }
    table.print();
    Ok(())
}

fn show(connection: &Connection, function: &v1::Function, view: v1::FunctionView) -> Result<(), Failure> {
    if connection.json {
        print_json(&json("Function", function)?);
        return Ok(());
    }
    say!("{}", function.name);
    let mut lines = vec![
        ("version", function.version.to_string()),
        ("runtime", function.runtime.clone()),
        ("handler", crate::render::text(&function.handler)),
        ("amount", some_amount(function.amount.as_ref())),
        ("has now", some_amount(function.effective_amount.as_ref())),
        ("resizing", resizing::shown(function.resizing.as_ref())),
        ("timeout", duration(function.timeout)),
        (
            "code",
            format!("{}, sha256 {}", bytes(function.code_size_bytes), function.code_sha256),
        ),
        ("/tmp", bytes(u64::from(function.ephemeral_storage_mib) << 20)),
        (
            "frozen",
            match function.freeze() {
                true => "between calls",
                false => "never",
            }
            .to_owned(),
        ),
        (
            "created",
            function
                .create_time
                .map_or_else(|| "-".to_owned(), |time| time.to_string()),
        ),
        ("uid", function.uid.clone()),
    ];
    for layer in &function.layers {
        lines.push((
            "layer",
            format!("{}, sha256 {}", bytes(layer.code_size_bytes), layer.code_sha256),
        ));
    }
    let mut environment: Vec<_> = function.environment.iter().collect();
    environment.sort();
    for (name, value) in environment {
        lines.push((
            "env",
            match view {
                v1::FunctionView::Full => format!("{name}={value}"),
                _ => format!("{name} (--show-values of `stoker function get` shows its value)"),
            },
        ));
    }
    for (key, value) in lines {
        say!("  {key:<8} {value}");
    }
    Ok(())
}
