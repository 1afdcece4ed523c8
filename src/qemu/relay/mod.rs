#![forbid(unsafe_code)]
//! Passes a migration of QEMU's on to another QEMU while it goes on: packet by packet, each checked, and none of the
//! guest's RAM kept.
//!
//! Each connection of the source is carried on to one of the relay's own. So rounds, barriers and back-pressure are what
//! they would be without a relay, and the destination's answer goes back to the source. What the source says that makes no
//! sense never reaches the destination; a connection on which nothing sensible is said is never made there.

mod carry;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::carry::{Carried, Carrier, Freight, Shared, Stop};
use super::framing::Qemu;
use super::seen::Counts;
use super::wire::{InitPacket, MAIN_MAGIC, ReturnMessage};
use crate::bell::{Bell, Close};
use crate::cancel::CancelHandle;
use crate::config::{CrewOptions, Timeouts};
use crate::crew::{Crew, Exit, Launch};
use crate::error::{Failure, OsReason, Outcome};
use crate::gate::Gate;
use crate::net::{Address, CROWD_PAUSE, ENTRANTS_MAX, Endpoint, Greeting, Listener, Lobby, Opening, Stream, open, passes};
use crate::poll::PollSleeper;
use crate::sync::Ordering::Relaxed;
use crate::sys::socket::Socket;
use crate::units::{ChannelId, FIRST_GENERATION};
use crate::wire::hello::HelloRole;

/// One migration that is to be passed on.
///
/// # When not to use it
/// To keep what passes: take it in with a [`Target`](crate::Target) that speaks [`Qemu`].
///
/// ```no_run
/// use pageferry::qemu::Relay;
///
/// let relay = Relay::new("0.0.0.0:4444", "10.1.0.2:4444", None)?;
/// println!("{}", relay.run().outcome);
/// # Ok::<(), pageferry::Failure>(())
/// ```
pub struct Relay {
    listener: Listener,
    to: Address,
    lobby: Lobby,
    timeouts: Timeouts,
    options: CrewOptions,
    bell: Bell<PollSleeper>,
    gate: Gate,
    shared: Arc<Shared>,
    accept_again: Option<Instant>,
    main: Option<Main>,
    channels: BTreeMap<u8, Channel>,
    uuid: Option<[u8; 16]>,
    told_blocks: bool,
    /// Bytes that had been carried at the last look, and when they became more.
    moved: (u64, Instant),
    turned_away: u64,
    remarks: Vec<String>,
}

/// The main connection's two workers.
struct Main {
    crew: Crew<Carrier>,
    source: Arc<Socket>,
    /// What has ended: the main stream, and the return path.
    forth: bool,
    back: bool,
}

struct Channel {
    crew: Crew<Carrier>,
    ended: bool,
}

/// How it ended, and what passed.
#[derive(Clone, PartialEq, Debug)]
#[must_use = "the outcome says whether the destination has the guest"]
pub struct RelayReport {
    /// [`Outcome::Completed`] where the destination said that all is well and the source was told so; without a return
    /// path, where both ended as they do when all is well.
    pub outcome: Outcome,
    /// What passed, from the source to the destination.
    pub counts: Counts,
    /// Data channels.
    pub channels: u8,
    /// From the source's first connection to the end.
    pub total: Duration,
    /// Connections that were turned away.
    pub turned_away: u64,
    /// What went wrong without deciding the outcome.
    pub remarks: Vec<String>,
}

/// Remarks about strangers, at the most: they come from anybody.
const REMARKS_MAX: usize = 16;
/// How long the listener is left alone when a connection cannot be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("at", &self.address()).field("to", &self.to).finish_non_exhaustive()
    }
}

impl Relay {
    /// Listens at one address, and passes on to another: `host:port` or `unix:PATH`. With a number of channels, one whose
    /// number is not below it is turned away; without, any may come.
    ///
    /// # Errors
    /// [`Failure::Config`] for an address that makes no sense, [`Failure::Listen`] for one that cannot be had.
    pub fn new(listen: &str, to: &str, channels: Option<u8>) -> Result<Relay, Failure> {
        let listener = Listener::bind(&listen.parse()?)?;
        let bell =
            PollSleeper::bell().map_err(|e| Failure::Config(format!("no eventfd for the relay's bell: {e}")))?;
        let framing = Qemu::new(channels.unwrap_or(u8::MAX));
        Ok(Relay {
            to: to.parse()?,
            listener,
            lobby: Lobby::new(Arc::new(framing)),
            timeouts: Timeouts::default(),
            options: CrewOptions::default(),
            gate: Gate::new(),
            shared: Arc::new(Shared::new(bell.ringer())),
            bell,
            accept_again: None,
            main: None,
            channels: BTreeMap::new(),
            uuid: None,
            told_blocks: false,
            moved: (0, Instant::now()),
            turned_away: 0,
            remarks: Vec::new(),
        })
    }

