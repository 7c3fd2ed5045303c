//! `ctr install`: programs and libraries of an image, put into a directory of this machine.

use std::fs::{self, File};
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use crate::advice;
use crate::cli::Ctx;
use crate::client::Client;
use crate::content;
use crate::image;
use crate::image::archive::{self, Piece};
use crate::image::model::Descriptor;
use crate::image::platform::Platform;
use crate::table;

/// Upstream's directory for what is installed, where shims and hooks are looked for as well.
const DIRECTORY: &str = "/opt/containerd";

/// Install programs of an image: the files of its /bin, and of its /lib where asked for
#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Install libraries as well
    #[arg(long, short)]
    libs: bool,
    /// Replace files that are there already
    #[arg(long, short)]
    replace: bool,
    /// Where to, in place of /opt/containerd
    #[arg(long, value_name = "DIR")]
    path: Option<PathBuf>,
    /// The image, which must have been pulled
    #[arg(value_name = "REF")]
    image: String,
}

impl Install {
    /// Prints each file it installs.
    pub(crate) async fn run(self, ctx: &Ctx) -> anyhow::Result<()> {
        let record = image::get(&ctx.client, &self.image).await?;
        let target = image::target(&record)?;
        let resolved = image::resolve(&ctx.client, &target, &Platform::host()).await?;
        let dir = self.path.clone().unwrap_or_else(|| DIRECTORY.into());
        let mut installed = Vec::new();
        for layer in &resolved.manifest.layers {
            let file = download(&ctx.client, layer).await?;
            self.layer(&dir, file, &mut installed).await?;
        }
        if installed.is_empty() {
            return advice::fail(
                format!("image {} has nothing to install", self.image),
                "programs must be in its /bin; those of /lib come with --libs",
            );
        }
        table::lines(installed.iter().map(|path| path.display().to_string()))
    }

    /// Whether an archive's file is to be installed: directly in one of the two directories.
    fn wants(&self, name: &str) -> bool {
        match name.split_once('/') {
            Some((dir, file)) if !file.contains('/') => dir == "bin" || (self.libs && dir == "lib"),
            _ => false,
        }
    }

    async fn layer(
        &self,
        dir: &Path,
        layer: File,
        installed: &mut Vec<PathBuf>,
    ) -> anyhow::Result<()> {
        let mut pieces = archive::read(layer);
        let mut open: Option<Fresh> = None;
        while let Some(piece) = pieces.recv().await {
            match piece? {
                Piece::Data(bytes) => {
                    if let Some(fresh) = &mut open {
                        fresh.file.write_all(&bytes).context("write")?;
                    }
                }
                Piece::File { name, .. } => {
                    finish(open.take(), installed)?;
                    if self.wants(&name) {
                        open = Some(self.create(dir, &name, installed)?);
                    }
                }
                Piece::Link { name, target } => {
                    finish(open.take(), installed)?;
                    if self.wants(&name) {
                        self.link(dir, &name, &target, installed)?;
                    }
                }
            }
        }
        finish(open.take(), installed)
    }

    /// Another name of a file that is installed as well.
    fn link(
        &self,
        dir: &Path,
        name: &str,
        target: &str,
        installed: &mut Vec<PathBuf>,
    ) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.wants(target),
            "{name} is a link to {target}, which is not installed: have the image hold a file"
        );
        let (temp, path) = self.place(dir, name, installed)?;
        // From one directory to the same or to the other.
        std::os::unix::fs::symlink(Path::new("..").join(target), &temp)
            .with_context(|| format!("make {}", temp.display()))?;
        keep(&Temp(temp), path, installed)
    }

    /// A file beside the one to install, which takes its place when it is whole.
    fn create(&self, dir: &Path, name: &str, installed: &[PathBuf]) -> anyhow::Result<Fresh> {
        let (temp, target) = self.place(dir, name, installed)?;
        let file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o755)
            .open(&temp)
            .with_context(|| format!("make {}", temp.display()))?;
        let temp = Temp(temp);
        Ok(Fresh { file, temp, target })
    }

    /// A name to work under, and the one to install; their directory is there.
    fn place(
        &self,
        dir: &Path,
        name: &str,
        installed: &[PathBuf],
    ) -> anyhow::Result<(PathBuf, PathBuf)> {
        let target = dir.join(name);
        // A later layer's file replaces an earlier one's in any case.
        if !self.replace && !installed.contains(&target) && target.symlink_metadata().is_ok() {
            return advice::fail(
                format!("cannot replace {name} in {}", dir.display()),
                "--replace does",
            );
        }
        let parent = target.parent().unwrap_or(dir);
        fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        let temp = target.with_file_name(format!(".{:08x}.installing", rand::random::<u32>()));
        Ok((temp, target))
    }
}

