//! Who a process runs as: numbers from the request, or names from the image's own tables.
//!
//! The tables are read beneath the container's mounted root, with bounds: they come from an image.

use std::collections::VecDeque;
use std::io::Read as _;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lighter_proto::runtime::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::{Error, Result};

/// Largest `/etc/passwd` or `/etc/group` that is read.
const MAX_TABLE_BYTES: u64 = 4 << 20;
/// Largest tables of one image that are kept for the next container.
const MAX_KNOWN_BYTES: usize = 64 << 10;
/// Most images whose tables are kept.
const MAX_KNOWN: usize = 32;
/// Largest uid or gid.
pub(super) const MAX_ID: u32 = i32::MAX.unsigned_abs();

/// The resolved user of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group.
    pub gid: u32,
    /// All groups, the primary one included, sorted.
    pub additional_gids: Vec<u32>,
}

#[derive(Debug)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

#[derive(Debug)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

fn id(text: &str, what: &str) -> Result<Option<u32>> {
    match text.parse::<i64>() {
        Ok(n) => match u32::try_from(n) {
            Ok(n) if n <= MAX_ID => Ok(Some(n)),
            _ => Err(Error::unknown(format!(
                "invalid USER value {text}: {what} out of range"
            ))),
        },
        Err(_) => Ok(None),
    }
}

/// A table of the image; empty when it has none.
fn table(root: &Path, path: &str) -> Result<String> {
    let open = |e: rustix::io::Errno| Error::unknown(format!("open {path} of the image: {e}"));
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(root, flags, Mode::empty()).map_err(open)?;
    let file = rustix::fs::openat2(
        dir.as_fd(),
        path,
        OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    );
    let file = match file {
        Ok(file) => std::fs::File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(open(error)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_TABLE_BYTES)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::unknown(format!("read {path} of the image: {e}")))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn accounts(text: &str) -> Vec<Account> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        Some(Account {
            name: (*fields.first()?).to_owned(),
            uid: fields.get(2)?.parse().ok()?,
            gid: fields.get(3)?.parse().ok()?,
        })
    };
    text.lines().filter_map(parse).collect()
}

fn groups(text: &str) -> Vec<Group> {
    let parse = |line: &str| {
        let fields: Vec<&str> = line.split(':').collect();
        Some(Group {
            name: (*fields.first()?).to_owned(),
            gid: fields.get(2)?.parse().ok()?,
            members: fields
                .get(3)
                .unwrap_or(&"")
                .split(',')
                .map(str::to_owned)
                .collect(),
        })
    };
    text.lines().filter_map(parse).collect()
}

/// `user[:group]` as the request and the image want it.
///
/// # Errors
/// For a group without a user, and numbers that no id can have.
pub fn wanted(security: &LinuxContainerSecurityContext, image_user: &str) -> Result<String> {
    let mut text = match (&security.run_as_username, &security.run_as_user) {
        (name, _) if !name.is_empty() => name.clone(),
        (_, Some(uid)) => uid.value.to_string(),
        _ => String::new(),
    };
    if let Some(group) = &security.run_as_group {
        if text.is_empty() {
            return Err(Error::unknown(format!(
                "user group {} is specified without user",
                group.value
            )));
        }
        text = format!(
            "{}:{}",
            text.split(':').next().unwrap_or_default(),
            group.value
        );
    }
    Ok(if text.is_empty() {
        image_user.to_owned()
    } else {
        text
    })
}

/// The accounts and groups of an image.
#[derive(Debug, Default)]
pub struct Tables {
    accounts: Vec<Account>,
    groups: Vec<Group>,
    /// Bytes of the files they were read from.
    size: usize,
}

impl Tables {
    /// Reads them beneath `root`.
    ///
    /// # Errors
    /// When a table is there and cannot be read.
    pub fn read(root: &Path) -> Result<Self> {
        let (passwd, group) = (table(root, "etc/passwd")?, table(root, "etc/group")?);
        Ok(Self {
            accounts: accounts(&passwd),
            groups: groups(&group),
            size: passwd.len() + group.len(),
        })
    }
}

