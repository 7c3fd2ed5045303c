//! Blobs and manifests from a registry into a sink: resumed, ranged, and never slower than a
//! minimum rate.
//!
//! Hosts are tried in order; a connection that breaks is opened again where the sink stands. Large
//! blobs come in ranges over several connections, written in order, so that what is in memory stays
//! bounded and a later attempt can go on from the sink's end. A server that ignores ranges gets one
//! stream.

use std::ops::Range;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::StreamExt;
use http::header::{ACCEPT, CONTENT_RANGE, RANGE};
use http::{HeaderValue, Method, StatusCode};
use lighter_floor::Digest;
use reqwest::{Response, Url};
use tracing::debug;

use super::encoding::Decoder;
use super::error::{SinkError, TransportCause};
use super::request::{self, Call, Place};
use super::session::{Endpoint, Limits, Session};
use super::{Error, MANIFEST_TYPES, Target};

/// Bytes by which a broken connection must have got further to count as progress.
const PROGRESS_BYTES: u64 = 64 << 10;

/// Where fetched bytes go: appended in order.
#[async_trait]
pub trait Sink: Send {
    /// Bytes so far.
    fn offset(&self) -> u64;
    /// Digest of the bytes so far.
    ///
    /// # Errors
    /// When the sink no longer knows.
    async fn digest(&mut self) -> Result<Digest, SinkError>;
    /// Appends.
    ///
    /// # Errors
    /// When the bytes cannot be kept.
    async fn write(&mut self, data: Bytes) -> Result<(), SinkError>;
    /// Throws everything away.
    ///
    /// # Errors
    /// When that fails.
    async fn reset(&mut self) -> Result<(), SinkError>;
}

/// Into memory: for what is small and is looked at right away.
#[async_trait]
impl Sink for Vec<u8> {
    fn offset(&self) -> u64 {
        self.len() as u64
    }
    async fn digest(&mut self) -> Result<Digest, SinkError> {
        Ok(Digest::of(self.as_slice()))
    }
    async fn write(&mut self, data: Bytes) -> Result<(), SinkError> {
        self.extend_from_slice(&data);
        Ok(())
    }
    async fn reset(&mut self) -> Result<(), SinkError> {
        self.clear();
        Ok(())
    }
}

/// Called with the sink's offset after every write.
pub type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

/// One place to fetch from.
struct Source<'a> {
    endpoint: &'a Endpoint,
    url: Url,
    place: Place,
    trusted: bool,
}

impl Session {
    /// Fetches `target` into `sink`, from the sink's offset on, and checks size and digest.
    ///
    /// # Errors
    /// `NotFound` when no host has it, `InvalidArgument` for a size of zero,
    /// `FailedPrecondition` when every host sends other bytes; else the last host's error.
    ///
    /// # Cancellation
    /// Safe: the sink holds what was written.
    pub async fn fetch(
        &self,
        target: &Target,
        sink: &mut dyn Sink,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        if target.size_bytes == 0 {
            return Err(Error::Invalid {
                reason: format!("{} reports content size of zero", target.digest),
            });
        }
        if sink.offset() > target.size_bytes {
            sink.reset().await?;
        }
        let resumed = sink.offset() > 0;
        if sink.offset() == target.size_bytes {
            if verify(target, sink).await.is_ok() {
                return Ok(());
            }
            sink.reset().await?;
        }
        let first = self.fetch_from_all(target, sink, progress).await;
        match first {
            // What was there before may be what is wrong.
            Err(Error::Digest { .. }) if resumed => {
                self.fetch_from_all(target, sink, progress).await
            }
            other => other,
        }
    }

