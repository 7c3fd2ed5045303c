//! The verbs, one file per noun.

mod checkpoint;
pub(crate) mod completion;
pub(crate) mod containers;
pub(crate) mod content;
mod create;
pub(crate) mod deprecations;
pub(crate) mod disk;
pub(crate) mod events;
pub(crate) mod images;
pub(crate) mod info;
pub(crate) mod install;
pub(crate) mod leases;
pub(crate) mod namespaces;
pub(crate) mod network;
pub(crate) mod objects;
pub(crate) mod oci;
pub(crate) mod plugins;
pub(crate) mod pods;
pub(crate) mod pprof;
mod remap;
pub(crate) mod run;
pub(crate) mod sandboxes;
pub(crate) mod shim;
pub(crate) mod snapshots;
pub(crate) mod tasks;
pub(crate) mod version;

/// Does `work` for each name, goes on after a failure, and fails in the end if any did.
async fn each<F>(
    names: &[String],
    verb: &str,
    mut work: impl FnMut(String) -> F,
) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    let mut first = None;
    for name in names {
        if let Err(error) = work(name.clone()).await {
            let error = error.context(format!("cannot {verb} {name}"));
            if let Some(before) = first.replace(error) {
                eprintln!("ctr: {before:#}");
            }
        }
    }
    first.map_or(Ok(()), Err)
}
