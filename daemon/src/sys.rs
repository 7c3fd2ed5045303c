//! The few calls of the C library that no crate wraps.
#![allow(
    unsafe_code,
    reason = "the one place of this crate where system calls are unsafe"
)]

/// Keeps the allocator small: few arenas, and freed memory goes back to the system.
///
/// Must run before threads exist; glibc reads these once per arena.
pub(crate) fn tame_allocator() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// Arenas shared by all threads: more would keep more memory than they save time.
        const ARENAS: libc::c_int = 2;
        /// Free bytes at the top of the heap after which it shrinks.
        const TRIM_BYTES: libc::c_int = 128 << 10;
        /// Allocations from this size on are mapped, and unmapped when freed.
        const MMAP_BYTES: libc::c_int = 256 << 10;
        // SAFETY: mallopt only stores a number; called before any other thread exists.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENAS) };
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_TRIM_THRESHOLD, TRIM_BYTES) };
        // SAFETY: as above.
        unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_BYTES) };
    }
}

/// Gives memory back to the system that can be had again: what the allocator holds free, and pages of
/// the program itself that were not changed. How many mappings those were.
pub(crate) fn give_back_memory() -> usize {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: malloc_trim may be called at any time, from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
    let (Ok(table), Ok(program)) = (
        std::fs::read_to_string("/proc/self/smaps"),
        std::fs::read_link("/proc/self/exe"),
    ) else {
        return 0;
    };
    let mut given = 0;
    for (start, length) in unchanged_mappings(&table, &program.to_string_lossy()) {
        // SAFETY: a private mapping of our own program's file that is not writable and has no page
        // of its own: every page dropped here is read from the same file again when it is next
        // touched. The program's mappings are made before `main` and never change, unlike those of
        // libraries that may be loaded at this moment.
        let dropped =
            unsafe { libc::madvise(start as *mut libc::c_void, length, libc::MADV_DONTNEED) };
        given += usize::from(dropped == 0);
    }
    given
}

/// Start and length of mappings of `program` in an smaps table that are private, not writable, and
/// hold no page that differs from the file (relocated data does).
fn unchanged_mappings(table: &str, program: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in table.lines() {
        let mut fields = line.split_ascii_whitespace();
        let Some(first) = fields.next() else { continue };
        if !first.ends_with(':') {
            let permissions = fields.next();
            let wanted = matches!(permissions, Some("r-xp" | "r--p"))
                && line.ends_with(program)
                && program.starts_with('/');
            current = wanted.then(|| range(first)).flatten();
        } else if first == "Anonymous:"
            && fields.next() == Some("0")
            && let Some(range) = current.take()
        {
            found.push(range);
        }
    }
    found
}

/// Start and length of `start-end` in hexadecimal.
fn range(text: &str) -> Option<(usize, usize)> {
    let (start, end) = text.split_once('-')?;
    let start = usize::from_str_radix(start, 16).ok()?;
    let end = usize::from_str_radix(end, 16).ok()?;
    Some((start, end.checked_sub(start)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_pages_of_the_program_are_given_back() {
        let table = "\
1000-2000 r-xp 00000000 fe:00 1 /bin/x\nRss: 4 kB\nAnonymous:             0 kB\n\
2000-3000 r--p 00000000 fe:00 1 /bin/x\nAnonymous:             4 kB\n\
3000-4000 rw-p 00000000 fe:00 1 /bin/x\nAnonymous:             0 kB\n\
4000-5000 r--p 00000000 00:00 0\nAnonymous:             0 kB\n\
5000-6000 r-xp 00000000 fe:00 2 /lib/y\nAnonymous:             0 kB\n\
6000-9000 r--p 00000000 fe:00 1 /bin/x\nAnonymous:             0 kB\n";
        assert_eq!(
            unchanged_mappings(table, "/bin/x"),
            vec![(0x1000, 0x1000), (0x6000, 0x3000)]
        );
    }

    #[test]
    fn a_program_goes_on_after_giving_memory_back() {
        let kept = vec![7_u8; 1 << 20];
        assert!(give_back_memory() > 0);
        assert!(kept.iter().all(|byte| *byte == 7));
        assert_eq!(format!("{:?}", kept.get(1)), "Some(7)");
    }
}
