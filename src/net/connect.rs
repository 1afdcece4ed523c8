#![forbid(unsafe_code)]
//! How the source gets its connections: by address, or ready-made from a VMM that may not connect by itself.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use crossbeam_queue::ArrayQueue;

use crate::bell::Bell;
use crate::error::Failure;
use crate::net::{Address, Stream, Tls};
use crate::poll::PollSleeper;
use crate::sys::socket::Socket;
use crate::units::{ChannelId, Generation};

/// Which connection is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Opening {
    /// The control connection.
    Control,
    /// A data channel.
    Data {
        /// The channel.
        channel: ChannelId,
        /// How often it has been connected, this time included.
        generation: Generation,
    },
}

impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Opening::Control => f.write_str("the control connection"),
            Opening::Data { channel, generation } => write!(f, "channel {channel}, generation {generation}"),
        }
    }
}

/// Hands out connected stream sockets: for a jailed VMM, whose broker connects for it.
pub trait Connector: Send {
    /// A connected stream socket to the target. Called on the thread that migrates; it should not block for long, as
    /// a cancel waits for it.
    ///
    /// # Errors
    /// Why there is none; the migration fails with it.
    fn open(&mut self, opening: Opening) -> io::Result<OwnedFd>;
}

/// Where connections come from.
pub enum Endpoint {
    /// Connect to these addresses of one target, over different networks: the control connection goes to the first that
    /// answers, and data channels are spread over all of them. At least one.
    Addresses(Vec<Address>),
    /// Ask this.
    Connector(Box<dyn Connector>),
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Addresses(addresses) => {
                f.write_str(&addresses.iter().map(Address::to_string).collect::<Vec<_>>().join(", "))
            }
            Endpoint::Connector(_) => f.write_str("a connector"),
        }
    }
}

/// A [`Connector`] over descriptors that are there already.
#[derive(Debug)]
pub struct Fds {
    control: Option<OwnedFd>,
    data: BTreeMap<u8, OwnedFd>,
}

impl Fds {
    /// The control connection, and the data channels 0, 1, ... in order.
    pub fn new(control: OwnedFd, data: impl IntoIterator<Item = OwnedFd>) -> Fds {
        Fds { control: Some(control), data: (0..=u8::MAX).zip(data).collect() }
    }
}

impl Connector for Fds {
    fn open(&mut self, opening: Opening) -> io::Result<OwnedFd> {
        let fd = match opening {
            Opening::Control => self.control.take(),
            Opening::Data { channel, .. } => self.data.remove(&channel.0),
        };
        fd.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no descriptor is left for {opening}")))
    }
}

