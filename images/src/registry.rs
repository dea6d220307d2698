//! Pulls images from a registry (OCI distribution specification, "Pull"), with the tokens that Docker's registries ask for.
//!
//! A client of its own on `reqwest`, because `oci-client` keeps whatever a registry answers in memory: manifests, tokens and
//! errors of any length. Here all that is kept is bounded, and blobs go to files.

use std::{fs::File, net::IpAddr, path::Path, time::Duration};

use http_auth::{ChallengeRef, parse_challenges};
use oci_spec::{
    distribution::Reference,
    image::{ImageManifest, MediaType},
};
use reqwest::{
    Client, Response, StatusCode, Url,
    header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE},
    redirect::Policy,
};
use serde::Deserialize;
use tokio::io::AsyncWriteExt as _;

use crate::{
    digest::Digest,
    error::ImageError,
    limits::{Exceeded, Limits},
    manifest::{self, Kind, MAX_NESTED, Plan, blob, blob_name, check_media, choose, parse},
    source::Pulled,
    spool::{Blob, check},
};

/// How long a registry may take to be reached, and from one part of an answer to the next.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);
const READ_TIMEOUT: Duration = Duration::from_secs(60);
/// The longest answer with a token, and what is read of an error, in bytes.
const MAX_TOKEN: u64 = 64 << 10;
const MAX_ERROR: u64 = 4 << 10;
const MAX_REDIRECTS: usize = 5;

/// Who pulls.
#[derive(Clone)]
pub struct Credentials {
    /// The user's name.
    pub username: String,
    /// A password or an access token.
    pub password: String,
}

/// How far a pull is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Progress {
    /// Bytes of layers that were pulled, as the registry has them.
    pub pulled: u64,
    /// Bytes of all layers that are to be pulled; 0 as long as that is not known.
    pub total: u64,
}

/// Why an image could not be pulled.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No reference to an image.
    #[error("{0:?} does not name an image: REGISTRY/REPOSITORY:TAG or REGISTRY/REPOSITORY@DIGEST")]
    Reference(String),
    /// It could not be reached, or what it says is not HTTP.
    #[error("can't ask the registry {registry}: {}", causes(source))]
    Http {
        /// Its host and port.
        registry: String,
        /// What went wrong.
        source: reqwest::Error,
    },
    /// It does not have the image, or does not give it to us.
    #[error("the registry {registry} answers {status}{message}")]
    Status {
        /// Its host and port.
        registry: String,
        /// The status of HTTP.
        status: u16,
        /// What else it says, after a colon.
        message: String,
    },
    /// It wants to know who pulls, in a way that is not supported, or by something that is not to be trusted.
    #[error("the registry {registry} asks for a login that is not supported: {why}")]
    Login {
        /// Its host and port.
        registry: String,
        /// What is wrong with it.
        why: String,
    },
    /// It answers more than anybody needs.
    #[error("the registry {registry} answers with more than {limit} bytes")]
    TooLong {
        /// Its host and port.
        registry: String,
        /// How much is read.
        limit: u64,
    },
}

/// One pull.
struct Pull<'a> {
    http: Client,
    /// Scheme, host and port.
    base: Url,
    registry: String,
    repository: &'a str,
    credentials: Option<&'a Credentials>,
    /// What the registry wants to be told, once it has asked.
    authorization: Option<HeaderValue>,
}

/// What a server of tokens answers: one or the other name, or both.
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// The registry that a reference to an image names, as `docker.io` or `127.0.0.1:5000`.
///
/// # Errors
///
/// [`RegistryError::Reference`]
pub fn registry_of(reference: &str) -> Result<String, RegistryError> {
    Ok(parse_reference(reference)?.registry().to_owned())
}

fn parse_reference(reference: &str) -> Result<Reference, RegistryError> {
    let parsed = reference.parse();
    parsed.map_err(|_| RegistryError::Reference(reference.to_owned()))
}

