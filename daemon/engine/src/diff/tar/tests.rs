//! Fields of headers.

use super::header::parse_number;
use super::pax::pax_time;
use super::sparse::segments;
use super::*;

#[test]
fn numbers_are_octal_or_base_256() {
    assert_eq!(parse_number(b"0000644\0"), Some(0o644));
    assert_eq!(parse_number(b"   644 \0"), Some(0o644));
    assert_eq!(parse_number(b"\0\0\0\0\0\0\0\0"), Some(0));
    assert_eq!(parse_number(b"77777777"), Some(0o77_777_777));
    assert_eq!(parse_number(b"64x\0"), None);
    assert_eq!(
        parse_number(&[0x80, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 1]),
        Some((2 << 24) + 1)
    );
    assert_eq!(parse_number(&[0x80, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0]), None);
}

#[test]
fn times_have_fractions_and_signs() {
    let time = |text: &str| pax_time(text.as_bytes()).map(|t| (t.seconds, t.nanos));
    assert_eq!(time("12"), Some((12, 0)));
    assert_eq!(time("12.5"), Some((12, 500_000_000)));
    assert_eq!(time("12.0000000019"), Some((12, 1)));
    assert_eq!(time("-1.25"), Some((-2, 750_000_000)));
    assert_eq!(time("1.x"), None);
    assert_eq!(time(""), None);
}

#[test]
fn sparse_maps_are_checked() {
    assert_eq!(
        segments(&[0, 5, 10, 5], 20, 10),
        Some(vec![(0, 5), (10, 5)])
    );
    assert_eq!(segments(&[0, 5, 20, 0], 20, 5), Some(vec![(0, 5)]));
    assert_eq!(segments(&[0, 5, 4, 5], 20, 10), None);
    assert_eq!(segments(&[0, 5], 4, 5), None);
    assert_eq!(segments(&[u64::MAX, 1], u64::MAX, 1), None);
    assert_eq!(segments(&[1], 4, 0), None);
}

#[test]
fn an_archive_may_end_after_its_last_byte_of_data_but_not_before() {
    let mut builder = ::tar::Builder::new(Vec::new());
    let mut header = ::tar::Header::new_ustar();
    header.set_size(3);
    header.set_mode(0o644);
    builder
        .append_data(&mut header, "a", &b"abc"[..])
        .expect("appends");
    let whole = builder.into_inner().expect("ends");
    let read = |length: usize| {
        let mut archive = Archive::new(&whole[..length]);
        let mut names = 0;
        while archive.next()?.is_some() {
            names += 1;
        }
        Ok::<_, Error>(names)
    };
    assert_eq!(read(whole.len()).expect("complete"), 1);
    assert_eq!(read(BLOCK + 3).expect("without padding"), 1);
    for cut in [BLOCK + 2, BLOCK + 4, BLOCK - 1] {
        assert!(read(cut).is_err(), "{cut}");
    }
}