/// Tables of the images that containers were made from last, by chain id: a new container's root
/// holds nothing else, and need not be mounted to be asked.
#[derive(Debug, Default)]
pub struct Known(Mutex<VecDeque<(String, Arc<Tables>)>>);

impl Known {
    fn list(&self) -> MutexGuard<'_, VecDeque<(String, Arc<Tables>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those of the image with this chain id.
    #[must_use]
    pub fn get(&self, chain: &str) -> Option<Arc<Tables>> {
        let list = self.list();
        let found = list.iter().find(|(id, _)| id == chain);
        found.map(|(_, tables)| Arc::clone(tables))
    }

    /// Keeps them, unless they are large.
    pub fn keep(&self, chain: &str, tables: &Arc<Tables>) {
        let mut list = self.list();
        if tables.size > MAX_KNOWN_BYTES || list.iter().any(|(id, _)| id == chain) {
            return;
        }
        if list.len() == MAX_KNOWN {
            list.pop_front();
        }
        list.push_back((chain.to_owned(), Arc::clone(tables)));
    }
}

/// Resolves `user[:group]` against the image's tables and adds the groups asked for.
///
/// # Errors
/// For unknown names and numbers out of range.
pub fn resolve(
    tables: &Tables,
    text: &str,
    security: &LinuxContainerSecurityContext,
) -> Result<User> {
    let (accounts, groups) = (&tables.accounts, &tables.groups);
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let account = match id(user, "uid")? {
        Some(uid) => accounts.iter().find(|a| a.uid == uid),
        None => Some(
            accounts
                .iter()
                .find(|a| a.name == user)
                .ok_or_else(|| Error::unknown(format!("no users found for {user:?}")))?,
        ),
    };
    let uid = match (id(user, "uid")?, account) {
        (Some(uid), _) => uid,
        (None, Some(account)) => account.uid,
        (None, None) => 0,
    };
    let gid = match group.filter(|g| !g.is_empty()) {
        None => account.map_or(0, |a| a.gid),
        Some(group) => match id(group, "gid")? {
            Some(gid) => gid,
            None => groups
                .iter()
                .find(|g| g.name == group)
                .map(|g| g.gid)
                .ok_or_else(|| Error::unknown(format!("no groups found for {group:?}")))?,
        },
    };
    let mut gids = vec![gid];
    for extra in &security.supplemental_groups {
        gids.push(id(&extra.to_string(), "gid")?.unwrap_or(0));
    }
    if security.supplemental_groups_policy() == SupplementalGroupsPolicy::Merge
        && let Some(account) = account
    {
        let member = |g: &&Group| g.members.contains(&account.name);
        gids.extend(groups.iter().filter(member).map(|g| g.gid));
    }
    gids.sort_unstable();
    gids.dedup();
    Ok(User {
        uid,
        gid,
        additional_gids: gids,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use lighter_proto::runtime::v1::Int64Value;

    fn image() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let passwd = "root:x:0:0::/:/bin/sh\nsailor:x:1000:1001::/:/bin/sh\n";
        std::fs::write(dir.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\ndock:x:2000:sailor,other\nbroken\n";
        std::fs::write(dir.path().join("etc/group"), group).unwrap();
        dir
    }

    fn gids(
        root: &Path,
        text: &str,
        security: &LinuxContainerSecurityContext,
    ) -> (u32, u32, Vec<u32>) {
        let user = resolve(&Tables::read(root).unwrap(), text, security).unwrap();
        (user.uid, user.gid, user.additional_gids)
    }

    #[test]
    fn names_and_numbers_resolve_in_the_image() {
        let image = image();
        let plain = LinuxContainerSecurityContext::default();
        assert_eq!(gids(image.path(), "", &plain), (0, 0, vec![0]));
        assert_eq!(
            gids(image.path(), "sailor", &plain),
            (1000, 1001, vec![1001, 2000])
        );
        assert_eq!(
            gids(image.path(), "1000:dock", &plain),
            (1000, 2000, vec![2000])
        );
        assert_eq!(gids(image.path(), "77:88", &plain), (77, 88, vec![88]));
        for bad in ["nobody", "-1", "2147483648", "sailor:nogroup"] {
            let tables = Tables::read(image.path()).unwrap();
            assert!(resolve(&tables, bad, &plain).is_err(), "{bad}");
        }
    }

    /// GHSA-jpcc-p29g-p8mq: tables of an image are read with bounds, and only within it.
    #[test]
    fn tables_of_an_image_are_bounded() {
        let image = image();
        let etc = image.path().join("etc");
        let plain = LinuxContainerSecurityContext::default();
        // A terabyte that takes no space.
        let huge = std::fs::File::create(etc.join("group")).unwrap();
        huge.set_len(1 << 40).unwrap();
        assert_eq!(
            gids(image.path(), "sailor", &plain),
            (1000, 1001, vec![1001])
        );
        assert!(table(image.path(), "etc/group").unwrap().len() <= 4 << 20);
        // A fifo that nobody writes to.
        std::fs::remove_file(etc.join("group")).unwrap();
        nix::unistd::mkfifo(&etc.join("group"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(table(image.path(), "etc/group").unwrap(), "");
        // A link to the host's own.
        std::fs::remove_file(etc.join("passwd")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", etc.join("passwd")).unwrap();
        assert_eq!(table(image.path(), "etc/passwd").unwrap(), "");
    }

    /// GHSA-265r-hfxg-fhmg: a number beyond 2³¹−1 became root.
    #[test]
    fn ids_out_of_range_are_refused() {
        let image = image();
        let plain = LinuxContainerSecurityContext::default();
        for bad in [
            "2147483648",
            "4294967296",
            "65536000000",
            "0:2147483648",
            "1:-1",
        ] {
            let tables = Tables::read(image.path()).unwrap();
            let error = resolve(&tables, bad, &plain).unwrap_err().to_string();
            assert!(error.contains("out of range"), "{bad}: {error}");
        }
        let extra = LinuxContainerSecurityContext {
            supplemental_groups: vec![1 << 40],
            ..Default::default()
        };
        let tables = Tables::read(image.path()).unwrap();
        assert!(resolve(&tables, "0", &extra).is_err());
        assert_eq!(gids(image.path(), "2147483647", &plain).0, 2_147_483_647);
    }

    #[test]
    fn a_strict_policy_ignores_the_image() {
        let image = image();
        let strict = LinuxContainerSecurityContext {
            supplemental_groups: vec![5],
            supplemental_groups_policy: SupplementalGroupsPolicy::Strict.into(),
            ..Default::default()
        };
        assert_eq!(
            gids(image.path(), "sailor", &strict),
            (1000, 1001, vec![5, 1001])
        );
    }

    #[test]
    fn few_and_small_tables_are_kept() {
        let known = Known::default();
        let small = Arc::new(Tables::default());
        let large = Arc::new(Tables {
            size: MAX_KNOWN_BYTES + 1,
            ..Tables::default()
        });
        known.keep("large", &large);
        for n in 0..=MAX_KNOWN {
            known.keep(&n.to_string(), &small);
        }
        assert!(known.get("large").is_none() && known.get("0").is_none());
        assert!(known.get("1").is_some() && known.get(&MAX_KNOWN.to_string()).is_some());
    }

    #[test]
    fn a_group_needs_a_user() {
        let security = LinuxContainerSecurityContext {
            run_as_group: Some(Int64Value { value: 5 }),
            ..Default::default()
        };
        assert!(wanted(&security, "").is_err());
    }
}
