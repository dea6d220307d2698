//! The `Images` service.

use std::io;
use std::time::Duration;

use stoker_images::{Config, Credentials, ImageError, Port, Progress, Protocol, RegistryError, User};
use stoker_proto::limits::CODE_CHUNK_BYTES;
use stoker_proto::v1;
use stoker_proto::v1::images_server;
use stoker_proto::v1::import_image_request::Part;
use stoker_proto::v1::pull_image_response::Part as PullPart;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};

use super::errors::{Violations, about, busy, exhausted, internal, invalid, not_found, precondition, unavailable};
use super::page::{self, Page};
use super::parts::Parts;
use crate::catalog::Catalog;
use crate::images::{Image, Images as Kept, ImagesError, Import, Pulling, Slot, Source, TAKE_LIMIT};
use crate::names::{ImageName, NameError};

/// When a caller may try again that was refused because enough images come in.
const RETRY: Duration = Duration::from_secs(1);

/// The longest name of an image at a registry or in an archive, in bytes.
const MAX_REFERENCE: usize = 512;

/// The longest user name of a registry, and the longest password, which may be a token, in bytes.
const MAX_USERNAME: usize = 256;
const MAX_PASSWORD: usize = 8 << 10;

/// The longest message about an image, in bytes. It goes into the headers of the answer, once as text where a byte may take three
/// and twice in the details; clients take 16 KiB of headers, and see a broken connection where there are more.
const MAX_MESSAGE: usize = 2048;

/// Takes in, shows and deletes images.
pub struct Images {
    images: Kept,
    /// Whose limits hold for what comes in here too.
    catalog: Catalog,
}

// === impl Images ===

impl Images {
    /// A service over these images; what callers may do is as for the functions of a catalogue.
    pub fn new(images: Kept, catalog: Catalog) -> Self {
        Self { images, catalog }
    }
}

#[tonic::async_trait]
impl images_server::Images for Images {
    async fn import_image(
        &self,
        request: Request<Streaming<v1::ImportImageRequest>>,
    ) -> Result<Response<v1::Image>, Status> {
        // Before anything is read: only so many calls may hold what has come in.
        let slot = self.images.slot()?;
        let mut parts = Parts::new(request.into_inner(), self.catalog.limits().upload_idle_timeout);
        let receiving = tokio::time::timeout(TAKE_LIMIT, receive(&mut parts, slot)).await;
        let import = receiving.map_err(|_| ImagesError::TooLong)??;
        Ok(Response::new(proto(import.finish().await?)))
    }

    type PullImageStream = ReceiverStream<Result<v1::PullImageResponse, Status>>;

