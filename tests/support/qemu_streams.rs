//! What a decoder of QEMU's streams made of whole streams: golden tests, property tests and fuzz targets ask the same.

#![allow(dead_code)] // A golden test uses a part.

use pageferry::qemu::wire::{
    ChannelDecoder, ChannelEvent, Dialect, MainDecoder, Record, ReturnDecoder, ReturnMessage, StreamError,
};

/// What came of a main stream: bytes that are handed through are joined, so that it does not matter how they were cut.
#[derive(Clone, PartialEq, Debug)]
pub struct Received<'a> {
    pub records: Vec<Record<'a>>,
    pub end: Result<(), StreamError>,
}

/// `stream`, cut into pieces of these lengths, over and over.
pub fn cut<'a>(stream: &'a [u8], pieces: &'a [usize]) -> impl Iterator<Item = &'a [u8]> {
    let mut lengths = pieces.iter().cycle();
    let mut rest = stream;
    std::iter::from_fn(move || {
        let length = lengths.next().map_or(rest.len(), |length| (*length).clamp(1, rest.len().max(1)));
        let (piece, left) = rest.split_at(length.min(rest.len()));
        rest = left;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Where `piece` stands in `stream`, of which it is a part.
fn place(stream: &[u8], piece: &[u8]) -> usize {
    piece.as_ptr() as usize - stream.as_ptr() as usize
}

/// `after` behind `before`, which it follows in `stream`.
fn joined<'a>(stream: &'a [u8], before: &[u8], after: &[u8]) -> &'a [u8] {
    let start = place(stream, before);
    assert_eq!(start + before.len(), place(stream, after), "bytes that are handed through leave no gap");
    &stream[start..start + before.len() + after.len()]
}

/// Feeds `stream` to a decoder in pieces of these lengths, and checks at each step that it holds no more than one record.
pub fn receive<'a>(stream: &'a [u8], dialect: Dialect, pieces: &'a [usize]) -> Received<'a> {
    let mut decoder = MainDecoder::new(dialect);
    let mut records: Vec<Record<'a>> = Vec::new();
    for mut piece in cut(stream, pieces) {
        loop {
            let pulled = decoder.pull(&mut piece);
            assert!(decoder.capacity_bytes() <= 2 << 16, "{} bytes held", decoder.capacity_bytes());
            let record = match pulled {
                Ok(Some(record)) => record,
                Ok(None) => break assert!(piece.is_empty(), "input was left though no record was complete"),
                Err(error) => {
                    assert_eq!(decoder.pull(&mut piece), Err(error.clone()), "an error is final");
                    assert_eq!(decoder.finish(), Err(error.clone()), "an error is final");
                    assert!(error.at <= stream.len() as u64, "{error}");
                    return Received { records, end: Err(error) };
                }
            };
            // An end that more bytes have undone was one all the same: it stays between two pieces of the tail.
            match (records.last_mut(), &record) {
                (Some(Record::Tail(before)), Record::Tail(after))
                | (Some(Record::PageData(before)), Record::PageData(after))
                | (Some(Record::Packaged(before)), Record::Packaged(after)) => *before = joined(stream, before, after),
                _ => records.push(record),
            }
        }
    }
    Received { records, end: decoder.finish() }
}

/// What came on a channel, as text: headers as they print, data joined.
#[derive(Clone, PartialEq, Debug)]
pub struct ReceivedChannel {
    pub events: Vec<String>,
    pub data_bytes: Vec<u64>,
    pub end: Result<(), StreamError>,
}

/// Feeds `stream` to a channel's decoder in pieces of these lengths.
pub fn receive_channel(stream: &[u8], dialect: Dialect, pieces: &[usize]) -> ReceivedChannel {
    let mut decoder = ChannelDecoder::new(dialect);
    let (mut events, mut data_bytes) = (Vec::new(), Vec::new());
    for mut piece in cut(stream, pieces) {
        loop {
            match decoder.pull(&mut piece) {
                Ok(Some(ChannelEvent::Data(data))) => match data_bytes.last_mut() {
                    Some(sum) => *sum += data.len() as u64,
                    None => panic!("data before a header"),
                },
                Ok(Some(event)) => {
                    events.push(format!("{event:?}"));
                    data_bytes.push(0);
                }
                Ok(None) => break assert!(piece.is_empty(), "input was left though nothing was complete"),
                Err(error) => {
                    assert_eq!(decoder.pull(&mut piece), Err(error.clone()), "an error is final");
                    assert_eq!(decoder.finish(), Err(error.clone()), "an error is final");
                    return ReceivedChannel { events, data_bytes, end: Err(error) };
                }
            }
        }
    }
    ReceivedChannel { events, data_bytes, end: decoder.finish() }
}

/// Feeds `stream` to a decoder of the return path in pieces of these lengths.
pub fn receive_return(stream: &[u8], pieces: &[usize]) -> (Vec<ReturnMessage>, Result<(), StreamError>) {
    let mut decoder = ReturnDecoder::new();
    let mut messages = Vec::new();
    for mut piece in cut(stream, pieces) {
        loop {
            let pulled = decoder.pull(&mut piece);
            assert!(decoder.capacity_bytes() <= 1024, "{} bytes held", decoder.capacity_bytes());
            match pulled {
                Ok(Some(message)) => messages.push(message),
                Ok(None) => break assert!(piece.is_empty(), "input was left though no message was complete"),
                Err(error) => {
                    assert_eq!(decoder.finish(), Err(error.clone()), "an error is final");
                    return (messages, Err(error));
                }
            }
        }
    }
    (messages, decoder.finish())
}
