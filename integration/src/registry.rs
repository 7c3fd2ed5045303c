//! A real registry on loopback: Debian's docker-registry with storage of its own.

use std::fs::{self, File};
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::Context as _;

use crate::{Blob, Image, Result, eventually};

/// A running registry.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    dir: PathBuf,
    port: u16,
}

impl Registry {
    /// Starts one without authentication.
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn start() -> Result<Self> {
        Self::start_with("").await
    }

    /// Starts one with `extra` YAML in its configuration (`auth: …`).
    ///
    /// # Errors
    /// When it does not answer in time.
    pub async fn start_with(extra: &str) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("lighter-registry-")
            .tempdir()?
            .keep();
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = format!(
            "version: 0.1\nlog:\n  level: warn\nstorage:\n  filesystem:\n    rootdirectory: \
             {}\n  delete:\n    enabled: true\nhttp:\n  addr: 127.0.0.1:{port}\n{extra}\n",
            dir.join("data").display()
        );
        fs::write(dir.join("config.yml"), config)?;
        let log = File::create(dir.join("log"))?;
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.join("config.yml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start docker-registry")?;
        let registry = Self { child, dir, port };
        eventually("the registry answers", async || {
            Ok(std::net::TcpStream::connect(("127.0.0.1", port))
                .ok()
                .map(drop))
        })
        .await?;
        Ok(registry)
    }

    /// `host:port`.
    #[must_use]
    pub fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// Its directory, for tests that damage what it serves.
    #[must_use]
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// File that holds a blob.
    #[must_use]
    pub fn blob_path(&self, blob: &Blob) -> PathBuf {
        let hex = blob.digest.trim_start_matches("sha256:");
        self.dir
            .join("data/docker/registry/v2/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// Puts `image` there as `repository:tag`, with Debian's skopeo. Returns its reference.
    ///
    /// # Errors
    /// When the push fails.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<String> {
        self.push_as(image, repository, tag, None)
    }

    /// [`Registry::push`] with `user:password`.
    ///
    /// # Errors
    /// When the push fails.
    pub fn push_as(
        &self,
        image: &Image,
        repository: &str,
        tag: &str,
        creds: Option<&str>,
    ) -> Result<String> {
        let archive = self.dir.join("push.tar");
        fs::write(&archive, image.oci_archive()?)?;
        let reference = format!("{}/{repository}:{tag}", self.host());
        let output = Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--dest-tls-verify=false",
                "--insecure-policy",
            ])
            .arg("--preserve-digests")
            .args(creds.iter().flat_map(|creds| ["--dest-creds", creds]))
            .arg(format!("oci-archive:{}", archive.display()))
            .arg(format!("docker://{reference}"))
            .output()
            .context("start skopeo")?;
        anyhow::ensure!(
            output.status.success(),
            "skopeo: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(reference)
    }

    /// Puts an index over manifests that are there already as `repository:tag`, each with its
    /// platform's architecture. Returns its reference.
    ///
    /// # Errors
    /// When the registry refuses.
    pub fn push_index(
        &self,
        manifests: &[(&Blob, &str)],
        repository: &str,
        tag: &str,
    ) -> Result<String> {
        use std::io::{Read as _, Write as _};
        let kind = "application/vnd.oci.image.index.v1+json";
        let manifests: Vec<_> = manifests
            .iter()
            .map(|(blob, architecture)| {
                let mut descriptor = blob.descriptor();
                descriptor["platform"] =
                    serde_json::json!({ "os": "linux", "architecture": architecture });
                descriptor
            })
            .collect();
        let index = serde_json::json!({
            "schemaVersion": 2, "mediaType": kind, "manifests": manifests,
        })
        .to_string();
        let host = self.host();
        let mut stream = std::net::TcpStream::connect(&host)?;
        let head = format!(
            "PUT /v2/{repository}/manifests/{tag} HTTP/1.0\r\nHost: {host}\r\nContent-Type: \
             {kind}\r\nContent-Length: {}\r\n\r\n",
            index.len()
        );
        stream.write_all(head.as_bytes())?;
        stream.write_all(index.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        anyhow::ensure!(answer.contains(" 201 "), "{answer}");
        Ok(format!("{host}/{repository}:{tag}"))
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}
