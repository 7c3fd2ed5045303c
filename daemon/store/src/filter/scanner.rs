//! Splits a filter into tokens; knows nothing of what may follow what.

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    End,
    Quoted,
    Separator,
    Operator,
    Value,
    Field,
    Illegal,
}

/// One token: its kind, where it starts, and its text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token<'a> {
    pub(super) kind: Kind,
    pub(super) start: usize,
    pub(super) text: &'a str,
}

/// Reads tokens from the left. After an operator unquoted text is a value until the next separator.
#[derive(Debug)]
pub(super) struct Scanner<'a> {
    input: &'a str,
    position: usize,
    value: bool,
    /// Why the last token was illegal.
    pub(super) reason: &'static str,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(input: &'a str) -> Self {
        Self {
            input,
            position: 0,
            value: false,
            reason: "illegal token",
        }
    }

    pub(super) fn position(&self) -> usize {
        self.position
    }

    /// The next character, left where it is.
    pub(super) fn peek(&self) -> Option<char> {
        self.input[self.position..].chars().next()
    }

    pub(super) fn scan(&mut self) -> Token<'a> {
        while self.peek().is_some_and(char::is_whitespace) {
            self.bump();
        }
        let start = self.position;
        let Some(first) = self.peek() else {
            return self.token(Kind::End, start);
        };
        let kind = if first == '\0' {
            self.bump();
            self.reason = "unexpected null";
            Kind::Illegal
        } else if is_quote(first) {
            self.bump();
            self.quoted(first)
        } else if matches!(first, ',' | '.') {
            self.bump();
            self.value = false;
            Kind::Separator
        } else if is_operator(first) {
            self.run(is_operator);
            self.value = true;
            Kind::Operator
        } else if self.value {
            self.run(is_value);
            self.value = false;
            if self.position == start {
                self.bump();
                self.reason = "illegal token";
                Kind::Illegal
            } else {
                Kind::Value
            }
        } else if is_field(first) {
            self.run(is_field);
            Kind::Field
        } else {
            self.bump();
            self.reason = "illegal token";
            Kind::Illegal
        };
        self.token(kind, start)
    }

    fn token(&self, kind: Kind, start: usize) -> Token<'a> {
        Token {
            kind,
            start,
            text: &self.input[start..self.position],
        }
    }

    fn bump(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.position += next.len_utf8();
        Some(next)
    }

    fn run(&mut self, wanted: fn(char) -> bool) {
        while self.peek().is_some_and(wanted) {
            self.bump();
        }
    }

    /// The rest of a literal opened by `quote`; what its escapes mean is the parser's business.
    fn quoted(&mut self, quote: char) -> Kind {
        loop {
            match self.bump() {
                Some('\n') | None => {
                    self.reason = "quoted literal not terminated";
                    return Kind::Illegal;
                }
                Some('\\') => {
                    if matches!(self.peek(), Some('\n') | None) {
                        self.reason = "illegal escape sequence";
                        return Kind::Illegal;
                    }
                    self.bump();
                }
                Some(c) if c == quote => return Kind::Quoted,
                Some(_) => {}
            }
        }
    }
}

pub(super) fn is_quote(c: char) -> bool {
    matches!(c, '/' | '|' | '"')
}

fn is_operator(c: char) -> bool {
    matches!(c, '=' | '!' | '~')
}

fn is_field(c: char) -> bool {
    c == '_' || c.is_ascii_alphanumeric()
}

/// Graphic, not a space, not the separator of selectors.
fn is_value(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control()
}
