//! Stands between source and target, passes everything on, and damages one byte.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use pageferry::wire::hello::HELLO_BYTES;

/// Type, length, sequence and CRC of a control frame.
pub const FRAME_HEADER_BYTES: usize = 16;

/// A direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    ToTarget,
    ToSource,
}

/// The byte to damage.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Flip {
    /// In the order in which the source connects: 0 is the control connection.
    pub connection: usize,
    pub way: Way,
    /// From the start of the connection, in its direction; or from the start of its first frame of this type.
    pub offset: u64,
    pub in_frame: Option<u16>,
    /// The bits to turn over.
    pub mask: u8,
}

/// What became of the stream that was to be damaged.
#[derive(Debug, Default)]
pub struct Seen {
    /// Its bytes, as they were before.
    pub bytes: Vec<u8>,
    /// Whether it was long enough.
    pub flipped: bool,
}

pub struct Proxy {
    address: String,
    accepting: JoinHandle<Vec<JoinHandle<()>>>,
    seen: Arc<Mutex<Seen>>,
}

impl Proxy {
    /// A proxy before the target at this address.
    pub fn before(target: &str, flip: Option<Flip>) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let accepting = std::thread::spawn({
            let (target, seen) = (target.to_owned(), seen.clone());
            move || accept_all(&listener, &target, flip, &seen)
        });
        Proxy { address, accepting, seen }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Call when the source has closed its connections: everything under way is passed on first.
    pub fn end(self) -> Seen {
        // A connection that says nothing is the sign to stop accepting. A source that fails early may have left one of its
        // own like that: then nobody listens any more.
        drop(TcpStream::connect(&self.address));
        let pumps = self.accepting.join().unwrap();
        pumps.into_iter().for_each(|pump| pump.join().unwrap());
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

fn accept_all(
    listener: &TcpListener,
    target: &str,
    flip: Option<Flip>,
    seen: &Arc<Mutex<Seen>>,
) -> Vec<JoinHandle<()>> {
    let mut pumps = Vec::new();
    for connection in 0.. {
        let (near, _) = listener.accept().unwrap();
        let mut first = [0; 1];
        // Both sides say Hello at once, so a connection of the source is never empty.
        if !matches!(near.peek(&mut first), Ok(1)) {
            return pumps;
        }
        let Ok(far) = TcpStream::connect(target) else { return pumps };
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        for way in [Way::ToTarget, Way::ToSource] {
            let (from, to) = if way == Way::ToTarget { (&near, &far) } else { (&far, &near) };
            let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
            let flip = flip.filter(|flip| (flip.connection, flip.way) == (connection, way));
            let seen = seen.clone();
            pumps.push(std::thread::spawn(move || pump(from, to, flip, &seen)));
        }
    }
    pumps
}

/// Where the first frame of this type starts, from the frame at `header_at` on, which moves over those of other types.
fn first_frame(bytes: &[u8], header_at: &mut usize, wanted: u16) -> Option<usize> {
    while let Some(header) = bytes.get(*header_at..*header_at + FRAME_HEADER_BYTES) {
        let (kind, length) = (u16::from_le_bytes([header[0], header[1]]), header[4..8].try_into().unwrap());
        if kind == wanted {
            return Some(*header_at);
        }
        *header_at += FRAME_HEADER_BYTES + u32::from_le_bytes(length) as usize;
    }
    None
}

fn pump(mut from: TcpStream, mut to: TcpStream, flip: Option<Flip>, seen: &Mutex<Seen>) {
    let mut buffer = vec![0; 1 << 16];
    let mut at = 0u64;
    let mut header_at = HELLO_BYTES;
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        if let Some(flip) = flip {
            let mut seen = seen.lock().unwrap();
            seen.bytes.extend_from_slice(&buffer[..n]);
            let place = match flip.in_frame {
                None => Some(flip.offset),
                Some(wanted) => {
                    first_frame(&seen.bytes, &mut header_at, wanted).map(|start| start as u64 + flip.offset)
                }
            };
            if let Some(place) = place.filter(|place| !seen.flipped && (at..at + n as u64).contains(place)) {
                buffer[(place - at) as usize] ^= flip.mask;
                seen.flipped = true;
            }
        }
        at += n as u64;
        if to.write_all(&buffer[..n]).is_err() {
            break;
        }
    }
    // The end is passed on like everything else, in both directions: either side finds that the other has left.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
