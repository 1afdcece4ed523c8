//! Control frames of both directions, in pieces of any size.
//!
//! The first byte chooses: bit 0 who sends, bit 1 between bytes as they are and frames of any type and body whose number
//! and checksum are right; three bytes follow that say how the stream is cut.

use std::fmt::Debug;

use pageferry::wire::control::{Frame, SourceFrame, TargetFrame};

use super::frames::sealed;
use super::script::Script;
use super::wire_checks::{accepted_frames_are_canonical, receive};

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let choice = script.byte();
    let pieces = [0; 3].map(|_| usize::from(script.byte()) + 1);
    let mut stream = Vec::new();
    if choice & 2 == 0 {
        stream = script.rest().to_vec();
    } else {
        for sequence in 0.. {
            if script.is_over() {
                break;
            }
            let frame_type = u16::from(script.byte());
            stream.extend(sealed(frame_type, sequence, script.bytes()));
        }
    }
    if choice & 1 == 0 { decode::<SourceFrame>(&stream, &pieces) } else { decode::<TargetFrame>(&stream, &pieces) }
}

fn decode<F: Frame + Clone + PartialEq + Debug>(stream: &[u8], pieces: &[usize]) -> &'static str {
    accepted_frames_are_canonical::<F>(stream);
    let whole = receive::<F>(stream, &[]);
    assert_eq!(whole, receive::<F>(stream, pieces), "the same in pieces of {pieces:?} as at once");
    assert!(whole.frames.iter().all(|frame| !frame.name().is_empty()));
    if whole.end.is_ok() { "accepted" } else { "refused" }
}