    async fn pull_image(
        &self,
        request: Request<v1::PullImageRequest>,
    ) -> Result<Response<Self::PullImageStream>, Status> {
        let (name, source) = source(request.into_inner())?;
        let mut pull = self.images.slot()?.pull(name, source);
        let (to, answers) = mpsc::channel(1);
        tokio::spawn(async move {
            loop {
                let said = tokio::select! {
                    said = pull.next() => said,
                    // Nobody waits for it: it ends as it is dropped.
                    () = to.closed() => return,
                };
                let (part, is_last) = match said {
                    Pulling::Progress(progress) => (Ok(PullPart::Progress(progress_proto(progress))), false),
                    Pulling::Done(done) => ((*done).map(proto).map(PullPart::Image).map_err(Status::from), true),
                };
                let part = part.map(|part| v1::PullImageResponse { part: Some(part) });
                if to.send(part).await.is_err() || is_last {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(answers)))
    }

    async fn get_image(&self, request: Request<v1::GetImageRequest>) -> Result<Response<v1::Image>, Status> {
        let name = image_name(&request.into_inner().name)?;
        Ok(Response::new(proto(self.images.get(name).await?)))
    }

    async fn list_images(
        &self,
        request: Request<v1::ListImagesRequest>,
    ) -> Result<Response<v1::ListImagesResponse>, Status> {
        let request = request.into_inner();
        let page: Page<ImageName> = Page::of(&request.parent, request.page_size, &request.page_token)?;
        let found = self.images.list(page.account, page.after, page.size + 1).await?;
        let mut images: Vec<_> = found.into_iter().map(proto).collect();
        let more = page::cut(&mut images, page.size);
        let next_page_token = match images.last() {
            Some(last) if more => last.name.clone(),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListImagesResponse {
            images,
            next_page_token,
        }))
    }

    async fn delete_image(&self, request: Request<v1::DeleteImageRequest>) -> Result<Response<()>, Status> {
        let name = image_name(&request.into_inner().name)?;
        self.images.delete(name).await?;
        Ok(Response::new(()))
    }
}

/// Takes an image in up to its last piece.
async fn receive(parts: &mut Parts<v1::ImportImageRequest>, slot: Slot) -> Result<Import, Status> {
    let header = match parts.next().await?.and_then(|first| first.part) {
        Some(Part::Header(header)) => header,
        _ => return Err(invalid("header", "must be the first message")),
    };
    let mut violations = Violations::default();
    let name = parse("header.name", &header.name, &mut violations);
    check_text("header.reference", &header.reference, MAX_REFERENCE, &mut violations);
    violations.check()?;
    let name = name.ok_or_else(|| invalid("header.name", "is missing"))?;
    let mut import = slot.import(name, Some(header.reference).filter(|reference| !reference.is_empty()));
    // A caller that leaves looks like one that has sent all (tonic tells no cancelled request from one that ends). What has not come
    // whole is known by its own end then, which archives and compressions have.
    while let Some(part) = parts.next().await? {
        let chunk = match part.part {
            Some(Part::Chunk(chunk)) => chunk,
            Some(Part::Header(_)) => return Err(invalid("header", "must be the first message only")),
            None => return Err(invalid("part", "must be a chunk of an image")),
        };
        if chunk.len() > CODE_CHUNK_BYTES {
            return Err(invalid("chunk", format!("must be at most {CODE_CHUNK_BYTES} bytes")));
        }
        if !import.write(chunk).await? {
            break;
        }
    }
    Ok(import)
}

/// What is to be pulled, and what it is to be called.
fn source(request: v1::PullImageRequest) -> Result<(ImageName, Source), Status> {
    let mut violations = Violations::default();
    let name = parse("name", &request.name, &mut violations);
    if request.reference.is_empty() {
        violations.add("reference", "is missing");
    }
    check_text("reference", &request.reference, MAX_REFERENCE, &mut violations);
    check_text("username", &request.username, MAX_USERNAME, &mut violations);
    check_text("password", &request.password, MAX_PASSWORD, &mut violations);
    if request.username.is_empty() && !request.password.is_empty() {
        violations.add("username", "is missing, where there is a password");
    }
    violations.check()?;
    let name = name.ok_or_else(|| invalid("name", "is missing"))?;
    let credentials = (!request.username.is_empty()).then_some(Credentials {
        username: request.username,
        password: request.password,
    });
    let reference = request.reference;
    Ok((name, Source { reference, credentials }))
}

fn parse(field: &str, name: &str, violations: &mut Violations) -> Option<ImageName> {
    let parsed = name.parse();
    parsed
        .map_err(|error: NameError| violations.add(field, error.to_string()))
        .ok()
}

fn check_text(field: &str, text: &str, most: usize, violations: &mut Violations) {
    if text.len() > most || text.chars().any(char::is_control) {
        violations.add(field, format!("must be at most {most} bytes and no control characters"));
    }
}

fn image_name(name: &str) -> Result<ImageName, Status> {
    name.parse()
        .map_err(|error: NameError| invalid("name", error.to_string()))
}

fn proto(image: Image) -> v1::Image {
    v1::Image {
        name: image.name.to_string(),
        digest: image.id.to_string(),
        size_bytes: image.size,
        config: image.config.map(config),
        create_time: Some(image.since.into()),
        damaged: image.is_damaged,
    }
}

fn config(config: Config) -> v1::ImageConfig {
    let User { uid, gid, groups, home } = config.user;
    v1::ImageConfig {
        entrypoint: config.entrypoint,
        command: config.cmd,
        environment: config.env,
        working_dir: config.working_dir,
        user: Some(v1::ImageUser { uid, gid, groups, home }),
        exposed_ports: config.exposed_ports.into_iter().map(port).collect(),
        stop_signal: config.stop_signal,
    }
}

fn port(Port { number, protocol }: Port) -> String {
    let protocol = match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    format!("{number}/{protocol}")
}

fn progress_proto(Progress { pulled, total }: Progress) -> v1::PullProgress {
    v1::PullProgress {
        pulled_bytes: pulled,
        total_bytes: total,
    }
}

impl From<ImagesError> for Status {
    fn from(error: ImagesError) -> Self {
        let message = told(&error);
        match &error {
            ImagesError::NotFound(name) => not_found("image", &name.to_string()),
            ImagesError::Damaged(name) => about(Code::DataLoss, "image", &name.to_string(), message),
            ImagesError::Busy { .. } => busy("images", message, RETRY),
            ImagesError::AccountBusy { account } => busy(&format!("accounts/{account}"), message, RETRY),
            ImagesError::Names { account, .. } | ImagesError::AccountFull { account, .. } => {
                exhausted(&format!("accounts/{account}"), message)
            }
            ImagesError::HostFull { .. } => exhausted("host", message),
            ImagesError::Registry(_) => precondition("REGISTRY_NOT_ALLOWED", message),
            ImagesError::Image(image) => refused(image),
            ImagesError::TooLong | ImagesError::TooSlow(_) => Self::deadline_exceeded(message),
            ImagesError::Abandoned => Self::cancelled(message),
            ImagesError::Folder(_) | ImagesError::Disk { .. } => internal("use its images", &error),
            ImagesError::Panicked(_) => internal("finish the call", &error),
        }
    }
}

/// What is wrong with an image is told of the field `image`, which stands for all that came or was pulled.
fn refused(error: &ImageError) -> Status {
    let message = told(error);
    match error {
        ImageError::Io { source, .. } => match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => exhausted("disk", message),
            _ => internal("use its images", error),
        },
        ImageError::NamesLost { .. } => internal("use its images", error),
        ImageError::Limit(_) => exhausted("image", message),
        ImageError::Several { .. } | ImageError::NoSuchImage { .. } => invalid("reference", message),
        ImageError::Registry(registry) => refused_by_registry(registry),
        ImageError::NotFound(name) => not_found("image", name),
        ImageError::Damaged(name) => about(Code::DataLoss, "image", name, message),
        ImageError::Name(_) => invalid("name", message),
        ImageError::NotAnImage { .. }
        | ImageError::Missing(_)
        | ImageError::Document { .. }
        | ImageError::Digest { .. }
        | ImageError::Size { .. }
        | ImageError::DigestName(_)
        | ImageError::MediaType { .. }
        | ImageError::Platform { .. }
        | ImageError::Nested(_)
        | ImageError::Compression { .. }
        | ImageError::LayerCount { .. }
        | ImageError::Tar(_)
        | ImageError::Layer { .. }
        | ImageError::Config(_) => invalid("image", message),
    }
}

