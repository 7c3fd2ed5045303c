//! User and group names, looked up in the container's own `/etc/passwd` and `/etc/group`.
//!
//! Both files come from an image, so they are hostile: opened beneath the rootfs, size-bounded,
//! lines that make no sense skipped.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::Context as _;
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

use crate::advice::Advice;

/// Largest passwd or group file that is looked at, bytes.
const MAX_FILE: u64 = 10 << 20;
/// Most groups a user gets; the kernel's own bound.
const MAX_GROUPS: usize = 65_536;

/// The account files of a rootfs; empty where there are none.
#[derive(Debug, Default)]
pub(crate) struct Accounts {
    users: Vec<Account>,
    groups: Vec<Group>,
}

#[derive(Debug, PartialEq, Eq)]
struct Account {
    name: String,
    uid: u32,
    gid: u32,
}

#[derive(Debug, PartialEq, Eq)]
struct Group {
    name: String,
    gid: u32,
    members: Vec<String>,
}

/// Who a process runs as.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) additional_gids: Vec<u32>,
}

impl Accounts {
    /// Reads the account files below `rootfs`.
    pub(crate) fn read(rootfs: &Path) -> anyhow::Result<Self> {
        Ok(Self::parse(
            &read_beneath(rootfs, "etc/passwd")?,
            &read_beneath(rootfs, "etc/group")?,
        ))
    }

    /// Parses the two files.
    pub(crate) fn parse(passwd: &str, group: &str) -> Self {
        let account = |line: &str| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            let (uid, gid) = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
            Some(Account { name, uid, gid })
        };
        let one = |line: &str| {
            let mut fields = line.split(':');
            let name = fields.next()?.to_owned();
            let gid = fields.nth(1)?.parse().ok()?;
            let members = fields.next().unwrap_or_default();
            let members = members
                .split(',')
                .filter(|m| !m.is_empty())
                .map(str::to_owned)
                .collect();
            Some(Group { name, gid, members })
        };
        Self {
            users: passwd.lines().filter_map(account).collect(),
            groups: group.lines().filter_map(one).collect(),
        }
    }

    /// Resolves `user`, `uid`, `user:group`, `uid:gid`. An unknown number is taken as it is.
    pub(crate) fn resolve(&self, text: &str) -> Result<Identity, Advice> {
        let (user, group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (text, None),
        };
        if user.is_empty() || group.is_some_and(str::is_empty) {
            return Err(Advice::new(
                format!("user {text:?} is incomplete"),
                "write it as USER, UID, USER:GROUP or UID:GID",
            ));
        }
        let number = user.parse().ok();
        let account = self
            .users
            .iter()
            .find(|account| number.map_or(account.name == user, |uid: u32| account.uid == uid));
        let (uid, mut gid) = match (account, number) {
            (Some(account), _) => (account.uid, account.gid),
            (None, Some(uid)) => (uid, 0),
            (None, None) => return Err(unknown("user", user, "passwd")),
        };
        if let Some(group) = group {
            let found = self.groups.iter().find(|entry| entry.name == group);
            gid = match (group.parse(), found) {
                (Ok(gid), _) => gid,
                (Err(_), Some(entry)) => entry.gid,
                (Err(_), None) => return Err(unknown("group", group, "group")),
            };
        }
        let name = account.map_or(user, |account| account.name.as_str());
        Ok(Identity {
            uid,
            gid,
            additional_gids: self.groups_of(name, gid),
        })
    }

    /// The primary group, then every group that names the user.
    fn groups_of(&self, name: &str, gid: u32) -> Vec<u32> {
        let mut gids = vec![gid];
        for group in &self.groups {
            let member = group.members.iter().any(|member| member == name);
            if member && !gids.contains(&group.gid) && gids.len() < MAX_GROUPS {
                gids.push(group.gid);
            }
        }
        gids
    }
}

fn unknown(what: &str, name: &str, file: &str) -> Advice {
    Advice::new(
        format!("no {what} {name:?} in the container's /etc/{file}"),
        "use a number, or a name that the image has",
    )
}

/// A file of the rootfs as text; empty when it does not exist. Links stay inside.
fn read_beneath(rootfs: &Path, path: &str) -> anyhow::Result<String> {
    let wrap = || format!("cannot read /{path} of the rootfs {}", rootfs.display());
    let directory = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    let root = open(rootfs, directory, Mode::empty()).with_context(wrap)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match openat2(&root, path, flags, Mode::empty(), resolve) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(String::new()),
        Err(error) => return Err(error).with_context(wrap),
    };
    let metadata = file.metadata().with_context(wrap)?;
    anyhow::ensure!(metadata.is_file(), "{}: not a regular file", wrap());
    anyhow::ensure!(
        metadata.len() <= MAX_FILE,
        "{}: larger than {MAX_FILE} bytes",
        wrap()
    );
    let mut bytes = Vec::new();
    file.take(MAX_FILE)
        .read_to_end(&mut bytes)
        .with_context(wrap)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn accounts() -> Accounts {
        Accounts::parse(
            "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/:/bin/false\nbroken\n:x:y:z:\n",
            "root:x:0:\nwww:x:34:\nadm:x:4:web,other\nwheel:x:10:root\nbroken:x\n",
        )
    }

    fn gids(identity: &Identity) -> (u32, u32, Vec<u32>) {
        (identity.uid, identity.gid, identity.additional_gids.clone())
    }

    #[test]
    fn names_and_numbers_find_the_same_account() {
        assert_eq!(
            gids(&accounts().resolve("web").unwrap()),
            (33, 34, vec![34, 4])
        );
        assert_eq!(
            gids(&accounts().resolve("33").unwrap()),
            (33, 34, vec![34, 4])
        );
        assert_eq!(
            gids(&accounts().resolve("root").unwrap()),
            (0, 0, vec![0, 10])
        );
    }

    #[test]
    fn a_group_replaces_the_primary_one() {
        assert_eq!(
            gids(&accounts().resolve("web:wheel").unwrap()),
            (33, 10, vec![10, 4])
        );
        assert_eq!(gids(&accounts().resolve("7:8").unwrap()), (7, 8, vec![8]));
        assert_eq!(gids(&accounts().resolve("7").unwrap()), (7, 0, vec![0]));
    }

    #[test]
    fn unknown_names_are_refused() {
        for text in ["nobody", "web:nogroup", "", ":1", "1:"] {
            assert!(accounts().resolve(text).is_err(), "{text}");
        }
    }

    #[test]
    fn links_do_not_leave_the_rootfs() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", dir.path().join("etc/passwd")).unwrap();
        assert_eq!(read_beneath(dir.path(), "etc/passwd").unwrap(), "");
        assert_eq!(read_beneath(dir.path(), "etc/group").unwrap(), "");
    }

    #[test]
    fn a_fifo_is_no_account_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("passwd");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            Mode::RWXU,
            0,
        )
        .unwrap();
        assert!(read_beneath(dir.path(), "passwd").is_err());
    }
}
