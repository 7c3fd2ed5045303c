//! What comes before a mount whose type has prefixes: `format/` fills templates in from what is
//! mounted already, `mkfs/` makes an image file, `mkdir/` makes directories.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use super::Mount;
use super::template::{Made, fill};

/// Options that are instructions, not words for the kernel.
const OURS: &str = "X-containerd.";
/// Mode of a directory whose option names none.
const DIR_MODE: u32 = 0o700;
/// Largest image that is made.
const MAX_IMAGE_BYTES: u64 = 1 << 44;

/// Prefixes of a type that are carried out here.
const PREFIXES: [&str; 3] = ["format/", "mkfs/", "mkdir/"];

/// Whether a mount's type has prefixes.
#[must_use]
pub fn has_prefix(mount: &Mount) -> bool {
    PREFIXES
        .iter()
        .any(|prefix| mount.fstype.starts_with(prefix))
}

/// The mount with the prefixes of its type carried out, left to right. `made` are the mounts before
/// it; files and directories are made below `roots` only.
///
/// # Errors
/// What is wrong with the mount, or why something could not be made.
pub fn ready(mount: &Mount, made: &[Made<'_>], roots: &[PathBuf]) -> Result<Mount, String> {
    let mut mount = mount.clone();
    let mut ours = take_ours(&mut mount);
    while let Some((prefix, rest)) = mount.fstype.split_once('/') {
        let (prefix, rest) = (prefix.to_owned(), rest.to_owned());
        match prefix.as_str() {
            "format" => {
                mount.source = fill(&mount.source, made)?;
                mount.target = fill(&mount.target, made)?;
                for option in &mut mount.options {
                    *option = fill(option, made)?;
                }
                for (_, value) in &mut ours {
                    *value = fill(value, made)?;
                }
            }
            "mkfs" => mkfs(&mount, &ours, roots)?,
            "mkdir" => mkdir(&ours, roots)?,
            other => return Err(format!("unknown mount transformation {other:?}")),
        }
        mount.fstype = rest;
    }
    Ok(mount)
}

/// Runs a program; what it printed, or why it failed.
fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|e| format!("{name}: {e}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let stderr = String::from_utf8_lossy(&output.stderr);
        Err(format!("{name}: {}: {}", stderr.trim(), output.status))
    }
}

/// Takes the options that are instructions off a mount; each as name and value.
fn take_ours(mount: &mut Mount) -> Vec<(String, String)> {
    let mut ours = Vec::new();
    mount
        .options
        .retain(|option| match option.strip_prefix(OURS) {
            Some(instruction) => {
                let (name, value) = instruction.split_once('=').unwrap_or((instruction, ""));
                ours.push((name.to_owned(), value.to_owned()));
                false
            }
            None => true,
        });
    ours
}

/// Makes the filesystem image that is the mount's source, if it is not there yet.
///
/// # Errors
/// For instructions that make no sense, or when the image cannot be made; it is removed then.
fn mkfs(mount: &Mount, ours: &[(String, String)], roots: &[PathBuf]) -> Result<(), String> {
    let value = |name: &str| {
        let mut values = ours.iter().filter(|(n, _)| n == name);
        values.next().map(|(_, value)| value.as_str())
    };
    let size = value("mkfs.size").ok_or("mkfs needs option X-containerd.mkfs.size")?;
    let size =
        size_bytes(size).ok_or_else(|| format!("X-containerd.mkfs.size={size} is no size"))?;
    let kind = value("mkfs.fs").unwrap_or("ext4");
    if !matches!(kind, "ext2" | "ext3" | "ext4" | "xfs") {
        return Err(format!(
            "X-containerd.mkfs.fs={kind} is none of ext2, ext3, ext4, xfs"
        ));
    }
    let image = Path::new(&mount.source);
    beneath(image, roots)?;
    let file = match File::create_new(image) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(e) => return Err(format!("create {}: {e}", image.display())),
    };
    let made = file
        .set_len(size)
        .map_err(|e| e.to_string())
        .and_then(|()| {
            let mut command = Command::new(format!("mkfs.{kind}"));
            let uuid = value("mkfs.uuid");
            if kind == "xfs" {
                command.arg("-q");
                if let Some(uuid) = uuid {
                    command.arg("-m").arg(format!("uuid={uuid}"));
                }
            } else {
                command.args(["-q", "-F"]);
                if let Some(uuid) = uuid {
                    command.args(["-U", uuid]);
                }
            }
            output(command.arg(image)).map(drop)
        });
    made.map_err(|error| {
        let _gone = std::fs::remove_file(image);
        format!("make a filesystem in {}: {error}", image.display())
    })
}

