//! Last words: what a process says, and removes, before a bus error ends it.
// UNSAFETY: sigaction(2), and a signal handler that may only make system calls.
#![expect(unsafe_code)]

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;

use super::cvt;

/// What the handler does, prepared beforehand: it may not allocate, lock or format.
#[derive(Debug)]
pub struct LastWords {
    /// Written to standard error.
    pub stderr: Vec<u8>,
    /// Written to standard output; may be empty.
    pub stdout: Vec<u8>,
    /// Files, and folders that are empty then, to be removed in this order; those that are not there are passed over.
    pub remove: Vec<CString>,
    /// The exit code.
    pub code: u8,
}

static WORDS: OnceLock<(LastWords, Outlets)> = OnceLock::new();

/// Descriptors made beforehand: standard output under another number, and one that swallows what is written to it.
#[derive(Debug)]
struct Outlets {
    stdout: OwnedFd,
    nowhere: OwnedFd,
}

/// Ends the process with these words, and not by a signal, when memory that maps a file cannot be had: the disk of a
/// sparse file is full, or the file was cut short.
///
/// For programs. A VMM has a handler of its own for bus errors, and this would replace it.
///
/// # Errors
/// Words were set before, or what sigaction(2) says.
pub fn on_bus_error(words: LastWords) -> io::Result<()> {
    let stdout = io::stdout().as_fd().try_clone_to_owned()?;
    let nowhere = OwnedFd::from(OpenOptions::new().write(true).open("/dev/null")?);
    let told = WORDS.set((words, Outlets { stdout, nowhere }));
    told.map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    let handler: extern "C" fn(libc::c_int) = speak;
    // SAFETY: an all-zero sigaction is a valid one: no flags, an empty mask, and the handler set below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // SAFETY: the action is a local, whole and of the right type; the old one is not asked for.
    cvt(unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) }.into()).map(drop)
}

/// Makes system calls only, all of them async-signal-safe; reading a `OnceLock` that is set is one atomic load.
extern "C" fn speak(_signal: libc::c_int) {
    let mut code = 1;
    if let Some((words, outlets)) = WORDS.get() {
        code = words.code.into();
        for path in &words.remove {
            // SAFETY: a C string that lives for ever.
            if unsafe { libc::unlink(path.as_ptr()) } != 0 {
                // SAFETY: as above.
                unsafe { libc::rmdir(path.as_ptr()) };
            }
        }
        // They are to be the last: what another thread prints from here on goes nowhere.
        // SAFETY: both descriptors are open: the one is ours, and standard output is there or is made here.
        unsafe { libc::dup2(outlets.nowhere.as_raw_fd(), libc::STDOUT_FILENO) };
        for (fd, text) in [(libc::STDERR_FILENO, &words.stderr), (outlets.stdout.as_raw_fd(), &words.stdout)] {
            // SAFETY: the bytes live for ever. Nothing is left to do if they cannot be written.
            unsafe { libc::write(fd, text.as_ptr().cast(), text.len()) };
        }
    }
    // SAFETY: takes no pointer. Not exit(3), which would run what is not safe here.
    unsafe { libc::_exit(code) };
}
