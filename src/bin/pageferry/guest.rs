//! The demo guest: the hooks of a VMM around its writers.

use std::io::Write;

use pageferry::{Guest, HookError, StateWriter};

use crate::state::{TAG, encode};
use crate::writers::Writers;

/// A guest whose vCPUs are threads that write.
pub struct DemoGuest {
    pub writers: Writers,
}

impl Guest for DemoGuest {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(TAG.to_vec())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        self.writers.stop();
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(self.writers.start()?)
    }

    fn throttle(&mut self, percent: u8) -> Result<(), HookError> {
        self.writers.throttle(percent);
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        out.write_all(&encode(&self.writers.written()))?;
        Ok(())
    }
}
