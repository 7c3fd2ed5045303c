//! What the tests of layers share: archives made by hand, and trees described as text.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use lighter_snapshotter::Mount;

/// A tar made by hand; nothing in it is checked.
#[derive(Debug, Default)]
pub(super) struct Tar(Vec<u8>);

impl Tar {
    pub(super) fn raw(
        mut self,
        name: &str,
        flag: u8,
        link: &str,
        data: &[u8],
        change: impl FnOnce(&mut tar::Header),
    ) -> Self {
        let mut header = tar::Header::new_ustar();
        let fields = header.as_old_mut();
        fields.name[..name.len()].copy_from_slice(name.as_bytes());
        fields.linkname[..link.len()].copy_from_slice(link.as_bytes());
        fields.linkflag = [flag];
        header.set_mode(if flag == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(data.len() as u64);
        if matches!(flag, b'3' | b'4') {
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
        }
        change(&mut header);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, name: &str, data: &str) -> Self {
        self.raw(name, b'0', "", data.as_bytes(), |_| {})
    }

    pub(super) fn dir(self, name: &str) -> Self {
        self.raw(name, b'5', "", b"", |_| {})
    }

    pub(super) fn link(self, name: &str, target: &str) -> Self {
        self.raw(name, b'2', target, b"", |_| {})
    }

    pub(super) fn hard(self, name: &str, target: &str) -> Self {
        self.raw(name, b'1', target, b"", |_| {})
    }

    /// An extended header for the next entry.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut data = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let mut length = rest + 1;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} {key}=").as_bytes());
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        self.raw("PaxHeaders.0/x", b'x', "", &data, |_| {})
    }

    pub(super) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }

    pub(super) fn cut(self) -> Vec<u8> {
        self.0
    }
}

/// A writable bind of `path`.
pub(super) fn bind(path: &Path) -> Mount {
    Mount {
        fstype: "bind".to_owned(),
        source: path.to_str().unwrap().to_owned(),
        target: String::new(),
        options: vec!["rw".to_owned(), "rbind".to_owned()],
    }
}

/// A read-only bind of `path`.
pub(super) fn view(path: &Path) -> Mount {
    Mount {
        options: vec!["ro".to_owned(), "rbind".to_owned()],
        ..bind(path)
    }
}

/// An overlay with its directories `upper` and `work` in `dir`, over `lower`, nearest first.
pub(super) fn overlay(dir: &Path, lower: &[&Path]) -> Mount {
    for name in ["upper", "work"] {
        fs::create_dir_all(dir.join(name)).unwrap();
    }
    let lower: Vec<_> = lower.iter().map(|p| p.to_str().unwrap()).collect();
    Mount {
        fstype: "overlay".to_owned(),
        source: "overlay".to_owned(),
        target: String::new(),
        options: vec![
            format!("workdir={}", dir.join("work").display()),
            format!("upperdir={}", dir.join("upper").display()),
            format!("lowerdir={}", lower.join(":")),
            "index=off".to_owned(),
        ],
    }
}

/// Everything below `root` by path, as comparable text; the root itself is left out.
pub(super) fn describe(root: &Path) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut inodes = BTreeMap::new();
    visit(root, root, &mut found, &mut inodes);
    found
}

fn visit(
    root: &Path,
    dir: &Path,
    found: &mut BTreeMap<String, String>,
    inodes: &mut BTreeMap<u64, String>,
) {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let mut text = format!("{:o} {}:{}", meta.mode(), meta.uid(), meta.gid());
        text += &format!(" {}.{:09}", meta.mtime(), meta.mtime_nsec());
        if kind.is_symlink() {
            text += &format!(" -> {}", fs::read_link(&path).unwrap().display());
        } else if kind.is_file() {
            let data = fs::read(&path).unwrap();
            let sum = data
                .iter()
                .fold(7_u64, |sum, b| sum.wrapping_mul(31) ^ u64::from(*b));
            text += &format!(" {} bytes {sum:x}", data.len());
        } else if !kind.is_dir() {
            text += &format!(" device {:x}", meta.rdev());
        }
        if !kind.is_dir() && meta.nlink() > 1 {
            let first = inodes.entry(meta.ino()).or_insert_with(|| name.clone());
            text += &format!(" linked with {first}");
        }
        if !kind.is_symlink() {
            let mut names: Vec<_> = xattr::list(&path).unwrap().collect();
            names.retain(|n| !n.as_bytes().starts_with(b"trusted.overlay."));
            names.sort();
            for attribute in names {
                let value = xattr::get(&path, &attribute).unwrap().unwrap_or_default();
                text += &format!(" {}={}", attribute.to_string_lossy(), hex::encode(value));
            }
        }
        found.insert(name, text);
        if kind.is_dir() {
            visit(root, &path, found, inodes);
        }
    }
}
