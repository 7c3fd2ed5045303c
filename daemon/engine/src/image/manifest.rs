//! Manifests, indexes and configurations: bytes to values, with bounds. Pure.
//!
//! A document that could be read as another kind is refused whatever its label says: two readers
//! of one digest must never see different images.
//!
//! Spec: OCI image-spec v1.1 manifest, index, config; Docker image manifest v2 schema 2.

use std::collections::BTreeMap;

use lighter_store::Digest;
use serde::Deserialize;

use super::descriptor::Wire;
use super::{Descriptor, Error, Platform, media};

/// Largest document read, in bytes: manifests of imported archives may be this long.
pub const MAX_DOCUMENT_BYTES: u64 = 20 << 20;
/// Most descriptors in one document.
pub const MAX_CHILDREN: usize = 10_000;
/// How deep indexes may nest.
pub const MAX_DEPTH: usize = 8;

/// A manifest: one image for one platform, or an artifact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// Its configuration.
    pub config: Descriptor,
    /// Its layers, the base first.
    pub layers: Vec<Descriptor>,
    /// What it says something about.
    pub subject: Option<Descriptor>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// An index: manifests, and other indexes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// In the order given.
    pub manifests: Vec<Descriptor>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

/// Either of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Box<Manifest>),
    /// Several.
    Index(Index),
}

impl Document {
    /// Everything it refers to; of a manifest the configuration first.
    #[must_use]
    pub fn children(&self) -> Vec<Descriptor> {
        match self {
            Self::Manifest(manifest) => {
                let mut all = vec![manifest.config.clone()];
                all.extend(manifest.layers.iter().cloned());
                all
            }
            Self::Index(index) => index.manifests.clone(),
        }
    }
}

/// An image's configuration, as far as pulling and unpacking go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What it runs on.
    pub platform: Platform,
    /// Digests of its layers uncompressed, the base first.
    pub diff_ids: Vec<Digest>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    fs_layers: Option<serde::de::IgnoredAny>,
    #[serde(default)]
    config: Option<Wire>,
    #[serde(default)]
    layers: Option<Vec<Wire>>,
    #[serde(default)]
    manifests: Option<Vec<Wire>>,
    #[serde(default)]
    subject: Option<Wire>,
    #[serde(default)]
    annotations: Option<BTreeMap<String, String>>,
}

