//! Stands between source and target, knows the control frames that pass, and does harm at one place of one of them.
// UNSAFETY: resets a connection, and waits for two at a time.
#![expect(unsafe_code)]

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::units::SessionId;
use pageferry::wire::control::{FRAME_HEADER_BYTES, HEARD_THE_END};
use pageferry::wire::hello::{HELLO_BYTES, Hello};

/// A direction of the control connection.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Way {
    ToTarget,
    ToSource,
}

/// A message, by what it is and how many of its kind went the same way before.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Message {
    pub way: Way,
    /// The number of its type; [`HELLO`], and [`HEARD`] for the Ping that says so.
    pub kind: u16,
    pub turn: u32,
}

pub const HELLO: u16 = 0;
pub const HEARD: u16 = u16::MAX;

/// What is done.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Harm {
    /// The control connection is reset, both ways.
    Reset,
    /// It is closed in good order, both ways.
    Close,
    /// It carries nothing more, and stays.
    Stall,
    /// The source's process is killed.
    KillSource,
    /// The target's process is killed.
    KillTarget,
}

/// When: the first `offset` bytes of this message have passed, and no more.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    pub message: Message,
    pub offset: usize,
}

impl Place {
    /// Whether the target has not even heard who is there.
    pub fn is_within_first_word(self) -> bool {
        let Message { way, kind, .. } = self.message;
        (way, kind) == (Way::ToTarget, HELLO) && self.offset < HELLO_BYTES
    }
}

/// What the proxy has seen.
#[derive(Clone, Default, Debug)]
pub struct Seen {
    /// Messages in the order in which they passed, and their lengths.
    pub passed: Vec<(Message, usize)>,
    /// Whether the place came.
    pub harmed: bool,
    /// What the source's Hello says.
    pub session: Option<SessionId>,
}

/// Kills whom the harm names; returns when it is gone.
pub type Kill = dyn Fn(Harm) + Send + Sync;

struct Shared {
    target: String,
    harm: Option<(Place, Harm)>,
    kill: Box<Kill>,
    seen: Mutex<Seen>,
    /// A stalled connection goes on.
    released: AtomicBool,
    ended: AtomicBool,
}

pub struct Proxy {
    address: String,
    shared: Arc<Shared>,
    control: Option<JoinHandle<()>>,
}

impl Proxy {
    /// A proxy before the target at this address.
    pub fn before(target: &str, harm: Option<(Place, Harm)>, kill: Box<Kill>) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (target, seen) = (target.to_owned(), Mutex::default());
        let (released, ended) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { target, harm, kill, seen, released, ended });
        let control = std::thread::spawn({
            let shared = shared.clone();
            move || carry_all(&listener, &shared)
        });
        Proxy { address, shared, control: Some(control) }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Lets a stalled connection go on: what was held back arrives now.
    pub fn release(&self) {
        self.shared.released.store(true, Ordering::Relaxed);
    }

    /// The session, once the source has said Hello.
    pub fn session(&self) -> SessionId {
        self.seen().session.unwrap()
    }

    pub fn seen(&self) -> Seen {
        self.shared.seen.lock().unwrap().clone()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        // Wakes it should it wait for a connection.
        drop(TcpStream::connect(&self.address));
        let ended = self.control.take().unwrap().join();
        assert!(ended.is_ok() || std::thread::panicking(), "the proxy has panicked");
    }
}

/// The first connection is the control connection; all others are carried as they are, by threads that end with them.
fn carry_all(listener: &TcpListener, shared: &Arc<Shared>) {
    let mut control = None;
    for near in listener.incoming() {
        if shared.ended.load(Ordering::Relaxed) {
            break;
        }
        let Ok(far) = TcpStream::connect(&shared.target) else { continue };
        let near = near.unwrap();
        near.set_nodelay(true).unwrap();
        far.set_nodelay(true).unwrap();
        if control.is_some() {
            carry(near.try_clone().unwrap(), far.try_clone().unwrap());
            carry(far, near);
            continue;
        }
        let shared = shared.clone();
        control = Some(std::thread::spawn(move || Control::new(near, far, &shared).carry()));
    }
    if let Some(control) = control {
        control.join().unwrap();
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream) {
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Both);
    });
}

/// One direction: bytes that have come and not yet passed.
#[derive(Default)]
struct Stream {
    waiting: Vec<u8>,
    greeted: bool,
    /// The other side says no more.
    closed: bool,
}

struct Control<'a> {
    near: TcpStream,
    far: TcpStream,
    streams: [Stream; 2],
    shared: &'a Shared,
    harmed: bool,
}

/// Nothing more is to be carried.
struct Done;

