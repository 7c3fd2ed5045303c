//! The shim's log: logfmt lines written to the fifo `log` of its bundle, which the daemon reads.
//!
//! A reader that is slow or gone costs lines, never time: the fifo is opened for both directions,
//! so that a daemon's death is no error, and without blocking.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{Mode, OFlags};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Longest line; one write of at most this many bytes to a pipe is atomic.
const MAX_LINE_BYTES: usize = 4096;

struct Log {
    fifo: File,
    level: Level,
}

/// Sends tracing events of this process to `<bundle>/log`; without such a fifo nothing is logged.
pub(crate) fn init(bundle: &Path, level: Level) {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let Ok(fd) = rustix::fs::open(bundle.join("log"), flags, Mode::empty()) else {
        return;
    };
    if !is_fifo(&fd) {
        return;
    }
    // A second initialisation keeps the first log.
    let _ = tracing::subscriber::set_global_default(Log {
        fifo: File::from(fd),
        level,
    });
}

fn is_fifo(fd: &OwnedFd) -> bool {
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Fifo
    })
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Dependencies log at info what only they care about.
        *metadata.level() <= self.level
            && (*metadata.level() <= Level::WARN
                || metadata.target().starts_with("containerd_shim"))
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let level = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            Level::INFO => "info",
            Level::DEBUG => "debug",
            Level::TRACE => "trace",
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        let now = lighter_floor::timestamp::Rfc3339::of(SystemTime::now());
        let mut line = String::new();
        let _ = write!(
            line,
            "time=\"{}\" level={level} msg={:?}",
            now.as_str(),
            fields.message
        );
        line.push_str(&fields.rest);
        truncate(&mut line, MAX_LINE_BYTES - 1);
        line.push('\n');
        // Nobody reads, or too slowly: the line is lost, the container is not held up.
        let _ = (&self.fifo).write(line.as_bytes());
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

fn truncate(line: &mut String, limit: usize) {
    if line.len() > limit {
        let mut end = limit;
        while !line.is_char_boundary(end) {
            end -= 1;
        }
        line.truncate(end);
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            let _ = write!(self.rest, " {}={value:?}", field.name());
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            let text = format!("{value:?}");
            if text.contains(|c: char| c.is_whitespace() || c == '"' || c == '=') {
                let _ = write!(self.rest, " {}={text:?}", field.name());
            } else {
                let _ = write!(self.rest, " {}={text}", field.name());
            }
        }
    }
}
