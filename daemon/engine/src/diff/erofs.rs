//! Layers that are EROFS images as they are: put in the place of the image that the erofs snapshotter
//! would make at commit.
//!
//! The layer's descriptor and its diff ID name the image itself, uncompressed. Only an active
//! snapshot of that snapshotter has a place for one; a file beside its directory says so.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};

use lighter_snapshotter::Mount;
use sha2::{Digest as _, Sha256};

use super::apply::{Applied, ApplyOptions};
use super::compression::decompress;
use super::pipeline::digest_text;
use super::unpack::LeansOn;
use super::{EROFS_LAYER, Error};

/// The file that marks an active snapshot of the erofs snapshotter.
const MARK: &str = ".erofslayer";
/// The image beside it.
const IMAGE: &str = "layer.erofs";
/// Where the superblock begins, and what it begins with.
///
/// Spec: Linux, Documentation/filesystems/erofs.rst, "On-disk details".
const MAGIC_AT: usize = 1024;
const MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();
/// Bytes copied at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Whether a media type is that of an image, and then whether more is packed around it.
pub(super) fn packing(media_type: &str) -> Option<Result<Packing, Error>> {
    let rest = media_type.strip_prefix(EROFS_LAYER)?;
    match rest {
        "" => Some(Ok(Packing::None)),
        "+zstd" => Some(Ok(Packing::Zstd)),
        // A longer name, which is another type.
        _ if !rest.starts_with('+') => None,
        _ => Some(Err(Error::Unsupported {
            media_type: media_type.to_owned(),
        })),
    }
}

/// What is packed around an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packing {
    None,
    Zstd,
}

/// Copies the image in `reader` to where the snapshot of `mounts` wants it; `check` is asked about
/// its size as it grows. Blocks.
pub(super) fn apply<R: Read + Send>(
    reader: R,
    packing: Packing,
    mounts: &[Mount],
    options: &ApplyOptions<'_>,
    check: impl Fn(u64) -> Result<(), Error>,
) -> Result<Applied, Error> {
    let dir = place(mounts)?;
    let temp = Temp(dir.join(".layer.erofs.new"));
    let plain: Box<dyn Read + Send> = match packing {
        Packing::None => Box::new(reader),
        Packing::Zstd => decompress(reader).map_err(Error::Stream)?,
    };
    let (hash, size_bytes) = copy(plain, &temp.0, options.sync_fs, check)?;
    let image = dir.join(IMAGE);
    fs::rename(&temp.0, &image).map_err(failed("keep", &image))?;
    if options.sync_fs {
        let synced = File::open(&dir).and_then(|dir| dir.sync_all());
        synced.map_err(failed("sync", &dir))?;
    }
    Ok(Applied {
        diff_id: digest_text(hash),
        size_bytes,
        leans_on: LeansOn::default(),
    })
}

/// A file that is gone when it is not wanted any more.
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        // Not there any more once it has its name.
        let _gone = fs::remove_file(&self.0);
    }
}

fn failed<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// The directory of the snapshot that `mounts` are of.
fn place(mounts: &[Mount]) -> Result<PathBuf, Error> {
    let option = |mount: &Mount, key: &str| {
        let found = mount.options.iter().find_map(|o| o.strip_prefix(key));
        found.map(PathBuf::from)
    };
    let last = mounts.last();
    let written = last.and_then(|mount| match mount.kind() {
        "bind" => Some(PathBuf::from(&mount.source)),
        "overlay" => option(mount, "upperdir="),
        _ => None,
    });
    // With a writable layer of bounded size, that is an image of its own: the first mount.
    let written = match written {
        Some(path) if path.is_absolute() => Some(path),
        _ => mounts.first().map(|mount| PathBuf::from(&mount.source)),
    };
    let dir = written.as_deref().and_then(Path::parent);
    match dir {
        Some(dir) if dir.is_absolute() && dir.join(MARK).is_file() => Ok(dir.to_owned()),
        _ => Err(Error::Unsupported {
            media_type: format!("{EROFS_LAYER} (only snapshotter erofs takes such a layer)"),
        }),
    }
}

