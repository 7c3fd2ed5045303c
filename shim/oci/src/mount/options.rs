//! Mount options of the specification, sorted into what the kernel takes where.
//!
//! Spec: OCI runtime-spec, config.md, "Linux mount options".

use crate::error::{Error, Result};
use crate::sys::attr;

/// Parsed options of one mount.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Options {
    /// `Some(recursive)` for `bind` and `rbind`.
    pub(crate) bind: Option<bool>,
    pub(crate) remount: bool,
    /// Attributes to set and to clear on this mount.
    pub(crate) set: u64,
    pub(crate) clear: u64,
    /// The same for the whole tree (`rro` and its kin).
    pub(crate) recursive_set: u64,
    pub(crate) recursive_clear: u64,
    /// Propagation changes in order: (`MS_SHARED` …, whether recursive).
    pub(crate) propagation: Vec<(u64, bool)>,
    /// Superblock options: a flag, or a key with its value.
    pub(crate) data: Vec<(String, Option<String>)>,
    pub(crate) tmp_copy_up: bool,
    /// `Some(recursive)` for `idmap` and `ridmap`.
    pub(crate) idmap: Option<bool>,
}

pub(crate) const MS_UNBINDABLE: u64 = libc::MS_UNBINDABLE;
pub(crate) const MS_PRIVATE: u64 = libc::MS_PRIVATE;
pub(crate) const MS_SLAVE: u64 = libc::MS_SLAVE;
pub(crate) const MS_SHARED: u64 = libc::MS_SHARED;

/// (name, bit, sets it) for attributes that also have a recursive spelling with a leading `r`.
const ATTRIBUTES: &[(&str, u64, bool)] = &[
    ("ro", attr::RDONLY, true),
    ("rw", attr::RDONLY, false),
    ("nosuid", attr::NOSUID, true),
    ("suid", attr::NOSUID, false),
    ("nodev", attr::NODEV, true),
    ("dev", attr::NODEV, false),
    ("noexec", attr::NOEXEC, true),
    ("exec", attr::NOEXEC, false),
    ("nodiratime", attr::NODIRATIME, true),
    ("diratime", attr::NODIRATIME, false),
    ("nosymfollow", attr::NOSYMFOLLOW, true),
    ("symfollow", attr::NOSYMFOLLOW, false),
    ("noatime", attr::NOATIME, true),
    ("strictatime", attr::STRICTATIME, true),
    ("relatime", attr::RELATIME, true),
];

/// Superblock flags that are options of their own name in the mount API.
const SUPERBLOCK: &[&str] = &[
    "sync",
    "async",
    "dirsync",
    "lazytime",
    "nolazytime",
    "mand",
    "nomand",
];

/// Options that carry no meaning for a container's mount table (fstab's and util-linux's).
const IGNORED: &[&str] = &[
    "defaults",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "acl",
    "noacl",
    "nofail",
    "auto",
    "noauto",
    "_netdev",
];

/// The names this runtime knows, for `features`.
pub(crate) fn known() -> Vec<String> {
    let mut names: Vec<String> = ATTRIBUTES
        .iter()
        .flat_map(|(name, _, _)| [(*name).to_owned(), format!("r{name}")])
        .collect();
    names.extend(
        [
            "atime",
            "ratime",
            "norelatime",
            "rnorelatime",
            "nostrictatime",
            "rnostrictatime",
        ]
        .map(str::to_owned),
    );
    names.extend(["bind", "rbind", "remount", "tmpcopyup", "idmap", "ridmap"].map(str::to_owned));
    names.extend(
        PROPAGATION
            .iter()
            .flat_map(|(name, _)| [(*name).to_owned(), format!("r{name}")]),
    );
    names.extend(
        SUPERBLOCK
            .iter()
            .chain(IGNORED)
            .map(|name| (*name).to_owned()),
    );
    names.sort();
    names.dedup();
    names
}

const PROPAGATION: &[(&str, u64)] = &[
    ("private", MS_PRIVATE),
    ("shared", MS_SHARED),
    ("slave", MS_SLAVE),
    ("unbindable", MS_UNBINDABLE),
];

