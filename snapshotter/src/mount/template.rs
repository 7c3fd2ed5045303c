//! `{{ … }}` in the mounts of `format/`: what is mounted already, by index.

use super::Mount;

/// Most bytes that a filled-in text may have: a page is what the kernel takes of options.
const MAX_BYTES: usize = 64 << 10;

/// A mount that was made already, for those after it.
#[derive(Debug, Clone, Copy)]
pub struct Made<'a> {
    /// The mount.
    pub mount: &'a Mount,
    /// Where it is mounted.
    pub point: &'a str,
}

/// Fills `text` in: `source i`, `target i`, `mount i`, `overlay start end`.
///
/// # Errors
/// For an unknown function, an index that is not mounted, or an open brace.
pub(super) fn fill(text: &str, active: &[Made<'_>]) -> Result<String, String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(begin) = rest.find("{{") {
        out.push_str(&rest[..begin]);
        let inner = &rest[begin + 2..];
        let end = inner
            .find("}}")
            .ok_or_else(|| format!("template {text:?} has no closing braces"))?;
        out.push_str(&call(&inner[..end], active)?);
        if out.len() > MAX_BYTES {
            return Err(format!("template {text:?} grows beyond {MAX_BYTES} bytes"));
        }
        rest = &inner[end + 2..];
    }
    out.push_str(rest);
    Ok(out)
}

fn call(text: &str, active: &[Made<'_>]) -> Result<String, String> {
    let words: Vec<&str> = text.trim_matches('-').split_whitespace().collect();
    let index = |word: &str| -> Result<usize, String> {
        let index: usize = word
            .parse()
            .map_err(|_| format!("{word:?} in a mount template is no index"))?;
        if index < active.len() {
            Ok(index)
        } else {
            Err(format!("mount {index} in a mount template is not active"))
        }
    };
    match words.as_slice() {
        ["source", i] => Ok(active[index(i)?].mount.source.clone()),
        ["target", i] => Ok(active[index(i)?].mount.target.clone()),
        ["mount", i] => Ok(active[index(i)?].point.to_owned()),
        ["overlay", start, end] => {
            let (start, end) = (index(start)?, index(end)?);
            let points = |range: &mut dyn Iterator<Item = usize>| {
                range.map(|i| active[i].point).collect::<Vec<_>>().join(":")
            };
            Ok(if start <= end {
                points(&mut (start..=end))
            } else {
                points(&mut (end..=start).rev())
            })
        }
        _ => Err(format!("unknown function in mount template: {text:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_name_what_is_mounted_in_the_order_of_their_arguments() {
        let mounts: Vec<Mount> = (0..3)
            .map(|i| Mount {
                source: format!("/s{i}"),
                ..Mount::default()
            })
            .collect();
        let points = ["/m0", "/m1", "/m2"];
        let made: Vec<Made<'_>> = mounts
            .iter()
            .zip(points)
            .map(|(mount, point)| Made { mount, point })
            .collect();
        let fill = |text: &str| fill(text, &made);
        assert_eq!(
            fill("lowerdir={{ overlay 2 0 }}").unwrap(),
            "lowerdir=/m2:/m1:/m0"
        );
        assert_eq!(fill("{{overlay 0 1}}").unwrap(), "/m0:/m1");
        assert_eq!(fill("{{ mount 1 }}/x{{ source 2 }}").unwrap(), "/m1/x/s2");
        for bad in [
            "{{ mount 3 }}",
            "{{ rm 0 }}",
            "{{ mount 0",
            "{{ overlay 0 9 }}",
        ] {
            assert!(fill(bad).is_err(), "{bad}");
        }
    }
}