/// Opens a connection, encrypted if `tls` is given. Comes back when it is there, when `deadline` has passed, or when
/// `cancelled` says so after a ring of the bell: then with `None`.
///
/// # Errors
/// [`Failure::Connect`], with the address and what the system said; [`Failure::Tls`] where hands were not shaken.
pub(crate) fn open(
    endpoint: &mut Endpoint,
    opening: Opening,
    tls: Option<&Tls>,
    bell: &mut Bell<PollSleeper>,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Stream>, Failure> {
    let failed = |address: String, e: io::Error| Failure::Connect { address, reason: e.into() };
    match endpoint {
        Endpoint::Connector(connector) => {
            let fd = connector.open(opening).and_then(Socket::from_fd);
            let peer = format!("the VMM's connector ({opening})");
            let socket = fd.map_err(|e| failed(peer.clone(), e))?;
            secure(socket, tls, None, bell, deadline, cancelled).map_err(|e| e.of(peer))
        }
        Endpoint::Addresses(addresses) => {
            // The first network that works is good enough for the control connection; a data channel has its own.
            let candidates = match opening {
                Opening::Control => &addresses[..],
                Opening::Data { channel, generation } => one_of(addresses, channel, generation),
            };
            let mut result = Err(Failure::Config("there is no address to connect to".to_owned()));
            for (index, address) in candidates.iter().enumerate() {
                let share = deadline.saturating_duration_since(Instant::now()) / (candidates.len() - index) as u32;
                let until = Instant::now() + share;
                let connected = connect(address, bell, until, cancelled).map_err(|e| failed(address.to_string(), e));
                result = match connected {
                    Ok(Some(socket)) => {
                        let shaken = secure(socket, tls, Some(address), bell, until, cancelled);
                        shaken.map_err(|e| e.of(address.to_string()))
                    }
                    Ok(None) => Ok(None),
                    Err(why) => Err(why),
                };
                if result.is_ok() {
                    break;
                }
            }
            result
        }
    }
}
/// Why hands were not shaken.
struct NotShaken(io::Error);

impl NotShaken {
    fn of(self, peer: String) -> Failure {
        Failure::Tls { peer, reason: self.0.to_string() }
    }
}

/// Makes a stream of a connected socket, encrypted if `tls` is given.
fn secure(
    socket: Socket,
    tls: Option<&Tls>,
    address: Option<&Address>,
    bell: &mut Bell<PollSleeper>,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> Result<Option<Stream>, NotShaken> {
    socket.set_no_delay();
    let Some(tls) = tls else { return Ok(Some(Stream::from(socket))) };
    let stream = socket.set_nonblocking(true).and_then(|()| tls.connect(socket, address));
    stream.and_then(|stream| shake_hands(stream, bell, deadline, cancelled)).map_err(NotShaken)
}

/// Shakes hands over a connection.
fn shake_hands(
    mut stream: Stream,
    bell: &mut Bell<PollSleeper>,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<Option<Stream>> {
    loop {
        if cancelled() {
            return Ok(None);
        }
        if stream.shake_hands()? {
            return Ok(Some(stream));
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the target did not finish the handshake in time"));
        }
        let set = bell.sleeper().set();
        set.clear();
        set.until(deadline);
        set.watch(stream.as_fd(), true, stream.unsent_bytes() > 0);
        bell.wait();
    }
}

/// The address for a data channel: channels take turns, and one that is connected again tries the next.
pub fn one_of(addresses: &[Address], channel: ChannelId, generation: Generation) -> &[Address] {
    let turn = usize::from(channel.0) + generation.0.saturating_sub(1) as usize;
    turn.checked_rem(addresses.len()).map_or(addresses, |index| &addresses[index..=index])
}

fn connect(
    address: &Address,
    bell: &mut Bell<PollSleeper>,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<Option<Socket>> {
    let candidates = match address {
        Address::Unix(path) => return finish(Socket::start_unix(path)?, bell, deadline, cancelled),
        Address::Tcp { host, port } => match resolve(host, *port, bell, deadline, cancelled)? {
            Some(candidates) => candidates,
            None => return Ok(None),
        },
    };
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for candidate in candidates {
        match Socket::start_tcp(&candidate).and_then(|socket| finish(socket, bell, deadline, cancelled)) {
            Ok(done) => return Ok(done),
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// Waits for a connect that was started.
fn finish(
    socket: Socket,
    bell: &mut Bell<PollSleeper>,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<Option<Socket>> {
    loop {
        if cancelled() {
            return Ok(None);
        }
        let set = bell.sleeper().set();
        set.clear();
        set.until(deadline);
        let place = set.watch(socket.as_fd(), false, true);
        bell.wait();
        if bell.sleeper().set().ready(place).writable {
            socket.take_error()?;
            return Ok(Some(socket));
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time"));
        }
    }
}

/// Resolves a name. getaddrinfo(3) cannot be interrupted: it runs on a thread of its own, which a cancel leaves behind
/// (it ends by itself, and holds nothing but the queue for its answer).
fn resolve(
    host: &str,
    port: u16,
    bell: &mut Bell<PollSleeper>,
    deadline: Instant,
    cancelled: &dyn Fn() -> bool,
) -> io::Result<Option<Vec<SocketAddr>>> {
    if let Ok(ip) = host.parse::<IpAddr>() {
        return Ok(Some(vec![SocketAddr::new(ip, port)]));
    }
    let answer = Arc::new(ArrayQueue::new(1));
    let (to, name, ringer) = (answer.clone(), host.to_owned(), bell.ringer());
    crate::sys::thread::with_signals_blocked(|| {
        thread::Builder::new().name("pf-resolve".to_owned()).spawn(move || {
            let _ = to.push((name.as_str(), port).to_socket_addrs().map(|found| found.collect::<Vec<_>>()));
            ringer.ring();
        })
    })?;
    loop {
        if let Some(found) = answer.pop() {
            return found.map(Some);
        }
        if cancelled() {
            return Ok(None);
        }
        if Instant::now() >= deadline {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the name could not be resolved in time"));
        }
        let set = bell.sleeper().set();
        set.clear();
        set.until(deadline);
        bell.wait();
    }
}
