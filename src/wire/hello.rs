//! The hello: 64 bytes that open every connection and say what it is for.
//!
//! ```text
//!   0  magic       8 bytes  "PGFERRY\n"
//!   8  version     u16
//!  10  role        u8       1 control, 2 data
//!  11  side        u8       1 source, 2 target: who sends this
//!  12  channel     u8       0 on the control connection
//!  13  reserved    3 bytes  zero
//!  16  generation  u32
//!  20  reserved    4 bytes  zero
//!  24  features    u64
//!  32  session     16 bytes
//!  48  reserved    12 bytes zero
//!  60  crc         u32      CRC-32C of bytes 0 to 59
//! ```

#![forbid(unsafe_code)]

use std::fmt;

use super::codec::{Reader, check_channel};
use super::crc::crc32c;
use super::{VERSION, WireError};
use crate::units::{ChannelId, Generation, SessionId};

/// Bytes of a hello.
pub const HELLO_BYTES: usize = 64;

/// The first eight bytes of every connection. The line feed shows a transport that rewrites line ends.
pub const HELLO_MAGIC: [u8; 8] = *b"PGFERRY\n";

/// What errors call it.
const NAME: &str = "hello";

/// One of the two sides of a migration.
///
/// ```
/// assert_eq!(pageferry::wire::hello::Side::Source.to_string(), "source");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    /// Where the guest runs at first.
    Source,
    /// Where the guest is to run.
    Target,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Side::Source => "source",
            Side::Target => "target",
        })
    }
}

/// What a connection is for.
///
/// ```
/// use pageferry::units::ChannelId;
/// use pageferry::wire::hello::HelloRole;
///
/// assert_ne!(HelloRole::Control, HelloRole::Data(ChannelId(0)));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum HelloRole {
    /// The one control connection.
    Control,
    /// This data channel.
    Data(ChannelId),
}

/// The first message on every connection, in both directions. A target tells by it, and not by the order of arrival,
/// which connection is which.
///
/// ```
/// use pageferry::units::{ChannelId, Generation, SessionId};
/// use pageferry::wire::hello::{Hello, HelloRole, Side};
///
/// let hello = Hello {
///     role: HelloRole::Data(ChannelId(3)),
///     side: Side::Source,
///     generation: Generation(1),
///     session: SessionId([7; 16]),
///     features: 0,
/// };
/// assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Hello {
    /// What the connection is for.
    pub role: HelloRole,
    /// Who sends this hello.
    pub side: Side,
    /// How often this connection has been made.
    pub generation: Generation,
    /// The migration it belongs to.
    pub session: SessionId,
    /// What the sender can do beyond version 1, a bit each. Bits that the receiver does not know are no error: each
    /// side uses what both have set.
    pub features: u64,
}

