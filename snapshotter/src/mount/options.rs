//! fstab words into flags, propagation and filesystem data.
//!
//! Source: `mount(8)` and `mount_setattr(2)`; the special words are containerd's.

use rustix::mount::{MountFlags, MountPropagationFlags};

use super::{Error, IdMap, Mount};

/// The options of one mount, understood.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Parsed {
    /// Flags of `mount(2)`.
    pub flags: Flags,
    /// Propagation set by a further call, in the order given.
    pub propagation: Vec<MountPropagationFlags>,
    /// Words for the filesystem itself.
    pub data: Vec<String>,
    /// The source is a file that needs a loop device.
    pub via_loop: bool,
    /// The loop device bypasses the page cache of its file.
    pub direct_io: bool,
    /// Owners are shifted by these maps.
    pub idmap: Option<IdMap>,
}

/// Flags of a mount, as `MS_*` bits, and whether it is a bind or a change of an existing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flags {
    /// Bits given to `mount(2)`.
    pub bits: MountFlags,
    /// `bind` or `rbind`.
    pub bind: bool,
    /// `rbind`.
    pub recursive: bool,
    /// `remount`.
    pub remount: bool,
}

impl Default for Flags {
    fn default() -> Self {
        Self {
            bits: MountFlags::empty(),
            bind: false,
            recursive: false,
            remount: false,
        }
    }
}

impl Flags {
    /// Whether nothing may be written.
    #[must_use]
    pub fn read_only(self) -> bool {
        self.bits.contains(MountFlags::RDONLY)
    }
}

/// Word, bit, and whether the word clears the bit.
const FLAG_WORDS: [(&str, MountFlags, bool); 26] = [
    ("async", MountFlags::SYNCHRONOUS, true),
    ("atime", MountFlags::NOATIME, true),
    ("defaults", MountFlags::empty(), false),
    ("dev", MountFlags::NODEV, true),
    ("diratime", MountFlags::NODIRATIME, true),
    ("dirsync", MountFlags::DIRSYNC, false),
    ("exec", MountFlags::NOEXEC, true),
    ("iversion", MountFlags::from_bits_retain(1 << 23), false),
    ("lazytime", MountFlags::LAZYTIME, false),
    ("loud", MountFlags::SILENT, true),
    ("mand", MountFlags::PERMIT_MANDATORY_FILE_LOCKING, false),
    ("noatime", MountFlags::NOATIME, false),
    ("nodev", MountFlags::NODEV, false),
    ("nodiratime", MountFlags::NODIRATIME, false),
    ("noexec", MountFlags::NOEXEC, false),
    ("nolazytime", MountFlags::LAZYTIME, true),
    ("nomand", MountFlags::PERMIT_MANDATORY_FILE_LOCKING, true),
    ("norelatime", MountFlags::RELATIME, true),
    ("nostrictatime", MountFlags::STRICTATIME, true),
    ("nosuid", MountFlags::NOSUID, false),
    ("nosymfollow", MountFlags::from_bits_retain(1 << 8), false),
    ("relatime", MountFlags::RELATIME, false),
    ("silent", MountFlags::SILENT, false),
    ("strictatime", MountFlags::STRICTATIME, false),
    ("suid", MountFlags::NOSUID, true),
    ("sync", MountFlags::SYNCHRONOUS, false),
];

fn propagation(word: &str) -> Option<MountPropagationFlags> {
    let (word, recursive) = match word.strip_prefix('r') {
        Some(rest) if !rest.is_empty() => (rest, MountPropagationFlags::REC),
        _ => (word, MountPropagationFlags::empty()),
    };
    let kind = match word {
        "shared" => MountPropagationFlags::SHARED,
        "slave" => MountPropagationFlags::DOWNSTREAM,
        "private" => MountPropagationFlags::PRIVATE,
        "unbindable" => MountPropagationFlags::UNBINDABLE,
        _ => return None,
    };
    Some(kind | recursive)
}

impl Mount {
    /// Reads the options.
    ///
    /// # Errors
    /// [`Error::Option`] for a word containerd reserves for mount managers (`X-containerd.*`) that
    /// nobody consumed, and for id maps that do not parse.
    pub fn parse(&self) -> Result<Parsed, Error> {
        let mut parsed = Parsed::default();
        let (mut uid_map, mut gid_map) = (None, None);
        if self.fstype == "bind" {
            parsed.flags.bind = true;
        }
        for word in &self.options {
            let reject = |reason| Error::Option {
                fstype: self.fstype.clone(),
                option: word.clone(),
                reason,
            };
            match word.as_str() {
                "" => {}
                "ro" => parsed.flags.bits |= MountFlags::RDONLY,
                "rw" => parsed.flags.bits -= MountFlags::RDONLY,
                "bind" => parsed.flags.bind = true,
                "rbind" => {
                    parsed.flags.bind = true;
                    parsed.flags.recursive = true;
                }
                "remount" => parsed.flags.remount = true,
                "loop" => parsed.via_loop = true,
                "direct-io" => parsed.direct_io = true,
                other => {
                    if let Some(map) = other.strip_prefix("uidmap=") {
                        uid_map = Some(map);
                    } else if let Some(map) = other.strip_prefix("gidmap=") {
                        gid_map = Some(map);
                    } else if other.starts_with("X-containerd.") {
                        return Err(reject("no mount handler consumed it"));
                    } else if let Some(kind) = propagation(other) {
                        parsed.propagation.push(kind);
                    } else if let Some((_, bit, clear)) =
                        FLAG_WORDS.iter().find(|(name, ..)| *name == other)
                    {
                        parsed.flags.bits.set(*bit, !clear);
                    } else {
                        parsed.data.push(other.to_owned());
                    }
                }
            }
        }
        parsed.idmap = match (uid_map, gid_map) {
            (None, None) => None,
            (Some(uid), Some(gid)) => {
                Some(IdMap::parse(uid, gid).ok_or_else(|| Error::Option {
                    fstype: self.fstype.clone(),
                    option: format!("uidmap={uid},gidmap={gid}"),
                    reason: "want container:host:size[,…] of 32-bit numbers",
                })?)
            }
            _ => {
                return Err(Error::Option {
                    fstype: self.fstype.clone(),
                    option: "uidmap".to_owned(),
                    reason: "uidmap and gidmap go together",
                });
            }
        };
        Ok(parsed)
    }
}