/// Pulls an image into files in `folder` that have no name. Of one that `has` says is there no layer is pulled. `progress` hears
/// of every part that comes.
pub(crate) async fn pull(
    reference: &str,
    credentials: Option<&Credentials>,
    limits: &Limits,
    folder: &Path,
    has: impl FnOnce(Digest) -> bool,
    progress: impl Fn(Progress),
) -> Result<(Plan, Pulled), ImageError> {
    let wrong = || RegistryError::Reference(reference.to_owned());
    let parsed = parse_reference(reference)?;
    let mut pull = Pull::new(&parsed, credentials)?;
    let mut named: String = parsed.digest().or(parsed.tag()).ok_or_else(wrong)?.to_owned();
    let mut expected: Option<Digest> = parsed.digest().map(str::parse).transpose()?;
    for _ in 0..=MAX_NESTED {
        let (bytes, media_type) = pull.manifest(&named, expected, limits).await?;
        match manifest::kind_of(&media_type) {
            Some(Kind::Index) => {
                let Blob { digest, .. } = blob(&choose(&parse("the index", &bytes)?)?)?;
                named = digest.to_string();
                expected = Some(digest);
            }
            Some(Kind::Manifest) => {
                let manifest: ImageManifest = parse("the manifest", &bytes)?;
                return pull.image(&manifest, limits, folder, has, progress).await;
            }
            None => {
                return Err(ImageError::MediaType {
                    what: "the manifest".to_owned(),
                    media_type: media_type.to_string(),
                });
            }
        }
    }
    Err(ImageError::Nested(MAX_NESTED))
}

// === impl Pull ===

impl<'a> Pull<'a> {
    fn new(reference: &'a Reference, credentials: Option<&'a Credentials>) -> Result<Self, RegistryError> {
        let registry = reference.resolve_registry().to_owned();
        let wrong = || RegistryError::Reference(reference.whole());
        // As Docker has it: only this machine itself is believed without a certificate.
        let with_tls = Url::parse(&format!("https://{registry}/")).map_err(|_| wrong())?;
        let host = with_tls.host_str().unwrap_or_default();
        let scheme = if is_here(host) { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{registry}/")).map_err(|_| wrong())?;
        // The first to be set stays for the process; it fails where there is one already.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Client::builder()
            .user_agent(concat!("stoker/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .redirect(Policy::custom(|attempt| {
                let was_secret = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
                if attempt.previous().len() > MAX_REDIRECTS {
                    attempt.error("it leads on and on")
                } else if was_secret && attempt.url().scheme() != "https" {
                    attempt.error("it leads away from TLS")
                } else {
                    attempt.follow()
                }
            }))
            .build()
            .map_err(|source| RegistryError::Http {
                registry: registry.clone(),
                source,
            })?;
        Ok(Self {
            http,
            base,
            registry,
            repository: reference.repository(),
            credentials,
            authorization: None,
        })
    }

