//! Sources and destinations: from the messages clients send to values, once.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use lighter_proto::any;
use lighter_proto::containerd::types::transfer as wire;
use lighter_store::{Labels, Namespace, labels};
use prost::Name;
use prost_types::Any;

use super::container::{PathEnd, TarStream};
use super::credentials::StreamCredentials;
use super::graph::Select;
use super::pull::UnpackRequest;
use super::{Error, Transfer};
use crate::image::{Matcher, Platform};
use crate::registry::{Access, Anonymous, Credentials, SessionOptions};
use crate::streaming::Stream;

/// Images kept beside the named one, extra references and platforms, at most.
const MAX_LIST: usize = 1000;

/// A repository of a registry.
#[derive(Debug)]
pub struct RegistryEnd {
    /// Transport-level reference.
    pub reference: String,
    /// Credentials, headers, hosts.
    pub session: SessionOptions,
}

/// Another name an image is kept under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Extra {
    /// A name, or the prefix of one.
    pub name: String,
    /// Whether it is a prefix.
    pub is_prefix: bool,
    /// Whether names outside the prefix are kept as they are.
    pub allow_overwrite: bool,
    /// Whether `prefix@digest` is made.
    pub add_digest: bool,
    /// Not where the image has a name.
    pub skip_named_digest: bool,
}

/// The image store.
#[derive(Debug, Clone)]
pub struct StoreEnd {
    /// Name of the image; empty where the names come from elsewhere.
    pub name: String,
    /// Labels of the record.
    pub labels: Labels,
    /// Platforms wanted, in order; none: all.
    pub platforms: Vec<Platform>,
    /// Which manifests are taken.
    pub select: Select,
    /// Further names.
    pub extras: Vec<Extra>,
    /// What to unpack.
    pub unpacks: Vec<UnpackRequest>,
}

/// How an archive is read.
#[derive(Debug)]
pub struct ImportOptions {
    /// Where it comes from.
    pub stream: Stream,
    /// Whether plain layers of a Docker archive are compressed.
    pub force_compress: bool,
}

/// How an archive is made.
#[derive(Debug)]
pub struct ExportOptions {
    /// Where it goes.
    pub stream: Stream,
    /// Platforms wanted; none: the host's.
    pub platforms: Vec<Platform>,
    /// All of them, and all must be there.
    pub all_platforms: bool,
    /// No `manifest.json` for `docker load`.
    pub skip_compatibility_manifest: bool,
    /// Layers that may not be passed on are left out.
    pub skip_non_distributable: bool,
}

/// Where something comes from.
#[derive(Debug)]
#[expect(missing_docs, reason = "named by their contents")]
pub enum Source {
    Registry(RegistryEnd),
    Store(StoreEnd),
    Import(ImportOptions),
    Path(PathEnd),
    Stream(TarStream),
    /// A type that is no source; its name.
    Other(String),
}

/// Where something goes.
#[derive(Debug)]
#[expect(missing_docs, reason = "named by their contents")]
pub enum Destination {
    Registry(RegistryEnd),
    Store(StoreEnd),
    Export(ExportOptions),
    Path(PathEnd),
    Stream(TarStream),
    /// A type that is no destination; its name.
    Other(String),
}

impl fmt::Display for RegistryEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OCI Registry ({})", self.reference)
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(end) => end.fmt(f),
            Self::Store(end) => write!(f, "Local Image Store ({})", end.name),
            Self::Import(_) => f.write_str("Import stream"),
            Self::Path(end) => write!(f, "path {:?} in container {:?}", end.path, end.container),
            Self::Stream(_) => f.write_str("Read stream"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(end) => end.fmt(f),
            Self::Store(end) => write!(f, "Local Image Store ({})", end.name),
            Self::Export(_) => f.write_str("Export stream"),
            Self::Path(end) => write!(f, "path {:?} in container {:?}", end.path, end.container),
            Self::Stream(_) => f.write_str("Write stream"),
            Self::Other(name) => f.write_str(name),
        }
    }
}

fn unpack<M: prost::Message + Name + Default>(message: &Any) -> Result<M, Error> {
    any::unpack(message).map_err(|error| Error::invalid(error.to_string()))
}

fn platforms(
    list: Vec<lighter_proto::containerd::types::Platform>,
) -> Result<Vec<Platform>, Error> {
    if list.len() > MAX_LIST {
        return Err(Error::invalid(format!("more than {MAX_LIST} platforms")));
    }
    Ok(list.into_iter().map(Platform::from).collect())
}

fn path_end(message: wire::ContainerPath) -> Result<PathEnd, Error> {
    if message.container_id.is_empty() || message.path.is_empty() {
        return Err(Error::invalid(
            "container path needs a container and a path",
        ));
    }
    if message.path.contains('\0') {
        return Err(Error::invalid("container path with a NUL byte"));
    }
    Ok(PathEnd {
        container: message.container_id,
        path: message.path,
        walk: !message.no_walk,
        keep_owners: message.preserve_ownership,
    })
}