/// Reads a document that is labelled `media_type`.
///
/// # Errors
/// [`Error::Malformed`], [`Error::NoImage`] when the type is neither manifest nor index.
pub fn parse(media_type: &str, digest: &Digest, bytes: &[u8]) -> Result<Document, Error> {
    let malformed = |reason: String| Error::Malformed {
        digest: digest.clone(),
        reason,
    };
    let manifest = media::is_manifest(media_type);
    if !manifest && !media::is_index(media_type) {
        return Err(Error::NoImage {
            digest: digest.clone(),
            media_type: media_type.chars().take(128).collect(),
        });
    }
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(malformed(format!("larger than {MAX_DOCUMENT_BYTES} bytes")));
    }
    let raw: Raw = serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    if raw.fs_layers.is_some() {
        return Err(malformed("media-type: schema 1 not supported".to_owned()));
    }
    let stated = raw.media_type.as_deref().unwrap_or_default();
    if manifest {
        let other = !stated.is_empty() && !media::is_manifest(stated);
        if raw.manifests.as_ref().is_some_and(|m| !m.is_empty()) || other {
            return Err(malformed(format!(
                "media-type: expected manifest but found index ({media_type})"
            )));
        }
    } else if raw.config.is_some()
        || raw.layers.as_ref().is_some_and(|l| !l.is_empty())
        || !stated.is_empty() && !media::is_index(stated)
    {
        return Err(malformed(format!(
            "media-type: expected index but found manifest ({media_type})"
        )));
    }
    let list = |wires: Option<Vec<Wire>>| -> Result<Vec<Descriptor>, Error> {
        let wires = wires.unwrap_or_default();
        if wires.len() > MAX_CHILDREN {
            return Err(malformed(format!("more than {MAX_CHILDREN} descriptors")));
        }
        let read = |wire| Descriptor::from_wire(wire).map_err(malformed);
        wires.into_iter().map(read).collect()
    };
    let annotations = raw.annotations.unwrap_or_default();
    if !manifest {
        return Ok(Document::Index(Index {
            manifests: list(raw.manifests)?,
            annotations,
        }));
    }
    let config = raw
        .config
        .ok_or_else(|| malformed("manifest without config".to_owned()))?;
    let mut config = Descriptor::from_wire(config).map_err(malformed)?;
    // Builders of long ago left the type out.
    if media_type == media::DOCKER_MANIFEST && config.media_type == "application/octet-stream" {
        config.media_type = media::DOCKER_CONFIG.to_owned();
    }
    Ok(Document::Manifest(Box::new(Manifest {
        config,
        layers: list(raw.layers)?,
        subject: raw
            .subject
            .map(|wire| Descriptor::from_wire(wire).map_err(malformed))
            .transpose()?,
        annotations,
    })))
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawConfig {
    #[serde(flatten)]
    platform: Platform,
    rootfs: RawRootfs,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRootfs {
    diff_ids: Option<Vec<String>>,
}

/// Reads an image's configuration.
///
/// # Errors
/// [`Error::Malformed`].
pub fn parse_config(digest: &Digest, bytes: &[u8]) -> Result<Config, Error> {
    let malformed = |reason: String| Error::Malformed {
        digest: digest.clone(),
        reason,
    };
    if bytes.len() as u64 > MAX_DOCUMENT_BYTES {
        return Err(malformed(format!("larger than {MAX_DOCUMENT_BYTES} bytes")));
    }
    let raw: RawConfig =
        serde_json::from_slice(bytes).map_err(|error| malformed(error.to_string()))?;
    let ids = raw.rootfs.diff_ids.unwrap_or_default();
    if ids.len() > MAX_CHILDREN {
        return Err(malformed(format!("more than {MAX_CHILDREN} layers")));
    }
    let parse = |id: &String| Digest::parse(id).map_err(|error| malformed(error.to_string()));
    Ok(Config {
        platform: raw.platform.normalized(),
        diff_ids: ids.iter().map(parse).collect::<Result<_, _>>()?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(media_type: &str, text: &str) -> Result<Document, Error> {
        parse(media_type, &Digest::of(text.as_bytes()), text.as_bytes())
    }

    fn descriptor(extra: &str) -> String {
        format!(
            r#"{{"mediaType":"t","digest":"{}","size":1{extra}}}"#,
            Digest::of(b"x")
        )
    }

    #[test]
    fn manifests_and_indexes_are_never_taken_for_each_other() {
        let one = descriptor("");
        let manifest = format!(r#"{{"config":{one},"layers":[{one},{one}]}}"#);
        let index = format!(r#"{{"manifests":[{one}]}}"#);
        let both = format!(r#"{{"config":{one},"layers":[{one}],"manifests":[{one}]}}"#);
        let typed = format!(r#"{{"mediaType":"{}","config":{one}}}"#, media::OCI_INDEX);
        assert!(
            matches!(read(media::OCI_MANIFEST, &manifest), Ok(Document::Manifest(m)) if m.layers.len() == 2)
        );
        assert!(matches!(
            read(media::OCI_INDEX, &index),
            Ok(Document::Index(_))
        ));
        for (media_type, text) in [
            (media::OCI_INDEX, &manifest),
            (media::OCI_MANIFEST, &index),
            (media::OCI_MANIFEST, &both),
            (media::DOCKER_LIST, &both),
            (media::OCI_MANIFEST, &typed),
        ] {
            assert!(read(media_type, text).is_err(), "{media_type} {text}");
        }
        assert!(read(media::OCI_MANIFEST, r#"{"fsLayers":[]}"#).is_err());
        assert!(read("text/plain", &manifest).is_err());
        assert!(read(media::OCI_MANIFEST, "{").is_err());
    }

    #[test]
    fn descriptors_are_checked() {
        for bad in [
            r#"{"mediaType":"t","digest":"sha256:../../etc","size":1}"#.to_owned(),
            descriptor("").replace("\"size\":1", "\"size\":-1"),
        ] {
            let text = format!(r#"{{"manifests":[{bad}]}}"#);
            assert!(read(media::OCI_INDEX, &text).is_err(), "{text}");
        }
        let nulls = r#"{"manifests":null,"annotations":null}"#;
        assert!(
            matches!(read(media::OCI_INDEX, nulls), Ok(Document::Index(i)) if i.manifests.is_empty())
        );
    }

    #[test]
    fn embedded_data_counts_only_when_it_is_the_blob() {
        let with = |data: &str| {
            let text = format!(
                r#"{{"manifests":[{}]}}"#,
                descriptor(&format!(r#","data":"{data}""#))
            );
            match read(media::OCI_INDEX, &text).expect("valid") {
                Document::Index(index) => index.manifests[0].embedded().map(<[u8]>::to_vec),
                Document::Manifest(_) => None,
            }
        };
        assert_eq!(with("eA=="), Some(b"x".to_vec()));
        assert_eq!(with("eQ=="), None);
        assert_eq!(with("???"), None);
    }

    #[test]
    fn a_config_gives_platform_and_diff_ids() {
        let text = format!(
            r#"{{"os":"Linux","architecture":"x86_64","rootfs":{{"type":"layers","diff_ids":["{}"]}}}}"#,
            Digest::of(b"l")
        );
        let config = parse_config(&Digest::of(b""), text.as_bytes()).expect("valid");
        assert_eq!(config.platform.to_string(), "linux/amd64");
        assert_eq!(config.diff_ids.len(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let digest = Digest::of(&bytes);
            let _ = parse(media::OCI_MANIFEST, &digest, &bytes);
            let _ = parse(media::OCI_INDEX, &digest, &bytes);
            let _ = parse_config(&digest, &bytes);
        }

        #[test]
        fn no_mutation_of_a_manifest_panics(at in 0usize..400, byte in any::<u8>()) {
            let one = descriptor(r#","platform":{"os":"linux","architecture":"arm"},"urls":["http://x"]"#);
            let mut text = format!(r#"{{"schemaVersion":2,"config":{one},"layers":[{one}]}}"#).into_bytes();
            let at = at % text.len();
            text[at] = byte;
            let _ = parse(media::OCI_MANIFEST, &Digest::of(&text), &text);
        }
    }
}
