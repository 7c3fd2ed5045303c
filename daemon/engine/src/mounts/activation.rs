//! What is asked of the manager, and what it made of it.

use std::borrow::Cow;
use std::time::SystemTime;

use lighter_snapshotter::Mount;
use lighter_store::Labels;
use lighter_store::filter::Fields;

/// One mount that was made here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Active {
    /// The mount as it was made.
    pub mount: Mount,
    /// When.
    pub mounted_at: SystemTime,
    /// Where.
    pub mount_point: String,
}

/// One activation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Activation {
    /// Its name.
    pub name: String,
    /// What is mounted here.
    pub active: Vec<Active>,
    /// What is left for the caller to mount.
    pub system: Vec<Mount>,
    /// Labels.
    pub labels: Labels,
    /// The lease that owns it.
    pub lease: Option<String>,
}

impl Fields for Activation {
    fn field(&self, path: &[String]) -> Option<Cow<'_, str>> {
        match path {
            [field] if field == "name" => Some(Cow::Borrowed(&self.name)),
            [first, rest @ ..] if first == "labels" => {
                let value = self.labels.get(&rest.join("."))?;
                Some(Cow::Borrowed(value))
            }
            _ => None,
        }
    }
}

/// What is to be activated.
#[derive(Debug, Clone, Copy)]
pub struct Activate<'a> {
    /// Its name.
    pub name: &'a str,
    /// The mounts, in order.
    pub mounts: &'a [Mount],
    /// Its labels.
    pub labels: &'a Labels,
    /// All of them are made here, and one bind of the last is left.
    pub temporary: bool,
}
