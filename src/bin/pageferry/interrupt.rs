//! Ctrl-C: cancels the migration, whenever it comes; SIGTERM and SIGHUP do the same.

use std::sync::{Arc, Mutex, PoisonError};

use pageferry::{CancelAnswer, CancelHandle};

use crate::output::complain;

/// Whether a signal has come, and what it cancels.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    asked: bool,
    handle: Option<CancelHandle>,
}

impl Interrupt {
    /// Listens for signals from now on. If that cannot be had, a signal ends the process the hard way.
    pub fn listen() -> Interrupt {
        let interrupt = Interrupt::default();
        let listener = interrupt.clone();
        if let Err(e) = ctrlc::set_handler(move || listener.ask()) {
            complain(format_args!("Ctrl-C will end the program without a clean-up: {e}"));
        }
        interrupt
    }

    /// Cancels this migration when a signal comes; at once if it has come.
    pub fn attach(&self, handle: CancelHandle) {
        self.change(|state| {
            if state.asked {
                handle.cancel();
            }
            state.handle = Some(handle);
        });
    }

    /// Whether a signal has come.
    pub fn asked(&self) -> bool {
        self.change(|state| state.asked)
    }

    fn ask(&self) {
        let answer = self.change(|state| {
            state.asked = true;
            state.handle.as_ref().map(CancelHandle::cancel)
        });
        if answer == Some(CancelAnswer::TooLate) {
            complain("too late to cancel: the hand-over is under way");
        }
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
