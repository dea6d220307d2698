//! The `Functions` service.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use stoker_archive::{ArchiveError, CheckError};
use stoker_policy::Amount;
use stoker_proto::limits::CODE_CHUNK_BYTES;
use stoker_proto::v1;
use stoker_proto::v1::create_function_request::Part;
use stoker_proto::v1::functions_server;
use tonic::{Request, Response, Status, Streaming};

use super::errors::{
    Violations, already_exists, busy, database, exhausted, internal, invalid, not_found, precondition,
};
use super::page::{self, Page};
use super::parts::Parts;
use super::{resizing, validate};
use crate::catalog::{Catalog, CatalogError, Function, Staged, Upload};
use crate::code::CodeError;
use crate::names::FunctionName;
use crate::store::{FunctionRecord, Layer};

/// When a caller may try again that was refused because enough zips come in.
const RETRY: Duration = Duration::from_secs(1);

/// How long a function's zips may take to come in: who sends a byte now and then would else keep others from it.
const UPLOAD_LIMIT: Duration = Duration::from_secs(15 * 60);

/// Deploys, shows and deletes functions.
pub struct Functions {
    catalog: Catalog,
    largest: Amount,
}

// === impl Functions ===

impl Functions {
    /// A service over these functions; `largest` is the most that one may ask for.
    pub fn new(catalog: Catalog, largest: Amount) -> Self {
        Self { catalog, largest }
    }

    fn find(&self, name: &str) -> Result<Arc<Function>, Status> {
        let name = function_name(name)?;
        Ok(self.catalog.get(&name).ok_or(CatalogError::NotFound(name))?)
    }

    async fn create(
        &self,
        mut parts: Parts<v1::CreateFunctionRequest>,
        upload: Upload,
    ) -> Result<FunctionRecord, Status> {
        let header = match parts.next().await?.and_then(|first| first.part) {
            Some(Part::Header(header)) => header,
            _ => return Err(invalid("header", "must be the first message")),
        };
        let mut violations = Violations::default();
        let spec = validate::function(&header, self.largest, &mut violations);
        violations.check()?;
        let spec = spec.ok_or_else(|| invalid("function", "is missing"))?;
        self.catalog.check_new(&spec.name, &header.request_id).await?;
        let staged = tokio::time::timeout(UPLOAD_LIMIT, receive(&mut parts, upload))
            .await
            .map_err(|_| Status::deadline_exceeded(format!("the zips took more than {UPLOAD_LIMIT:?}")))??;
        let most = self.largest.scratch_mib;
        Ok(self.catalog.create(spec, header.request_id, staged, most).await?)
    }
}

/// Takes a function's zips in.
async fn receive(parts: &mut Parts<v1::CreateFunctionRequest>, mut upload: Upload) -> Result<Staged, Status> {
    while let Some(part) = parts.next().await? {
        let chunk = match part.part {
            Some(Part::Chunk(chunk)) => chunk,
            Some(Part::Layer(v1::LayerHeader {})) => {
                upload.begin_layer().await?;
                continue;
            }
            Some(Part::Header(_)) => return Err(invalid("header", "must be the first message only")),
            None => return Err(invalid("part", "must be a chunk of a zip or begin a layer")),
        };
        if chunk.len() > CODE_CHUNK_BYTES {
            return Err(invalid("chunk", format!("must be at most {CODE_CHUNK_BYTES} bytes")));
        }
        if !upload.write(chunk).await? {
            break;
        }
    }
    Ok(upload.finish().await?)
}

#[tonic::async_trait]
impl functions_server::Functions for Functions {
    async fn create_function(
        &self,
        request: Request<Streaming<v1::CreateFunctionRequest>>,
    ) -> Result<Response<v1::Function>, Status> {
        // Before anything is read: only so many calls may hold what has come in.
        let upload = self.catalog.upload()?;
        let parts = Parts::new(request.into_inner(), self.catalog.limits().upload_idle_timeout);
        let record = self.create(parts, upload).await?;
        let shown = match self.catalog.find(record.uid) {
            Some(function) => proto(&function, v1::FunctionView::Basic),
            // It was deleted at once.
            None => of_record(&record, v1::FunctionView::Basic),
        };
        Ok(Response::new(shown))
    }

    async fn get_function(&self, request: Request<v1::GetFunctionRequest>) -> Result<Response<v1::Function>, Status> {
        let request = request.into_inner();
        let function = self.find(&request.name)?;
        Ok(Response::new(proto(&function, request.view())))
    }

    async fn list_functions(
        &self,
        request: Request<v1::ListFunctionsRequest>,
    ) -> Result<Response<v1::ListFunctionsResponse>, Status> {
        let request = request.into_inner();
        let page = Page::of(&request.parent, request.page_size, &request.page_token)?;
        let found = self
            .catalog
            .list(page.account.as_ref(), page.after.as_ref(), page.size + 1);
        let mut functions: Vec<_> = found.iter().map(|function| proto(function, request.view())).collect();
        let more = page::cut(&mut functions, page.size);
        let next_page_token = match functions.last() {
            Some(last) if more => last.name.clone(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListFunctionsResponse {
            functions,
            next_page_token,
        }))
    }

    async fn delete_function(&self, request: Request<v1::DeleteFunctionRequest>) -> Result<Response<()>, Status> {
        let name = function_name(&request.into_inner().name)?;
        self.catalog.delete(name).await?;
        Ok(Response::new(()))
    }

