//! The small languages of the container flags: mounts, id mappings, namespaces, limits.

use super::model::{IdMapping, Mount, Namespace, Rlimit};

/// Namespaces that `--with-ns` can join.
const NAMESPACES: [&str; 8] = [
    "pid", "network", "uts", "mount", "user", "ipc", "cgroup", "time",
];

/// `type=bind,src=/a,dst=/b,options=rbind:ro`; fields may be quoted as in CSV.
pub(crate) fn mount(text: &str) -> Result<Mount, String> {
    let mut mount = Mount::default();
    for field in csv(text)? {
        let (key, value) = field
            .split_once('=')
            .ok_or_else(|| format!("mount field {field:?} has no value: write key=value"))?;
        match key {
            "type" => mount.kind = value.to_owned(),
            "source" | "src" => mount.source = value.to_owned(),
            "destination" | "dst" | "target" => mount.destination = value.to_owned(),
            "options" => mount.options = value.split(':').map(str::to_owned).collect(),
            _ => {
                return Err(format!(
                    "mount option {key:?} is not supported: use type, src, dst and options"
                ));
            }
        }
    }
    if mount.destination.is_empty() {
        return Err("a mount needs a destination: add dst=/path".to_owned());
    }
    Ok(mount)
}

/// Splits at commas outside of double quotes; `""` within quotes is one quote.
fn csv(text: &str) -> Result<Vec<String>, String> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let field = fields.last_mut().expect("starts with one field");
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => field.push(c),
        }
    }
    if quoted {
        Err(format!("{text:?} has a quote without an end"))
    } else {
        Ok(fields)
    }
}

/// `container-uid:host-uid:length`.
pub(crate) fn id_mapping(text: &str) -> Result<IdMapping, String> {
    let wrong = || format!("{text:?} is no id mapping: write container-id:host-id:length");
    let parts: Vec<u32> = text
        .split(':')
        .map(|part| part.parse().map_err(|_| wrong()))
        .collect::<Result<_, _>>()?;
    match parts[..] {
        [container_id, host_id, size] if size > 0 => Ok(IdMapping {
            container_id,
            host_id,
            size,
        }),
        _ => Err(wrong()),
    }
}

/// `network:/proc/7/ns/net`.
pub(crate) fn namespace(text: &str) -> Result<Namespace, String> {
    let (kind, path) = text
        .split_once(':')
        .ok_or_else(|| format!("{text:?} names no namespace: write type:path"))?;
    if !NAMESPACES.contains(&kind) {
        return Err(format!(
            "{kind:?} is no namespace type: use one of {}",
            NAMESPACES.join(", ")
        ));
    }
    Ok(Namespace {
        kind: kind.to_owned(),
        path: path.to_owned(),
    })
}

/// `soft:hard`, or one number for both.
pub(crate) fn nofile(text: &str) -> Result<Rlimit, String> {
    let wrong = || format!("{text:?} is no limit of open files: write soft:hard");
    let (soft, hard) = text.split_once(':').unwrap_or((text, text));
    let soft = soft.parse().map_err(|_| wrong())?;
    let hard = hard.parse().map_err(|_| wrong())?;
    if soft > hard {
        return Err(format!("{text:?}: the soft limit is above the hard one"));
    }
    Ok(Rlimit {
        kind: "RLIMIT_NOFILE".to_owned(),
        hard,
        soft,
    })
}

/// A capability with its `CAP_` prefix.
pub(crate) fn capability(text: &str) -> Result<String, String> {
    if super::defaults::ALL_CAPABILITIES.contains(&text) {
        return Ok(text.to_owned());
    }
    if text.starts_with("CAP_") {
        return Err(format!(
            "unknown capability {text:?}: capabilities(7) lists them"
        ));
    }
    Err(format!(
        "{text:?}: capabilities must be specified with 'CAP_' prefix"
    ))
}

/// Lines of an env file: `KEY=value`, blank lines and `#` comments skipped, a bare `KEY` taken from
/// our own environment.
pub(crate) fn env_file(text: &str) -> Vec<String> {
    text.lines()
        .map(str::trim_start)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_has_short_and_long_names() {
        let short = mount("type=bind,src=/tmp,dst=/host,options=rbind:ro").unwrap();
        let long = mount("type=bind,source=/tmp,destination=/host,options=rbind:ro").unwrap();
        assert_eq!(short, long);
        assert_eq!(short.options, ["rbind", "ro"]);
    }

    #[test]
    fn quotes_keep_commas() {
        let quoted = mount(r#"type=bind,"src=/a,b",dst=/c"#).unwrap();
        assert_eq!(quoted.source, "/a,b");
        assert!(mount(r#"dst=/a,"src=/b"#).is_err());
    }

    #[test]
    fn wrong_mounts_say_what_is_wrong() {
        assert!(
            mount("type=bind,src=/a")
                .unwrap_err()
                .contains("destination")
        );
        assert!(mount("typo=bind,dst=/a").unwrap_err().contains("typo"));
        assert!(mount("bind").unwrap_err().contains("key=value"));
    }

    #[test]
    fn id_mappings_have_three_numbers() {
        let mapping = id_mapping("0:100000:65536").unwrap();
        assert_eq!(
            (mapping.container_id, mapping.host_id, mapping.size),
            (0, 100_000, 65_536)
        );
        for text in ["", "0:1", "0:1:2:3", "a:1:2", "0:1:0", "0:1:4294967296"] {
            assert!(id_mapping(text).is_err(), "{text}");
        }
    }

    #[test]
    fn namespaces_limits_and_capabilities_are_checked() {
        assert_eq!(
            namespace("network:/run/netns/a").unwrap().path,
            "/run/netns/a"
        );
        assert!(namespace("net:/x").is_err() && namespace("pid").is_err());
        assert_eq!(nofile("10:20").unwrap().hard, 20);
        assert_eq!(nofile("10").unwrap().hard, 10);
        assert!(nofile("20:10").is_err() && nofile("x").is_err());
        assert!(capability("CAP_SYS_ADMIN").is_ok());
        assert!(capability("SYS_ADMIN").is_err() && capability("CAP_TYPO").is_err());
    }

    #[test]
    fn an_env_file_has_comments() {
        assert_eq!(
            env_file("# x\n\nA=1\n  B=2 # kept\n"),
            ["A=1", "B=2 # kept"]
        );
    }
}
