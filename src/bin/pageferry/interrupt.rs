//! Ctrl-C: cancels the migration, whenever it comes; SIGTERM and SIGHUP do the same.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::{CancelAnswer, CancelHandle};

use crate::output::complain;

/// Whether a signal has come, and what it cancels.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    asked: bool,
    stop: Option<Box<dyn Fn() + Send>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").field("asked", &self.asked).finish_non_exhaustive()
    }
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
        self.attach_to(move || {
            if handle.cancel() == CancelAnswer::TooLate {
                complain("too late to cancel: the hand-over is under way");
            }
        });
    }

    /// Does this at each signal that comes; at once if one has come.
    pub fn attach_to(&self, stop: impl Fn() + Send + 'static) {
        self.change(|state| {
            if state.asked {
                stop();
            }
            state.stop = Some(Box::new(stop));
        });
    }

    /// Whether a signal has come.
    pub fn asked(&self) -> bool {
        self.change(|state| state.asked)
    }

    fn ask(&self) {
        self.change(|state| {
            state.asked = true;
            if let Some(stop) = &state.stop {
                stop();
            }
        });
    }

    fn change<R>(&self, change: impl FnOnce(&mut State) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
