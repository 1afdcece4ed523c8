//! A main stream of QEMU's, in pieces of any size.
//!
//! The first byte chooses: bit 0 the dialect, bits 1 and 2 between bytes as they are, bytes behind a header and a
//! configuration, and a sound stream in which up to three bytes are changed; three bytes follow that say how it is cut.

use super::checks::any_main_stream_is_judged_well;
use super::plans::{self, Step};
use super::script::Script;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let dialect = plans::dialect(&mut script);
    let choice = script.below(4);
    let pieces = [0; 3].map(|_| usize::from(script.byte()) + 1);
    let stream = match choice {
        0 => script.rest().to_vec(),
        1 => [b"QEVM\0\0\0\x03\x07\0\0\0\x01m", script.rest()].concat(),
        _ => {
            let changes = plans::changes(&mut script);
            let steps = plans::plan(&mut script, dialect);
            let mut stream = plans::encode(steps.iter().map(Step::record), dialect).expect("a sound stream");
            if changes.is_empty() {
                assert_eq!(any_main_stream_is_judged_well(&stream, dialect, &pieces), "accepted");
            }
            plans::change(&mut stream, &changes);
            stream
        }
    };
    any_main_stream_is_judged_well(&stream, dialect, &pieces)
}