    async fn fetch_from_all(
        &self,
        target: &Target,
        sink: &mut dyn Sink,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let mut worst: Option<Error> = None;
        for source in self.sources(target)? {
            let outcome = match self.fetch_from(&source, target, sink, progress).await {
                Ok(()) => verify(target, sink).await,
                Err(error) => Err(error),
            };
            let error = match outcome {
                Ok(()) => return Ok(()),
                Err(error @ Error::Sink(_)) => return Err(error),
                Err(error) => error,
            };
            debug!(digest = %target.digest, host = %source.endpoint.host.authority, %error, "not fetched");
            if matches!(error, Error::Digest { .. } | Error::Size { .. }) {
                sink.reset().await?;
            }
            if worst
                .as_ref()
                .is_none_or(|worst| error.progress() >= worst.progress())
            {
                worst = Some(error);
            }
        }
        Err(match worst {
            Some(Error::NotFound { .. }) | None => Error::NotFound {
                what: format!(
                    "could not fetch content descriptor {} ({}) from remote",
                    target.digest, target.media_type
                ),
            },
            Some(error) => error,
        })
    }

    fn sources(&self, target: &Target) -> Result<Vec<Source<'_>>, Error> {
        let endpoints = self.capable("pull", |c| c.pull)?;
        let mut sources = Vec::new();
        let foreign = target.urls.iter().filter_map(|url| Url::parse(url).ok());
        for url in foreign
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .take(8)
        {
            sources.push(Source {
                endpoint: endpoints[0].0,
                url,
                place: Place::BeforeOthers,
                trusted: false,
            });
        }
        let kind = if MANIFEST_TYPES.contains(&target.media_type.as_str()) {
            "manifests"
        } else {
            "blobs"
        };
        let tail = format!("{kind}/{}", target.digest);
        for (endpoint, place) in endpoints {
            sources.push(Source {
                endpoint,
                url: endpoint.url(self.reference.repository(), &tail)?,
                place,
                trusted: true,
            });
        }
        Ok(sources)
    }

    async fn fetch_from(
        &self,
        source: &Source<'_>,
        target: &Target,
        sink: &mut dyn Sink,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let limits = self.limits();
        let mut stalls = 0;
        loop {
            let start = sink.offset();
            let opened = self.open(source, target, start).await?;
            let outcome = match opened {
                Opened::Ranged(first) => {
                    self.pump_ranges(source, target, first, sink, progress)
                        .await
                }
                Opened::Stream { response, skip } => {
                    pump(limits, response, skip, target, sink, progress).await
                }
            };
            let error = match outcome {
                Ok(()) => return Ok(()),
                Err(error @ Error::Transport { .. }) => error,
                Err(error) => return Err(error),
            };
            if sink.offset() >= start + PROGRESS_BYTES {
                stalls = 0;
            } else {
                stalls += 1;
            }
            if stalls >= limits.attempts_without_progress {
                return Err(error);
            }
            debug!(digest = %target.digest, offset = sink.offset(), %error, "connection reopened");
        }
    }

    fn call(source: &Source<'_>, target: &Target, range: Option<&str>) -> Result<Call, Error> {
        let accept = match target.media_type.as_str() {
            "" => "*/*".to_owned(),
            media_type => format!("{media_type}, */*"),
        };
        let header = |text: &str| {
            HeaderValue::from_str(text).map_err(|_| Error::Invalid {
                reason: format!("media type {:?}", target.media_type),
            })
        };
        let mut call = Call::new(Method::GET, source.url.clone()).header(ACCEPT, header(&accept)?);
        call.trusted = source.trusted;
        Ok(match range {
            Some(range) => call.header(RANGE, header(range)?),
            None => call,
        })
    }

    async fn open(
        &self,
        source: &Source<'_>,
        target: &Target,
        offset: u64,
    ) -> Result<Opened, Error> {
        let limits = self.limits();
        let left = target.size_bytes - offset;
        let ranged = limits.chunk_bytes > 0
            && limits.chunks_per_blob > 1
            && left >= limits.ranged_above_bytes.max(limits.chunk_bytes as u64);
        let range = if ranged {
            Some(format!(
                "bytes={offset}-{}",
                offset + limits.chunk_bytes as u64 - 1
            ))
        } else {
            (offset > 0).then(|| format!("bytes={offset}-"))
        };
        let call = Self::call(source, target, range.as_deref())?;
        let mut response = self.send(source.endpoint, &call, source.place).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE && range.is_some() {
            let call = Self::call(source, target, None)?;
            response = self.send(source.endpoint, &call, source.place).await?;
        }
        self.check(&response)?;
        let partial = response.status() == StatusCode::PARTIAL_CONTENT;
        if !response.status().is_success() {
            return Err(request::status_error(&Method::GET, response).await);
        }
        let starts_at = content_range_start(&response);
        if !partial && (offset == 0 || starts_at != Some(offset)) {
            return Ok(Opened::Stream {
                response,
                skip: offset,
            });
        }
        if starts_at.is_some_and(|start| start != offset) {
            return Err(Error::Protocol {
                reason: format!(
                    "range from {offset} asked of {}, got another",
                    target.digest
                ),
            });
        }
        Ok(if ranged && partial {
            Opened::Ranged(response)
        } else {
            Opened::Stream { response, skip: 0 }
        })
    }

    /// The first chunk is under way in `first`; the others are asked for beside it.
    async fn pump_ranges(
        &self,
        source: &Source<'_>,
        target: &Target,
        first: Response,
        sink: &mut dyn Sink,
        progress: Progress<'_>,
    ) -> Result<(), Error> {
        let limits = *self.limits();
        let chunk = limits.chunk_bytes as u64;
        let mut ranges = Vec::new();
        let mut at = sink.offset();
        while at < target.size_bytes {
            let end = (at + chunk).min(target.size_bytes);
            ranges.push(at..end);
            at = end;
        }
        let mut first = Some(first);
        let jobs = ranges.into_iter().map(|range| {
            let response = first.take();
            self.chunk(source, target, range, response)
        });
        let mut chunks = futures::stream::iter(jobs).buffered(limits.chunks_per_blob);
        while let Some(chunk) = chunks.next().await {
            let (bytes, permit) = chunk?;
            sink.write(bytes).await?;
            drop(permit);
            progress(sink.offset());
        }
        Ok(())
    }

    async fn chunk(
        &self,
        source: &Source<'_>,
        target: &Target,
        range: Range<u64>,
        mut opened: Option<Response>,
    ) -> Result<(Bytes, tokio::sync::OwnedSemaphorePermit), Error> {
        let semaphore = std::sync::Arc::clone(&self.registry.chunks);
        let permit = semaphore.acquire_owned().await.expect("never closed");
        let header = format!("bytes={}-{}", range.start, range.end - 1);
        let mut attempt = 0;
        loop {
            attempt += 1;
            let response = match opened.take() {
                Some(response) => response,
                None => {
                    let call = Self::call(source, target, Some(&header))?;
                    self.send(source.endpoint, &call, source.place).await?
                }
            };
            self.check(&response)?;
            if response.status() != StatusCode::PARTIAL_CONTENT {
                return Err(request::status_error(&Method::GET, response).await);
            }
            match read_chunk(self.limits(), response, range.end - range.start).await {
                Ok(bytes) => return Ok((bytes, permit)),
                Err(error) if attempt >= self.limits().attempts_without_progress => {
                    return Err(error);
                }
                Err(error) => debug!(%error, "range asked for again"),
            }
        }
    }
}