/// A propagation word (`rslave`, `private` …) as flag and recursion.
pub(crate) fn propagation(word: &str) -> Option<(u64, bool)> {
    let find = |name: &str| {
        PROPAGATION
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, flag)| *flag)
    };
    find(word).map(|flag| (flag, false)).or_else(|| {
        word.strip_prefix('r')
            .and_then(find)
            .map(|flag| (flag, true))
    })
}

impl Options {
    /// Parses the option list of one mount.
    ///
    /// # Errors
    /// `Spec` for an option that contradicts itself.
    pub(crate) fn parse(words: &[String]) -> Result<Self> {
        let mut options = Self::default();
        for word in words {
            options.take(word)?;
        }
        Ok(options)
    }

    fn take(&mut self, word: &str) -> Result<()> {
        match word {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "remount" => self.remount = true,
            "tmpcopyup" => self.tmp_copy_up = true,
            "idmap" => self.idmap = Some(self.idmap.unwrap_or(false)),
            "ridmap" => self.idmap = Some(true),
            "" => {}
            _ if IGNORED.contains(&word) => {}
            _ if SUPERBLOCK.contains(&word) => self.data.push((word.to_owned(), None)),
            _ => {
                if let Some(change) = propagation(word) {
                    self.propagation.push(change);
                } else if !self.take_attribute(word, false)
                    && !word
                        .strip_prefix('r')
                        .is_some_and(|word| self.take_attribute(word, true))
                {
                    if word.contains('\0') {
                        return Err(Error::Spec(format!(
                            "mount option {word:?} contains a zero byte"
                        )));
                    }
                    let (key, value) = match word.split_once('=') {
                        Some((key, value)) => (key, Some(value.to_owned())),
                        None => (word, None),
                    };
                    self.data.push((key.to_owned(), value));
                }
            }
        }
        Ok(())
    }

    fn take_attribute(&mut self, word: &str, recursive: bool) -> bool {
        let (bit, set) = match word {
            // The default access time policy, asked for by undoing another.
            "atime" | "nostrictatime" | "norelatime" => (attr::RELATIME, true),
            _ => match ATTRIBUTES.iter().find(|(name, _, _)| *name == word) {
                Some((_, bit, set)) => (*bit, *set),
                None => return false,
            },
        };
        let (sets, clears) = if recursive {
            (&mut self.recursive_set, &mut self.recursive_clear)
        } else {
            (&mut self.set, &mut self.clear)
        };
        let is_time = bit & attr::ATIME != 0 || bit == attr::RELATIME;
        if is_time {
            // The kernel wants the whole field cleared whenever a policy is set.
            *sets = (*sets & !attr::ATIME) | bit;
            *clears |= attr::ATIME;
        } else if set {
            *sets |= bit;
            *clears &= !bit;
        } else {
            *sets &= !bit;
            *clears |= bit;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Options {
        Options::parse(
            &words
                .iter()
                .map(|word| (*word).to_owned())
                .collect::<Vec<_>>(),
        )
        .unwrap()
    }

    #[test]
    fn attributes_and_data_are_told_apart() {
        let options = parse(&["nosuid", "strictatime", "mode=755", "size=65536k", "ro"]);
        assert_eq!(options.set, attr::NOSUID | attr::STRICTATIME | attr::RDONLY);
        assert_eq!(options.clear, attr::ATIME);
        assert_eq!(
            options.data,
            [
                ("mode".to_owned(), Some("755".to_owned())),
                ("size".to_owned(), Some("65536k".to_owned()))
            ]
        );
    }

    #[test]
    fn the_last_of_two_opposites_wins() {
        let options = parse(&["ro", "rw"]);
        assert_eq!((options.set, options.clear), (0, attr::RDONLY));
    }

    #[test]
    fn recursive_spellings_reach_the_tree() {
        let options = parse(&["rbind", "rro", "rnosuid", "rw"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.recursive_set, attr::RDONLY | attr::NOSUID);
        assert_eq!(options.clear, attr::RDONLY);
    }

    #[test]
    fn propagation_words_are_not_attributes() {
        let options = parse(&["rprivate", "shared"]);
        assert_eq!(
            options.propagation,
            [(MS_PRIVATE, true), (MS_SHARED, false)]
        );
        assert!(options.data.is_empty());
    }
}