fn refused_by_registry(error: &RegistryError) -> Status {
    let message = told(error);
    match error {
        RegistryError::Reference(_) => invalid("reference", message),
        RegistryError::Http { .. } => unavailable("REGISTRY_UNREACHABLE", message),
        RegistryError::Status { registry, status, .. } => match status {
            404 => about(Code::NotFound, "registry", registry, message),
            401 | 403 => precondition("REGISTRY_LOGIN", message),
            429 | 500.. => unavailable("REGISTRY_UNAVAILABLE", message),
            _ => precondition("REGISTRY_REFUSED", message),
        },
        RegistryError::Login { .. } => precondition("REGISTRY_LOGIN", message),
        RegistryError::TooLong { .. } => precondition("REGISTRY_REFUSED", message),
    }
}

/// What is told of an error, in which an image or a registry may have put anything: orders to a terminal, and more than anybody
/// reads. What is too long loses its middle, for it is at the end that it says what is wrong.
fn told(error: &impl std::fmt::Display) -> String {
    let text = error.to_string().replace(char::is_control, " ");
    if text.len() <= MAX_MESSAGE {
        return text;
    }
    let half = MAX_MESSAGE / 2;
    let (start, _) = text.split_at(text.floor_char_boundary(half));
    let (_, end) = text.split_at(text.ceil_char_boundary(text.len() - half));
    format!("{start} ... {end}")
}

#[cfg(test)]
mod tests {
    use tonic_types::StatusExt as _;

    use super::*;
    use crate::images::Pace;