enum Opened {
    /// The answer to the first range; more can be asked for.
    Ranged(Response),
    /// Everything from `skip` bytes before the offset on.
    Stream { response: Response, skip: u64 },
}

fn content_range_start(response: &Response) -> Option<u64> {
    let text = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    let range = text.trim().strip_prefix("bytes")?.trim_start();
    range.split('-').next()?.trim().parse().ok()
}

async fn verify(target: &Target, sink: &mut dyn Sink) -> Result<(), Error> {
    if sink.offset() != target.size_bytes {
        return Err(Error::Size {
            got_bytes: sink.offset(),
            want_bytes: target.size_bytes,
        });
    }
    let got = sink.digest().await?;
    if got.algorithm() == target.digest.algorithm() && got != target.digest {
        return Err(Error::Digest {
            got,
            want: target.digest.clone(),
        });
    }
    Ok(())
}

/// Reads pieces of a body and gives up on a peer that is too slow. Only time spent waiting for the
/// peer counts, not what the sink takes.
struct Body {
    response: Response,
    window: Duration,
    min_rate_bytes: u64,
    waited: Duration,
    received: u64,
}

impl Body {
    fn new(limits: &Limits, response: Response) -> Self {
        Self {
            response,
            window: limits.rate_window,
            min_rate_bytes: limits.min_rate_bytes,
            waited: Duration::ZERO,
            received: 0,
        }
    }