fn copy(
    mut from: Box<dyn Read + Send + '_>,
    to: &Path,
    sync: bool,
    check: impl Fn(u64) -> Result<(), Error>,
) -> Result<(Sha256, u64), Error> {
    let mut file = File::create(to).map_err(failed("create", to))?;
    let (mut hash, mut size_bytes) = (Sha256::new(), 0_u64);
    let mut piece = Vec::with_capacity(PIECE_BYTES);
    loop {
        piece.clear();
        let most = u64::try_from(PIECE_BYTES).expect("a piece is small");
        from.by_ref()
            .take(most)
            .read_to_end(&mut piece)
            .map_err(Error::Stream)?;
        if size_bytes == 0 && piece.get(MAGIC_AT..MAGIC_AT + 4) != Some(&MAGIC[..]) {
            return Err(Error::Stream(io::Error::new(
                io::ErrorKind::InvalidData,
                "no EROFS image: it has no superblock",
            )));
        }
        if piece.is_empty() {
            break;
        }
        size_bytes += piece.len() as u64;
        check(size_bytes)?;
        hash.update(&piece);
        file.write_all(&piece).map_err(failed("write", to))?;
    }
    if sync {
        file.sync_all().map_err(failed("sync", to))?;
    }
    Ok((hash, size_bytes))
}

#[cfg(test)]
mod tests {
    use lighter_proto::errdefs::{Classify, ErrorKind};

    use super::super::apply;
    use super::*;

    fn image() -> Vec<u8> {
        let mut image = vec![7; 3 << 20];
        image[MAGIC_AT..MAGIC_AT + 4].copy_from_slice(&MAGIC);
        image
    }

    fn snapshot() -> (tempfile::TempDir, Mount) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("fs")).unwrap();
        fs::write(dir.path().join(MARK), "").unwrap();
        let mount = Mount {
            fstype: "bind".to_owned(),
            source: dir.path().join("fs").display().to_string(),
            options: vec!["rw".to_owned(), "rbind".to_owned()],
            ..Mount::default()
        };
        (dir, mount)
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_image_is_put_in_its_place_and_named_by_its_own_bytes() {
        let image = image();
        let packed = zstd::encode_all(&image[..], 1).unwrap();
        let hash = digest_text(Sha256::new_with_prefix(&image));
        for (suffix, bytes) in [("", &image), ("+zstd", &packed)] {
            let (dir, mount) = snapshot();
            let options = ApplyOptions {
                sync_fs: true,
                ..ApplyOptions::default()
            };
            let media_type = format!("{EROFS_LAYER}{suffix}");
            let applied = apply(&bytes[..], &media_type, &[mount], &options).unwrap();
            assert_eq!(applied.diff_id, hash);
            assert_eq!(applied.size_bytes, image.len() as u64);
            assert_eq!(fs::read(dir.path().join(IMAGE)).unwrap(), image);
            assert_eq!(names(dir.path()), [MARK, "fs", IMAGE]);
        }
    }

    #[test]
    fn the_place_is_found_in_every_form_of_mounts() {
        let (dir, bind) = snapshot();
        let inside = |name: &str| dir.path().join(name).display().to_string();
        let overlay = Mount {
            fstype: "format/mkdir/overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![format!("upperdir={}", inside("fs"))],
            ..Mount::default()
        };
        let writable = Mount {
            fstype: "mkfs/ext4".to_owned(),
            source: inside("rwlayer.img"),
            ..Mount::default()
        };
        let inner = Mount {
            fstype: "format/mkdir/bind".to_owned(),
            source: "{{ mount 0 }}/upper".to_owned(),
            ..Mount::default()
        };
        for mounts in [vec![bind], vec![overlay], vec![writable, inner]] {
            assert_eq!(place(&mounts).unwrap(), dir.path(), "{mounts:?}");
        }
        fs::remove_file(dir.path().join(MARK)).unwrap();
        let (_other, bind) = snapshot();
        for mounts in [
            vec![],
            vec![Mount {
                source: "relative/x".to_owned(),
                ..bind
            }],
        ] {
            assert_eq!(place(&mounts).unwrap_err().kind(), ErrorKind::Unimplemented);
        }
    }

    #[test]
    fn what_is_no_image_leaves_nothing() {
        let zeros = vec![0; 8192];
        let cut = &zstd::encode_all(&image()[..], 1).unwrap()[..100];
        for (suffix, bytes, kind) in [
            ("", &b""[..], ErrorKind::InvalidArgument),
            ("", &zeros[..], ErrorKind::InvalidArgument),
            ("", &zeros[..100], ErrorKind::InvalidArgument),
            ("+zstd", cut, ErrorKind::InvalidArgument),
            ("+gzip", &zeros[..], ErrorKind::Unimplemented),
        ] {
            let (dir, mount) = snapshot();
            let media_type = format!("{EROFS_LAYER}{suffix}");
            let error = apply(bytes, &media_type, &[mount], &ApplyOptions::default()).unwrap_err();
            assert_eq!(error.kind(), kind, "{suffix} {error:?}");
            assert_eq!(names(dir.path()), [MARK, "fs"]);
        }
        let (_dir, mount) = snapshot();
        let mut options = ApplyOptions::default();
        options.limits.max_size_bytes = Some(1000);
        let error = apply(&image()[..], EROFS_LAYER, &[mount], &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
    }
}
