//! Log lines: to the file of `--log`, or to standard error, as text or as JSON with `level`, `msg` and `time`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::SystemTime;

use crate::error::{Context, Error, Result};
use crate::time::rfc3339;

/// Where log lines go.
#[derive(Clone, Debug)]
pub(crate) struct Log {
    file: Option<Arc<File>>,
    json: bool,
}

impl Log {
    pub(crate) fn stderr() -> Self {
        Self {
            file: None,
            json: false,
        }
    }

    pub(crate) fn open(path: Option<&str>, format: Option<&str>) -> Result<Self> {
        let json = match format {
            None | Some("" | "text") => false,
            Some("json") => true,
            Some(other) => {
                return Err(Error::Spec(format!(
                    "unknown log-format {other:?}: text or json"
                )));
            }
        };
        let file = match path {
            None | Some("") => None,
            Some(path) => {
                let file = File::options()
                    .append(true)
                    .create(true)
                    .mode(0o644)
                    .open(path);
                Some(Arc::new(file.context(|| format!("open log {path}"))?))
            }
        };
        Ok(Self { file, json })
    }

    /// A failure that ends the command: into the log, and to standard error if the log is a file.
    pub(crate) fn fatal(&self, message: &str) {
        self.line("error", message);
        if self.file.is_some() {
            let mut stderr = std::io::stderr().lock();
            writeln!(stderr, "{message}").ok();
        }
    }

    /// Something the user should know; the command goes on.
    pub(crate) fn warn(&self, message: &str) {
        self.line("warning", message);
    }

    fn line(&self, level: &str, message: &str) {
        let time = rfc3339(SystemTime::now());
        let line = if self.json {
            serde_json::json!({"level": level, "msg": message, "time": time}).to_string()
        } else {
            format!("time={time:?} level={level} msg={message:?}")
        };
        let line = format!("{line}\n");
        // A log that cannot be written must not decide what happens to the container.
        match &self.file {
            Some(file) => file.as_ref().write_all(line.as_bytes()).ok(),
            None => std::io::stderr().lock().write_all(line.as_bytes()).ok(),
        };
    }
}
