//! Builds selectors from tokens.

use regex::Regex;

use super::scanner::{Kind, Scanner, Token};
use super::{Selector, Test};
use crate::Error;

struct Parser<'a> {
    input: &'a str,
    scanner: Scanner<'a>,
}

/// Parses one non-empty filter string.
pub(super) fn parse(input: &str) -> Result<Vec<Selector>, Error> {
    let mut parser = Parser {
        input,
        scanner: Scanner::new(input),
    };
    let mut selectors = vec![parser.selector()?];
    loop {
        match parser.scanner.peek() {
            Some(',') => {
                parser.scanner.scan();
                selectors.push(parser.selector()?);
            }
            None => return Ok(selectors),
            Some(other) => {
                let at = parser.scanner.position();
                return Err(parser.error(at, &format!("unexpected input: {other}")));
            }
        }
    }
}

impl Parser<'_> {
    fn selector(&mut self) -> Result<Selector, Error> {
        let path = self.path()?;
        if matches!(self.scanner.peek(), Some(',') | None) {
            return Ok(Selector {
                path,
                test: Test::Present,
            });
        }
        let operator = self.scanner.scan();
        let test = match (operator.kind, operator.text) {
            (Kind::Operator, "==") => Test::Equal(self.value(false)?),
            (Kind::Operator, "!=") => Test::NotEqual(self.value(false)?),
            (Kind::Operator, "~=") => Test::Matches(Regex::new(&self.value(true)?).ok()),
            (Kind::Operator, other) => {
                let reason = format!("unsupported operator {other:?}");
                return Err(self.error(operator.start, &reason));
            }
            _ => {
                return Err(
                    self.unexpected(operator, "expected an operator (\"==\"|\"!=\"|\"~=\")")
                );
            }
        };
        Ok(Selector { path, test })
    }

    fn path(&mut self) -> Result<Vec<String>, Error> {
        let mut path = vec![self.field()?];
        while self.scanner.peek() == Some('.') {
            self.scanner.scan();
            path.push(self.field()?);
        }
        Ok(path)
    }

    fn field(&mut self) -> Result<String, Error> {
        let token = self.scanner.scan();
        match token.kind {
            Kind::Field => Ok(token.text.to_owned()),
            Kind::Quoted => self.literal(token, false),
            _ => Err(self.unexpected(token, "expected field or quoted")),
        }
    }

    fn value(&mut self, pattern: bool) -> Result<String, Error> {
        let token = self.scanner.scan();
        match token.kind {
            Kind::Value | Kind::Field => Ok(token.text.to_owned()),
            Kind::Quoted => self.literal(token, pattern),
            _ => Err(self.unexpected(token, "expected value or quoted")),
        }
    }

    /// What a quoted token says. `/` and `|` quote patterns only.
    fn literal(&self, token: Token<'_>, pattern: bool) -> Result<String, Error> {
        let quote = token.text.chars().next().unwrap_or('"');
        if quote != '"' && !pattern {
            return Err(self.error(token.start, "invalid quote encountered"));
        }
        let inner = &token.text[1..token.text.len() - 1];
        unquote(inner, quote)
            .ok_or_else(|| self.error(token.start, "unquoting failed: invalid syntax"))
    }

    fn unexpected(&self, token: Token<'_>, wanted: &str) -> Error {
        let reason = if token.kind == Kind::Illegal {
            self.scanner.reason
        } else {
            wanted
        };
        self.error(token.start, reason)
    }

    fn error(&self, at: usize, reason: &str) -> Error {
        let place = match self.input[at..].chars().next() {
            Some(c) => {
                let after = &self.input[at + c.len_utf8()..];
                format!("{} >|{c}|< {after}", &self.input[..at])
            }
            None => format!("{} >||<", self.input),
        };
        Error::Invalid {
            reason: format!("filters: parse error: [{place}]: {reason}"),
        }
    }
}

/// The text of a literal's inside; `None` for an escape the language lacks.
fn unquote(inner: &str, quote: char) -> Option<String> {
    // Octal and \x escapes are bytes, so the text is put together from bytes.
    let mut out = Vec::with_capacity(inner.len());
    let mut rest = inner.chars();
    while let Some(c) = rest.next() {
        if c != '\\' {
            out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
            continue;
        }
        match rest.next()? {
            'a' => out.push(7),
            'b' => out.push(8),
            'f' => out.push(12),
            'n' => out.push(b'\n'),
            'r' => out.push(b'\r'),
            't' => out.push(b'\t'),
            'v' => out.push(11),
            '\\' => out.push(b'\\'),
            c if c == quote => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            first @ '0'..='7' => {
                let digits = [first, rest.next()?, rest.next()?];
                out.push(u8::try_from(number(digits.into_iter(), 8)?).ok()?);
            }
            'x' => out.push(u8::try_from(number(exactly(&mut rest, 2)?.chars(), 16)?).ok()?),
            'u' => push_char(&mut out, number(exactly(&mut rest, 4)?.chars(), 16)?)?,
            'U' => push_char(&mut out, number(exactly(&mut rest, 8)?.chars(), 16)?)?,
            _ => return None,
        }
    }
    Some(String::from_utf8_lossy(&out).into_owned())
}

fn exactly<'a>(rest: &mut std::str::Chars<'a>, count: usize) -> Option<&'a str> {
    let text = rest.as_str().get(..count)?;
    rest.nth(count - 1)?;
    Some(text)
}

fn number(digits: impl Iterator<Item = char>, radix: u32) -> Option<u32> {
    let mut value = None;
    for digit in digits {
        let digit = digit.to_digit(radix)?;
        value = Some(
            value
                .unwrap_or(0_u32)
                .checked_mul(radix)?
                .checked_add(digit)?,
        );
    }
    value
}

fn push_char(out: &mut Vec<u8>, code: u32) -> Option<()> {
    let c = char::from_u32(code)?;
    out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
    Some(())
}
