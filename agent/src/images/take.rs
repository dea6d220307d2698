//! Images on their way in.

use std::io::{self, Read};

use bytes::{Buf as _, Bytes};
use stoker_images::{Credentials, Progress};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Duration, Instant};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::pace::Rate;
use super::room::Turn;
use super::{Image, Images, ImagesError, TAKE_LIMIT};
use crate::names::ImageName;

/// How many pieces of an image wait to be written while another is.
const QUEUE: usize = 1;

/// How often it is told how far a pull is.
const TELL: Duration = Duration::from_millis(200);

/// A place among the images that may be taken in at a time, until nothing of the one that has it is left.
pub struct Slot {
    images: Images,
    _permit: OwnedSemaphorePermit,
}

/// An image that comes in piece by piece, and is written, checked and kept on a thread of its own. Dropped before it is
/// finished, nothing is left of it.
pub struct Import {
    pieces: mpsc::Sender<Piece>,
    rate: Rate,
    /// Since when the next piece is waited for.
    pub(super) waits: Instant,
    taking: JoinHandle<Result<Image, ImagesError>>,
}

enum Piece {
    Chunk(Bytes),
    /// That was all of it.
    End,
}

/// Reads what comes in. What ends without having been finished fails.
struct Incoming {
    pieces: mpsc::Receiver<Piece>,
    chunk: Bytes,
    is_whole: bool,
}

/// Where an image is pulled from.
pub struct Source {
    /// Its name at a registry.
    pub reference: String,
    /// Who pulls it.
    pub credentials: Option<Credentials>,
}

/// An image that is pulled, checked and kept on a thread of its own. Dropped before its layers are there, nothing is left of
/// it.
pub struct Pull {
    progress: watch::Receiver<Progress>,
    /// When it may be told again how far it is.
    next: Instant,
    taking: JoinHandle<Result<Image, ImagesError>>,
    _cancel: DropGuard,
}

/// What there is to say of a pull.
#[derive(Debug)]
pub enum Pulling {
    /// It goes on.
    Progress(Progress),
    /// It has ended.
    Done(Box<Result<Image, ImagesError>>),
}

// === impl Slot ===

impl Slot {
    pub(super) fn new(images: Images, permit: OwnedSemaphorePermit) -> Self {
        Self {
            images,
            _permit: permit,
        }
    }

    /// Begins to take an image in that is to have this name; of several images in an archive the one that `reference` names.
    pub fn import(self, name: ImageName, reference: Option<String>) -> Import {
        let (pieces, received) = mpsc::channel(QUEUE);
        let rate = Rate::new(self.images.0.rules.pace);
        let take = move || {
            let Self { images, _permit } = self;
            let turn = Turn::begin(&images.0, &name)?;
            let from = Incoming {
                pieces: received,
                chunk: Bytes::new(),
                is_whole: false,
            };
            let taken = turn.store().import_stream(name.image(), from, reference.as_deref());
            kept(name, taken.map_err(|error| turn.refused(error))?)
        };
        Import {
            pieces,
            rate,
            waits: Instant::now(),
            taking: tokio::task::spawn_blocking(take),
        }
    }

    /// Begins to pull an image that is to have this name.
    pub fn pull(self, name: ImageName, source: Source) -> Pull {
        let (tell, progress) = watch::channel(Progress::default());
        let cancel = CancellationToken::new();
        let cancelled = cancel.clone();
        let told = progress.clone();
        let take = move || {
            let Self { images, _permit } = self;
            images.0.rules.check_registry(&source.reference)?;
            let turn = Turn::begin(&images.0, &name)?;
            let fetching = turn
                .store()
                .fetch(&source.reference, source.credentials.as_ref(), |progress| {
                    tell.send_replace(progress);
                });
            // On this thread, which may block: to let go of what was fetched takes its time too.
            let fetched = Handle::current().block_on(async {
                tokio::select! {
                    fetched = fetching => fetched.map_err(|error| turn.refused(error)),
                    () = cancelled.cancelled() => Err(ImagesError::Abandoned),
                    error = images.0.rules.pace.is_missed(&told) => Err(error),
                    () = tokio::time::sleep(TAKE_LIMIT) => Err(ImagesError::TooLong),
                }
            })?;
            let taken = turn.store().keep(name.image(), fetched);
            kept(name, taken.map_err(|error| turn.refused(error))?)
        };
        Pull {
            progress,
            next: Instant::now(),
            taking: tokio::task::spawn_blocking(take),
            _cancel: cancel.drop_guard(),
        }
    }
}

fn kept(name: ImageName, image: stoker_images::Image) -> Result<Image, ImagesError> {
    tracing::info!(image = %name, id = %image.id, bytes = image.size, "took in an image");
    Ok(Image::of(name, image))
}

// === impl Import ===

impl Import {
    /// Takes the next bytes; says whether more are wanted. Where not, [`Self::finish`] tells why.
    ///
    /// # Errors
    ///
    /// [`ImagesError::TooSlow`]: then it is to be given up.
    pub async fn write(&mut self, chunk: Bytes) -> Result<bool, ImagesError> {
        // Else who is refused for something else would hear of its pace.
        if self.pieces.is_closed() {
            return Ok(false);
        }
        self.rate.count(self.waits.elapsed(), chunk.len() as u64)?;
        let is_wanted = self.pieces.send(Piece::Chunk(chunk)).await.is_ok();
        self.waits = Instant::now();
        Ok(is_wanted)
    }

    /// The image, once all of it is checked and kept.
    ///
    /// # Errors
    ///
    /// [`ImagesError`]; then nothing of it is kept.
    pub async fn finish(self) -> Result<Image, ImagesError> {
        // Where nobody takes it the thread has ended, and says why.
        let _ = self.pieces.send(Piece::End).await;
        self.taking.await?
    }
}

// === impl Incoming ===

impl Read for Incoming {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() && !self.is_whole {
            match self.pieces.blocking_recv() {
                Some(Piece::Chunk(chunk)) => self.chunk = chunk,
                Some(Piece::End) => self.is_whole = true,
                None => return Err(io::ErrorKind::ConnectionAborted.into()),
            }
        }
        let count = self.chunk.len().min(to.len());
        let (to, _) = to.split_at_mut(count);
        self.chunk.copy_to_slice(to);
        Ok(count)
    }
}

// === impl Pull ===

impl Pull {
    /// What there is to say next; nothing more once it has ended.
    pub async fn next(&mut self) -> Pulling {
        let progress = async {
            tokio::time::sleep_until(self.next).await;
            self.progress
                .changed()
                .await
                .map(|()| *self.progress.borrow_and_update())
        };
        tokio::select! {
            biased;
            done = &mut self.taking => Pulling::Done(Box::new(done.map_err(ImagesError::from).flatten())),
            Ok(progress) = progress => {
                self.next = Instant::now() + TELL;
                Pulling::Progress(progress)
            }
        }
    }
}