    fn error(&self, cause: TransportCause) -> Error {
        request::transport(&Method::GET, self.response.url(), cause)
    }

    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let began = Instant::now();
        let left = self.window.saturating_sub(self.waited);
        let piece = match tokio::time::timeout(left, self.response.chunk()).await {
            Ok(Ok(piece)) => piece,
            Ok(Err(error)) => return Err(self.error(error.into())),
            Err(_) => {
                let enough = self
                    .min_rate_bytes
                    .saturating_mul(self.window.as_secs().max(1));
                if self.received < enough {
                    return Err(self.error(TransportCause::Slow(self.min_rate_bytes)));
                }
                self.waited = Duration::ZERO;
                self.received = 0;
                return Box::pin(self.next()).await;
            }
        };
        self.waited += began.elapsed();
        self.received += piece.as_ref().map_or(0, |piece| piece.len() as u64);
        Ok(piece)
    }
}

async fn pump(
    limits: &Limits,
    response: Response,
    mut skip: u64,
    target: &Target,
    sink: &mut dyn Sink,
    progress: Progress<'_>,
) -> Result<(), Error> {
    let mut decoder = Decoder::of(response.headers()).map_err(|encoding| Error::Protocol {
        reason: format!(
            "{}: unsupported Content-Encoding {encoding:?}",
            target.digest
        ),
    })?;
    let mut body = Body::new(limits, response);
    let encoding = |body: &Body, error| body.error(TransportCause::Encoding(error));
    loop {
        let piece = body.next().await?;
        let (pieces, ended) = match piece {
            Some(piece) => (
                decoder.decode(piece).map_err(|e| encoding(&body, e))?,
                false,
            ),
            None => {
                let decoder = std::mem::replace(&mut decoder, Decoder::Identity);
                (
                    vec![decoder.finish().map_err(|e| encoding(&body, e))?],
                    true,
                )
            }
        };
        for mut bytes in pieces {
            let dropped = usize::try_from(skip).unwrap_or(usize::MAX).min(bytes.len());
            let _ = bytes.split_to(dropped);
            skip -= dropped as u64;
            if bytes.is_empty() {
                continue;
            }
            let got_bytes = sink.offset() + bytes.len() as u64;
            if got_bytes > target.size_bytes {
                return Err(Error::Size {
                    got_bytes,
                    want_bytes: target.size_bytes,
                });
            }
            sink.write(bytes).await?;
            progress(sink.offset());
        }
        if ended {
            break;
        }
    }
    if sink.offset() < target.size_bytes {
        return Err(body.error(TransportCause::Truncated));
    }
    Ok(())
}

async fn read_chunk(limits: &Limits, response: Response, length: u64) -> Result<Bytes, Error> {
    let length = usize::try_from(length).expect("a chunk fits in memory");
    let mut body = Body::new(limits, response);
    let mut bytes = BytesMut::with_capacity(length);
    while let Some(piece) = body.next().await? {
        if bytes.len() + piece.len() > length {
            return Err(Error::Protocol {
                reason: "more bytes than the range asked for".to_owned(),
            });
        }
        bytes.extend_from_slice(&piece);
    }
    if bytes.len() < length {
        return Err(body.error(TransportCause::Truncated));
    }
    Ok(bytes.freeze())
}
