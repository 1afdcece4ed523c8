#![forbid(unsafe_code)]
//! Where strangers wait until they have said who they are.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::framing::{Framing, Native};
use crate::net::stream::{Stream, is_tls};
use crate::sys::event::PollSet;
use crate::wire::hello::{HELLO_BYTES, Hello};

/// Connections that have not yet said who they are. Nobody waits for any of them, and there is room for a few only.
///
/// Whoever can reach the port can fill it. So a newcomer pushes out the oldest guest of the address that has the most
/// here: a crowd from one address pushes out its own. What a guest has said so far counts for nothing, as a crowd can say
/// 63 bytes of a Hello as well as none. Among guests of one address, and where many addresses have a few each, the oldest
/// leaves: and as no more than [`ENTRANTS_MAX`] are let in each [`CROWD_PAUSE`], every guest has 70 ms at the least, while
/// an honest peer's Hello comes right behind its connection.
#[derive(Debug)]
pub struct Lobby {
    framing: Arc<dyn Framing>,
    /// From the oldest to the newest.
    guests: Vec<Guest>,
    /// How many there are of each origin; none of zero.
    crowds: BTreeMap<Origin, usize>,
    turned_away: u64,
}

/// Whence somebody came: an address, or the network of one household (64 bits of IPv6), any of whose addresses one
/// stranger can have. Unix sockets have none.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Origin(Option<IpAddr>);

impl Origin {
    /// Of a peer with this address.
    pub fn of(ip: Option<IpAddr>) -> Origin {
        Origin(ip.map(|ip| match ip.to_canonical() {
            IpAddr::V4(v4) => IpAddr::V4(v4),
            IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        }))
    }
}

#[derive(Debug)]
struct Guest {
    stream: Stream,
    origin: Origin,
    hello: [u8; HELLO_BYTES],
    got: usize,
    until: Instant,
    /// Its place in the poll set of the last wait.
    place: Option<usize>,
}

/// What became of a connection in the lobby.
#[derive(Debug)]
pub enum Greeting {
    /// It said a good Hello.
    Hello(Stream, Hello),
    /// It said something else, or is not trusted: why.
    Stranger(String),
    /// It said nothing in time, or left.
    Silent,
}

/// Connections in the lobby at once: one of each channel's, and some strangers.
const GUESTS_MAX: usize = 512;
/// Connections to be let in before those in the lobby are heard, at the most. Far fewer than the lobby holds: a crowd of
/// strangers does not push out a channel that has said its Hello already, or keep the target from its work.
pub const ENTRANTS_MAX: usize = 64;
/// How long the door stays shut after so many have come at once: a migration has other things to do.
pub const CROWD_PAUSE: Duration = Duration::from_millis(10);
/// Connections of one origin that are no crowd: a source opens its channels one after the other.
const COMPANY_MAX: usize = 8;

impl Default for Lobby {
    fn default() -> Lobby {
        Lobby::new(Arc::new(Native))
    }
}

impl Lobby {
    /// An empty one, for guests who speak this.
    pub fn new(framing: Arc<dyn Framing>) -> Lobby {
        Lobby { framing, guests: Vec::new(), crowds: BTreeMap::new(), turned_away: 0 }
    }

    /// Lets a connection in. If there is no room, one leaves: the oldest of the largest crowd.
    ///
    /// # Errors
    /// What fcntl(2) says.
    pub fn enter(&mut self, stream: impl Into<Stream>, hello_timeout: Duration) -> io::Result<()> {
        let mut stream = stream.into();
        stream.set_nonblocking(true)?;
        let ip = stream.socket().peer_ip();
        self.enter_from(stream, Origin::of(ip), Instant::now() + hello_timeout);
        Ok(())
    }

    fn enter_from(&mut self, stream: Stream, origin: Origin, until: Instant) {
        // The newcomer is counted: it belongs to its crowd.
        *self.crowds.entry(origin).or_default() += 1;
        if self.guests.len() >= GUESTS_MAX {
            self.make_room();
        }
        self.guests.push(Guest { stream, origin, hello: [0; HELLO_BYTES], got: 0, until, place: None });
    }