    async fn set_resizing(&self, request: Request<v1::SetResizingRequest>) -> Result<Response<v1::Function>, Status> {
        let v1::SetResizingRequest { name, resizing: given } = request.into_inner();
        let function = self.find(&name)?;
        let mut violations = Violations::default();
        let (first, largest) = (function.amount, self.largest);
        let settings = given.and_then(|given| resizing::checked("resizing", &given, first, largest, &mut violations));
        violations.check()?;
        self.catalog.set_resizing(function.clone(), settings).await?;
        Ok(Response::new(proto(&function, v1::FunctionView::Basic)))
    }

    async fn list_function_resizes(
        &self,
        request: Request<v1::ListFunctionResizesRequest>,
    ) -> Result<Response<v1::ListFunctionResizesResponse>, Status> {
        let request = request.into_inner();
        let (size, before) = (page::size(request.page_size)?, page::number(&request.page_token)?);
        let name = request.parent.parse::<FunctionName>();
        let name = name.map_err(|error| invalid("parent", error.to_string()))?;
        let function = self.catalog.get(&name).ok_or(CatalogError::NotFound(name))?;
        let listed = self.catalog.resizes(&function, before, size + 1).await?;
        let (resizes, next_page_token) = page::numbered(listed, size);
        Ok(Response::new(v1::ListFunctionResizesResponse {
            resizes,
            next_page_token,
        }))
    }
}

/// A function as it is shown: the values of its environment to whom asks for all of it alone.
fn proto(function: &Function, view: v1::FunctionView) -> v1::Function {
    v1::Function {
        resizing: function.own_resizing().as_ref().map(resizing::proto),
        effective_amount: Some(function.effective_amount()),
        ..of_record(function, view)
    }
}

/// The same, as it was deployed.
fn of_record(record: &FunctionRecord, view: v1::FunctionView) -> v1::Function {
    let mut environment: HashMap<_, _> = record.environment.clone().into_iter().collect();
    if view != v1::FunctionView::Full {
        environment.values_mut().for_each(String::clear);
    }
    v1::Function {
        name: record.name.to_string(),
        uid: record.uid.to_string(),
        runtime: record.runtime.clone(),
        handler: record.handler.clone(),
        environment,
        timeout: prost_types::Duration::try_from(record.timeout).ok(),
        amount: Some(record.amount),
        version: record.version,
        code_sha256: record.code_sha256.clone(),
        code_size_bytes: record.code_size,
        create_time: Some(record.create_time.into()),
        freeze: Some(record.freeze),
        ephemeral_storage_mib: record.ephemeral_storage_mib,
        layers: record.layers.iter().map(layer).collect(),
        resizing: record.resizing.as_ref().map(resizing::proto),
        effective_amount: Some(record.amount),
    }
}

fn layer(layer: &Layer) -> v1::Layer {
    v1::Layer {
        code_sha256: layer.code_sha256.clone(),
        code_size_bytes: layer.code_size,
    }
}

impl From<CatalogError> for Status {
    fn from(error: CatalogError) -> Self {
        match &error {
            CatalogError::NotFound(name) => not_found("function", &name.to_string()),
            CatalogError::AlreadyExists(name) => already_exists("function", &name.to_string()),
            CatalogError::RequestReused => {
                invalid("request_id", "was used for a request with other content; use a new one")
            }
            CatalogError::MadeAndDeleted(_) => precondition("FUNCTION_DELETED", error.to_string()),
            CatalogError::Full { .. } => exhausted("functions", error.to_string()),
            CatalogError::AccountFull { account, .. } => exhausted(&account.to_string(), error.to_string()),
            CatalogError::Busy { .. } => busy("uploads", error.to_string(), RETRY),
            CatalogError::ZipTooLarge { layer, .. } => {
                let subject = layer.map_or_else(|| "code".to_owned(), layer_field);
                exhausted(&subject, error.to_string())
            }
            CatalogError::TooManyLayers => invalid("layers", error.to_string()),
            CatalogError::Archive(zips) => refused(zips),
            CatalogError::ScratchTooLarge { .. } => invalid("function.ephemeral_storage_mib", error.to_string()),
            CatalogError::GraceTooShort { .. } => invalid("older_than", error.to_string()),
            CatalogError::Code(CodeError::NotOwner { .. }) => precondition("CODE_OWNER", error.to_string()),
            CatalogError::Code(code) if code.is_disk_full() => exhausted("disk", error.to_string()),
            CatalogError::Code(_) => internal("use its code store", &error),
            CatalogError::Store(store) => database(store),
            CatalogError::Backup(_) => internal("make a backup", &error),
            CatalogError::Panicked(_) => internal("finish the call", &error),
        }
    }
}

fn refused(error: &CheckError) -> Status {
    match error {
        CheckError::Code(ArchiveError::Io(_))
        | CheckError::Layer {
            source: ArchiveError::Io(_),
            ..
        } => internal("read the zips", error),
        CheckError::Code(ArchiveError::Handler(_)) => invalid("function.handler", error.to_string()),
        CheckError::Code(archive) if archive.is_size() => exhausted("code", error.to_string()),
        CheckError::Code(_) => invalid("code", error.to_string()),
        CheckError::Layer { number, .. } | CheckError::TooLarge { number, .. } => {
            invalid(&layer_field(*number), error.to_string())
        }
    }
}

/// The field of a layer, which are numbered from 1.
fn layer_field(number: usize) -> String {
    format!("layers[{}]", number.saturating_sub(1))
}

fn function_name(name: &str) -> Result<FunctionName, Status> {
    name.parse()
        .map_err(|error: crate::names::NameError| invalid("name", error.to_string()))
}
