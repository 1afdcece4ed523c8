//! Lists that several control frames carry: lanes, chunks and digests.

#![forbid(unsafe_code)]

use crate::units::{BlockId, ChannelId, Generation};
use crate::wire::codec::{Reader, Writer, check_channel, check_count};
use crate::wire::{BLOCKS_MAX, CHANNELS_MAX, WireError};

/// Most chunks in one Repair or DigestMismatch: the chunks of 128 GiB. What does not fit waits for the next round of
/// repair; more wrong chunks than that are no accident that repair could mend.
pub const CHUNKS_PER_FRAME_MAX: usize = 65_536;

/// Writes a lane: a channel and its generation.
pub fn write_lane(out: &mut Writer<'_>, channel: ChannelId, generation: Generation) -> Result<(), WireError> {
    out.u8(check_channel(channel)?.0);
    out.u32(generation.0);
    Ok(())
}

/// Reads a lane.
pub fn read_lane(body: &mut Reader<'_>) -> Result<(ChannelId, Generation), WireError> {
    Ok((check_channel(ChannelId(body.u8()?))?, Generation(body.u32()?)))
}

/// Refuses a list that names a channel twice: whoever counts lanes would count it twice.
pub fn check_lanes(channels: impl Iterator<Item = ChannelId>) -> Result<(), WireError> {
    let mut seen = [false; 256];
    for channel in channels {
        if std::mem::replace(&mut seen[usize::from(channel.0)], true) {
            return Err(WireError::LaneTwice { channel });
        }
    }
    Ok(())
}

/// Writes a list of lanes.
pub fn write_lanes(out: &mut Writer<'_>, lanes: &[(ChannelId, Generation)]) -> Result<(), WireError> {
    check_count("number of lanes", lanes.len(), CHANNELS_MAX)?;
    check_lanes(lanes.iter().map(|lane| lane.0))?;
    out.u8(lanes.len() as u8);
    lanes.iter().try_for_each(|&(channel, generation)| write_lane(out, channel, generation))
}

/// Reads a list of lanes.
pub fn read_lanes(body: &mut Reader<'_>) -> Result<Vec<(ChannelId, Generation)>, WireError> {
    let count = usize::from(body.u8()?);
    let mut lanes = body.room_for("number of lanes", count, CHANNELS_MAX, 5)?;
    for _ in 0..count {
        lanes.push(read_lane(body)?);
    }
    check_lanes(lanes.iter().map(|lane| lane.0))?;
    Ok(lanes)
}

/// Passes on a block that a migration can have.
pub fn check_block(block: BlockId) -> Result<BlockId, WireError> {
    check_count("block", block.0.into(), BLOCKS_MAX - 1)?;
    Ok(block)
}

/// Writes a list of chunks.
pub fn write_chunks(out: &mut Writer<'_>, chunks: &[(BlockId, u32)]) -> Result<(), WireError> {
    check_count("number of chunks", chunks.len(), CHUNKS_PER_FRAME_MAX)?;
    out.u32(chunks.len() as u32);
    for &(block, chunk) in chunks {
        out.u16(check_block(block)?.0);
        out.u32(chunk);
    }
    Ok(())
}

/// Reads a list of chunks.
pub fn read_chunks(body: &mut Reader<'_>) -> Result<Vec<(BlockId, u32)>, WireError> {
    let count = usize::try_from(body.u32()?).unwrap_or(usize::MAX);
    let mut chunks = body.room_for("number of chunks", count, CHUNKS_PER_FRAME_MAX, 6)?;
    for _ in 0..count {
        chunks.push((check_block(BlockId(body.u16()?))?, body.u32()?));
    }
    Ok(chunks)
}

/// Writes a list of digests, one a block.
pub fn write_digests(out: &mut Writer<'_>, digests: &[u64]) -> Result<(), WireError> {
    check_count("number of digests", digests.len(), BLOCKS_MAX)?;
    out.u16(digests.len() as u16);
    digests.iter().for_each(|&digest| out.u64(digest));
    Ok(())
}

/// Reads a list of digests.
pub fn read_digests(body: &mut Reader<'_>) -> Result<Vec<u64>, WireError> {
    let count = usize::from(body.u16()?);
    let mut digests = body.room_for("number of digests", count, BLOCKS_MAX, 8)?;
    for _ in 0..count {
        digests.push(body.u64()?);
    }
    Ok(digests)
}

/// Writes the digests of a block's chunks.
pub fn write_chunk_digests(out: &mut Writer<'_>, digests: &[u64]) -> Result<(), WireError> {
    check_count("number of chunk digests", digests.len(), CHUNKS_PER_FRAME_MAX)?;
    out.u32(digests.len() as u32);
    digests.iter().for_each(|&digest| out.u64(digest));
    Ok(())
}

/// Reads the digests of a block's chunks.
pub fn read_chunk_digests(body: &mut Reader<'_>) -> Result<Vec<u64>, WireError> {
    let count = body.u32()? as usize;
    let mut digests = body.room_for("number of chunk digests", count, CHUNKS_PER_FRAME_MAX, 8)?;
    for _ in 0..count {
        digests.push(body.u64()?);
    }
    Ok(digests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_channel_that_stands_twice_is_refused_both_ways() {
        let twice = [(ChannelId(3), Generation(1)), (ChannelId(0), Generation(1)), (ChannelId(3), Generation(2))];
        let error = WireError::LaneTwice { channel: ChannelId(3) };
        assert_eq!(write_lanes(&mut Writer::new(&mut Vec::new()), &twice), Err(error));
        let bytes = [3, 3, 1, 0, 0, 0, 0, 1, 0, 0, 0, 3, 2, 0, 0, 0];
        assert_eq!(read_lanes(&mut Reader::new("test", &bytes)), Err(error));
    }

    #[test]
    fn lists_over_their_limit_are_refused_both_ways() {
        let error = WireError::TooLarge { field: "number of chunks", value: 65_537, limit: 65_536 };
        let chunks = vec![(BlockId(0), 0); CHUNKS_PER_FRAME_MAX + 1];
        assert_eq!(write_chunks(&mut Writer::new(&mut Vec::new()), &chunks), Err(error));
        assert_eq!(read_chunks(&mut Reader::new("test", &[1, 0, 1, 0])), Err(error));

        let error = WireError::TooLarge { field: "number of digests", value: 1025, limit: 1024 };
        assert_eq!(write_digests(&mut Writer::new(&mut Vec::new()), &[0; 1025]), Err(error));
        assert_eq!(read_digests(&mut Reader::new("test", &[1, 4])), Err(error));

        let error = WireError::TooLarge { field: "block", value: 1024, limit: 1023 };
        assert_eq!(write_chunks(&mut Writer::new(&mut Vec::new()), &[(BlockId(1024), 0)]), Err(error));
        assert_eq!(read_chunks(&mut Reader::new("test", &[1, 0, 0, 0, 0, 4, 0, 0, 0, 0])), Err(error));
    }
}
