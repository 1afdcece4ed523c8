//! Both sessions by hand: the happy path frame by frame, what may be lost and mended on it, and each refusal.

mod hand_over;
mod resume;
mod source;
mod source_losses;
mod target;
mod target_losses;

use crate::units::{ChannelId, Generation, Verify};
use crate::wire::control::{Setup, SourceFrame, TargetFrame};

fn setup(channels: u8) -> Setup {
    let (blocks, opaque) = (Vec::new(), Vec::new());
    Setup { verify: Verify::Wire, channels, features: 0, state_bytes_max: 0, blocks, opaque }
}

/// A channel and a generation of it, as frames and actions name them.
type Named = (ChannelId, Generation);

fn named(channel: u8, generation: u32) -> Named {
    (ChannelId(channel), Generation(generation))
}

fn lost((channel, generation): Named) -> SourceFrame {
    SourceFrame::ChannelLost { channel, generation }
}

fn join((channel, generation): Named) -> SourceFrame {
    SourceFrame::ChannelJoin { channel, generation }
}

fn joined((channel, generation): Named) -> TargetFrame {
    TargetFrame::ChannelJoined { channel, generation }
}

fn retired((channel, generation): Named) -> TargetFrame {
    TargetFrame::ChannelRetired { channel, generation }
}
