#![forbid(unsafe_code)]
//! The VMM's hooks, and what goes on beside them: a hook may take long, and the target must not take that for silence.

use std::thread;

use crate::bell::Ringer;
use crate::crew::Starting;
use crate::error::Failure;
use crate::poll::PollSleeper;
use crate::source::driver::Driver;
use crate::source::ends::Over;
use crate::sync::AtomicBool;
use crate::sync::Ordering::Relaxed;
use crate::sys::thread::with_signals_blocked;

/// Says, when it is dropped, that the hook has returned. Relaxed: nothing hangs on it but the end of a wait, which the
/// ring ends; what the hook hands over has a queue of its own.
struct Done<'a>(&'a AtomicBool, Ringer<PollSleeper>);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
        self.1.ring();
    }
}

impl Driver<'_> {
    /// Runs `hook` on this thread, which is the VMM's, and the driver on another: first `work`, then whatever comes until
    /// the hook has returned. State travels, heartbeats go out and a cancel is heard meanwhile. The thread is called
    /// `pf-KIND`.
    pub fn beside<T>(
        &mut self,
        kind: &'static str,
        work: impl Fn(&mut Self) -> Result<(), Over> + Sync,
        hook: impl FnOnce() -> T,
    ) -> (Result<(), Over>, T) {
        let name = format!("pf-{kind}");
        let (returned, ringer, options) = (AtomicBool::new(false), self.bell.ringer(), self.options.clone());
        let (worked, value) = thread::scope(|scope| {
            let (driver, returned, work, name) = (&mut *self, &returned, &work, name.as_str());
            // Dropped when the hook is done, also by its panic: the thread must not wait for ever.
            let done = Done(returned, ringer);
            let drive = move || {
                if let Err(e) = options.own_hook(&Starting { kind, id: 0, name }) {
                    return driver.fail(Failure::Worker(format!("{name} {e}")));
                }
                work(driver)?;
                while !returned.load(Relaxed) {
                    driver.service(true)?;
                }
                Ok(())
            };
            let named = thread::Builder::new().name(name.to_owned());
            let started = with_signals_blocked(|| named.spawn_scoped(scope, drive));
            let value = hook();
            drop(done);
            (started.map(|thread| thread.join()), value)
        });
        let result = match worked {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => self.fail(Failure::Worker(format!("{name} panicked"))),
            // No thread to be had: one after the other, then.
            Err(e) => {
                self.remark(format!("no thread to go on beside a hook, which was waited for: {e}"));
                self.excuse_silence();
                work(self)
            }
        };
        (result, value)
    }
}