    /// How long to wait for what.
    #[must_use]
    pub fn timeouts(mut self, timeouts: Timeouts) -> Relay {
        self.timeouts = timeouts.bounded();
        self
    }

    /// The address to connect to, with the port that the system chose.
    pub fn address(&self) -> Option<Address> {
        self.listener.address()
    }

    /// Cancels it, from any thread.
    pub fn cancel_handle(&self) -> CancelHandle {
        CancelHandle { gate: self.gate.clone(), controller: self.bell.ringer() }
    }

    /// Waits for a source, and passes its migration on. Every thread that it started has been joined when it returns.
    pub fn run(mut self) -> RelayReport {
        let mut begun = None;
        let outcome = loop {
            if self.gate.is_cancelled() {
                break Outcome::Cancelled;
            }
            match self.serve() {
                Ok(None) => {}
                Ok(Some(outcome)) => break outcome,
                Err(why) => break Outcome::Failed(why),
            }
            if begun.is_none() && (self.main.is_some() || !self.channels.is_empty()) {
                begun = Some(Instant::now());
            }
            self.sleep();
        };
        if outcome != Outcome::Completed {
            self.tell_source();
        }
        let channels = self.channels.len() as u8;
        if let Some(main) = &mut self.main {
            main.crew.close(Close::Abort);
        }
        self.channels.values().for_each(|channel| {
            channel.crew.close(Close::Abort);
        });
        if let Some(main) = &mut self.main {
            main.crew.join();
        }
        self.channels.values_mut().for_each(|channel| {
            channel.crew.join();
        });
        RelayReport {
            outcome,
            counts: self.shared.seen.counts(),
            channels,
            total: begun.map_or(Duration::ZERO, |at| at.elapsed()),
            turned_away: self.turned_away + self.lobby.turned_away(),
            remarks: self.remarks,
        }
    }

    /// Deals with what has happened; an outcome when it is over.
    fn serve(&mut self) -> Result<Option<Outcome>, Failure> {
        self.accept()?;
        for greeting in self.lobby.listen(self.bell.sleeper().set()) {
            match greeting {
                Greeting::Hello(stream, hello) => self.let_in(stream, hello.role, hello.session.0)?,
                Greeting::Stranger(why) => self.remark(format!("a connection was turned away: {why}")),
                Greeting::Silent => {}
            }
        }
        if !self.told_blocks && self.shared.blocks.get().is_some() {
            self.told_blocks = true;
            self.channels.values().flat_map(|channel| channel.crew.ringers()).for_each(|bell| {
                bell.ring();
            });
        }
        self.look_at_channels()?;
        self.look_at_main()
    }

    fn remark(&mut self, what: String) {
        if self.remarks.len() < REMARKS_MAX {
            self.remarks.push(what);
        }
    }

    fn accept(&mut self) -> Result<(), Failure> {
        if self.accept_again.is_some_and(|when| Instant::now() < when) {
            return Ok(());
        }
        self.accept_again = None;
        for _ in 0..ENTRANTS_MAX {
            match self.listener.accept() {
                Ok(Some(socket)) => {
                    if let Err(e) = self.lobby.enter(socket, self.timeouts.hello) {
                        self.remark(format!("a connection could not be let in: {e}"));
                    }
                }
                Ok(None) => return Ok(()),
                Err(e) if self.main.is_some() || passes(&e) => {
                    self.lobby.make_room();
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    self.remark(format!("a connection could not be accepted: {e}"));
                    return Ok(());
                }
                Err(e) => {
                    let address = self.address().map_or_else(String::new, |a| a.to_string());
                    return Err(Failure::Listen { address, reason: e.into() });
                }
            }
        }
        self.accept_again = Some(Instant::now() + CROWD_PAUSE);
        Ok(())
    }

