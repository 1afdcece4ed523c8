#![forbid(unsafe_code)]
//! Device state on its way out: the VMM writes it on its thread, the driver sends it on another, meanwhile.

use std::io;
use std::sync::Arc;

use crossbeam_queue::SegQueue;

use crate::bell::Ringer;
use crate::poll::PollSleeper;
use crate::wire::control::STATE_CHUNK_BYTES_MAX;

/// Where [`crate::Guest::save_state`] writes. Pieces travel as they fill.
#[derive(Debug)]
pub struct StateWriter {
    piece: Vec<u8>,
    pieces: Arc<SegQueue<Vec<u8>>>,
    driver: Ringer<PollSleeper>,
}

impl StateWriter {
    pub(super) fn new(pieces: Arc<SegQueue<Vec<u8>>>, driver: Ringer<PollSleeper>) -> StateWriter {
        StateWriter { piece: Vec::new(), pieces, driver }
    }

    fn hand_over(&mut self) {
        if !self.piece.is_empty() {
            self.pieces.push(std::mem::take(&mut self.piece));
            self.driver.ring();
        }
    }
}

impl io::Write for StateWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = bytes.len().min(STATE_CHUNK_BYTES_MAX - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        if self.piece.len() == STATE_CHUNK_BYTES_MAX {
            self.hand_over();
        }
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hand_over();
        Ok(())
    }
}

impl Drop for StateWriter {
    fn drop(&mut self) {
        self.hand_over();
    }
}
