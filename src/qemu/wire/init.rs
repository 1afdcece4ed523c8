//! The first 64 bytes of a multifd channel.
//!
//! ```text
//!   0  magic     u32      0x11223344
//!   4  version   u32      1
//!   8  uuid      16 bytes the source's, zeros without one
//!  24  channel   u8       0 to N - 1
//!  25  reserved  39 bytes zero
//! ```

#![forbid(unsafe_code)]

use super::codec::{Reader, Stop};
use super::error::{Fault, Stream, StreamError};
use super::packet::{MAGIC, VERSION, magic_and_version};

/// Bytes of an init packet.
pub const INIT_BYTES: usize = 64;

/// Says which channel a connection is, once, from the source. There is no answer.
///
/// A QEMU destination compares the uuid with its own, and dies of a channel that is not below the number of channels:
/// how many there are is agreed beforehand and is in no stream, so a caller compares both.
///
/// ```
/// use pageferry::qemu::wire::InitPacket;
///
/// let init = InitPacket { uuid: [0; 16], channel: 2 };
/// assert_eq!(InitPacket::decode(&init.encode()), Ok(init));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct InitPacket {
    /// The uuid of the VM at the source.
    pub uuid: [u8; 16],
    /// Which channel this is.
    pub channel: u8,
}

impl InitPacket {
    /// The bytes of this packet. Channel 255, of which there is none, is put into them as it is.
    pub fn encode(&self) -> [u8; INIT_BYTES] {
        let mut bytes = [0; INIT_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_be_bytes());
        bytes[8..24].copy_from_slice(&self.uuid);
        bytes[24] = self.channel;
        bytes
    }

    /// Reads the first packet of a channel.
    ///
    /// # Errors
    ///
    /// If the magic or the version is another, the channel is 255, or a reserved byte is not zero.
    pub fn decode(bytes: &[u8; INIT_BYTES]) -> Result<InitPacket, StreamError> {
        let mut fields = Reader::new(Stream::Channel, 0, bytes);
        InitPacket::read(&mut fields).map_err(|stop| fields.whole("init packet", stop))
    }

    fn read(fields: &mut Reader<'_>) -> Result<InitPacket, Stop> {
        magic_and_version(fields)?;
        let init = InitPacket { uuid: fields.array()?, channel: fields.u8()? };
        if init.channel == u8::MAX {
            return Err(fields.bad(1, Fault::TooLarge { field: "channel id", found: 255, limit: 254 }));
        }
        fields.zeros("reserved byte of the init packet", 39)?;
        Ok(init)
    }
}