    /// Reads a manifest or index, and what it says that it is.
    async fn manifest(
        &mut self,
        named: &str,
        expected: Option<Digest>,
        limits: &Limits,
    ) -> Result<(Vec<u8>, MediaType), ImageError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Typed {
            media_type: Option<String>,
        }
        let response = self.get(&format!("manifests/{named}"), &manifest::accepted()).await?;
        let header = response
            .headers()
            .get(CONTENT_TYPE)
            .and_then(|value| value.to_str().ok());
        let header = header
            .and_then(|value| value.split(';').next())
            .map(|value| value.trim().to_owned());
        let bytes = self
            .body(response, limits.document)
            .await?
            .ok_or(Exceeded::Document(limits.document))?;
        if let Some(digest) = expected {
            check("the manifest", digest, Digest::of(&bytes))?;
        }
        let typed: Typed = parse("the manifest", &bytes)?;
        // What is covered by the digest counts first.
        let media_type = typed.media_type.or(header).unwrap_or_default();
        Ok((bytes, MediaType::from(&*media_type)))
    }

    async fn image(
        &mut self,
        manifest: &ImageManifest,
        limits: &Limits,
        folder: &Path,
        has: impl FnOnce(Digest) -> bool,
        progress: impl Fn(Progress),
    ) -> Result<(Plan, Pulled), ImageError> {
        check_media(manifest)?;
        let said = blob(manifest.config())?;
        if said.size > limits.document {
            return Err(Exceeded::Document(limits.document).into());
        }
        let response = self.get(&format!("blobs/{}", said.digest), "*/*").await?;
        let config = self.body(response, said.size).await?.unwrap_or_default();
        check("the configuration", said.digest, Digest::of(&config))?;
        let plan = Plan::of_manifest(manifest, config, limits)?;
        let mut files = Pulled::default();
        if has(plan.id()) {
            return Ok((plan, files));
        }
        let mut blobs: Vec<Blob> = Vec::new();
        for blob in plan.layers.iter().filter_map(|layer| layer.blob) {
            if blobs.iter().all(|other| other.digest != blob.digest) {
                blobs.push(blob);
            }
        }
        // Compressed they are less than unpacked, or hardly more.
        let total = blobs.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
        if total > limits.unpacked {
            return Err(Exceeded::Unpacked(limits.unpacked).into());
        }
        let mut pulled = 0;
        progress(Progress { pulled, total });
        for blob in blobs {
            let name = blob_name(blob.digest);
            let more = |count| {
                pulled += count;
                progress(Progress { pulled, total });
            };
            let (file, size) = self.layer(blob, &name, folder, more).await?;
            files.insert(name, file, size);
        }
        Ok((plan, files))
    }

    /// Reads a layer into a file; what is in it is checked when it is unpacked. `more` hears how many bytes come.
    async fn layer(
        &mut self,
        blob: Blob,
        name: &str,
        folder: &Path,
        mut more: impl FnMut(u64),
    ) -> Result<(File, u64), ImageError> {
        let writing = || ImageError::io(format!("write in {}", folder.display()));
        let mut response = self.get(&format!("blobs/{}", blob.digest), "*/*").await?;
        let mut file = tokio::fs::File::from_std(tempfile::tempfile_in(folder).map_err(writing())?);
        let mut size = 0;
        while let Some(part) = response.chunk().await.map_err(|source| self.failed(source))? {
            size += part.len() as u64;
            if size > blob.size {
                return Err(ImageError::Size {
                    what: name.to_owned(),
                    expected: blob.size,
                    found: size,
                });
            }
            file.write_all(&part).await.map_err(writing())?;
            more(part.len() as u64);
        }
        file.flush().await.map_err(writing())?;
        Ok((file.into_std().await, size))
    }

    /// Asks for something of the repository; logs in if the registry wants that.
    async fn get(&mut self, path: &str, accept: &str) -> Result<Response, RegistryError> {
        let url = self.base.join(&format!("v2/{}/{path}", self.repository));
        let url = url.map_err(|_| RegistryError::Reference(self.repository.to_owned()))?;
        let response = self.send(url.clone(), accept).await?;
        // Whom a redirect led to may not say where the password is to be sent: only the registry itself is told who pulls.
        let is_its_own = response.url().origin() == self.base.origin();
        let response = if response.status() == StatusCode::UNAUTHORIZED && is_its_own {
            self.log_in(&response).await?;
            self.send(url, accept).await?
        } else {
            response
        };
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.refused(response).await)
        }
    }

    async fn send(&self, url: Url, accept: &str) -> Result<Response, RegistryError> {
        let mut request = self.http.get(url).header(ACCEPT, accept);
        if let Some(authorization) = &self.authorization {
            request = request.header(AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|source| self.failed(source))
    }

    /// Gets what the registry wants to be told.
    async fn log_in(&mut self, response: &Response) -> Result<(), RegistryError> {
        let asked: Vec<String> = response
            .headers()
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .filter_map(|value| value.to_str().ok().map(str::to_owned))
            .collect();
        let challenges: Vec<ChallengeRef<'_>> = asked
            .iter()
            .filter_map(|value| parse_challenges(value).ok())
            .flatten()
            .collect();
        let find = |scheme: &str| {
            challenges
                .iter()
                .find(|challenge| challenge.scheme.eq_ignore_ascii_case(scheme))
        };
        let value = match (find("bearer"), find("basic"), self.credentials) {
            (Some(bearer), ..) => format!("Bearer {}", self.token(bearer).await?),
            (None, Some(_), Some(Credentials { username, password })) => {
                http_auth::basic::encode_credentials(username, password)
            }
            (None, Some(_), None) => return Err(self.login("a user and a password are needed")),
            (None, None, _) => return Err(self.login("neither a token nor a user and a password")),
        };
        let mut value = HeaderValue::from_str(&value).map_err(|_| self.login("its token can't be sent"))?;
        value.set_sensitive(true);
        self.authorization = Some(value);
        Ok(())
    }

    /// Asks the server that a registry names for a token.
    async fn token(&self, challenge: &ChallengeRef<'_>) -> Result<String, RegistryError> {
        let find = |name: &str| {
            let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
            found.map(|(_, value)| value.to_unescaped())
        };
        let realm = find("realm").and_then(|realm| Url::parse(&realm).ok());
        let realm = realm.ok_or_else(|| self.login("it does not say where tokens are given out"))?;
        // Nor does a registry of this machine have a password sent over the network as it is.
        let may_be_plain = self.base.scheme() == "http" && realm.host_str().is_some_and(is_here);
        if realm.scheme() != "https" && !may_be_plain {
            return Err(self.login("it gives out tokens without TLS"));
        }
        let mut query = vec![("scope", format!("repository:{}:pull", self.repository))];
        query.extend(find("service").map(|service| ("service", service)));
        let mut request = self.http.get(realm).query(&query);
        if let Some(Credentials { username, password }) = self.credentials {
            request = request.basic_auth(username, Some(password));
        }
        let response = request.send().await.map_err(|source| self.failed(source))?;
        if !response.status().is_success() {
            return Err(self.refused(response).await);
        }
        let too_long = || RegistryError::TooLong {
            registry: self.registry.clone(),
            limit: MAX_TOKEN,
        };
        let bytes = self.body(response, MAX_TOKEN).await?.ok_or_else(too_long)?;
        let token: Option<Token> = serde_json::from_slice(&bytes).ok();
        let token = token.and_then(|token| token.token.or(token.access_token));
        token.ok_or_else(|| self.login("its answer has no token"))
    }

    /// All of an answer; none where it is longer than `limit` bytes.
    async fn body(&self, mut response: Response, limit: u64) -> Result<Option<Vec<u8>>, RegistryError> {
        let mut bytes = Vec::new();
        while let Some(part) = response.chunk().await.map_err(|source| self.failed(source))? {
            if (bytes.len() + part.len()) as u64 > limit {
                return Ok(None);
            }
            bytes.extend_from_slice(&part);
        }
        Ok(Some(bytes))
    }

    async fn refused(&self, response: Response) -> RegistryError {
        let status = response.status().as_u16();
        let body = self.body(response, MAX_ERROR).await.ok().flatten().unwrap_or_default();
        RegistryError::Status {
            registry: self.registry.clone(),
            status,
            message: message(&body).map(|message| format!(": {message}")).unwrap_or_default(),
        }
    }

    fn failed(&self, source: reqwest::Error) -> RegistryError {
        RegistryError::Http {
            registry: self.registry.clone(),
            source,
        }
    }

    fn login(&self, why: &str) -> RegistryError {
        RegistryError::Login {
            registry: self.registry.clone(),
            why: why.to_owned(),
        }
    }
}

