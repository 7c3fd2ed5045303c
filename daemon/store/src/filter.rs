//! The filter language of every list and of event subscriptions.
//!
//! Upstream: containerd `pkg/filters`. Several strings are OR-ed, selectors in one are AND-ed.

use crate::Error;

/// A parsed filter; matches everything when it came from no strings.
#[derive(Debug, Clone, Default)]
pub struct Filter {}

/// An object that filters look into.
pub trait Fields {
    /// The value at `path`, `None` when absent. Map lookups join the rest of the path with `.`.
    fn field(&self, path: &[String]) -> Option<std::borrow::Cow<'_, str>>;
}

impl Filter {
    /// Parses filter strings.
    ///
    /// # Errors
    /// `InvalidArgument`, text `filters: parse error: [before >|x|< after]: reason`.
    pub fn parse<S: AsRef<str>>(_filters: &[S]) -> Result<Self, Error> {
        todo!()
    }

    /// Whether `object` matches.
    #[must_use]
    pub fn matches(&self, _object: &dyn Fields) -> bool {
        todo!()
    }
}
