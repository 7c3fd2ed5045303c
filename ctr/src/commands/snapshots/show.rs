//! `ctr snapshots list`, `tree` and `usage`: what there is.

use std::collections::BTreeMap;

use lighter_proto::containerd::services::snapshots::v1::{Info, UsageRequest};
use serde::Serialize;

use super::Scope;
use crate::duration;
use crate::json;
use crate::table;

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Shown {
    kind: String,
    name: String,
    parent: String,
    labels: BTreeMap<String, String>,
    created: String,
    updated: String,
}

pub(super) fn shown(info: Info) -> Shown {
    let kind = info.kind().as_str_name();
    Shown {
        kind: format!("{}{}", &kind[..1], kind[1..].to_ascii_lowercase()),
        name: info.name,
        parent: info.parent,
        labels: info.labels.into_iter().collect(),
        created: json::time(info.created_at.as_ref()),
        updated: json::time(info.updated_at.as_ref()),
    }
}

#[derive(Debug, Serialize)]
struct UsageRow {
    key: String,
    size: i64,
    inodes: i64,
}

impl Scope<'_> {
    pub(super) async fn list(&self, filters: Vec<String>) -> anyhow::Result<()> {
        let rows: Vec<_> = self.all(filters).await?.into_iter().map(shown).collect();
        table::list(self.ctx.format, &rows, ["KEY", "PARENT", "KIND"], |row| {
            [row.name.clone(), row.parent.clone(), row.kind.clone()]
        })
    }

    pub(super) async fn tree(&self) -> anyhow::Result<()> {
        let all = self.all(Vec::new()).await?;
        table::lines(tree(&all))
    }

    pub(super) async fn usage(&self, bytes: bool, keys: Vec<String>) -> anyhow::Result<()> {
        let keys = if keys.is_empty() {
            self.all(Vec::new())
                .await?
                .into_iter()
                .map(|info| info.name)
                .collect()
        } else {
            keys
        };
        let mut rows = Vec::new();
        for key in keys {
            let request = UsageRequest {
                snapshotter: self.name(),
                key: key.clone(),
            };
            let usage = self.client.snapshots().usage(request).await?.into_inner();
            rows.push(UsageRow {
                key,
                size: usage.size,
                inodes: usage.inodes,
            });
        }
        table::list(self.ctx.format, &rows, ["KEY", "SIZE", "INODES"], |row| {
            let size = if bytes {
                row.size.to_string()
            } else {
                duration::size(row.size)
            };
            [row.key.clone(), size, row.inodes.to_string()]
        })
    }
}

/// Lines of the forest of snapshots: children below their parents.
fn tree(all: &[Info]) -> Vec<String> {
    let mut children: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let known: std::collections::BTreeSet<_> = all.iter().map(|info| info.name.as_str()).collect();
    for info in all {
        // A parent that is not listed makes a root, so that nothing is left out.
        let parent = if known.contains(info.parent.as_str()) {
            info.parent.as_str()
        } else {
            ""
        };
        children.entry(parent).or_default().push(&info.name);
    }
    let mut lines = Vec::new();
    let mut stack: Vec<(&str, usize)> = Vec::new();
    let push = |stack: &mut Vec<_>, name: &str, depth: usize| {
        let mut below = children.get(name).cloned().unwrap_or_default();
        below.sort_unstable();
        stack.extend(below.into_iter().rev().map(|child| (child, depth)));
    };
    push(&mut stack, "", 0);
    while let Some((name, depth)) = stack.pop() {
        let indent = if depth == 0 {
            String::new()
        } else {
            format!("{}\\_ ", "  ".repeat(depth))
        };
        lines.push(format!("{indent}{name}"));
        if lines.len() > all.len() {
            break;
        }
        push(&mut stack, name, depth + 1);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, parent: &str) -> Info {
        Info {
            name: name.to_owned(),
            parent: parent.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn children_stand_below_their_parents() {
        let all = [
            info("c", "b"),
            info("a", ""),
            info("b", "a"),
            info("d", "a"),
            info("x", "gone"),
        ];
        assert_eq!(tree(&all), ["a", "  \\_ b", "    \\_ c", "  \\_ d", "x"]);
    }

    #[test]
    fn a_ring_of_parents_ends() {
        assert_eq!(
            tree(&[info("a", "b"), info("b", "a")]),
            Vec::<String>::new()
        );
        assert_eq!(tree(&[info("a", "a")]), Vec::<String>::new());
    }
}
