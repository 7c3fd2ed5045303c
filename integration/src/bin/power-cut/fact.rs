//! What the guest says over the serial line, and what the host concludes about what must be there.

use std::collections::{BTreeMap, BTreeSet};

/// One statement of the guest, on a line of its own: `@ VERB KIND NAME [DIGEST]`. Lines without the mark are noise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fact {
    /// The daemon has acknowledged that this exists.
    Made(Kind, String, String),
    /// A removal is about to be asked for: from here on both is right.
    Removing(Kind, String),
    /// The daemon has acknowledged the removal.
    Removed(Kind, String),
    /// Everything known was compared, this many things.
    Compared(usize),
    /// Something is wrong.
    Wrong(String),
}

/// What can be acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Named and checked by its digest.
    Blob,
    /// With the digest of its target.
    Image,
    /// With the digest of its spec.
    Container,
    /// An active snapshot.
    Active,
    /// An unpacked one, with the digest of a file in it.
    Unpacked,
}

const KINDS: [(Kind, &str); 5] = [
    (Kind::Blob, "blob"),
    (Kind::Image, "image"),
    (Kind::Container, "container"),
    (Kind::Active, "active"),
    (Kind::Unpacked, "unpacked"),
];

impl Kind {
    fn word(self) -> &'static str {
        let named = KINDS.iter().find(|(kind, _)| *kind == self);
        named.expect("every kind has a word").1
    }

    fn read(word: &str) -> Option<Self> {
        Some(KINDS.iter().find(|(_, name)| *name == word)?.0)
    }
}

impl std::fmt::Display for Fact {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Made(kind, name, digest) => {
                write!(to, "@ made {} {name} {digest} .", kind.word())
            }
            Self::Removing(kind, name) => write!(to, "@ removing {} {name} .", kind.word()),
            Self::Removed(kind, name) => write!(to, "@ removed {} {name} .", kind.word()),
            Self::Compared(count) => write!(to, "@ compared {count} ."),
            Self::Wrong(text) => write!(to, "@ wrong {}", text.replace('\n', " ")),
        }
    }
}

impl Fact {
    /// Reads a line. A line that the cut has shortened is none: it ends with a full stop.
    pub(crate) fn read(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.trim().strip_prefix("@ ")?.split(' ').collect();
        let own = |word: &&str| (*word).to_owned();
        match words.as_slice() {
            ["made", kind, name, digest, "."] => {
                Some(Self::Made(Kind::read(kind)?, own(name), own(digest)))
            }
            ["removing", kind, name, "."] => Some(Self::Removing(Kind::read(kind)?, own(name))),
            ["removed", kind, name, "."] => Some(Self::Removed(Kind::read(kind)?, own(name))),
            ["compared", count, "."] => Some(Self::Compared(count.parse().ok()?)),
            ["wrong", text @ ..] => Some(Self::Wrong(text.join(" "))),
            _ => None,
        }
    }
}

/// What must be there after a cut, and what must not.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// Kind and name → digest.
    pub(crate) there: BTreeMap<(Kind, String), String>,
    pub(crate) gone: BTreeSet<(Kind, String)>,
}

impl Known {
    pub(crate) fn learn(&mut self, fact: &Fact) {
        match fact {
            Fact::Made(kind, name, digest) => {
                self.gone.remove(&(*kind, name.clone()));
                self.there.insert((*kind, name.clone()), digest.clone());
            }
            Fact::Removing(kind, name) => {
                self.there.remove(&(*kind, name.clone()));
            }
            Fact::Removed(kind, name) => {
                self.gone.insert((*kind, name.clone()));
            }
            Fact::Compared(_) | Fact::Wrong(_) => {}
        }
    }

    /// As lines for [`Fact::read`], from which the guest learns the same.
    pub(crate) fn lines(&self) -> String {
        let there = self.there.iter();
        let there =
            there.map(|((kind, name), digest)| Fact::Made(*kind, name.clone(), digest.clone()));
        let gone = self
            .gone
            .iter()
            .map(|(kind, name)| Fact::Removed(*kind, name.clone()));
        there.chain(gone).map(|fact| format!("{fact}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_say_what_was_meant_and_short_ones_nothing() {
        let fact = Fact::Made(Kind::Container, "c1".into(), "sha256:0".into());
        let line = fact.to_string();
        assert_eq!(Fact::read(&line), Some(fact));
        for end in 0..line.len() {
            assert_eq!(Fact::read(&line[..end]), None, "{}", &line[..end]);
        }
        assert_eq!(Fact::read("[    1.2] @ kernel"), None);
    }

    #[test]
    fn between_request_and_answer_both_is_right() {
        let mut known = Known::default();
        let name = || "c1".to_owned();
        known.learn(&Fact::Made(Kind::Container, name(), "d".into()));
        known.learn(&Fact::Removing(Kind::Container, name()));
        assert!(known.there.is_empty() && known.gone.is_empty());
        known.learn(&Fact::Removed(Kind::Container, name()));
        let mut told = Known::default();
        known
            .lines()
            .lines()
            .filter_map(Fact::read)
            .for_each(|fact| told.learn(&fact));
        assert_eq!(told.gone, known.gone);
    }
}
