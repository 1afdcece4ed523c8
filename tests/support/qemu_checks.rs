//! What must hold of any bytes on QEMU's streams: a property test and a fuzz target call the same functions.

use pageferry::qemu::wire::{Dialect, Record};

use super::plans;
use super::streams::{receive, receive_channel, receive_return};

/// What must hold of any bytes as a main stream: they mean the same in pieces as at once, and what is accepted of them
/// can be written, and then means the same again.
pub fn any_main_stream_is_judged_well(stream: &[u8], dialect: Dialect, pieces: &[usize]) -> &'static str {
    let whole = receive(stream, dialect, &[]);
    assert_eq!(whole, receive(stream, dialect, pieces), "the same in pieces of {pieces:?} as at once");
    let mut again = plans::encode(whole.records.iter().cloned(), dialect).expect("what was read can be written");
    // Behind the last block a page size may follow: only what stands there tells.
    again.extend(0x10_u64.to_be_bytes().iter().filter(|_| matches!(whole.records.last(), Some(Record::Blocks(_)))));
    assert_eq!(receive(&again, dialect, &[]).records.get(..whole.records.len()), Some(&whole.records[..]));
    if whole.end.is_ok() { "accepted" } else { "refused" }
}

/// What must hold of any bytes as a channel.
pub fn any_channel_is_judged_well(stream: &[u8], dialect: Dialect, pieces: &[usize]) -> &'static str {
    let whole = receive_channel(stream, dialect, &[]);
    assert_eq!(whole, receive_channel(stream, dialect, pieces), "the same in pieces of {pieces:?} as at once");
    // A header and its data are there, or the channel has not ended well.
    let data: u64 = whole.data_bytes.iter().sum();
    assert!(data <= stream.len() as u64);
    if whole.end.is_ok() { "accepted" } else { "refused" }
}

/// What must hold of any bytes as a return path.
pub fn any_return_path_is_judged_well(stream: &[u8], pieces: &[usize]) -> &'static str {
    let (messages, end) = receive_return(stream, &[]);
    assert_eq!((&messages, &end), (&receive_return(stream, pieces).0, &receive_return(stream, pieces).1));
    let mut again = Vec::new();
    messages.iter().for_each(|message| message.encode(&mut again));
    assert_eq!(again, stream[..again.len()], "a message has one form only");
    if end.is_ok() { "accepted" } else { "refused" }
}
