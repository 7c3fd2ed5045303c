//! The document: a row for each method, a column for each client.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use lighter_integration::{Result, raw};

use crate::Column;

/// Answers of Unimplemented that clients of the reference get as well, and why.
pub(crate) const AS_THE_REFERENCE: [(&str, &str); 4] = [
    (
        "containerd.services.mounts.v1.Mounts/Activate",
        "of mounts that need no help: the client then mounts them by itself",
    ),
    (
        "containerd.services.mounts.v1.Mounts/Update",
        "no runtime serves it",
    ),
    (
        "runtime.v1.RuntimeService/CheckpointPod",
        "no runtime serves it",
    ),
    (
        "runtime.v1.RuntimeService/RestorePod",
        "no runtime serves it",
    ),
];

/// The names of all methods.
pub(crate) fn methods() -> Result<BTreeSet<String>> {
    Ok(raw::methods()?
        .into_iter()
        .map(|method| method.name)
        .collect())
}

/// The document.
pub(crate) fn render(columns: &[Column]) -> Result<String> {
    let methods = methods()?;
    let mut text = String::from(
        "# Compatibility\n\n\
         Every method of the API, and how each client's calls of it were answered: the codes, and how \
         often each. A dot means that the client's run did not call it. The run is \
         `integration/src/bin/compatibility`; `make compatibility` does it again and rewrites this \
         file. The last column is a bare client that sends an empty request to every method: any \
         answer but Unimplemented means that the method is served.\n\n",
    );
    for column in columns.iter().take(columns.len().saturating_sub(1)) {
        let called = methods.iter().filter(|m| column.calls.contains_key(*m));
        let failed = column.failed.len();
        writeln!(
            text,
            "- {}: {} of {} methods called, {failed} commands failed",
            column.name,
            called.count(),
            methods.len()
        )?;
        for line in &column.failed {
            let line = line.lines().next().unwrap_or_default();
            writeln!(text, "  - {line}")?;
        }
    }
    text.push_str("\nUnimplemented is also the reference's answer to:\n\n");
    for (method, why) in AS_THE_REFERENCE {
        writeln!(text, "- {method}: {why}")?;
    }
    let mut service = "";
    for method in &methods {
        let (this, name) = method.split_once('/').unwrap_or((method, ""));
        if this != service {
            service = this;
            let names: Vec<_> = columns.iter().map(|c| c.name.as_str()).collect();
            writeln!(text, "\n## {service}\n\n| method | {} |", names.join(" | "))?;
            writeln!(text, "|---|{}", "---|".repeat(columns.len()))?;
        }
        let cells: Vec<_> = columns
            .iter()
            .map(|column| match column.calls.get(method) {
                None => "·".to_owned(),
                Some(answers) => answers
                    .iter()
                    .map(|(code, count)| match count {
                        1 => code.clone(),
                        _ => format!("{code} ×{count}"),
                    })
                    .collect::<Vec<_>>()
                    .join(", "),
            })
            .collect();
        writeln!(text, "| {name} | {} |", cells.join(" | "))?;
    }
    Ok(text)
}
