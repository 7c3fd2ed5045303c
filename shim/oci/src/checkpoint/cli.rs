//! `checkpoint` and `restore` with runc's options.

use std::path::{Path, PathBuf};

use super::dump::{Afterwards, dump};
use super::{Choices, restore};
use crate::cli::args::{Arguments, Flag, one_id};
use crate::cli::create::Handover;
use crate::cli::{Context, Status, attach};
use crate::container::Deletion;
use crate::error::{Context as _, Error, Result};
use crate::spec::Spec;

const FLAGS: &[Flag] = &[
    Flag::value("image-path"),
    Flag::value("work-path"),
    Flag::value("parent-path"),
    Flag::switch("leave-running"),
    Flag::switch("tcp-established"),
    Flag::switch("ext-unix-sk"),
    Flag::switch("shell-job"),
    Flag::switch("lazy-pages"),
    Flag::switch("file-locks"),
    Flag::switch("link-remap"),
    Flag::switch("pre-dump"),
    Flag::value("manage-cgroups-mode"),
    Flag::value("empty-ns"),
    Flag::switch("auto-dedup"),
    Flag::value("bundle").or("b"),
    Flag::switch("detach").or("d"),
    Flag::value("pid-file"),
    Flag::value("console-socket"),
    Flag::value("pidfd-socket"),
    Flag::switch("no-subreaper"),
    Flag::switch("no-pivot"),
];

fn choices(arguments: &Arguments) -> Result<Choices> {
    let absolute = |path: &str| std::path::absolute(path).context(|| format!("path {path}"));
    let images = absolute(arguments.get("image-path").unwrap_or("checkpoint"))?;
    let work = match arguments.get("work-path").filter(|path| !path.is_empty()) {
        Some(path) => absolute(path)?,
        None => images.clone(),
    };
    if arguments.all("empty-ns").any(|name| name != "network") {
        return Err(Error::Spec("--empty-ns: only network is known".into()));
    }
    Ok(Choices {
        images,
        work,
        tcp_established: arguments.is_set("tcp-established"),
        external_unix_sockets: arguments.is_set("ext-unix-sk"),
        shell_job: arguments.is_set("shell-job"),
        file_locks: arguments.is_set("file-locks"),
        link_remap: arguments.is_set("link-remap"),
        auto_dedup: arguments.is_set("auto-dedup"),
        lazy_pages: arguments.is_set("lazy-pages"),
        manage_cgroups: arguments.get("manage-cgroups-mode").map(str::to_owned),
    })
}

/// `checkpoint`
pub(crate) fn checkpoint(context: &Context, words: Vec<String>) -> Result<Status> {
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("checkpoint", words)?;
    let container = context.runtime.container(&id)?;
    let parent = arguments
        .get("parent-path")
        .filter(|path| !path.is_empty())
        .map(PathBuf::from);
    let afterwards = if arguments.is_set("leave-running") {
        Afterwards::Runs
    } else {
        Afterwards::Ends
    };
    let pre_dump = arguments.is_set("pre-dump");
    dump(
        &container,
        &choices(&arguments)?,
        parent.as_deref(),
        pre_dump,
        afterwards,
    )
    .map(|()| 0)
}

/// `restore`
pub(crate) fn restore(context: &Context, words: Vec<String>) -> Result<Status> {
    let (arguments, words) = Arguments::parse(FLAGS, words)?;
    let id = one_id("restore", words)?;
    let bundle = Path::new(
        arguments
            .get("bundle")
            .filter(|path| !path.is_empty())
            .unwrap_or("."),
    );
    let bundle =
        std::fs::canonicalize(bundle).context(|| format!("bundle {}", bundle.display()))?;
    let spec = Spec::load(&bundle)?;
    if spec
        .process
        .as_ref()
        .is_some_and(|process| process.terminal)
    {
        return Err(Error::Unsupported(
            "restore: containers with a terminal cannot be restored".into(),
        ));
    }
    let detached = arguments.is_set("detach");
    if !detached {
        // The restored init becomes ours when criu ends.
        crate::sys::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0).context(|| "become a subreaper")?;
    }
    let signals = if detached {
        None
    } else {
        Some(attach::Signals::take()?)
    };
    let created = restore::restore(&context.runtime, &id, &bundle, &spec, &choices(&arguments)?)?;
    Handover::new(&arguments).give(&created)?;
    let Some(signals) = signals else { return Ok(0) };
    let status = attach::wait(&created.pidfd, None, &signals)?;
    context.runtime.container(&id)?.delete(Deletion::Forced)?;
    Ok(status)
}
