//! Terminals: sessions, sizes and modes.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use super::{check, owned};

/// Makes the terminal `fd` the controlling terminal of this session.
pub(crate) fn set_controlling_terminal(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// Unlocks a pseudo-terminal and opens its other end without looking at any path.
pub(crate) fn open_terminal_peer(master: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let unlock: c_int = 0;
    // SAFETY: TIOCSPTLCK reads an int.
    check(unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlock) }.into())?;
    // SAFETY: TIOCGPTPEER takes open flags and returns a descriptor.
    owned(
        unsafe {
            libc::ioctl(
                master.as_raw_fd(),
                libc::TIOCGPTPEER,
                libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC,
            )
        }
        .into(),
    )
}

/// Sets a terminal's size in characters.
pub(crate) fn set_terminal_size(
    terminal: BorrowedFd<'_>,
    columns: u16,
    rows: u16,
) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads a winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) }.into())
        .map(drop)
}

/// A terminal's size in characters (columns, rows).
pub(crate) fn terminal_size(terminal: BorrowedFd<'_>) -> io::Result<(u16, u16)> {
    // SAFETY: all-zero is a valid winsize.
    let mut size: libc::winsize = unsafe { std::mem::zeroed() };
    // SAFETY: TIOCGWINSZ writes a winsize.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) }.into())?;
    Ok((size.ws_col, size.ws_row))
}

/// Clears the terminal's `ONLCR`, or makes it raw; returns the settings it had.
pub(crate) fn terminal_mode(terminal: BorrowedFd<'_>, raw: bool) -> io::Result<libc::termios> {
    // SAFETY: all-zero is a valid termios.
    let mut settings: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: tcgetattr writes a termios.
    check(unsafe { libc::tcgetattr(terminal.as_raw_fd(), &raw mut settings) }.into())?;
    let before = settings;
    if raw {
        // SAFETY: cfmakeraw changes the structure it is given.
        unsafe { libc::cfmakeraw(&raw mut settings) };
    } else {
        settings.c_oflag &= !libc::ONLCR;
    }
    set_terminal_mode(terminal, &settings)?;
    Ok(before)
}

/// Applies terminal settings.
pub(crate) fn set_terminal_mode(
    terminal: BorrowedFd<'_>,
    settings: &libc::termios,
) -> io::Result<()> {
    // SAFETY: tcsetattr reads a termios.
    check(unsafe { libc::tcsetattr(terminal.as_raw_fd(), libc::TCSANOW, settings) }.into())
        .map(drop)
}

/// Whether `fd` is a terminal.
pub(crate) fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    // SAFETY: only an integer is passed.
    unsafe { libc::isatty(fd.as_raw_fd()) == 1 }
}