    /// Sends one away, the oldest of the largest crowd: its descriptor is needed.
    pub fn make_room(&mut self) {
        let weight = |count: usize| count.max(COMPANY_MAX);
        // The largest crowd may consist of a newcomer alone, who is not here yet.
        let most = self.guests.iter().map(|guest| weight(self.crowds[&guest.origin])).max();
        if let Some(index) = self.guests.iter().position(|guest| Some(weight(self.crowds[&guest.origin])) == most) {
            self.leave(index);
            self.turned_away += 1;
        }
    }

    fn leave(&mut self, index: usize) -> Guest {
        let guest = self.guests.remove(index);
        if let Some(count) = self.crowds.get_mut(&guest.origin) {
            *count -= 1;
            if *count == 0 {
                self.crowds.remove(&guest.origin);
            }
        }
        guest
    }

    /// Whether nobody is in it.
    pub fn is_empty(&self) -> bool {
        self.guests.is_empty()
    }

    /// Connections that were dropped without having said a good Hello.
    pub fn turned_away(&self) -> u64 {
        self.turned_away
    }

    /// Adds every guest to a poll set.
    pub fn watch(&mut self, set: &mut PollSet) {
        for guest in &mut self.guests {
            guest.place = Some(set.watch(guest.stream.as_fd(), true, guest.stream.unsent_bytes() > 0));
            set.until(guest.until);
        }
    }

    /// Listens, without waiting, to those of whom the last wait on `set` says that they have spoken, so that silent ones
    /// cost nothing; gives those who are done.
    pub fn listen(&mut self, set: &PollSet) -> Vec<Greeting> {
        let mut done = Vec::new();
        let now = Instant::now();
        let mut index = 0;
        while index < self.guests.len() {
            match self.guests[index].hear(&*self.framing, set, now) {
                None => index += 1,
                Some(heard) => {
                    let guest = self.leave(index);
                    done.push(match heard {
                        Heard::All(hello) => Greeting::Hello(guest.stream, hello),
                        Heard::Nonsense(why) => Greeting::Stranger(why),
                        Heard::Nothing => Greeting::Silent,
                    });
                }
            }
        }
        self.turned_away += done.iter().filter(|g| !matches!(g, Greeting::Hello(..))).count() as u64;
        done
    }
}

enum Heard {
    All(Hello),
    Nonsense(String),
    Nothing,
}

