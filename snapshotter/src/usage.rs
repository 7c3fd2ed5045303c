//! Disk used below a directory: allocated blocks and inodes, hard links counted once.

use std::collections::HashMap;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, openat, openat2, statat,
};
use rustix::io::Errno;

use crate::{Error, Usage};

/// Bytes of a block as `stat(2)` counts them, whatever the filesystem's own block is.
const BLOCK_BYTES: u64 = 512;

/// Measures `root` and everything below it; links are not followed, nor what vanishes meanwhile.
///
/// Memory grows with the number of directories still to visit and of inodes of which not all links
/// were seen, not with the number of files.
///
/// # Errors
/// When a directory cannot be read.
pub fn disk_usage(root: &Path) -> Result<Usage, Error> {
    let failed = |e: Errno| Error::io("measure", root)(e.into());
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let top = match openat(CWD, root, flags, Mode::empty()) {
        Ok(top) => top,
        Err(Errno::NOTDIR) => {
            let mut count = Count::default();
            count.add(&statat(CWD, root, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?);
            return Ok(count.usage);
        }
        Err(error) => return Err(failed(error)),
    };
    let mut count = Count::default();
    count.add(&rustix::fs::fstat(&top).map_err(failed)?);
    let mut waiting: Vec<CString> = vec![c".".to_owned()];
    while let Some(path) = waiting.pop() {
        let dir = match open_below(&top, &path) {
            // Gone, replaced, or nested deeper than a path can say.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => continue,
            other => other.map_err(failed)?,
        };
        scan(dir, &path, &mut waiting, &mut count).map_err(failed)?;
    }
    Ok(count.usage)
}

fn open_below(top: &OwnedFd, path: &CString) -> Result<OwnedFd, Errno> {
    openat2(
        top,
        path.as_c_str(),
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS,
    )
}

fn scan(
    dir: OwnedFd,
    path: &CString,
    waiting: &mut Vec<CString>,
    count: &mut Count,
) -> Result<(), Errno> {
    let mut entries = Dir::new(dir)?;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = match statat(entries.fd()?.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(error),
        };
        count.add(&stat);
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let mut below = path.as_bytes().to_vec();
            below.push(b'/');
            below.extend_from_slice(name.to_bytes());
            waiting.push(CString::new(below).expect("file names have no NUL"));
        }
    }
    Ok(())
}

#[derive(Default)]
struct Count {
    usage: Usage,
    /// Links still to come, by device and inode.
    linked: HashMap<(u64, u64), u64>,
}

impl Count {
    #[allow(
        clippy::unnecessary_cast,
        clippy::useless_conversion,
        reason = "widths differ between targets"
    )]
    fn add(&mut self, stat: &Stat) {
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let links = u64::from(stat.st_nlink);
        if links > 1 && !is_dir {
            let inode = (stat.st_dev, stat.st_ino);
            match self.linked.get_mut(&inode) {
                None => {
                    self.linked.insert(inode, links - 1);
                }
                Some(1) => {
                    self.linked.remove(&inode);
                    return;
                }
                Some(left) => {
                    *left -= 1;
                    return;
                }
            }
        }
        self.usage.inodes += 1;
        self.usage.size_bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * BLOCK_BYTES;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_and_holes_are_counted_once_and_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a/b/file");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(&file, vec![1; 100_000]).unwrap();
        let before = disk_usage(dir.path()).unwrap();
        assert_eq!(before.inodes, 4);
        assert!(before.size_bytes >= 100_000);
        for index in 0..3 {
            std::fs::hard_link(&file, dir.path().join(format!("link{index}"))).unwrap();
        }
        assert_eq!(disk_usage(dir.path()).unwrap(), before);
        std::os::unix::fs::symlink("/", dir.path().join("out")).unwrap();
        let hole = std::fs::File::create(dir.path().join("hole")).unwrap();
        hole.set_len(1 << 30).unwrap();
        let after = disk_usage(dir.path()).unwrap();
        assert_eq!(after.inodes, 6);
        assert!(after.size_bytes < before.size_bytes + (1 << 20));
    }
}
