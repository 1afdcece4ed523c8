//! Both sessions by hand: the happy path frame by frame, and each refusal.

mod source;
mod target;

use crate::units::Verify;
use crate::wire::control::Setup;

fn setup(channels: u8) -> Setup {
    let (blocks, opaque) = (Vec::new(), Vec::new());
    Setup { verify: Verify::Wire, channels, features: 0, state_bytes_max: 0, blocks, opaque }
}