impl Guest {
    fn hear(&mut self, framing: &dyn Framing, set: &PollSet, now: Instant) -> Option<Heard> {
        let ready = self.place.take().map(|place| set.ready(place));
        // One that is to be told something first, in a handshake, may be ready to hear it.
        let spoke = ready.is_some_and(|ready| ready.readable || ready.writable);
        let mut wanted = framing.hello_bytes(&self.hello[..self.got]).min(HELLO_BYTES);
        while spoke && self.got < wanted {
            match self.stream.recv(&mut self.hello[self.got..wanted]) {
                Ok(0) => return Some(Heard::Nothing),
                Ok(n) => self.got += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Some(Heard::Nothing),
                // Not the system's, but what TLS has to say against it.
                Err(e) if e.raw_os_error().is_none() => return Some(Heard::Nonsense(e.to_string())),
                Err(_) => return Some(Heard::Nothing),
            }
            wanted = framing.hello_bytes(&self.hello[..self.got]).min(HELLO_BYTES);
        }
        if self.got < wanted {
            return (now >= self.until).then_some(Heard::Nothing);
        }
        let said = &self.hello[..self.got];
        Some(match framing.who(said) {
            Ok(hello) => Heard::All(hello),
            Err(_) if is_tls(said) => {
                Heard::Nonsense(format!("it speaks TLS, and this side does not; {}", framing.without_tls()))
            }
            Err(why) => Heard::Nonsense(why),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event::EventFd;
    use crate::sys::socket::Socket;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    const LATER: Duration = Duration::from_secs(100);

    fn from(network: u8, host: u8) -> Origin {
        Origin::of(Some(IpAddr::from([10, 0, network, host])))
    }

    /// A guest that has come from there; and its own end.
    fn enter(lobby: &mut Lobby, origin: Origin) -> UnixStream {
        let (here, there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        lobby.enter_from(Socket::from_fd(here.into()).unwrap().into(), origin, Instant::now() + LATER);
        there.set_nonblocking(true).unwrap();
        there
    }

    fn is_in(mut guest: &UnixStream) -> bool {
        // The other end of one that was sent away is closed.
        io::Read::read(&mut guest, &mut [0]).is_err()
    }

    fn set() -> PollSet {
        PollSet::new(Arc::new(EventFd::new().unwrap()))
    }

    #[test]
    fn a_crowd_from_one_address_pushes_out_nobody_else() {
        let mut lobby = Lobby::default();
        let source: Vec<_> = (0..3).map(|_| enter(&mut lobby, from(0, 1))).collect();
        let crowd: Vec<_> = (0..3 * GUESTS_MAX).map(|_| enter(&mut lobby, from(9, 9))).collect();
        assert!(source.iter().all(is_in));
        let (gone, here) = crowd.split_at(2 * GUESTS_MAX + 3);
        assert!(!gone.iter().any(is_in), "the oldest leave");
        assert!(here.iter().all(is_in));
        assert_eq!(lobby.turned_away(), 2 * GUESTS_MAX as u64 + 3);
    }

    #[test]
    fn a_crowd_from_everywhere_leaves_each_guest_a_whole_lobby_of_time() {
        let mut lobby = Lobby::default();
        let source: Vec<_> = (0..COMPANY_MAX).map(|_| enter(&mut lobby, from(0, 1))).collect();
        let mut origins = (1..=255).flat_map(|network| (0..=255).map(move |host| from(network, host)));
        let mut crowd = Vec::new();
        for origin in origins.by_ref().take(GUESTS_MAX - COMPANY_MAX) {
            crowd.push(enter(&mut lobby, origin));
        }
        assert!(source.iter().all(is_in));
        crowd.push(enter(&mut lobby, origins.next().unwrap()));
        assert!(!is_in(&source[0]) && source[1..].iter().all(is_in), "one by one, from the oldest on");
    }

    #[test]
    fn all_addresses_of_an_ipv6_network_are_one_stranger() {
        let ip = |text: &str| Origin::of(Some(text.parse().unwrap()));
        assert_eq!(ip("2001:db8::1"), ip("2001:db8::ffff:1"));
        assert_ne!(ip("2001:db8::1"), ip("2001:db8:0:1::1"));
        assert_eq!(ip("::ffff:10.0.0.1"), from(0, 1));
        assert_ne!(from(0, 1), from(0, 2));
    }

    #[test]
    fn who_has_left_counts_for_no_crowd() {
        let mut lobby = Lobby::default();
        drop((0..20).map(|_| enter(&mut lobby, from(9, 9))).collect::<Vec<_>>());
        let mut set = set();
        lobby.watch(&mut set);
        set.wait();
        assert_eq!(lobby.listen(&set).len(), 20);
        assert!(lobby.crowds.is_empty() && lobby.guests.is_empty());
        lobby.make_room();
        assert_eq!(lobby.turned_away(), 20, "nobody is there to be sent away");
    }

    #[test]
    fn only_who_has_spoken_is_listened_to_and_each_byte_alone_is_enough() {
        let (mut lobby, mut set) = (Lobby::default(), set());
        let _silent = enter(&mut lobby, from(0, 2));
        let mut speaker = enter(&mut lobby, from(0, 1));
        let hello = Hello {
            role: crate::wire::hello::HelloRole::Control,
            side: crate::wire::hello::Side::Source,
            generation: crate::units::Generation(1),
            session: crate::units::SessionId([1; 16]),
            features: 0,
        };
        for byte in hello.encode() {
            assert!(lobby.listen(&set).is_empty());
            speaker.write_all(&[byte]).unwrap();
            assert!(lobby.listen(&set).is_empty(), "nobody has waited since: it was not read");
            set.clear();
            lobby.watch(&mut set);
            assert!(set.wait());
        }
        assert!(matches!(&lobby.listen(&set)[..], [Greeting::Hello(_, said)] if *said == hello));
        assert_eq!((lobby.guests.len(), lobby.turned_away()), (1, 0));
    }

    #[test]
    fn who_speaks_another_language_is_sent_away_with_its_first_word() {
        let (mut lobby, mut set) = (Lobby::default(), set());
        let mut browser = enter(&mut lobby, from(0, 1));
        browser.write_all(b"GET / HT").unwrap();
        lobby.watch(&mut set);
        assert!(set.wait());
        let said = lobby.listen(&set);
        assert!(matches!(&said[..], [Greeting::Stranger(why)] if why.to_string().contains("GET / HT")), "{said:?}");
    }
}
