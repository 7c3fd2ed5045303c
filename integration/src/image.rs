//! Images made on the spot from the machine's static busybox.

use std::io::Write;
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use lighter_proto::containerd::types;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Applets that the test image has as links to busybox.
const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "sleep", "true", "false", "id", "ls", "kill", "mount", "ps", "env", "pwd",
    "hostname", "stty", "tty", "dd", "head", "wc", "seq", "grep", "test", "touch", "mkdir", "rm",
    "stat", "readlink", "nc", "wget", "yes", "printf", "date", "ip", "mkfifo", "tail", "sync",
];

/// Bytes with their media type and digest.
#[derive(Debug, Clone)]
pub struct Blob {
    /// Media type.
    pub media_type: String,
    /// `sha256:…`
    pub digest: String,
    /// The bytes.
    pub data: Vec<u8>,
}

impl Blob {
    /// A blob of `data`.
    #[must_use]
    pub fn new(media_type: &str, data: Vec<u8>) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: digest(&data),
            data,
        }
    }

    /// Its OCI descriptor.
    #[must_use]
    pub fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest, "size": self.data.len() })
    }

    /// Its descriptor as requests have it.
    ///
    /// # Errors
    /// For more bytes than a descriptor can say.
    pub fn to_wire(&self) -> crate::Result<types::Descriptor> {
        Ok(types::Descriptor {
            media_type: self.media_type.clone(),
            digest: self.digest.clone(),
            size: i64::try_from(self.data.len())?,
            ..Default::default()
        })
    }
}

/// A mount that shows the directory at `path`.
#[must_use]
pub fn bind(path: &Path) -> types::Mount {
    types::Mount {
        r#type: "bind".into(),
        source: path.display().to_string(),
        options: vec!["rbind".into(), "rw".into()],
        ..Default::default()
    }
}

/// `sha256:` of `data`.
#[must_use]
pub fn digest(data: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(data)))
}

/// A layer: the blob as stored and the digest of the tar inside.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Compressed blob.
    pub blob: Blob,
    /// `sha256:…` of the tar.
    pub diff_id: String,
}

impl Layer {
    /// A gzip layer of a tar.
    ///
    /// # Errors
    /// Never in practice: compression into memory.
    pub fn gzip(tar: &[u8]) -> crate::Result<Self> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(tar)?;
        let data = encoder.finish()?;
        Ok(Self {
            blob: Blob::new("application/vnd.oci.image.layer.v1.tar+gzip", data),
            diff_id: digest(tar),
        })
    }

    /// A zstd layer of a tar.
    ///
    /// # Errors
    /// Never in practice: compression into memory.
    pub fn zstd(tar: &[u8]) -> crate::Result<Self> {
        Ok(Self {
            blob: Blob::new(
                "application/vnd.oci.image.layer.v1.tar+zstd",
                zstd::encode_all(tar, 1)?,
            ),
            diff_id: digest(tar),
        })
    }

    /// The layer every test image starts from: busybox and what a shell expects around it.
    ///
    /// # Errors
    /// When the machine has no static busybox (package busybox-static).
    pub fn busybox() -> crate::Result<Self> {
        use anyhow::Context as _;
        let busybox = std::fs::read("/bin/busybox")
            .or_else(|_| std::fs::read("/usr/bin/busybox"))
            .context("no busybox: install busybox-static")?;
        let mut tar = tar::Builder::new(Vec::new());
        for dir in [
            "bin/", "etc/", "proc/", "dev/", "sys/", "root/", "run/", "var/",
        ] {
            append(&mut tar, dir, tar::EntryType::Directory, 0o755, &[], None)?;
        }
        append(
            &mut tar,
            "tmp/",
            tar::EntryType::Directory,
            0o1777,
            &[],
            None,
        )?;
        append(
            &mut tar,
            "bin/busybox",
            tar::EntryType::Regular,
            0o755,
            &busybox,
            None,
        )?;
        for applet in APPLETS {
            let path = format!("bin/{applet}");
            append(
                &mut tar,
                &path,
                tar::EntryType::Symlink,
                0o777,
                &[],
                Some("busybox"),
            )?;
        }
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nsailor:x:1000:1000::/home/sailor:/bin/sh\n";
        append(
            &mut tar,
            "etc/passwd",
            tar::EntryType::Regular,
            0o644,
            passwd,
            None,
        )?;
        let group = b"root:x:0:\nsailor:x:1000:\ndock:x:2000:sailor\n";
        append(
            &mut tar,
            "etc/group",
            tar::EntryType::Regular,
            0o644,
            group,
            None,
        )?;
        Self::gzip(&tar.into_inner()?)
    }

    /// A layer of files, path and content each.
    ///
    /// # Errors
    /// For a path that tar cannot carry.
    pub fn files(files: &[(&str, &[u8])]) -> crate::Result<Self> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, data) in files {
            append(&mut tar, path, tar::EntryType::Regular, 0o644, data, None)?;
        }
        Self::gzip(&tar.into_inner()?)
    }
}

