//! Options as Go's flag package reads them: one or two dashes, `--name=value` or `--name value`, switches alone.

use crate::error::{Error, Result};

/// An option a command knows.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flag {
    name: &'static str,
    short: &'static str,
    takes_value: bool,
}

impl Flag {
    pub(crate) const fn value(name: &'static str) -> Self {
        Self {
            name,
            short: "",
            takes_value: true,
        }
    }

    pub(crate) const fn switch(name: &'static str) -> Self {
        Self {
            name,
            short: "",
            takes_value: false,
        }
    }

    /// A second name.
    pub(crate) const fn or(mut self, short: &'static str) -> Self {
        self.short = short;
        self
    }
}

/// Options that were given, in order.
#[derive(Debug, Default)]
pub(crate) struct Arguments {
    given: Vec<(&'static str, String)>,
}

impl Arguments {
    /// Reads options up to the first word that is none. Returns them and the words from there on.
    pub(crate) fn parse_prefix(flags: &[Flag], words: Vec<String>) -> Result<(Self, Vec<String>)> {
        let mut parsed = Self::default();
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next_if(|word| word.len() > 1 && word.starts_with('-')) {
            if word == "--" {
                break;
            }
            parsed.take(flags, &word, &mut words)?;
        }
        Ok((parsed, words.collect()))
    }

    /// Reads options before and between the words.
    pub(crate) fn parse(flags: &[Flag], words: Vec<String>) -> Result<(Self, Vec<String>)> {
        let mut parsed = Self::default();
        let mut rest = Vec::new();
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            if word == "--" {
                rest.extend(words);
                break;
            }
            if word.len() > 1 && word.starts_with('-') {
                parsed.take(flags, &word, &mut words)?;
            } else {
                rest.push(word);
            }
        }
        Ok((parsed, rest))
    }

    fn take(
        &mut self,
        flags: &[Flag],
        word: &str,
        more: &mut impl Iterator<Item = String>,
    ) -> Result<()> {
        let bare = word
            .strip_prefix("--")
            .or_else(|| word.strip_prefix('-'))
            .unwrap_or(word);
        let (name, value) = bare
            .split_once('=')
            .map_or((bare, None), |(name, value)| (name, Some(value)));
        let flag = flags
            .iter()
            .find(|flag| flag.name == name || (!flag.short.is_empty() && flag.short == name))
            .ok_or_else(|| Error::Spec(format!("flag provided but not defined: -{name}")))?;
        let value = match (value, flag.takes_value) {
            (Some(value), _) => value.to_owned(),
            (None, false) => "true".to_owned(),
            (None, true) => more
                .next()
                .ok_or_else(|| Error::Spec(format!("flag needs an argument: -{name}")))?,
        };
        if !flag.takes_value && !matches!(value.as_str(), "true" | "false" | "1" | "0") {
            return Err(Error::Spec(format!(
                "invalid boolean value {value:?} for -{name}"
            )));
        }
        self.given.push((flag.name, value));
        Ok(())
    }

    /// The last value given.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.given
            .iter()
            .rev()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value.as_str())
    }

    /// All values given.
    pub(crate) fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.given
            .iter()
            .filter(move |(known, _)| *known == name)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|value| matches!(value, "true" | "1"))
    }

    /// A number.
    pub(crate) fn number<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>> {
        let parse = |value: &str| {
            value.parse().map_err(|_| {
                Error::Spec(format!(
                    "invalid value {value:?} for flag -{name}: not a number in range"
                ))
            })
        };
        self.get(name)
            .filter(|value| !value.is_empty())
            .map(parse)
            .transpose()
    }
}

/// The one container id a command takes.
pub(crate) fn one_id(command: &str, words: Vec<String>) -> Result<String> {
    let mut words = words.into_iter();
    match (words.next(), words.next()) {
        (Some(id), None) if !id.is_empty() => Ok(id),
        (Some(id), None) if id.is_empty() => {
            Err(Error::Spec("container id cannot be empty".into()))
        }
        _ => Err(Error::Spec(format!(
            "\"lighter-oci {command}\" requires exactly 1 argument: the container's id"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLAGS: &[Flag] = &[Flag::value("bundle").or("b"), Flag::switch("all").or("a")];

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn options_are_read_with_one_or_two_dashes() {
        let (given, rest) =
            Arguments::parse(FLAGS, words("-bundle /b --all=false id -a x")).unwrap();
        assert_eq!(given.get("bundle"), Some("/b"));
        assert!(given.is_set("all"), "the last one counts");
        assert_eq!(rest, ["id", "x"]);
    }

    #[test]
    fn a_programs_own_options_are_left_alone() {
        let (_, rest) = Arguments::parse_prefix(FLAGS, words("-b=/x id ls --all")).unwrap();
        assert_eq!(rest, ["id", "ls", "--all"]);
    }

    #[test]
    fn unknown_options_are_named() {
        assert!(
            Arguments::parse(FLAGS, words("--bundel x"))
                .unwrap_err()
                .to_string()
                .contains("-bundel")
        );
        assert!(
            Arguments::parse(FLAGS, words("id -b"))
                .unwrap_err()
                .to_string()
                .contains("needs an argument")
        );
    }
}
