//! Everything that reaches standard output: aligned tables for people, JSON for programs.

use std::io::{self, Write};

use anyhow::Context as _;
use clap::ValueEnum;
use serde::Serialize;

/// What a listing is printed as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns with a header.
    #[default]
    #[value(alias = "default")]
    Table,
    /// A JSON document.
    Json,
}

/// Spaces between two columns; upstream's tables have as many at least.
const GAP: usize = 4;

/// Rows with a header, aligned when printed.
#[derive(Debug)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub(crate) fn new<const N: usize>(header: [&str; N]) -> Self {
        Self {
            rows: vec![header.map(str::to_owned).to_vec()],
        }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(Vec::from(cells));
    }

    /// The rows as text, columns padded to their widest cell, no trailing blanks.
    pub(crate) fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|c| c.chars().count())
                .max()
        };
        let widths: Vec<_> = (0..columns)
            .map(|column| width(column).unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                let pad = width - cell.chars().count() + GAP;
                line.extend(std::iter::repeat_n(' ', pad));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// Prints a list: one name a line when `quiet`, else as `format` says.
pub(crate) fn list<T: Serialize, const N: usize>(
    format: Format,
    items: &[T],
    header: [&str; N],
    cells: impl Fn(&T) -> [String; N],
) -> anyhow::Result<()> {
    match format {
        Format::Json => json(&items),
        Format::Table => {
            let mut table = Table::new(header);
            for item in items {
                table.row(cells(item));
            }
            raw(table.render().as_bytes())
        }
    }
}

/// Prints one line per item.
pub(crate) fn lines<S: AsRef<str>>(items: impl IntoIterator<Item = S>) -> anyhow::Result<()> {
    let mut text = String::new();
    for item in items {
        text.push_str(item.as_ref());
        text.push('\n');
    }
    raw(text.as_bytes())
}

/// Prints one line.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    lines([text])
}

/// Prints a value as indented JSON.
pub(crate) fn json<T: Serialize + ?Sized>(value: &T) -> anyhow::Result<()> {
    line(&serde_json::to_string_pretty(value).context("cannot write JSON")?)
}

/// Writes bytes and flushes.
pub(crate) fn raw(bytes: &[u8]) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

/// Whether the failure is that our reader went away.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    let broken = |cause: &io::Error| cause.kind() == io::ErrorKind::BrokenPipe;
    error.to_string().contains("standard output")
        && error
            .chain()
            .filter_map(|cause| cause.downcast_ref())
            .any(broken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_padded_to_the_widest_cell() {
        let mut table = Table::new(["TASK", "PID"]);
        table.row(["a-long-name".to_owned(), "7".to_owned()]);
        table.row(["ü".to_owned(), String::new()]);
        assert_eq!(table.render(), "TASK           PID\na-long-name    7\nü\n");
    }

    #[test]
    fn only_a_lost_reader_is_a_broken_pipe() {
        let lost = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(is_broken_pipe(
            &anyhow::Error::new(lost).context("cannot write to standard output")
        ));
        let remote = io::Error::from(io::ErrorKind::BrokenPipe);
        assert!(!is_broken_pipe(
            &anyhow::Error::new(remote).context("cannot connect")
        ));
    }
}
