//! Why a migration with QEMU failed, in words that tell what to look at: QEMU itself says little, and that in its own log.

use std::collections::BTreeSet;

use pageferry::Failure;
use pageferry::qemu::Facts;

/// What to do where anybody on the way can read and change RAM: QEMU's stream is not encrypted here.
pub const TRUSTED: &str = "QEMU's stream is not encrypted here, use a network that you trust";

const GAVE_UP: &str = "the source gave up or died in the middle of the stream";

/// Of a migration that came from QEMU, for which so many channels were expected.
pub fn of_source(why: &Failure, facts: &Facts, expected: u8) -> String {
    let words = match why {
        // What the stream itself says when it ends too early: it is not the bytes that are wrong.
        Failure::Protocol(what) if what.starts_with(GAVE_UP) => what.clone(),
        why if is_closed(why) => format!("{GAVE_UP} ({why})"),
        Failure::Silent { .. } => why.to_string(),
        why => return why.to_string(),
    };
    let callers = || facts.callers.iter().map(|init| init.channel);
    let here: BTreeSet<u8> = callers().filter(|id| *id < expected).collect();
    let beyond = callers().filter(|id| *id >= expected).max();
    let came = match beyond {
        Some(id) => format!("{} or more", u32::from(id) + 1),
        None => here.len().to_string(),
    };
    if beyond.is_some() || here.len() < usize::from(expected) {
        return format!(
            "{words}; of channels, {expected} were expected and {came} came: --channels must be what the source's \
             parameter multifd-channels is, and 0 where its capability multifd is off"
        );
    }
    if facts.callers.iter().any(|init| init.uuid != facts.callers[0].uuid) {
        return format!("{words}; channels came with different uuids, and those of one source have the same");
    }
    words
}

/// Of a migration that went to QEMU.
pub fn of_destination(why: &Failure) -> String {
    match why {
        why if is_closed(why) => format!("{why}: the destination closed the connection, and its own log says why"),
        Failure::Control { reason, .. } if reason.text.contains("speaks TLS") => {
            "the destination speaks TLS, and this side does not; turn its parameter tls-creds off".to_owned()
        }
        Failure::Stalled { channel: None, ms } => {
            format!(
                "nothing moved for {ms} ms although data was waiting; the destination does not read the main connection"
            )
        }
        why => why.to_string(),
    }
}

/// Whether the peer has closed a connection, or its system has, as it has died.
fn is_closed(why: &Failure) -> bool {
    const CLOSED: [i32; 2] = [libc::EPIPE, libc::ECONNRESET];
    match why {
        Failure::Control { reason, .. } => match reason.errno {
            Some(errno) => CLOSED.contains(&errno),
            None => reason.text == "the peer closed it",
        },
        Failure::Channel { reason, .. } => {
            CLOSED.iter().any(|errno| reason.contains(&format!("(os error {errno})")))
                || reason.starts_with("the peer closed the connection")
                || reason.starts_with("the source closed it")
        }
        _ => false,
    }
}
