//! VMMs with nothing to do: what a benchmark's memory is migrated by.
#![forbid(unsafe_code)]
// Each benchmark uses a part of it.
#![allow(dead_code)]

use std::io::{self, Read};

use pageferry::wire::control::Setup;
use pageferry::{Guest, HookError, Incoming, Ram, StateWriter};

/// A guest without devices.
pub struct NoDevices;

impl Guest for NoDevices {
    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self, _: &mut StateWriter) -> Result<(), HookError> {
        Ok(())
    }
}

/// A target that has its memory already.
pub struct Vmm(pub Ram);

impl Incoming for Vmm {
    fn prepare(&mut self, _: &Setup) -> Result<Ram, HookError> {
        Ok(self.0.clone())
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        io::copy(state, &mut io::sink())?;
        Ok(())
    }

    fn run(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}
