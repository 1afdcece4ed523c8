//! What a target makes of QEMU's connections: the dialogue with the main stream, and the packets of the channels.

#![forbid(unsafe_code)]

mod dialogue;
mod packets;

pub use dialogue::TargetDialogue;
pub use packets::QemuReader;
