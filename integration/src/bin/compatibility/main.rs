//! Which method of the API each client calls, and how it is answered: writes
//! `docs/compatibility.md` from a run of every client that this machine has.
//!
//! A client's calls are read from the daemon's own counters (`grpc_server_handled_total`), so that
//! nothing here has to know what a client does beneath a command. The last column is a bare client
//! that calls every method of the descriptors with an empty request: a method that is not served
//! shows there even where no other client calls it.
//!
//! Further clients are named by environment variables, because Debian has none of them:
//! `UPSTREAM_CTR` (containerd 2.x's ctr), `CRICTL`, and `BUILDKIT`, the folder of buildkitd and
//! buildctl.

mod calls;
mod clients;
mod table;

use std::io::Write as _;
use std::path::{Path, PathBuf};

use lighter_integration::{Engine, Result, built};

use self::calls::Calls;

/// Where the table goes when no argument names another file.
const OUTPUT: &str = "docs/compatibility.md";

/// One column.
struct Column {
    name: String,
    calls: Calls,
    /// Commands that failed, with what they said.
    failed: Vec<String>,
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> Result {
    let output = std::env::args().nth(1);
    let output = PathBuf::from(output.unwrap_or_else(|| OUTPUT.to_owned()));
    let mut columns = Vec::new();
    columns.push(clients::command_line("ctr (lighter)", &built("ctr"), true).await?);
    columns
        .push(clients::command_line("ctr (Debian, 1.6)", Path::new("/usr/bin/ctr"), false).await?);
    if let Some(program) = std::env::var_os("UPSTREAM_CTR") {
        columns
            .push(clients::command_line("ctr (upstream, 2.x)", Path::new(&program), true).await?);
    }
    if Engine::is_installed() {
        columns.push(clients::docker().await?);
    }
    if let Some(folder) = std::env::var_os("BUILDKIT") {
        columns.push(clients::buildkit(Path::new(&folder)).await?);
    }
    if let Some(program) = std::env::var_os("CRICTL") {
        columns.push(clients::crictl(Path::new(&program)).await?);
    }
    columns.push(clients::bare().await?);
    let text = table::render(&columns)?;
    if let Some(dir) = output.parent() {
        std::fs::create_dir_all(dir)?;
    }
    std::fs::write(&output, text)?;
    say(&format!("wrote {}", output.display()))?;
    let mut broken = false;
    for column in &columns {
        for line in &column.failed {
            say(&format!("{}: {line}", column.name))?;
            broken = true;
        }
        for (method, answers) in &column.calls {
            let known = table::AS_THE_REFERENCE
                .iter()
                .any(|(name, _)| name == method);
            if answers.contains_key("Unimplemented") && !known {
                say(&format!("{}: {method} is not served", column.name))?;
                broken = true;
            }
        }
    }
    anyhow::ensure!(!broken, "there are holes, see above");
    Ok(())
}

fn say(line: &str) -> Result {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
