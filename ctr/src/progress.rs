//! What a transfer is doing, shown: bars on a terminal, one line per change elsewhere.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use lighter_proto::any;
use lighter_proto::containerd::types::transfer::Progress;

use crate::streaming::Stream;

/// Bars shown at most; an image with more layers shows the first ones.
const MAX_BARS: usize = 64;
/// Characters of a name that are shown.
const NAME_WIDTH: usize = 40;

/// Shows the progress that arrives on `stream`, until it ends.
pub(crate) async fn show(mut stream: Stream) {
    let mut board = Board::new();
    while let Some(message) = stream.next().await {
        if let Ok(progress) = any::unpack::<Progress>(&message) {
            board.update(&progress);
        }
    }
    board.finish();
}

/// The progress of work done from here; clones show on the same board.
#[derive(Debug, Clone)]
pub(crate) struct Shown(Arc<Mutex<Board>>);

impl Shown {
    /// An empty board.
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(Board::new())))
    }

    /// A line about the whole.
    pub(crate) fn say(&self, event: &str) {
        self.update("", event, 0, 0);
    }

    /// `name` is in the state `event`, `done` of `total` bytes.
    pub(crate) fn update(&self, name: &str, event: &str, done: i64, total: i64) {
        let progress = Progress {
            name: name.to_owned(),
            event: event.to_owned(),
            progress: done,
            total,
            ..Progress::default()
        };
        let mut board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        board.update(&progress);
    }

    /// Leaves what is shown on the screen.
    pub(crate) fn finish(&self) {
        let board = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        board.finish();
    }
}

/// Everything that has been reported.
#[derive(Debug)]
struct Board {
    /// `None` where bars would be noise.
    screen: Option<MultiProgress>,
    bars: HashMap<String, ProgressBar>,
    /// Last state printed of each name.
    printed: HashMap<String, String>,
}

impl Board {
    fn new() -> Self {
        let screen = std::io::stderr().is_terminal().then(MultiProgress::new);
        Self {
            screen,
            bars: HashMap::new(),
            printed: HashMap::new(),
        }
    }

    fn update(&mut self, progress: &Progress) {
        if self.screen.is_some() {
            self.draw(progress);
        } else if let Some(line) = self.line(progress) {
            eprintln!("{line}");
        }
    }

    /// The line for a change; `None` when only the number of bytes moved.
    fn line(&mut self, progress: &Progress) -> Option<String> {
        let (name, state) = (&progress.name, &progress.event);
        if self.printed.get(name) == Some(state) || self.printed.len() > MAX_BARS * 16 {
            return None;
        }
        self.printed.insert(name.clone(), state.clone());
        Some(if name.is_empty() {
            clean(state)
        } else {
            format!("{}: {}", clean(name), clean(state))
        })
    }

    fn draw(&mut self, progress: &Progress) {
        let Some(screen) = &self.screen else { return };
        if progress.name.is_empty() {
            // A terminal that refuses a line will refuse the bars as well.
            let _ = screen.println(clean(&progress.event));
            return;
        }
        if !self.bars.contains_key(&progress.name) && self.bars.len() >= MAX_BARS {
            return;
        }
        let bar = self.bars.entry(progress.name.clone()).or_insert_with(|| {
            let bar = screen.add(ProgressBar::new(0));
            bar.set_prefix(short(&progress.name));
            bar
        });
        bar.set_style(style(progress.total > 0));
        bar.set_message(clean(&progress.event));
        if let (Ok(done), Ok(total @ 1..)) = (
            u64::try_from(progress.progress),
            u64::try_from(progress.total),
        ) {
            bar.set_length(total);
            bar.set_position(done.min(total));
        }
        if [
            "complete",
            "already exists",
            "extracted",
            "saved",
            "done",
            "exists",
        ]
        .contains(&progress.event.as_str())
        {
            bar.set_position(bar.length().unwrap_or(0));
        }
        bar.tick();
    }

    fn finish(&self) {
        for bar in self.bars.values() {
            bar.abandon();
        }
    }
}

fn style(sized: bool) -> ProgressStyle {
    let template = if sized {
        "{prefix:40} {msg:16} [{bar:30}] {bytes:>10}/{total_bytes:10}"
    } else {
        "{prefix:40} {msg:16}"
    };
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

/// A name short enough for its column; of a digest the start says enough.
fn short(name: &str) -> String {
    let name = clean(name);
    if name.chars().count() <= NAME_WIDTH {
        return name;
    }
    name.chars().take(NAME_WIDTH - 1).chain(['…']).collect()
}

/// Text from elsewhere without control characters, which could drive our terminal.
fn clean(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn progress(name: &str, event: &str, done: i64) -> Progress {
        Progress {
            name: name.to_owned(),
            event: event.to_owned(),
            progress: done,
            total: 10,
            ..Default::default()
        }
    }

    fn board() -> Board {
        Board {
            screen: None,
            bars: HashMap::new(),
            printed: HashMap::new(),
        }
    }

    #[test]
    fn a_line_is_printed_only_when_the_state_changes() {
        let mut board = board();
        let shown: Vec<_> = [
            ("a", "downloading", 1),
            ("a", "downloading", 5),
            ("a", "complete", 10),
        ]
        .iter()
        .filter_map(|(name, event, done)| board.line(&progress(name, event, *done)))
        .collect();
        assert_eq!(shown, ["a: downloading", "a: complete"]);
        assert_eq!(
            board.line(&progress("", "Resolving", 0)).unwrap(),
            "Resolving"
        );
    }

    #[test]
    fn a_registry_cannot_drive_the_terminal() {
        assert_eq!(
            board().line(&progress("a\x1b[2J", "b\r", 0)).unwrap(),
            "a[2J: b"
        );
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(short(&"x".repeat(100)).chars().count(), NAME_WIDTH);
        assert_eq!(short("short"), "short");
    }

    #[test]
    fn drawing_without_a_terminal_does_nothing_and_styles_are_valid() {
        let mut board = board();
        board.draw(&progress("a", "b", 1));
        assert!(board.bars.is_empty());
        for template in [true, false] {
            drop(style(template));
        }
    }
}
