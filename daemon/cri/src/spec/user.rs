//! Who a process runs as: numbers from the request, or names from the image's own tables.
//!
//! The tables are read beneath the container's mounted root, with bounds: they come from an image.

use std::io::Read as _;
use std::os::fd::AsFd;
use std::path::Path;

use lighter_proto::runtime::v1::{LinuxContainerSecurityContext, SupplementalGroupsPolicy};
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::{Error, Result};

/// Largest `/etc/passwd` or `/etc/group` that is read.
const MAX_TABLE_BYTES: u64 = 4 << 20;
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

struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

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

/// Resolves `user[:group]` against the tables below `root` and adds the groups asked for.
///
/// # Errors
/// For unknown names and numbers out of range.
pub fn resolve(root: &Path, text: &str, security: &LinuxContainerSecurityContext) -> Result<User> {
    let accounts = accounts(&table(root, "etc/passwd")?);
    let groups = groups(&table(root, "etc/group")?);
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
        let user = resolve(root, text, security).unwrap();
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
            assert!(resolve(image.path(), bad, &plain).is_err(), "{bad}");
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
            let error = resolve(image.path(), bad, &plain).unwrap_err().to_string();
            assert!(error.contains("out of range"), "{bad}: {error}");
        }
        let extra = LinuxContainerSecurityContext {
            supplemental_groups: vec![1 << 40],
            ..Default::default()
        };
        assert!(resolve(image.path(), "0", &extra).is_err());
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
    fn a_group_needs_a_user() {
        let security = LinuxContainerSecurityContext {
            run_as_group: Some(Int64Value { value: 5 }),
            ..Default::default()
        };
        assert!(wanted(&security, "").is_err());
    }
}
