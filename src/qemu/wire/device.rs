//! State of a device that comes on a multifd channel.
//!
//! ```text
//!   0  magic, version, flags  3 u32     flags: 0x40
//!  12  device                 256 bytes a name, filled up with zeros
//! 268  instance               u32
//! 272  next_packet_size       u32       bytes that follow
//! ```

#![forbid(unsafe_code)]

use super::codec::{Reader, Stop};
use super::error::{Fault, Stream, StreamError};
use super::name::Name;
use super::packet::{FLAG_DEVICE_STATE, MAGIC, VERSION, common};

/// Bytes of the header of a device's packet.
pub const DEVICE_PACKET_BYTES: usize = 276;

/// Most bytes of state in one packet. QEMU's own devices send up to 1 MiB.
pub const DEVICE_DATA_BYTES_MAX: u32 = 64 << 20;

/// The header of a packet with the state of a device; so many bytes follow it. Only QEMU 10.0 and later make them.
///
/// ```
/// use pageferry::qemu::wire::{DevicePacket, Name};
///
/// let packet = DevicePacket { device: Name::new("0000:00:02.0/vfio").unwrap(), instance: 0, data_bytes: 4096 };
/// assert_eq!(DevicePacket::decode(&packet.encode()?, 0), Ok(packet));
/// # Ok::<(), pageferry::qemu::wire::StreamError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct DevicePacket {
    /// The device it belongs to.
    pub device: Name,
    /// Which of several of that name.
    pub instance: u32,
    /// Bytes of state that follow: 1 to [`DEVICE_DATA_BYTES_MAX`].
    pub data_bytes: u32,
}

impl DevicePacket {
    /// The bytes of this header.
    ///
    /// # Errors
    ///
    /// If `data_bytes` is out of range.
    pub fn encode(&self) -> Result<[u8; DEVICE_PACKET_BYTES], StreamError> {
        let mut bytes = [0; DEVICE_PACKET_BYTES];
        bytes[..4].copy_from_slice(&MAGIC.to_be_bytes());
        bytes[4..8].copy_from_slice(&VERSION.to_be_bytes());
        bytes[8..12].copy_from_slice(&FLAG_DEVICE_STATE.to_be_bytes());
        let name = self.device.as_str().as_bytes();
        bytes[12..12 + name.len()].copy_from_slice(name);
        bytes[268..272].copy_from_slice(&self.instance.to_be_bytes());
        bytes[272..].copy_from_slice(&self.data_bytes.to_be_bytes());
        DevicePacket::decode(&bytes, 0)?;
        Ok(bytes)
    }

    /// Reads a header whose first byte is byte `at` of the channel.
    ///
    /// # Errors
    ///
    /// If the flags are others, the device has no name, or no state follows, or too much.
    pub fn decode(bytes: &[u8; DEVICE_PACKET_BYTES], at: u64) -> Result<DevicePacket, StreamError> {
        let mut fields = Reader::new(Stream::Channel, at, bytes);
        DevicePacket::read(&mut fields).map_err(|stop| fields.whole("device-state packet", stop))
    }

    fn read(fields: &mut Reader<'_>) -> Result<DevicePacket, Stop> {
        let flags = common(fields)?;
        if flags != FLAG_DEVICE_STATE {
            let fault = Fault::Value { field: "flag word", found: flags.into(), expected: "0x40: device state and no other" };
            return Err(fields.bad(4, fault));
        }
        let padded = fields.bytes(256)?;
        let device = Name::check_padded("device name", padded, false)
            .and_then(|text| Name::read("device name", text.as_bytes()))
            .map_err(|fault| fields.bad(256, fault))?;
        let packet = DevicePacket { device, instance: fields.u32()?, data_bytes: fields.u32()? };
        let (field, found) = ("next_packet_size", packet.data_bytes.into());
        match packet.data_bytes {
            0 => Err(fields.bad(4, Fault::Value { field, found, expected: "some state" })),
            1..=DEVICE_DATA_BYTES_MAX => Ok(packet),
            _ => Err(fields.bad(4, Fault::TooLarge { field, found, limit: DEVICE_DATA_BYTES_MAX.into() })),
        }
    }
}
