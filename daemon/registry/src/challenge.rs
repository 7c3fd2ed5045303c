//! `WWW-Authenticate` headers. Pure.

use std::collections::BTreeMap;

/// Longest header value read, in bytes; longer ones are cut.
const MAX_HEADER_BYTES: usize = 8192;

/// An authentication scheme.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scheme {
    /// Tokens from a token server; preferred.
    Bearer,
    /// User and password in every request.
    Basic,
}

/// One challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    pub(super) scheme: Scheme,
    /// Parameters; keys in lower case.
    pub(super) params: BTreeMap<String, String>,
}

/// Challenges of all headers that we can answer, the preferred first.
pub(super) fn parse<'a>(headers: impl Iterator<Item = &'a str>) -> Vec<Challenge> {
    let mut all = Vec::new();
    for header in headers {
        let cut = header
            .char_indices()
            .map(|(at, c)| at + c.len_utf8())
            .take_while(|end| *end <= MAX_HEADER_BYTES)
            .last()
            .unwrap_or(0);
        parse_one(&header[..cut], &mut all);
    }
    all.sort_by_key(|challenge| challenge.scheme);
    all
}

fn parse_one(header: &str, out: &mut Vec<Challenge>) {
    let mut rest = header.trim_start_matches([' ', '\t', ',']);
    // `None` while inside a challenge whose scheme we do not know: its parameters are skipped.
    let mut current: Option<Challenge> = None;
    while !rest.is_empty() {
        let end = rest.find([' ', '\t', '=', ',']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        let after_space = after.trim_start_matches([' ', '\t']);
        if let Some(value) = after_space.strip_prefix('=') {
            let (value, remaining) = parse_value(value.trim_start_matches([' ', '\t']));
            if let Some(challenge) = &mut current {
                challenge.params.insert(word.to_ascii_lowercase(), value);
            }
            rest = remaining;
        } else {
            out.extend(current.take());
            let scheme = match word.to_ascii_lowercase().as_str() {
                "bearer" => Some(Scheme::Bearer),
                "basic" => Some(Scheme::Basic),
                _ => None,
            };
            current = scheme.map(|scheme| Challenge {
                scheme,
                params: BTreeMap::new(),
            });
            rest = after_space;
        }
        rest = rest.trim_start_matches([' ', '\t', ',']);
    }
    out.extend(current);
}

fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([',', ' ', '\t']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            other => value.push(other),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn bearer_comes_first_with_its_parameters() {
        let header = r#"Basic realm="x, y", Bearer realm="https://a/t",service=r , scope="repository:a/b:pull,push""#;
        let parsed = parse([header].into_iter());
        assert_eq!(parsed.len(), 2);
        assert_eq!(parsed[0].scheme, Scheme::Bearer);
        assert_eq!(parsed[0].params["service"], "r");
        assert_eq!(parsed[0].params["scope"], "repository:a/b:pull,push");
        assert_eq!(parsed[1].params["realm"], "x, y");
    }

    #[test]
    fn unknown_schemes_are_skipped_whole() {
        let header = r#"Negotiate, Digest realm="d", qop=auth, Basic realm="b\"q""#;
        let parsed = parse([header].into_iter());
        assert_eq!(parsed.len(), 1);
        assert_eq!(parsed[0].params["realm"], "b\"q");
    }

    proptest! {
        #[test]
        fn no_header_panics(text in "\\PC{0,200}") {
            parse([text.as_str()].into_iter());
        }
    }
}