impl Hello {
    /// The bytes of this hello. A channel above 254 is put into them as it is, and refused by every peer.
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let (role, channel) = match self.role {
            HelloRole::Control => (1, 0),
            HelloRole::Data(channel) => (2, channel.0),
        };
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..8].copy_from_slice(&HELLO_MAGIC);
        bytes[8..10].copy_from_slice(&VERSION.to_le_bytes());
        bytes[10] = role;
        bytes[11] = match self.side {
            Side::Source => 1,
            Side::Target => 2,
        };
        bytes[12] = channel;
        bytes[16..20].copy_from_slice(&self.generation.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.features.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.session.0);
        let crc = crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a hello.
    ///
    /// # Errors
    ///
    /// [`WireError::NotPageferry`] if the magic is wrong, [`WireError::UnsupportedVersion`] if the version is not
    /// [`VERSION`], [`WireError::BadCrc`] if the bytes are damaged, [`WireError::ReservedNotZero`] and
    /// [`WireError::BadValue`] if a sound checksum covers something that has no meaning. They are found in this order:
    /// another program is told apart from another version, and that from damage.
    pub fn decode(bytes: &[u8; HELLO_BYTES]) -> Result<Hello, WireError> {
        let mut fields = Reader::new(NAME, bytes);
        let magic = fields.array()?;
        if magic != HELLO_MAGIC {
            return Err(WireError::NotPageferry { first: magic });
        }
        let version = fields.u16()?;
        if version != VERSION {
            return Err(WireError::UnsupportedVersion { theirs: version, ours: VERSION });
        }
        let stated = u32::from_le_bytes([bytes[60], bytes[61], bytes[62], bytes[63]]);
        let computed = crc32c(&bytes[..60]);
        if stated != computed {
            return Err(WireError::BadCrc { message: NAME, stated, computed });
        }

        let (role, side, channel) = (fields.u8()?, fields.u8()?, fields.u8()?);
        fields.reserved::<3>()?;
        let generation = Generation(fields.u32()?);
        fields.reserved::<4>()?;
        let features = fields.u64()?;
        let session = SessionId(fields.array()?);
        fields.reserved::<12>()?;

        let role = match (role, channel) {
            (1, 0) => HelloRole::Control,
            (1, _) => return Err(WireError::BadValue { field: "control connection's channel", value: channel.into() }),
            (2, _) => HelloRole::Data(check_channel(ChannelId(channel))?),
            (other, _) => return Err(WireError::BadValue { field: "role in a hello", value: other.into() }),
        };
        let side = match side {
            1 => Side::Source,
            2 => Side::Target,
            other => return Err(WireError::BadValue { field: "side in a hello", value: other.into() }),
        };
        Ok(Hello { role, side, generation, session, features })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HELLO: Hello = Hello {
        role: HelloRole::Control,
        side: Side::Target,
        generation: Generation(2),
        session: SessionId([9; 16]),
        features: 0x8000_0000_0000_0001,
    };

    /// A hello with some bytes changed and the checksum made right again.
    fn with(at: usize, new: &[u8]) -> [u8; HELLO_BYTES] {
        let mut bytes = HELLO.encode();
        bytes[at..at + new.len()].copy_from_slice(new);
        let crc = crc32c(&bytes[..60]);
        bytes[60..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    #[test]
    fn each_wrong_hello_has_its_own_error() {
        let not_ours = WireError::NotPageferry { first: *b"\x16\x03\x01GIF89" };
        assert_eq!(Hello::decode(&with(0, b"\x16\x03\x01GIF89")), Err(not_ours));
        assert_eq!(not_ours.to_string(), r#"this is not a pageferry peer: its first bytes were "\x16\x03\x01GIF89""#);
        let newer = WireError::UnsupportedVersion { theirs: 2, ours: 1 };
        assert_eq!(Hello::decode(&with(8, &[2, 0])), Err(newer));
        assert_eq!(newer.to_string(), "the peer speaks a newer version of the protocol: 2; this side speaks 1");
        let older = WireError::UnsupportedVersion { theirs: 0, ours: 1 };
        assert_eq!(Hello::decode(&with(8, &[0, 0])), Err(older));

        let mut damaged = HELLO.encode();
        damaged[33] ^= 4;
        assert!(matches!(Hello::decode(&damaged), Err(WireError::BadCrc { message: "hello", .. })));

        for reserved in [13, 14, 15, 20, 21, 22, 23, 48, 59] {
            let error = WireError::ReservedNotZero { message: "hello" };
            assert_eq!(Hello::decode(&with(reserved, &[1])), Err(error), "byte {reserved}");
        }
        for (at, new, field, value) in [
            (10, &[0u8][..], "role in a hello", 0),
            (10, &[3], "role in a hello", 3),
            (11, &[0], "side in a hello", 0),
            (11, &[3], "side in a hello", 3),
            (12, &[1], "control connection's channel", 1),
        ] {
            assert_eq!(Hello::decode(&with(at, new)), Err(WireError::BadValue { field, value }));
        }
        let too_many = WireError::TooLarge { field: "channel", value: 255, limit: 254 };
        assert_eq!(Hello::decode(&with(10, &[2, 1, 255])), Err(too_many));
        assert!(Hello::decode(&with(10, &[2, 1, 254])).is_ok());
    }

    #[test]
    fn a_newer_version_is_told_apart_from_damage_whatever_its_layout() {
        let mut newer = [0xAA; HELLO_BYTES];
        newer[..8].copy_from_slice(&HELLO_MAGIC);
        newer[8..10].copy_from_slice(&7u16.to_le_bytes());
        assert_eq!(Hello::decode(&newer), Err(WireError::UnsupportedVersion { theirs: 7, ours: 1 }));
    }
}