    #[test]
    fn what_a_registry_says_is_told_by_what_can_be_done_about_it() {
        let answer = |status| RegistryError::Status {
            registry: "registry.example".to_owned(),
            status,
            message: ": it is so".to_owned(),
        };
        for (status, code, reason) in [
            (404, Code::NotFound, ""),
            (401, Code::FailedPrecondition, "REGISTRY_LOGIN"),
            (403, Code::FailedPrecondition, "REGISTRY_LOGIN"),
            (429, Code::Unavailable, "REGISTRY_UNAVAILABLE"),
            (503, Code::Unavailable, "REGISTRY_UNAVAILABLE"),
            (418, Code::FailedPrecondition, "REGISTRY_REFUSED"),
        ] {
            let found = Status::from(ImagesError::Image(answer(status).into()));
            let details = found.get_error_details();
            let said = details.error_info().map_or("", |info| &*info.reason);
            assert_eq!((found.code(), said), (code, reason), "{status}");
            assert!(found.message().contains("registry.example"), "{found:?}");
        }
    }

    #[test]
    fn what_an_image_says_neither_breaks_a_connection_nor_commands_a_terminal() {
        for long in ["x", "\u{e4}", "\u{1b}[2J", "%", "\u{10ffff}"] {
            let found = vec![long.repeat(100_000)];
            for error in [
                ImageError::Platform { found: found.clone() },
                ImageError::Several { names: found.clone() },
                ImageError::Missing(found.concat()),
                RegistryError::Reference(found.concat()).into(),
            ] {
                let status = Status::from(ImagesError::Image(error));
                assert!(!status.message().contains(char::is_control));
                let mut headers = Default::default();
                status.add_header(&mut headers).unwrap();
                // As HTTP/2 counts them (RFC 9113, 6.5.2).
                let size: usize = headers
                    .iter()
                    .map(|(name, value)| name.as_str().len() + value.len() + 32)
                    .sum();
                assert!(size < 16 << 10, "{size}");
            }
            let status = Status::from(ImagesError::Image(ImageError::Platform { found }));
            assert!(status.message().ends_with("this host runs linux/amd64"), "{status:?}");
        }
        let short = Status::from(ImagesError::Image(ImageError::Missing("layer.tar".to_owned())));
        assert!(short.message().contains(r#"it names "layer.tar" and"#), "{short:?}");
    }

    #[test]
    fn what_the_host_cannot_do_is_not_the_images_fault() {
        let of = |kind: io::ErrorKind| {
            let what = "write in /x".to_owned();
            let error = ImageError::Io {
                what,
                source: kind.into(),
            };
            Status::from(ImagesError::Image(error)).code()
        };
        assert_eq!(of(io::ErrorKind::StorageFull), Code::ResourceExhausted);
        assert_eq!(of(io::ErrorKind::PermissionDenied), Code::Internal);
        let damaged = ImageError::Missing("layer.tar".to_owned());
        let damaged = Status::from(ImagesError::Image(damaged));
        assert_eq!(damaged.code(), Code::InvalidArgument);
        let details = damaged.get_error_details();
        assert_eq!(details.bad_request().unwrap().field_violations[0].field, "image");
    }

    #[test]
    fn what_comes_too_slowly_or_is_damaged_here_is_told_by_its_own_code() {
        let name: ImageName = "accounts/acme/images/web".parse().unwrap();
        for (error, code, says) in [
            (
                ImagesError::TooSlow(Pace::LEAST),
                Code::DeadlineExceeded,
                "64 KiB/s, averaged over 1m,",
            ),
            (ImagesError::TooLong, Code::DeadlineExceeded, "more than 1h to come in"),
            (
                ImagesError::Damaged(name),
                Code::DataLoss,
                "accounts/acme/images/web is damaged",
            ),
        ] {
            let status = Status::from(error);
            assert_eq!(status.code(), code, "{status:?}");
            assert!(status.message().contains(says), "{status:?}");
        }
    }

    #[test]
    fn all_that_is_wrong_with_a_pull_is_told_at_once() {
        let request = v1::PullImageRequest {
            name: "web".into(),
            reference: String::new(),
            username: String::new(),
            password: "secret\n".into(),
        };
        let status = source(request).map(|_| ()).unwrap_err();
        let details = status.get_error_details();
        let violations = &details.bad_request().unwrap().field_violations;
        let fields: Vec<_> = violations.iter().map(|violation| &*violation.field).collect();
        assert_eq!(fields, ["name", "reference", "password", "username"]);
        assert!(!format!("{status:?}").contains("secret"));
    }
}
