//! Signals and processors of the calling thread.
// UNSAFETY: pthread_sigmask(3), sched_getcpu(3) and getrusage(2) are C calls.
#![expect(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use super::cvt;

/// Runs `f` with signals blocked on this thread: threads it creates inherit the mask, with no gap in which a signal of
/// the VMM could land on one of ours. Not those that a thread raises by what it does (a bus error in guest RAM): the
/// kernel kills a process that has them blocked, without asking the handler of the VMM.
pub fn with_signals_blocked<R>(f: impl FnOnce() -> R) -> R {
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are locals of the right type; sigfillset and pthread_sigmask initialise what they are given, and
    // sigdelset comes after the former.
    let blocked = unsafe {
        let mut all = MaybeUninit::<libc::sigset_t>::uninit();
        libc::sigfillset(all.as_mut_ptr());
        for own in [libc::SIGBUS, libc::SIGSEGV, libc::SIGILL, libc::SIGFPE] {
            libc::sigdelset(all.as_mut_ptr(), own);
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) == 0
    };
    struct Restore(MaybeUninit<libc::sigset_t>, bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            if self.1 {
                // SAFETY: the set was filled in by the successful call above.
                unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, self.0.as_ptr(), std::ptr::null_mut()) };
            }
        }
    }
    let _restore = Restore(before, blocked);
    f()
}

/// The processor this thread runs on now.
pub fn current_cpu() -> Option<usize> {
    // SAFETY: takes no pointers.
    usize::try_from(unsafe { libc::sched_getcpu() }).ok()
}

/// Processor time, user and system, this process has used.
///
/// # Errors
/// What getrusage(2) says.
pub fn process_cpu_time() -> io::Result<Duration> {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the kernel fills in the whole structure it is given.
    cvt(unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) }.into())?;
    // SAFETY: the call above succeeded.
    let usage = unsafe { usage.assume_init() };
    let of = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    Ok(of(usage.ru_utime) + of(usage.ru_stime))
}

/// Page faults that this thread has taken and that needed no disk, those inside system calls among them. 0 where the
/// system does not say.
pub(crate) fn page_faults() -> u64 {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the kernel fills in the whole structure it is given.
    if unsafe { libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) } != 0 {
        return 0;
    }
    // SAFETY: the call above succeeded.
    unsafe { usage.assume_init() }.ru_minflt as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_made_inside_have_signals_blocked_and_the_maker_has_not() {
        fn blocked(signal: i32) -> bool {
            let mut now = MaybeUninit::<libc::sigset_t>::uninit();
            // SAFETY: a null new set only reads the mask into the local.
            unsafe {
                libc::pthread_sigmask(libc::SIG_SETMASK, std::ptr::null(), now.as_mut_ptr());
                libc::sigismember(now.as_ptr(), signal) == 1
            }
        }
        let inside = |signal| with_signals_blocked(|| std::thread::spawn(move || blocked(signal))).join().unwrap();
        assert!(inside(libc::SIGUSR1));
        assert!(!inside(libc::SIGBUS), "the VMM's handler of bus errors would not be asked");
        assert!(!blocked(libc::SIGUSR1));
    }
}