    /// Carries on what belongs to the migration: one main connection, and each channel once, of one QEMU.
    fn let_in(&mut self, stream: Stream, role: HelloRole, uuid: [u8; 16]) -> Result<(), Failure> {
        match role {
            HelloRole::Control if self.main.is_none() => self.carry_main(stream),
            HelloRole::Data(id) if self.is_new(id, uuid) => self.carry_channel(stream, id, uuid),
            HelloRole::Control | HelloRole::Data(_) => {
                self.turned_away += 1;
                self.remark("a connection was turned away: there is one like it already".to_owned());
                Ok(())
            }
        }
    }

    fn is_new(&self, id: ChannelId, uuid: [u8; 16]) -> bool {
        // Once the blocks are known, all channels are there: the source connects them first.
        let known = self.channels.contains_key(&id.0) || self.told_blocks;
        !known && self.uuid.is_none_or(|first| first == uuid)
    }

    fn carry_main(&mut self, source: Stream) -> Result<(), Failure> {
        let Some(destination) = self.connect(Opening::Control, &MAIN_MAGIC)? else { return Ok(()) };
        let (source_again, destination_again) = (source.twin(), destination.twin());
        let socket = source.socket().clone();
        let carriers = vec![
            self.carrier(Freight::Forth, source, destination)?,
            self.carrier(Freight::Back, destination_again, source_again)?,
        ];
        let crew = self.start(0, carriers)?;
        self.main = Some(Main { crew, source: socket, forth: false, back: false });
        Ok(())
    }

    fn carry_channel(&mut self, source: Stream, id: ChannelId, uuid: [u8; 16]) -> Result<(), Failure> {
        let opening = Opening::Data { channel: id, generation: FIRST_GENERATION };
        let init = InitPacket { uuid, channel: id.0 }.encode();
        let Some(destination) = self.connect(opening, &init)? else { return Ok(()) };
        let carrier = self.carrier(Freight::Channel, source, destination)?;
        // Main's two workers are numbers 0 and 1.
        let crew = self.start(2 + usize::from(id.0), vec![carrier])?;
        self.channels.insert(id.0, Channel { crew, ended: false });
        self.uuid = Some(uuid);
        Ok(())
    }

    /// A connection to the destination, on which this has been said at once: QEMU stands still while one is silent.
    fn connect(&mut self, opening: Opening, first: &[u8]) -> Result<Option<Stream>, Failure> {
        let mut endpoint = Endpoint::Addresses(vec![self.to.clone()]);
        let (gate, until) = (self.gate.clone(), Instant::now() + self.timeouts.connect);
        let opened = open(&mut endpoint, opening, None, &mut self.bell, until, &|| gate.is_cancelled())?;
        let Some(mut stream) = opened else { return Ok(None) };
        let failed = |reason: OsReason| Failure::Connect { address: self.to.to_string(), reason };
        match stream.send(first) {
            Ok(n) if n == first.len() => Ok(Some(stream)),
            Ok(_) => Err(failed(OsReason { errno: None, text: "it takes no bytes".to_owned() })),
            Err(e) => Err(failed(e.into())),
        }
    }

    fn carrier(&self, freight: Freight, mut from: Stream, mut to: Stream) -> Result<Carrier, Failure> {
        let blocking = from.set_nonblocking(false).and_then(|()| to.set_nonblocking(false));
        blocking.map_err(|e| Failure::Worker(format!("a socket: {e}")))?;
        Ok(Carrier { freight, from, to, shared: self.shared.clone() })
    }

    fn start(&self, first: usize, carriers: Vec<Carrier>) -> Result<Crew<Carrier>, Failure> {
        let launch = Launch::new(&*self.options.spawn, Arc::new(self.bell.ringer()));
        let made = crate::sys::thread::with_signals_blocked(|| {
            Crew::muster(first..first + carriers.len(), &launch, |_| Ok::<_, Infallible>(carriers))
        });
        made.map_err(|e| Failure::Worker(e.to_string()))
    }

    fn look_at_channels(&mut self) -> Result<(), Failure> {
        for (id, channel) in &mut self.channels {
            let Some(worker) = channel.crew.poll_exit() else { continue };
            let exit = channel.crew.workers().iter().find(|w| w.id == worker).and_then(|w| w.exit.as_ref());
            let failed = |reason| Failure::Channel { channel: ChannelId(*id), generation: FIRST_GENERATION, reason };
            why_ended(exit).map_err(failed)?;
            channel.ended = true;
        }
        Ok(())
    }

