//! Where things are and how networks are attached.

use std::path::{Path, PathBuf};

use crate::cache::DEFAULT_DIR;

/// Where things are and how networks are attached.
#[derive(Debug, Clone)]
pub struct Config {
    /// Directory of network configurations.
    pub conf_dir: PathBuf,
    /// Directories of plugin binaries, first match wins.
    pub bin_dirs: Vec<PathBuf>,
    /// Networks loaded, in the order of file names; 0 for all.
    pub max_conf_num: usize,
    /// Attach one network after the other instead of all at once.
    pub setup_serially: bool,
    /// Template of the configuration that [`Cni::write_from_template`](crate::Cni::write_from_template) writes.
    pub conf_template: Option<PathBuf>,
    /// Directory of libcni's result cache, shared with other runtimes.
    pub cache_dir: PathBuf,
    /// Directory of our own journal. It must last as long as the plugins' leases do.
    pub journal_dir: PathBuf,
}

impl Config {
    /// The usual directories, with the journal below `root`.
    #[must_use]
    pub fn with_root(root: &Path) -> Self {
        Self {
            conf_dir: PathBuf::from("/etc/cni/net.d"),
            bin_dirs: vec![PathBuf::from("/opt/cni/bin")],
            max_conf_num: 1,
            setup_serially: false,
            conf_template: None,
            cache_dir: PathBuf::from(DEFAULT_DIR),
            journal_dir: root.join("cni"),
        }
    }
}
