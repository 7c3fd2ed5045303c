//! The fields of a header block: ustar, with the numbers of GNU and the prefix of star.

use std::ops::Range;

use super::BLOCK;

/// A header block.
pub(super) struct Header<'a>(pub(super) &'a [u8; BLOCK]);

impl Header<'_> {
    pub(super) fn checksum_fits(&self) -> bool {
        let Some(stored) = self.number(148..156) else {
            return false;
        };
        let byte = |(index, byte): (usize, &u8)| {
            if (148..156).contains(&index) {
                b' '
            } else {
                *byte
            }
        };
        let unsigned: u64 = self.0.iter().enumerate().map(byte).map(u64::from).sum();
        // Some old programs summed signed bytes.
        let signed: i64 = self
            .0
            .iter()
            .enumerate()
            .map(byte)
            .map(|b| i64::from(b.cast_signed()))
            .sum();
        stored == unsigned || i64::try_from(stored) == Ok(signed)
    }

    pub(super) fn path(&self) -> Vec<u8> {
        let name = until_nul(&self.0[..100]);
        if &self.0[257..263] != b"ustar\0" {
            return name;
        }
        // star keeps times where ustar has the end of the prefix.
        let prefix = if &self.0[508..512] == b"tar\0" {
            &self.0[345..476]
        } else {
            &self.0[345..500]
        };
        let mut path = until_nul(prefix);
        if path.is_empty() {
            return name;
        }
        path.push(b'/');
        path.extend_from_slice(&name);
        path
    }

    pub(super) fn number(&self, range: Range<usize>) -> Option<u64> {
        parse_number(&self.0[range])
    }

    pub(super) fn signed(&self, range: Range<usize>) -> Option<i64> {
        let field = &self.0[range];
        // Base 256, two's complement, with the sign in the second highest bit.
        if field[0] == 0xff {
            let low = field.last_chunk::<8>()?;
            return Some(i64::from_be_bytes(*low));
        }
        i64::try_from(parse_number(field)?).ok()
    }
}

/// Octal digits among spaces and NULs, or base 256 when the highest bit is set.
pub(super) fn parse_number(field: &[u8]) -> Option<u64> {
    let (first, rest) = field.split_first()?;
    if *first == 0x80 {
        let high = rest.len().checked_sub(8);
        let (high, low) = rest.split_at(high.unwrap_or(0));
        return high.iter().all(|b| *b == 0).then(|| {
            low.iter()
                .fold(0, |number, byte| number << 8 | u64::from(*byte))
        });
    }
    let is_space = |b: &u8| matches!(b, b' ' | 0);
    let start = field
        .iter()
        .position(|b| !is_space(b))
        .unwrap_or(field.len());
    let field = &field[start..];
    let end = field.iter().position(is_space).unwrap_or(field.len());
    field[..end]
        .iter()
        .try_fold(0_u64, |number, byte| match byte {
            b'0'..=b'7' => number.checked_mul(8)?.checked_add(u64::from(byte - b'0')),
            _ => None,
        })
}

pub(super) fn until_nul(field: &[u8]) -> Vec<u8> {
    let end = field.iter().position(|b| *b == 0).unwrap_or(field.len());
    field[..end].to_vec()
}