/// Appends one entry with fixed owner and time; the path is taken as it is, however hostile.
///
/// # Errors
/// When a name does not fit its field.
pub fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    path: &str,
    kind: tar::EntryType,
    mode: u32,
    data: &[u8],
    link: Option<&str>,
) -> crate::Result {
    let mut header = tar::Header::new_ustar();
    let name = path.as_bytes();
    anyhow::ensure!(name.len() <= 100, "{path}: too long for this builder");
    header.as_mut_bytes()[..name.len()].copy_from_slice(name);
    if let Some(link) = link {
        header.set_link_name_literal(link)?;
    }
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1_700_000_000);
    header.set_size(data.len() as u64);
    header.set_cksum();
    tar.append(&header, data)?;
    Ok(())
}

/// An image: config, layers, manifest.
#[derive(Debug, Clone)]
pub struct Image {
    /// Reference it is stored under.
    pub name: String,
    /// Config blob.
    pub config: Blob,
    /// Layers, base first.
    pub layers: Vec<Layer>,
    /// Manifest blob.
    pub manifest: Blob,
}

impl Image {
    /// An image of busybox under `name`.
    ///
    /// # Errors
    /// When the machine has no static busybox.
    pub fn busybox(name: &str) -> crate::Result<Self> {
        Self::new(name, vec![Layer::busybox()?])
    }

    /// An image of `layers` for this machine's platform.
    ///
    /// # Errors
    /// Never in practice: JSON of our own.
    pub fn new(name: &str, layers: Vec<Layer>) -> crate::Result<Self> {
        let diff_ids: Vec<_> = layers.iter().map(|l| l.diff_id.clone()).collect();
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],
                "Cmd": ["sh"],
                "WorkingDir": "/"
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": [{ "created_by": "the harness" }]
        });
        Self::with_config(name, &config, layers)
    }

    /// An image with a config of its own.
    ///
    /// # Errors
    /// Never in practice: JSON of our own.
    pub fn with_config(name: &str, config: &Value, layers: Vec<Layer>) -> crate::Result<Self> {
        let config = Blob::new(
            "application/vnd.oci.image.config.v1+json",
            serde_json::to_vec(config)?,
        );
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config.descriptor(),
            "layers": layers.iter().map(|l| l.blob.descriptor()).collect::<Vec<_>>(),
        });
        let manifest = Blob::new(
            "application/vnd.oci.image.manifest.v1+json",
            serde_json::to_vec(&manifest)?,
        );
        Ok(Self {
            name: name.to_owned(),
            config,
            layers,
            manifest,
        })
    }

    /// Chain id of the first `count` layers: the name of their snapshot.
    #[must_use]
    pub fn chain_id(&self, count: usize) -> String {
        let mut layers = self.layers[..count].iter();
        let mut chain = layers.next().map(|l| l.diff_id.clone()).unwrap_or_default();
        for layer in layers {
            chain = digest(format!("{chain} {}", layer.diff_id).as_bytes());
        }
        chain
    }

    /// The image as an OCI layout in a tar, named by annotation.
    ///
    /// # Errors
    /// Never in practice: a tar in memory.
    pub fn oci_archive(&self) -> crate::Result<Vec<u8>> {
        let mut descriptor = self.manifest.descriptor();
        descriptor["annotations"] = json!({
            "io.containerd.image.name": self.name,
            "org.opencontainers.image.ref.name": self.name,
        });
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [descriptor],
        });
        let mut tar = tar::Builder::new(Vec::new());
        let regular = tar::EntryType::Regular;
        let layout = br#"{"imageLayoutVersion":"1.0.0"}"#;
        append(&mut tar, "oci-layout", regular, 0o444, layout, None)?;
        append(
            &mut tar,
            "index.json",
            regular,
            0o644,
            &serde_json::to_vec(&index)?,
            None,
        )?;
        let blobs = [&self.config, &self.manifest].into_iter();
        for blob in blobs.chain(self.layers.iter().map(|l| &l.blob)) {
            let path = format!("blobs/{}", blob.digest.replace(':', "/"));
            append(&mut tar, &path, regular, 0o444, &blob.data, None)?;
        }
        Ok(tar.into_inner()?)
    }
}
