//! Files named by `imports`: found by glob, read once each, merged in order.
//!
//! A later file wins: tables are merged key by key, anything else is replaced, except the lists
//! of plugins, which are joined.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::Error;
use super::migrate;

/// Most files one configuration may be made of.
const MAX_FILES: usize = 1000;

/// Reads `path` and everything it imports into one table, in the newest version's layout.
pub(super) fn load(path: &Path) -> Result<toml::Table, Error> {
    let mut seen = BTreeSet::new();
    let mut merged = toml::Table::new();
    visit(path, &mut seen, &mut merged)?;
    Ok(merged)
}

fn visit(path: &Path, seen: &mut BTreeSet<PathBuf>, merged: &mut toml::Table) -> Result<(), Error> {
    let absolute = std::fs::canonicalize(path).map_err(|e| Error::read(path, e))?;
    if !seen.insert(absolute.clone()) {
        return Ok(());
    }
    if seen.len() > MAX_FILES {
        return Err(Error::Invalid {
            place: path.display().to_string(),
            reason: format!("more than {MAX_FILES} files imported"),
        });
    }
    let text = std::fs::read_to_string(path).map_err(|e| Error::read(path, e))?;
    let table: toml::Table = text.parse().map_err(|source| Error::Syntax {
        path: path.to_owned(),
        source: Box::new(source),
    })?;
    let table = migrate::to_latest(table, path)?;
    let patterns: Vec<String> = match table.get("imports") {
        None => Vec::new(),
        Some(value) => value.clone().try_into().map_err(|_| Error::Invalid {
            place: format!("{}: imports", path.display()),
            reason: "must be a list of strings".to_owned(),
        })?,
    };
    merge(merged, table);
    let here = absolute.parent().unwrap_or(Path::new("/")).to_owned();
    for pattern in patterns {
        for file in expand(&here.join(&pattern))? {
            visit(&file, seen, merged)?;
        }
    }
    Ok(())
}

/// Files that match a path whose last component may hold `*` and `?`; a plain path must exist.
fn expand(pattern: &Path) -> Result<Vec<PathBuf>, Error> {
    let name = pattern
        .file_name()
        .and_then(|n| n.to_str())
        .unwrap_or_default();
    if !name.contains(['*', '?']) {
        return Ok(vec![pattern.to_owned()]);
    }
    let dir = pattern.parent().unwrap_or(Path::new("/"));
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::read(dir, e)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::read(dir, e))?;
        let file = entry.file_name();
        if file
            .to_str()
            .is_some_and(|f| matches(name.as_bytes(), f.as_bytes()))
        {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// Shell matching of `*` and `?`.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some((b'*', rest)) => (0..=name.len()).any(|skip| matches(rest, &name[skip..])),
        Some((b'?', rest)) => !name.is_empty() && matches(rest, &name[1..]),
        Some((c, rest)) => name.first() == Some(c) && matches(rest, &name[1..]),
    }
}

fn merge(into: &mut toml::Table, from: toml::Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(toml::Value::Table(old)), toml::Value::Table(new)) => merge(old, new),
            (Some(toml::Value::Array(old)), toml::Value::Array(new))
                if matches!(
                    key.as_str(),
                    "imports" | "disabled_plugins" | "required_plugins"
                ) =>
            {
                for item in new {
                    if !old.contains(&item) {
                        old.push(item);
                    }
                }
            }
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn imports_merge_in_order_and_cycles_end() {
        let dir = tempfile::tempdir().unwrap();
        let conf = dir.path().join("conf.d");
        std::fs::create_dir(&conf).unwrap();
        let main = dir.path().join("config.toml");
        std::fs::write(
            &main,
            "version = 3\nimports = ['conf.d/*.toml']\nroot='/a'\n[debug]\nlevel='info'\nformat='text'\n",
        )
        .unwrap();
        std::fs::write(
            conf.join("10.toml"),
            "version = 3\n[debug]\nlevel='debug'\n",
        )
        .unwrap();
        std::fs::write(
            conf.join("20.toml"),
            "version = 3\nimports = ['../config.toml']\nroot='/b'\n",
        )
        .unwrap();
        let table = load(&main).unwrap();
        assert_eq!(table["root"].as_str(), Some("/b"));
        assert_eq!(table["debug"]["level"].as_str(), Some("debug"));
        assert_eq!(table["debug"]["format"].as_str(), Some("text"));
    }

    #[test]
    fn a_missing_import_is_an_error_and_an_empty_glob_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let main = dir.path().join("config.toml");
        std::fs::write(&main, "version = 2\nimports = ['none/*.toml']\n").unwrap();
        assert!(load(&main).is_ok());
        std::fs::write(&main, "version = 2\nimports = ['none.toml']\n").unwrap();
        assert!(load(&main).is_err());
    }
}
