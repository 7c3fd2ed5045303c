//! Keeps secrets out of texts: query values of URLs never reach an error or a log line.

use reqwest::Url;

/// Which query values may stay readable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// None of them.
    Nothing,
    /// The mirror's namespace, which is no secret.
    Namespace,
}

/// The URL with user information removed and query values hidden.
pub(super) fn url(url: &Url, keep: Keep) -> String {
    let mut shown = url.clone();
    // Both fail only for URLs that cannot have them.
    let _ = shown.set_password(None);
    let _ = shown.set_username("");
    shown.set_fragment(None);
    if url.query().is_some() {
        let pairs: Vec<(String, String)> = url
            .query_pairs()
            .map(|(key, value)| {
                let hide = keep == Keep::Nothing || key != "ns";
                let value = if hide { "[REDACTED]".into() } else { value };
                (key.into_owned(), value.into_owned())
            })
            .collect();
        shown.query_pairs_mut().clear().extend_pairs(pairs);
    }
    shown.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_values_and_passwords_are_hidden() {
        let secret = Url::parse("https://u:p@h/v2/x?ns=docker.io&sig=abc#f").expect("valid");
        assert_eq!(
            url(&secret, Keep::Namespace),
            "https://h/v2/x?ns=docker.io&sig=%5BREDACTED%5D"
        );
        assert_eq!(
            url(&secret, Keep::Nothing),
            "https://h/v2/x?ns=%5BREDACTED%5D&sig=%5BREDACTED%5D"
        );
    }
}
