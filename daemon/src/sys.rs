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
