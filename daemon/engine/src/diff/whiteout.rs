//! Deletions in layers: `.wh.<name>` and `.wh..wh..opq`, and overlayfs' own marks for them.
//!
//! Source: OCI image-spec, layer.md, "Whiteouts"; kernel documentation, overlayfs.rst, "whiteouts
//! and opaque directories".

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, XattrFlags, chownat, fsetxattr, mknodat,
    openat, statat, unlinkat,
};

use super::Error;
use super::tree::open_root;

/// What a deleted name starts with.
pub(super) const PREFIX: &[u8] = b".wh.";
/// What the marks of older union filesystems start with; all but the opaque one are ignored.
const META_PREFIX: &[u8] = b".wh..wh.";
/// The name that empties a directory.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// What the last name of an entry asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark<'a> {
    /// An entry as any other.
    None,
    /// The name given is deleted.
    Whiteout(&'a [u8]),
    /// The directory hides what is below it.
    Opaque,
    /// Means nothing here.
    Ignored,
}

impl<'a> Mark<'a> {
    /// Reads the last name of `path`.
    pub(super) fn of(path: &'a [u8], name: &'a [u8]) -> Result<Self, Error> {
        if name == OPAQUE {
            return Ok(Self::Opaque);
        }
        if name.starts_with(META_PREFIX) {
            return Ok(Self::Ignored);
        }
        match name.strip_prefix(PREFIX) {
            None => Ok(Self::None),
            Some(b"" | b"." | b"..") => Err(Error::entry(path, "invalid whiteout name")),
            Some(deleted) => Ok(Self::Whiteout(deleted)),
        }
    }
}

/// The name space of overlayfs' attributes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Attributes {
    /// `trusted.overlay.*`
    Trusted,
    /// `user.overlay.*`, with mount option `userxattr`.
    User,
}

impl Attributes {
    fn opaque(self) -> &'static str {
        match self {
            Self::Trusted => "trusted.overlay.opaque",
            Self::User => "user.overlay.opaque",
        }
    }
}

/// Whether an attribute is overlayfs' own; no layer may bring such.
pub(super) fn is_overlay_attribute(name: &[u8]) -> bool {
    name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.")
}

/// Hides what lower layers have below directory `dir`.
pub(super) fn make_opaque(
    dir: BorrowedFd<'_>,
    attributes: Attributes,
) -> Result<(), rustix::io::Errno> {
    fsetxattr(dir, attributes.opaque(), b"y", XattrFlags::empty())
}

/// Hides `name` of lower layers; nothing of that name is in `dir`.
pub(super) fn make_whiteout(
    dir: BorrowedFd<'_>,
    name: &[u8],
    owner: (u32, u32),
) -> Result<(), rustix::io::Errno> {
    mknodat(dir, name, FileType::CharacterDevice, Mode::empty(), 0)?;
    if owner == (0, 0) {
        return Ok(());
    }
    chownat(
        dir,
        name,
        Some(Uid::from_raw(owner.0)),
        Some(Gid::from_raw(owner.1)),
        AtFlags::SYMLINK_NOFOLLOW,
    )
}

/// Whether a directory hides what lower layers have below it.
pub(super) fn is_opaque(dir: BorrowedFd<'_>) -> bool {
    [Attributes::Trusted, Attributes::User]
        .iter()
        .any(|attributes| {
            let mut value = [0; 1];
            rustix::fs::fgetxattr(dir, attributes.opaque(), &mut value) == Ok(1) && value == *b"y"
        })
}

/// Removes the marks of single deletions from an opaque directory, where overlayfs would list them.
pub(super) fn remove_marks(dir: BorrowedFd<'_>) -> Result<(), rustix::io::Errno> {
    let mut marks = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if entry.file_type() == FileType::CharacterDevice {
            marks.push(entry.file_name().to_owned());
        }
    }
    for name in marks {
        if is_whiteout(&statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?) {
            unlinkat(dir, &name, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// Whether the stack of lower directories, nearest first, shows something at `path`.
#[must_use]
pub fn visible(lower: &[String], path: &[u8]) -> bool {
    for layer in lower {
        let Ok(root) = open_root(layer) else {
            continue;
        };
        match look(root, path) {
            Seen::Something => return true,
            Seen::Hidden => return false,
            Seen::Nothing => {}
        }
    }
    false
}

/// What one lower directory says of a path.
enum Seen {
    /// It is there.
    Something,
    /// It is not, and what is further below does not count.
    Hidden,
    /// It says nothing.
    Nothing,
}

fn look(root: OwnedFd, path: &[u8]) -> Seen {
    let mut dir = root;
    let mut opaque = false;
    let mut names = path.split(|b| *b == b'/').peekable();
    while let Some(name) = names.next() {
        let absent = if opaque { Seen::Hidden } else { Seen::Nothing };
        let Ok(stat) = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW) else {
            return absent;
        };
        if is_whiteout(&stat) {
            return Seen::Hidden;
        }
        if names.peek().is_none() {
            return Seen::Something;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&dir, name, flags, Mode::empty()) {
            Ok(next) => dir = next,
            // Not a directory: it hides those of the same name below.
            Err(_) => return Seen::Hidden,
        }
        opaque |= is_opaque(dir.as_fd());
    }
    Seen::Something
}

/// Whether this is overlayfs' mark of a deletion.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_told_from_names() {
        let mark = |name: &'static str| Mark::of(b"d/x", name.as_bytes()).ok();
        assert_eq!(mark("file"), Some(Mark::None));
        assert_eq!(mark(".wh.file"), Some(Mark::Whiteout(b"file")));
        assert_eq!(mark(".wh..hidden"), Some(Mark::Whiteout(b".hidden")));
        assert_eq!(mark(".wh..wh..opq"), Some(Mark::Opaque));
        assert_eq!(mark(".wh..wh.plnk"), Some(Mark::Ignored));
        for escape in [".wh.", ".wh..", ".wh..."] {
            let error = Mark::of(b"d/x", escape.as_bytes()).unwrap_err();
            assert!(
                error.to_string().contains("invalid whiteout name"),
                "{escape}"
            );
        }
    }
}