impl Control<'_> {
    fn new(near: TcpStream, far: TcpStream, shared: &Shared) -> Control<'_> {
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        Control { near, far, streams: Default::default(), shared, harmed: false }
    }

    fn carry(mut self) {
        while !self.shared.ended.load(Ordering::Relaxed) {
            for way in [Way::ToTarget, Way::ToSource] {
                if self.take(way).is_err() || self.pass(way).is_err() {
                    return;
                }
            }
            if self.streams.iter().all(|stream| stream.closed) {
                return;
            }
            self.wait();
        }
    }

    /// Waits for something to read, and not for long: somebody may want the end.
    fn wait(&self) {
        let fd = |socket: &TcpStream, closed: bool| libc::pollfd {
            fd: if closed { -1 } else { socket.as_raw_fd() },
            events: libc::POLLIN,
            revents: 0,
        };
        let mut fds = [fd(&self.near, self.streams[0].closed), fd(&self.far, self.streams[1].closed)];
        // SAFETY: the pointer and the count are those of the array.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, 20) };
    }

    /// Reads what has come.
    fn take(&mut self, way: Way) -> Result<(), Done> {
        let stream = &mut self.streams[way as usize];
        let mut from = if way == Way::ToTarget { &self.near } else { &self.far };
        let mut buffer = [0; 1 << 16];
        while !stream.closed {
            match from.read(&mut buffer) {
                Ok(0) => stream.closed = true,
                Ok(n) => stream.waiting.extend_from_slice(&buffer[..n]),
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // Reset: so is the other half.
                Err(_) => return Err(Done),
            }
        }
        Ok(())
    }

    /// Passes on whole messages, and of the one that is to be harmed the beginning.
    fn pass(&mut self, way: Way) -> Result<(), Done> {
        while let Some((kind, length)) = self.next(way) {
            let message = self.note(way, kind, length);
            let place = self.shared.harm.filter(|(place, _)| place.message == message && !self.harmed);
            if let Some((place, harm)) = place {
                // A Pong is longer when there are lanes to speak of: not every run has the same.
                let offset = place.offset.min(length);
                self.write(way, offset)?;
                self.harmed = true;
                self.shared.seen.lock().unwrap().harmed = true;
                self.harm(harm)?;
                self.write(way, length - offset)?;
            } else {
                self.write(way, length)?;
            }
            self.streams[way as usize].greeted = true;
        }
        let stream = &self.streams[way as usize];
        if stream.closed {
            let to = if way == Way::ToTarget { &self.far } else { &self.near };
            let _ = to.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// Kind and length of the message that waits, if all of it is here.
    fn next(&self, way: Way) -> Option<(u16, usize)> {
        let Stream { waiting, greeted, .. } = &self.streams[way as usize];
        let (kind, length) = if !greeted {
            (HELLO, HELLO_BYTES)
        } else {
            let header = waiting.get(..FRAME_HEADER_BYTES)?;
            let body = u32::from_le_bytes(header[4..8].try_into().unwrap()) as usize;
            (u16::from_le_bytes([header[0], header[1]]), FRAME_HEADER_BYTES + body)
        };
        let bytes = waiting.get(..length)?;
        let heard = bytes[HEADER..].starts_with(&HEARD_THE_END.to_le_bytes()) && length == HEADER + 8;
        Some((if heard { HEARD } else { kind }, length))
    }

    fn note(&self, way: Way, kind: u16, length: usize) -> Message {
        let mut seen = self.shared.seen.lock().unwrap();
        let turn = seen.passed.iter().filter(|(m, _)| (m.way, m.kind) == (way, kind)).count() as u32;
        let message = Message { way, kind, turn };
        if (way, kind) == (Way::ToTarget, HELLO) {
            let hello = self.streams[way as usize].waiting.first_chunk();
            seen.session = hello.and_then(|hello| Hello::decode(hello).ok()).map(|hello| hello.session);
        }
        seen.passed.push((message, length));
        message
    }

    fn write(&mut self, way: Way, bytes: usize) -> Result<(), Done> {
        let stream = &mut self.streams[way as usize];
        let to = if way == Way::ToTarget { &mut self.far } else { &mut self.near };
        // Far less than a socket's buffer holds is ever on its way; who does not read any more has gone.
        let written = to.write_all(&stream.waiting[..bytes]);
        stream.waiting.drain(..bytes);
        written.map_err(|_| Done)
    }

    fn harm(&self, harm: Harm) -> Result<(), Done> {
        match harm {
            Harm::Reset => {
                let linger = libc::linger { l_onoff: 1, l_linger: 0 };
                for socket in [&self.near, &self.far] {
                    let len = size_of::<libc::linger>() as libc::socklen_t;
                    let value = (&raw const linger).cast();
                    // SAFETY: pointer and length are those of a local.
                    let set =
                        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_LINGER, value, len) };
                    assert_eq!(set, 0);
                }
                Err(Done) // both are closed, and nothing else holds them
            }
            Harm::Close => {
                for socket in [&self.near, &self.far] {
                    let _ = socket.shutdown(Shutdown::Write);
                }
                self.hold(|_| false);
                Err(Done)
            }
            Harm::Stall => {
                self.hold(|shared| shared.released.load(Ordering::Relaxed));
                Ok(())
            }
            Harm::KillSource | Harm::KillTarget => {
                (self.shared.kill)(harm);
                Err(Done)
            }
        }
    }

    /// Keeps both connections as they are, until the end.
    fn hold(&self, enough: impl Fn(&Shared) -> bool) {
        while !self.shared.ended.load(Ordering::Relaxed) && !enough(self.shared) {
            std::thread::park_timeout(Duration::from_millis(2));
        }
    }
}

const HEADER: usize = FRAME_HEADER_BYTES;