impl Transfer {
    /// Reads a source.
    ///
    /// # Errors
    /// `InvalidArgument`; `NotFound` for a stream nobody opened.
    pub fn source(&self, namespace: &Namespace, message: &Any) -> Result<Source, Error> {
        let is = |name: String| any::is(message, &name);
        Ok(if is(wire::OciRegistry::full_name()) {
            Source::Registry(self.registry_end(namespace, unpack(message)?, Access::Pull)?)
        } else if is(wire::ImageStore::full_name()) {
            Source::Store(self.store_end(unpack(message)?)?)
        } else if is(wire::ImageImportStream::full_name()) {
            let import: wire::ImageImportStream = unpack(message)?;
            Source::Import(ImportOptions {
                stream: self.stream(namespace, &import.stream)?,
                force_compress: import.force_compress,
            })
        } else if is(wire::ContainerPath::full_name()) {
            Source::Path(path_end(unpack(message)?)?)
        } else if is(wire::ReadStream::full_name()) {
            let read: wire::ReadStream = unpack(message)?;
            Source::Stream(TarStream {
                stream: self.stream(namespace, &read.stream)?,
                media_type: read.media_type,
            })
        } else {
            Source::Other(type_name(message))
        })
    }

    /// Reads a destination.
    ///
    /// # Errors
    /// `InvalidArgument`; `NotFound` for a stream nobody opened.
    pub fn destination(&self, namespace: &Namespace, message: &Any) -> Result<Destination, Error> {
        let is = |name: String| any::is(message, &name);
        Ok(if is(wire::OciRegistry::full_name()) {
            Destination::Registry(self.registry_end(namespace, unpack(message)?, Access::Push)?)
        } else if is(wire::ImageStore::full_name()) {
            Destination::Store(self.store_end(unpack(message)?)?)
        } else if is(wire::ImageExportStream::full_name()) {
            let export: wire::ImageExportStream = unpack(message)?;
            Destination::Export(ExportOptions {
                platforms: platforms(export.platforms)?,
                all_platforms: export.all_platforms,
                skip_compatibility_manifest: export.skip_compatibility_manifest,
                skip_non_distributable: export.skip_non_distributable,
                stream: self.stream(namespace, &export.stream)?,
            })
        } else if is(wire::ContainerPath::full_name()) {
            Destination::Path(path_end(unpack(message)?)?)
        } else if is(wire::WriteStream::full_name()) {
            let write: wire::WriteStream = unpack(message)?;
            Destination::Stream(TarStream {
                stream: self.stream(namespace, &write.stream)?,
                media_type: write.media_type,
            })
        } else {
            Destination::Other(type_name(message))
        })
    }

    fn registry_end(
        &self,
        namespace: &Namespace,
        message: wire::OciRegistry,
        access: Access,
    ) -> Result<RegistryEnd, Error> {
        let resolver = message.resolver.unwrap_or_default();
        let credentials: Arc<dyn Credentials> = if resolver.auth_stream.is_empty() {
            Arc::new(Anonymous)
        } else {
            let stream = self.stream(namespace, &resolver.auth_stream)?;
            Arc::new(StreamCredentials::new(stream))
        };
        Ok(RegistryEnd {
            reference: message.reference,
            session: SessionOptions {
                access,
                credentials,
                headers: resolver.headers.into_iter().collect(),
                host_dir: PathBuf::from(resolver.host_dir),
                default_scheme: resolver.default_scheme,
            },
        })
    }

    fn store_end(&self, message: wire::ImageStore) -> Result<StoreEnd, Error> {
        let platforms = platforms(message.platforms)?;
        if message.extra_references.len() > MAX_LIST || message.unpacks.len() > MAX_LIST {
            return Err(Error::invalid(format!(
                "more than {MAX_LIST} entries in a list"
            )));
        }
        let labels: Labels = message.labels.into_iter().collect();
        labels::check(&labels)?;
        let extras = message.extra_references.into_iter().map(|extra| Extra {
            name: extra.name,
            is_prefix: extra.is_prefix,
            allow_overwrite: extra.allow_overwrite,
            add_digest: extra.add_digest,
            skip_named_digest: extra.skip_named_digest,
        });
        let unpacks = message
            .unpacks
            .into_iter()
            .filter_map(|unpack| self.supported(unpack))
            .collect();
        Ok(StoreEnd {
            name: message.name,
            labels,
            select: Select {
                matcher: Matcher::ordered(platforms.clone()),
                limit: usize::try_from(message.manifest_limit).unwrap_or(usize::MAX),
                all_metadata: message.all_metadata,
            },
            platforms,
            extras: extras.collect(),
            unpacks,
        })
    }

    /// The configured combination a client's wish fits; a wish that fits none is left out, as
    /// upstream does, and said in the log.
    fn supported(&self, wish: wire::UnpackConfiguration) -> Option<UnpackRequest> {
        let platform = wish.platform.map_or_else(Platform::host, Platform::from);
        let offered = self.inner.config.unpack.iter().find(|offer| {
            let fits = wish.snapshotter.is_empty() || offer.snapshotter == wish.snapshotter;
            fits && Matcher::only(&offer.platform).matches(&platform)
        });
        let offered = offered.filter(|offer| self.inner.unpacker.knows(&offer.snapshotter));
        if offered.is_none() {
            tracing::warn!(%platform, snapshotter = %wish.snapshotter, "unpacking not supported for this combination, skipped");
        }
        offered.map(|offer| UnpackRequest {
            matcher: Matcher::only(&platform),
            snapshotter: offer.snapshotter.clone(),
        })
    }
}

fn type_name(message: &Any) -> String {
    let name = message.type_url.rsplit('/').next().unwrap_or_default();
    name.chars().take(128).collect()
}
