//! Which control group hierarchies this machine has and where.

use std::fs;
use std::path::{Path, PathBuf};

use super::v1::Hierarchy;
use super::{Directory, Group};
use crate::error::{Context, Error, Result};

const CGROUP2_MAGIC: i64 = 0x6367_7270;
const CGROUP_MAGIC: i64 = 0x0027_e0eb;

/// Where the hierarchies are mounted by convention.
pub(super) const ROOT: &str = "/sys/fs/cgroup";

/// The machine's control group layout.
#[derive(Clone, Debug)]
pub enum Host {
    /// v1 hierarchies, in a hybrid with a v2 one that may have controllers of its own.
    Legacy {
        /// The v1 hierarchies.
        hierarchies: Vec<Hierarchy>,
        /// Mount of the v2 hierarchy and the path of this process in it.
        unified: Option<(PathBuf, String)>,
    },
    /// v2 only.
    Unified {
        /// Where it is mounted.
        mount: PathBuf,
        /// Path of this process in it.
        own: String,
    },
}

fn filesystem(path: &Path) -> Option<i64> {
    rustix::fs::statfs(path).ok().map(|found| found.f_type)
}

impl Host {
    /// Looks at the mounts and at `/proc/self/cgroup`.
    ///
    /// # Errors
    /// `Unsupported` if no control groups are mounted at `/sys/fs/cgroup`.
    pub fn detect() -> Result<Self> {
        let own = fs::read_to_string("/proc/self/cgroup").context(|| "read /proc/self/cgroup")?;
        let own_v2 = own
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap_or("/")
            .to_owned();
        let root = PathBuf::from(ROOT);
        if filesystem(&root) == Some(CGROUP2_MAGIC) {
            return Ok(Self::Unified {
                mount: root,
                own: own_v2,
            });
        }
        let mut mounts = None;
        let mut hierarchies = Vec::new();
        for line in own.lines() {
            let mut fields = line.splitn(3, ':');
            let (Some(_), Some(names), Some(own)) = (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            if names.is_empty() {
                continue;
            }
            let controllers: Vec<String> = names.split(',').map(str::to_owned).collect();
            let usual = root.join(names.strip_prefix("name=").unwrap_or(names));
            let mount = if filesystem(&usual) == Some(CGROUP_MAGIC) {
                Some(usual)
            } else {
                let table = mounts.get_or_insert_with(|| {
                    fs::read_to_string("/proc/self/mountinfo").unwrap_or_default()
                });
                find_mount(table, &controllers)
            };
            if let Some(mount) = mount {
                hierarchies.push(Hierarchy {
                    controllers,
                    mount,
                    own: own.to_owned(),
                });
            }
        }
        if hierarchies.is_empty() {
            return Err(Error::Unsupported(format!(
                "no control groups are mounted at {ROOT}"
            )));
        }
        let unified = root.join("unified");
        let unified = (filesystem(&unified) == Some(CGROUP2_MAGIC)).then_some((unified, own_v2));
        Ok(Self::Legacy {
            hierarchies,
            unified,
        })
    }

    /// Whether this is a pure v2 machine.
    #[must_use]
    pub fn is_unified(&self) -> bool {
        matches!(self, Self::Unified { .. })
    }

    /// Where this process is, as far as that is to be seen here.
    pub(super) fn own_place(&self) -> Group {
        let own_in = |mount: &Path, own: &str| {
            let path = mount.join(own.trim_start_matches('/'));
            if own.contains("..") || !path.is_dir() {
                mount.to_path_buf()
            } else {
                path
            }
        };
        match self {
            Self::Unified { mount, own } => Group::Unified {
                path: own_in(mount, own),
            },
            Self::Legacy { hierarchies, .. } => Group::Legacy {
                directories: hierarchies
                    .iter()
                    .map(|hierarchy| Directory {
                        controllers: hierarchy.controllers.clone(),
                        path: own_in(&hierarchy.mount, &hierarchy.own),
                        mount: hierarchy.mount.clone(),
                    })
                    .collect(),
                unified: None,
            },
        }
    }

    pub(super) fn place(&self, wanted: &Path) -> Group {
        match self {
            // Where this process is there are processes, and a v2 group that has some hands no controllers down: a relative
            // path counts from the group above, as with runc.
            Self::Unified { mount, own } => Group::Unified {
                path: below(mount, parent(own), wanted),
            },
            Self::Legacy {
                hierarchies,
                unified,
            } => Group::Legacy {
                directories: hierarchies
                    .iter()
                    .map(|hierarchy| Directory {
                        controllers: hierarchy.controllers.clone(),
                        path: below(&hierarchy.mount, &hierarchy.own, wanted),
                        mount: hierarchy.mount.clone(),
                    })
                    .collect(),
                unified: unified
                    .as_ref()
                    .map(|(mount, own)| below(mount, own, wanted)),
            },
        }
    }
}

fn parent(own: &str) -> &str {
    match own.rsplit_once('/') {
        Some(("", _)) | None => "/",
        Some((above, _)) => above,
    }
}

/// An absolute path counts from the mount, a relative one from where this process is.
fn below(mount: &Path, own: &str, wanted: &Path) -> PathBuf {
    if let Ok(relative) = wanted.strip_prefix("/") {
        return mount.join(relative);
    }
    let base = mount.join(own.trim_start_matches('/'));
    // Seen from inside a cgroup namespace or a partial mount the own path may not exist.
    if own == "/" || own.contains("..") || !base.is_dir() {
        mount.join(wanted)
    } else {
        base.join(wanted)
    }
}

fn find_mount(table: &str, controllers: &[String]) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        if after.next() != Some("cgroup") {
            return None;
        }
        let options = after.nth(1)?;
        let has = |name: &String| options.split(',').any(|option| option == name);
        controllers
            .iter()
            .all(has)
            .then(|| before.split(' ').nth(4).map(PathBuf::from))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_controller() {
        let table = "31 25 0:27 / /sys/fs/cgroup/a rw - cgroup cgroup rw,cpu,cpuacct\n\
                     32 25 0:28 / /x/systemd rw - cgroup cgroup rw,name=systemd\n";
        let find = |names: &[&str]| {
            find_mount(
                table,
                &names
                    .iter()
                    .map(|name| (*name).to_owned())
                    .collect::<Vec<_>>(),
            )
        };
        assert_eq!(find(&["cpu", "cpuacct"]), Some("/sys/fs/cgroup/a".into()));
        assert_eq!(find(&["name=systemd"]), Some("/x/systemd".into()));
        assert_eq!(find(&["memory"]), None);
    }

    #[test]
    fn relative_paths_count_from_the_group_above_on_v2() {
        let host = |own: &str| Host::Unified {
            mount: "/m".into(),
            own: own.into(),
        };
        let place = |own: &str, wanted: &str| match host(own).place(Path::new(wanted)) {
            Group::Unified { path } => path,
            other @ Group::Legacy { .. } => panic!("{other:?}"),
        };
        assert_eq!(place("/", "c"), Path::new("/m/c"));
        assert_eq!(place("/a", "c"), Path::new("/m/c"));
        assert_eq!(place("/a/b", "/c"), Path::new("/m/c"));
        assert_eq!(parent("/user.slice/session.scope"), "/user.slice");
    }

    #[test]
    fn absolute_paths_count_from_the_mount() {
        assert_eq!(
            below(Path::new("/m"), "/own", Path::new("/a/b")),
            Path::new("/m/a/b")
        );
        assert_eq!(
            below(Path::new("/m"), "/", Path::new("b")),
            Path::new("/m/b")
        );
    }
}
