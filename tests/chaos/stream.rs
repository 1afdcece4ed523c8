//! What stands where in a stream of bytes, told without keeping the bytes.

use pageferry::wire::hello::HELLO_BYTES;
use pageferry::wire::packet::{PACKET_HEADER_BYTES, PacketHeader};

/// What a byte belongs to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    Hello,
    Header,
    Table,
    Payload,
    /// A control frame.
    Frame,
    /// A stream that makes no sense any more; source and target may see to it.
    Lost,
}

/// Follows one direction of one connection.
#[derive(Debug)]
pub struct Follower {
    place: Place,
    /// Bytes of it that are still to come.
    left: u64,
    control: bool,
    header: Vec<u8>,
    /// Bytes of payload behind the table.
    payload: u64,
}

impl Follower {
    pub fn new(control: bool) -> Follower {
        Follower { place: Place::Hello, left: HELLO_BYTES as u64, control, header: Vec::new(), payload: 0 }
    }

    /// What the first of these bytes belongs to, and how many do; they must not be empty, and go next time.
    pub fn step(&mut self, bytes: &[u8]) -> (Place, usize) {
        let place = self.place;
        let n = self.left.min(bytes.len() as u64);
        self.left -= n;
        if place == Place::Header {
            self.header.extend_from_slice(&bytes[..n as usize]);
        }
        while self.left == 0 {
            self.next();
        }
        (place, n as usize)
    }

    fn next(&mut self) {
        let header = (Place::Header, PACKET_HEADER_BYTES as u64);
        (self.place, self.left) = match self.place {
            Place::Hello if self.control => (Place::Frame, u64::MAX),
            Place::Hello | Place::Payload => header,
            Place::Table => (Place::Payload, self.payload),
            Place::Header => {
                let bytes = <[u8; PACKET_HEADER_BYTES]>::try_from(&self.header[..]).unwrap();
                self.header.clear();
                match PacketHeader::decode(&bytes) {
                    Ok(header) => {
                        self.payload = header.payload_bytes;
                        (Place::Table, header.table_bytes() as u64)
                    }
                    Err(_) => (Place::Lost, u64::MAX),
                }
            }
            Place::Frame | Place::Lost => (self.place, u64::MAX),
        };
    }
}
