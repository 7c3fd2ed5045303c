//! The filter language of every list and of event subscriptions.
//!
//! ```text
//! filter    = selector *( "," selector )
//! selector  = fieldpath [ op value ]           presence without op
//! fieldpath = field *( "." field )
//! field     = quoted | 1*( [A-Za-z0-9_] )
//! op        = "==" | "!=" | "~="
//! value     = quoted | 1*( graphic, not space, not "," )
//! ```
//!
//! Several strings are OR-ed, selectors in one are AND-ed. `!=` holds for an absent field; `~=` is
//! an unanchored regular expression, and one that does not compile matches nothing.
//!
//! Upstream: containerd `pkg/filters`.

mod parser;
mod scanner;

use std::borrow::Cow;
use std::collections::BTreeMap;

use regex::Regex;

use crate::Error;

/// Longest filter string, in bytes.
pub const MAX_BYTES: usize = 64 << 10;

/// A parsed filter; matches everything when it came from no strings.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Alternatives; none at all match everything.
    any: Vec<Vec<Selector>>,
}

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<String>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(String),
    NotEqual(String),
    /// `None` for an expression that does not compile.
    Matches(Option<Regex>),
}

/// An object that filters look into.
pub trait Fields {
    /// The value at `path`, `None` when absent. Map lookups join the rest of the path with `.`.
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>>;
}

/// Looks up the rest of a path in a map, as every map field of every object does it.
#[must_use]
pub fn entry<'a>(map: &'a BTreeMap<String, String>, rest: &[String]) -> Option<Cow<'a, str>> {
    let value = match rest {
        [key] => map.get(key),
        rest => map.get(&rest.join(".")),
    };
    value.map(|value| Cow::Borrowed(value.as_str()))
}

impl Filter {
    /// Parses filter strings.
    ///
    /// # Errors
    /// `InvalidArgument`, text `filters: parse error: [before >|x|< after]: reason`.
    pub fn parse<S: AsRef<str>>(filters: &[S]) -> Result<Self, Error> {
        let mut any = Vec::with_capacity(filters.len());
        for filter in filters {
            let filter = filter.as_ref();
            if filter.is_empty() {
                // Matches everything, and so does any list of alternatives that holds it.
                any.push(Vec::new());
                continue;
            }
            if filter.len() > MAX_BYTES {
                return Err(Error::Invalid {
                    reason: format!("filters: filter is longer than {MAX_BYTES} bytes"),
                });
            }
            any.push(parser::parse(filter)?);
        }
        Ok(Self { any })
    }

    /// Whether `object` matches.
    #[must_use]
    pub fn matches(&self, object: &dyn Fields) -> bool {
        self.any.is_empty()
            || self
                .any
                .iter()
                .any(|all| all.iter().all(|s| s.matches(object)))
    }

    /// Whether everything matches.
    #[must_use]
    pub fn is_all(&self) -> bool {
        self.any.is_empty() || self.any.iter().any(Vec::is_empty)
    }
}

impl Selector {
    fn matches(&self, object: &dyn Fields) -> bool {
        let value = object.field(&self.path);
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(want) => value.is_some_and(|value| value == want.as_str()),
            Test::NotEqual(want) => value.unwrap_or_default() != want.as_str(),
            Test::Matches(pattern) => pattern
                .as_ref()
                .is_some_and(|pattern| pattern.is_match(&value.unwrap_or_default())),
        }
    }
}

#[cfg(test)]
mod tests;