/// Makes the directories that the instructions name: `path[:mode[:uid:gid]]`.
///
/// # Errors
/// For a path outside the roots, or when one cannot be made.
fn mkdir(ours: &[(String, String)], roots: &[PathBuf]) -> Result<(), String> {
    for (_, value) in ours.iter().filter(|(name, _)| name == "mkdir.path") {
        let words: Vec<&str> = value.split(':').collect();
        let bad =
            || format!("X-containerd.mkdir.path={value} is not of the form path[:mode[:uid:gid]]");
        let (path, mode, owner) = match words.as_slice() {
            [path] => (*path, None, None),
            [path, mode] => (*path, Some(*mode), None),
            [path, mode, uid, gid] => (*path, Some(*mode), Some((*uid, *gid))),
            _ => return Err(bad()),
        };
        let path = Path::new(path);
        beneath(path, roots)?;
        if path.is_dir() {
            continue;
        }
        let mode = mode
            .filter(|m| !m.is_empty())
            .map_or(Ok(DIR_MODE), |m| u32::from_str_radix(m, 8))
            .map_err(|_| bad())?;
        let failed = |e: std::io::Error| format!("mkdir {}: {e}", path.display());
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)?;
        if let Some((uid, gid)) = owner {
            let id = |text: &str| text.parse::<u32>().map_err(|_| bad());
            chown(path, Some(id(uid)?), Some(id(gid)?)).map_err(failed)?;
        }
    }
    Ok(())
}

/// Refuses a path that is not plainly below one of `roots`.
fn beneath(path: &Path, roots: &[PathBuf]) -> Result<(), String> {
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    // Links on the way are resolved as far as the path exists, so that none leads out.
    let existing = path.ancestors().find_map(|p| std::fs::canonicalize(p).ok());
    let inside = |path: &Path| {
        roots
            .iter()
            .any(|root| std::fs::canonicalize(root).is_ok_and(|root| path.starts_with(root)))
    };
    if plain && path.is_absolute() && existing.is_some_and(|p| inside(&p)) {
        Ok(())
    } else {
        Err(format!(
            "{} is outside the directories where mounts may be prepared",
            path.display()
        ))
    }
}

/// A size with an optional unit: `64MiB`, `64M`, `1g`, `4096`.
#[must_use]
pub fn size_bytes(text: &str) -> Option<u64> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let number: u64 = text[..digits].parse().ok()?;
    let unit = match text[digits..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1u64 << 40,
        _ => return None,
    };
    number
        .checked_mul(unit)
        .filter(|n| (1..=MAX_IMAGE_BYTES).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units_and_bounds() {
        assert_eq!(size_bytes("64MiB"), Some(64 << 20));
        assert_eq!(size_bytes("10"), Some(10));
        for bad in ["", "0", "x", "1q", "99999999999999999999", "99999t"] {
            assert_eq!(size_bytes(bad), None, "{bad}");
        }
    }

    #[test]
    fn directories_are_made_below_the_roots_only() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::os::unix::fs::symlink("/", root.join("out")).unwrap();
        let roots = [root.clone()];
        let option = |path: &str| vec![("mkdir.path".to_owned(), path.to_owned())];
        let good = root.join("a/b");
        mkdir(&option(&format!("{}:0751", good.display())), &roots).unwrap();
        assert_eq!(
            std::fs::metadata(&good).unwrap().permissions().mode() & 0o777,
            0o751
        );
        for bad in [
            dir.path().join("c"),
            root.join("../c"),
            root.join("out/tmp/lighter-never"),
            PathBuf::from("relative"),
        ] {
            assert!(
                mkdir(&option(&bad.display().to_string()), &roots).is_err(),
                "{}",
                bad.display()
            );
        }
    }

    #[test]
    fn instructions_are_taken_off_the_options() {
        let mut mount = Mount {
            options: vec!["ro".to_owned(), "X-containerd.mkfs.size=1M".to_owned()],
            ..Mount::default()
        };
        assert_eq!(
            take_ours(&mut mount),
            [("mkfs.size".to_owned(), "1M".to_owned())]
        );
        assert_eq!(mount.options, ["ro"]);
    }
}