/// A file under a name to work under; dropped, it is gone.
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        // Not there any more once it has its own name.
        let _gone = fs::remove_file(&self.0);
    }
}

/// A file that is being installed.
struct Fresh {
    file: File,
    temp: Temp,
    target: PathBuf,
}

fn finish(fresh: Option<Fresh>, installed: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let Some(fresh) = fresh else { return Ok(()) };
    let synced = fresh.file.sync_all();
    synced.with_context(|| format!("write {}", fresh.temp.0.display()))?;
    keep(&fresh.temp, fresh.target, installed)
}

/// Gives a file its own name.
fn keep(temp: &Temp, target: PathBuf, installed: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    fs::rename(&temp.0, &target).with_context(|| format!("install {}", target.display()))?;
    if !installed.contains(&target) {
        installed.push(target);
    }
    Ok(())
}

/// A layer's bytes in a file without a name.
async fn download(client: &Client, layer: &Descriptor) -> anyhow::Result<File> {
    let mut file = tempfile::tempfile().context("make a temporary file")?;
    let mut stream = content::stream(client, &layer.digest).await?;
    while let Some(message) = stream.message().await? {
        file.write_all(&message.data).context("write")?;
    }
    file.seek(SeekFrom::Start(0)).context("rewind")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_directly_in_the_two_directories_are_wanted() {
        let mut install = Install {
            libs: false,
            replace: false,
            path: None,
            image: String::new(),
        };
        assert!(install.wants("bin/a"));
        for other in ["lib/a", "bin/a/b", "usr/bin/a", "bin", "sbin/a"] {
            assert!(!install.wants(other), "{other}");
        }
        install.libs = true;
        assert!(install.wants("lib/a"));
    }

    #[tokio::test]
    async fn files_are_installed_whole_and_replaced_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let mut tar = tar::Builder::new(tempfile::tempfile().unwrap());
        for (name, text) in [
            ("bin/tool", "new"),
            ("etc/tool", "no"),
            ("lib/tool.so", "no"),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, name, text.as_bytes()).unwrap();
        }
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, "bin/other", "tool").unwrap();
        let file = tar.into_inner().unwrap();
        let mut install = Install {
            libs: false,
            replace: false,
            path: None,
            image: String::new(),
        };
        let again = || {
            let mut file = file.try_clone().unwrap();
            file.rewind().unwrap();
            file
        };
        let mut installed = Vec::new();
        install
            .layer(dir.path(), again(), &mut installed)
            .await
            .unwrap();
        let bin = |name: &str| dir.path().join("bin").join(name);
        assert_eq!(installed, [bin("tool"), bin("other")]);
        assert_eq!(fs::read_to_string(bin("other")).unwrap(), "new");
        assert_eq!(fs::read_to_string(&installed[0]).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let refused = install.layer(dir.path(), again(), &mut Vec::new()).await;
        assert!(refused.unwrap_err().to_string().contains("cannot replace"));
        fs::write(&installed[0], "old").unwrap();
        install.replace = true;
        install
            .layer(dir.path(), again(), &mut Vec::new())
            .await
            .unwrap();
        assert_eq!(fs::read_to_string(&installed[0]).unwrap(), "new");
        assert_eq!(fs::read_dir(dir.path().join("bin")).unwrap().count(), 2);
    }
}
