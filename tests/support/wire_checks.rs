//! What must hold of any bytes that come from the wire: a property test and a fuzz target call the same functions.

use std::fmt::Debug;

use pageferry::units::PageSize;
use pageferry::wire::WireError;
use pageferry::wire::control::{FRAME_BODY_BYTES_MAX, FRAME_HEADER_BYTES, Frame, FrameDecoder, FrameEncoder};
use pageferry::wire::crc::crc32c;
use pageferry::wire::hello::{HELLO_BYTES, Hello};
use pageferry::wire::packet::{
    PACKET_HEADER_BYTES, PACKET_MAGIC, PacketHeader, RunEntry, check_crc, entries, validate_table,
};

/// What a decoder made of a whole connection.
#[derive(Clone, PartialEq, Debug)]
pub struct Received<F> {
    /// The frames that came.
    pub frames: Vec<F>,
    /// How it ended.
    pub end: Result<(), WireError>,
}

/// Feeds `stream` to a decoder in pieces of these lengths, over and over, and checks at each step that it holds no
/// more than one frame.
pub fn receive<F: Frame>(stream: &[u8], pieces: &[usize]) -> Received<F> {
    let mut decoder = FrameDecoder::new();
    let mut frames = Vec::new();
    let mut rest = stream;
    let mut lengths = pieces.iter().cycle();
    while !rest.is_empty() {
        let length = lengths.next().map_or(rest.len(), |&length| length.clamp(1, rest.len()));
        let mut piece;
        (piece, rest) = rest.split_at(length);
        loop {
            let pulled = decoder.pull(&mut piece);
            assert!(decoder.capacity_bytes() <= FRAME_HEADER_BYTES + FRAME_BODY_BYTES_MAX);
            match pulled {
                Ok(Some(frame)) => frames.push(frame),
                Ok(None) => break assert!(piece.is_empty(), "input was left though no frame was complete"),
                Err(error) => {
                    assert_eq!(decoder.pull(&mut piece).err(), Some(error), "an error is final");
                    assert_eq!(decoder.finish(), Err(error), "an error is final");
                    return Received { frames, end: Err(error) };
                }
            }
        }
    }
    Received { frames, end: decoder.finish() }
}

/// The bytes of `frames` on one connection.
pub fn stream_of<F: Frame>(frames: &[F]) -> Vec<u8> {
    let mut encoder = FrameEncoder::new();
    let mut stream = Vec::new();
    frames.iter().for_each(|frame| encoder.encode(frame, &mut stream).unwrap());
    stream
}

/// The first frame of a connection: this type, this body, and all else as it should be.
pub fn sealed_frame(frame_type: u16, body: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    frame.extend(frame_type.to_le_bytes());
    frame.extend([0; 2]);
    frame.extend((body.len() as u32).to_le_bytes());
    frame.extend([0; 8]);
    frame.extend(body);
    let crc = crc32c(&frame);
    frame[12..16].copy_from_slice(&crc.to_le_bytes());
    frame
}

/// A header and a table with the right magic and CRC, whatever else is in them. Too short ones stay as they are.
pub fn seal_packet(bytes: &mut [u8]) {
    if bytes.len() >= PACKET_HEADER_BYTES {
        bytes[0..4].copy_from_slice(&PACKET_MAGIC.to_le_bytes());
        bytes[60..64].fill(0);
        let crc = crc32c(bytes);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Whatever the bytes are: no panic, and what is accepted has no other bytes that mean the same.
pub fn accepted_frames_are_canonical<F: Frame + PartialEq + Debug>(stream: &[u8]) {
    let received = receive::<F>(stream, &[]);
    let again = stream_of(&received.frames);
    assert_eq!(again, stream[..again.len()]);
    assert!(received.end.is_err() || again.len() == stream.len(), "no byte is skipped");
    if let Err(error) = received.end {
        assert!(!error.to_string().is_empty());
    }
}

/// As [`accepted_frames_are_canonical`], for a hello.
pub fn an_accepted_hello_is_canonical(bytes: &[u8; HELLO_BYTES]) {
    match Hello::decode(bytes) {
        Ok(hello) => assert_eq!(hello.encode(), *bytes),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// As [`accepted_frames_are_canonical`], for a packet's header and what follows it; and the runs that are accepted lie
/// in the block, rise, and make up the payload.
pub fn an_accepted_packet_is_canonical_and_fits(bytes: &[u8], page_size: PageSize, block_pages: u64) {
    let accepted = judge_packet(bytes, page_size, block_pages);
    let (header, runs) = match accepted {
        Ok(accepted) => accepted,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let mut again = vec![0; PACKET_HEADER_BYTES + header.table_bytes()];
    assert_eq!(header.encode_into(&runs, &mut again), Ok(again.len()));
    assert_eq!(again, bytes[..again.len()]);

    // In 128 bits nothing wraps: an oracle that shares no arithmetic with the code under test.
    let mut end = 0u128;
    for run in &runs {
        assert!(run.pages > 0 && u128::from(run.first) >= end);
        end = u128::from(run.first) + u128::from(run.pages);
        assert!(end <= u128::from(block_pages));
    }
    use pageferry::wire::packet::RunKind::Data;
    let data_pages: u128 = runs.iter().filter(|run| run.kind == Data).map(|run| u128::from(run.pages)).sum();
    assert_eq!(data_pages * u128::from(page_size.bytes()), u128::from(header.payload_bytes));
}

/// What a lane does with the bytes of a data connection.
pub fn judge_packet(
    bytes: &[u8],
    page_size: PageSize,
    block_pages: u64,
) -> Result<(PacketHeader, Vec<RunEntry>), WireError> {
    let cut_short = WireError::CutShort { message: "packet", wanted: 0, left: bytes.len() };
    let (head, rest) = bytes.split_first_chunk::<PACKET_HEADER_BYTES>().ok_or(cut_short)?;
    let header = PacketHeader::decode(head)?;
    let table = rest.get(..header.table_bytes()).ok_or(cut_short)?;
    check_crc(head, table)?;
    validate_table(&header, table, page_size, block_pages)?;
    Ok((header, entries(table).collect::<Result<_, _>>()?))
}