    fn look_at_main(&mut self) -> Result<Option<Outcome>, Failure> {
        let Some(main) = &mut self.main else { return Ok(None) };
        while let Some(worker) = main.crew.poll_exit() {
            let exit = main.crew.workers().iter().find(|w| w.id == worker).and_then(|w| w.exit.as_ref());
            let doing = if worker == 0 { "carrying the main stream" } else { "carrying the return path" };
            let ended = why_ended(exit);
            // What the destination said last says more than how it left.
            if worker == 1 && self.shared.shut.load(Relaxed) > 0 {
                main.back = true;
                continue;
            }
            ended.map_err(|text| Failure::Control { doing, reason: OsReason { errno: None, text } })?;
            if worker == 0 {
                main.forth = true;
            } else {
                main.back = true;
            }
        }
        let (return_path, whole) = (self.shared.return_path.load(Relaxed), self.shared.whole.load(Relaxed));
        match self.shared.shut.load(Relaxed) {
            1 if main.forth => return Ok(Some(Outcome::Completed)),
            0 | 1 => {}
            n => return Err(Failure::Peer(format!("the destination refused the guest: SHUT({})", n - 1))),
        }
        if main.back && self.shared.shut.load(Relaxed) == 0 {
            if return_path || !whole {
                return Err(Failure::Peer("the destination closed the main connection without an answer".to_owned()));
            }
            if main.forth {
                return Ok(Some(Outcome::Completed));
            }
        }
        self.check_time()
    }

    /// A source may be silent for as long as it likes. But when some of its connections have ended, the others are about
    /// to.
    fn check_time(&mut self) -> Result<Option<Outcome>, Failure> {
        match self.deadline() {
            Some(at) if Instant::now() >= at => {
                let ms = self.moved.1.elapsed().as_millis() as u64;
                Err(Failure::Silent { waiting_for: "the end of the other connections, as some have ended", ms })
            }
            _ => Ok(None),
        }
    }

    fn deadline(&mut self) -> Option<Instant> {
        let moved = self.shared.moved.load(Relaxed);
        if moved != self.moved.0 {
            self.moved = (moved, Instant::now());
        }
        let main = self.main.as_ref()?;
        // A destination may take its time to load what has come. What has not all come is due.
        let is_due = self.channels.values().any(|channel| channel.ended) && !self.shared.whole.load(Relaxed);
        let source_left = main.back && !main.forth;
        (is_due || source_left).then(|| self.moved.1 + self.timeouts.silence)
    }

    /// The source waits for an answer, where it has a return path: it is told that it keeps the guest.
    fn tell_source(&mut self) {
        let Some(main) = &self.main else { return };
        if self.shared.return_path.load(Relaxed) && self.shared.shut.load(Relaxed) == 0 {
            let mut bytes = Vec::new();
            ReturnMessage::Shut { error: 1 }.encode(&mut bytes);
            // A courtesy: a source that is gone, or does not read, finds the connection closed.
            let _ = main.source.set_nonblocking(true).and_then(|()| main.source.send(&bytes));
        }
    }

    fn sleep(&mut self) {
        let deadline = self.deadline();
        let set = self.bell.sleeper().set();
        set.clear();
        match (self.accept_again, self.listener.fd()) {
            (Some(when), _) => set.until(when),
            (None, Some(fd)) => {
                set.watch(fd, true, false);
            }
            (None, None) => {}
        }
        self.lobby.watch(set);
        if let Some(deadline) = deadline {
            set.until(deadline);
        }
        self.bell.wait();
    }
}

/// `Ok` for a carrier that came to the end of its stream.
fn why_ended(exit: Option<&Exit<Carried>>) -> Result<(), String> {
    match exit {
        Some(Exit::Done(Carried { result: Ok(()), .. })) => Ok(()),
        Some(Exit::Done(Carried { result: Err(Stop::Aborted), .. })) => Err(Stop::Aborted.to_string()),
        Some(Exit::Done(Carried { result: Err(why), .. })) => Err(why.to_string()),
        Some(Exit::Panicked { message }) => Err(format!("its worker panicked: {message}")),
        Some(Exit::NeverRan) | None => Err("its worker never ran".to_owned()),
    }
}