/// Whether a host, as URLs have it, is this machine itself.
fn is_here(host: &str) -> bool {
    let address: Option<IpAddr> = host.trim_matches(['[', ']']).parse().ok();
    host == "localhost" || address.is_some_and(|address| address.is_loopback())
}

/// What an error of a registry says for people, on one line.
fn message(body: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        code: Option<String>,
        message: Option<String>,
    }
    let errors: Errors = serde_json::from_slice(body).ok()?;
    let first = errors.errors.into_iter().next()?;
    let text = first.message.filter(|text| !text.is_empty()).or(first.code)?;
    Some(text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect())
}

/// An error with what it comes from, as HTTP's say little themselves.
fn causes(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        text += &format!(": {cause}");
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_its_registry() {
        for (reference, registry) in [
            ("nginx", "docker.io"),
            ("acme/web:1", "docker.io"),
            ("docker.io/library/nginx:1.27", "docker.io"),
            ("registry.example/acme/web:1", "registry.example"),
            ("127.0.0.1:5000/web", "127.0.0.1:5000"),
            ("localhost/web", "localhost"),
        ] {
            assert_eq!(registry_of(reference).unwrap(), registry, "{reference}");
        }
        for wrong in ["", "Acme/Web", "x y", "https://registry.example/web"] {
            assert!(
                matches!(registry_of(wrong), Err(RegistryError::Reference(_))),
                "{wrong}"
            );
        }
    }
}
