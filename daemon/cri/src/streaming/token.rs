//! One-time tokens: what a request is called between the CRI's answer and the client's connection.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rand::Rng;

/// Requests waiting for their client.
pub(super) const MAX_TOKENS: usize = 1000;
/// How long a client has to come.
const LIFETIME: Duration = Duration::from_secs(60);
/// Random bytes of a token, which make 8 characters.
const TOKEN_BYTES: usize = 6;

/// Waiting requests by token. Tokens are used once.
#[derive(Debug)]
pub(super) struct Tokens<T> {
    waiting: HashMap<String, (T, Instant)>,
    /// Tokens in the order in which they expire; those used are still in it.
    order: VecDeque<(String, Instant)>,
}

impl<T> Default for Tokens<T> {
    fn default() -> Self {
        Self {
            waiting: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl<T> Tokens<T> {
    /// Keeps `request` and returns its token; `None` when too many wait.
    pub(super) fn insert(&mut self, request: T, now: Instant) -> Option<String> {
        self.expire(now);
        if self.waiting.len() >= MAX_TOKENS {
            return None;
        }
        loop {
            let bytes: [u8; TOKEN_BYTES] = rand::rng().random();
            let token = URL_SAFE_NO_PAD.encode(bytes);
            if !self.waiting.contains_key(&token) {
                let until = now + LIFETIME;
                self.order.push_back((token.clone(), until));
                self.waiting.insert(token.clone(), (request, until));
                return Some(token);
            }
        }
    }

    /// The request of `token`, which is thereby used up.
    pub(super) fn take(&mut self, token: &str, now: Instant) -> Option<T> {
        self.expire(now);
        self.waiting.remove(token).map(|(request, _)| request)
    }

    fn expire(&mut self, now: Instant) {
        while let Some((token, until)) = self.order.front() {
            let used = !self.waiting.contains_key(token);
            if *until > now && !used {
                break;
            }
            // A reused token text has a later entry of its own.
            if !used && self.waiting[token].1 <= now {
                self.waiting.remove(token);
            }
            self.order.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_used_once_and_expire() {
        let mut tokens = Tokens::default();
        let start = Instant::now();
        let one = tokens.insert(1, start).unwrap();
        let two = tokens.insert(2, start).unwrap();
        assert_eq!(one.len(), 8);
        assert_eq!(tokens.take(&one, start), Some(1));
        assert_eq!(tokens.take(&one, start), None);
        assert_eq!(tokens.take(&two, start + LIFETIME), None);
        assert!(tokens.order.is_empty());
    }

    #[test]
    fn the_number_of_tokens_is_bounded() {
        let mut tokens = Tokens::default();
        let start = Instant::now();
        for n in 0..MAX_TOKENS {
            tokens.insert(n, start).unwrap();
        }
        assert_eq!(tokens.insert(0, start), None);
        assert!(tokens.insert(0, start + LIFETIME).is_some());
    }
}
