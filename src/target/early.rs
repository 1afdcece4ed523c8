#![forbid(unsafe_code)]
//! Who is at a target's door before it is known whose migration this is, on a wire where anybody can claim to be a source
//! or one of its channels: no Hello names a session that only the source knows.
//!
//! A source is known by what it does. It says Setup on its control connection, and then, without an answer, something on
//! every channel. So each control connection is heard until one of them has said Setup, and each claim to be a channel is
//! kept until claims of one session to all the channels have gone on behind their Hellos. Nothing is read from a claim
//! before that, and whoever has left, or says no more, is in nobody's way.
//!
//! There are seats for some strangers, too. Where they are too few, somebody of the largest crowd from one address leaves,
//! and that is who came in its middle: a source that was here before a crowd of its own host stays, and so does one that
//! comes behind it, such as one that tries again and has left connections behind that nobody has told us are dead.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::error::{Failure, OsReason};
use crate::framing::Heard;
use crate::net::{Control, Origin, Stream};
use crate::session::target::TargetEvent;
use crate::sys::event::PollSet;
use crate::target::driver::{Driver, Over};
use crate::units::{ChannelId, FIRST_GENERATION, SessionId};
use crate::wire::control::{SourceFrame, TargetFrame};
use crate::wire::hello::{Hello, HelloRole};

/// Control connections that are heard at once. Each costs its inbox.
const APPLICANTS_MAX: usize = 16;
/// Answers that one of them may leave unread: a source's are a few bytes.
const UNREAD_BYTES_MAX: usize = 4096;
/// Claims that are kept beyond two to each channel: those of a source, those of somebody else's attempt, and some strangers'.
const SPARE_CLAIMS: usize = 64;

/// How soon claims of a given-up attempt are looked at again: no event says that the source has left, too.
const ELECT_AGAIN: Duration = Duration::from_millis(10);

/// How long the source's own channels may still be coming when it has said its list of RAM blocks, which some say before
/// they connect them: a lost SYN is sent again after a second.
const COMES_LATE: Duration = Duration::from_millis(1200);

/// Those who have come early.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// From the oldest to the newest.
    applicants: Vec<Applicant>,
    /// From the oldest to the newest.
    claims: Vec<Claim>,
    /// The number of the next claim.
    next: u64,
    /// Numbers of the claims that had left when the source came.
    given_up: Vec<u64>,
    /// When the source was ready for its channels, or a claim came last.
    moved: Option<Instant>,
    /// Claims have spoken since the last election, or those that did not count may do so when the source leaves, too.
    is_due: bool,
    /// Why the last applicant was turned away.
    refusal: Option<Failure>,
}

/// A control connection that has not said Setup yet.
#[derive(Debug)]
struct Applicant {
    control: Control<TargetFrame, SourceFrame>,
    origin: Origin,
    session: SessionId,
    since: Instant,
    /// Numbers of the claims that had left when it came.
    given_up: Vec<u64>,
}

/// A connection that claims to be a data channel.
#[derive(Debug)]
struct Claim {
    stream: Stream,
    origin: Origin,
    channel: ChannelId,
    session: SessionId,
    /// Something has come behind its Hello.
    has_spoken: bool,
    number: u64,
    /// Its place in the poll set of the last wait.
    place: Option<usize>,
}

impl Early {
    /// Whether nobody is here who could be a source.
    pub fn has_no_applicant(&self) -> bool {
        self.applicants.is_empty()
    }

    /// Why the last one that could have been a source was turned away.
    pub fn refusal(&mut self) -> Option<Failure> {
        self.refusal.take()
    }

    /// Keeps a claim. How many were given up for it.
    fn claim(&mut self, mut claim: Claim, channels: u8) -> u64 {
        self.is_due |= claim.has_spoken;
        self.moved = Some(Instant::now());
        claim.number = self.next;
        self.next += 1;
        self.claims.push(claim);
        let is_full = self.claims.len() > 2 * usize::from(channels) + SPARE_CLAIMS;
        if is_full { self.make_room() } else { 0 }
    }

    /// The source is ready for its channels.
    pub fn ready(&mut self) {
        self.moved = Some(Instant::now());
    }

    /// Gives claims up: of those who have left, or else one to a channel that has several. How many there were.
    pub fn make_room(&mut self) -> u64 {
        let before = self.claims.len();
        self.claims.retain(|claim| !claim.stream.socket().is_spent());
        if self.claims.len() == before {
            let (mut all, mut of_one) = (BTreeMap::<_, usize>::new(), BTreeMap::<_, usize>::new());
            for Claim { channel, origin, .. } in &self.claims {
                *all.entry(*channel).or_default() += 1;
                *of_one.entry((*channel, *origin)).or_default() += 1;
            }
            let weight = |claim: &Claim| (of_one[&(claim.channel, claim.origin)], all[&claim.channel]);
            if let Some(index) = one_too_many(&self.claims, weight).filter(|i| all[&self.claims[*i].channel] > 1) {
                self.claims.remove(index);
            }
        }
        (before - self.claims.len()) as u64
    }

    /// Keeps one that may be the source. True if another one was given up for it.
    fn apply(&mut self, mut applicant: Applicant) -> bool {
        let left = self.claims.iter().filter(|claim| claim.stream.socket().has_left());
        applicant.given_up = left.map(|claim| claim.number).collect();
        self.applicants.push(applicant);
        if self.applicants.len() <= APPLICANTS_MAX {
            return false;
        }
        let of_one = |origin| self.applicants.iter().filter(|other| other.origin == origin).count();
        let index = one_too_many(&self.applicants, |applicant| of_one(applicant.origin));
        index.map(|index| self.applicants.remove(index)).is_some()
    }

    /// Adds to a poll set whoever is waited for: applicants always, claims once it is time for them to speak.
    pub fn watch(&mut self, set: &mut PollSet, channels_are_due: bool, hello_timeout: Duration) {
        for Applicant { control, since, .. } in &self.applicants {
            set.watch(control.fd(), true, control.unsent_bytes() > 0);
            set.until(*since + hello_timeout);
            if control.has_news() {
                set.until(Instant::now());
            }
        }
        if channels_are_due {
            if self.is_due {
                set.until(Instant::now() + ELECT_AGAIN);
            }
            for claim in self.claims.iter_mut().filter(|claim| !claim.has_spoken) {
                claim.place = Some(set.watch(claim.stream.as_fd(), true, false));
            }
        }
    }

    /// Looks at those claims of which the last wait on `set` says that there is something; forgets those who have left. How
    /// many that were.
    fn look(&mut self, set: &PollSet) -> u64 {
        let before = self.claims.len();
        let is_due = &mut self.is_due;
        self.claims.retain_mut(|claim| {
            if !claim.place.take().is_some_and(|place| set.ready(place).readable) {
                return true;
            }
            claim.has_spoken = !claim.stream.socket().is_spent();
            *is_due |= claim.has_spoken;
            claim.has_spoken
        });
        (before - self.claims.len()) as u64
    }

    /// The first session of which every channel has spoken, and its channels in order: of several claims to one the newest.
    /// A claim that had left when the source came is of an attempt that was given up, whose session may well be the same, as
    /// long as the source stays; unless there is no other of its session, and none comes.
    fn elect(&mut self, channels: u8, source_stays: bool) -> Option<(SessionId, Vec<Stream>)> {
        if !std::mem::take(&mut self.is_due) {
            return None;
        }
        let given_up = std::mem::take(&mut self.given_up);
        let had_left = |claim: &Claim| given_up.contains(&claim.number);
        let others: BTreeSet<_> = self.claims.iter().filter(|c| !had_left(c)).map(|claim| claim.session.0).collect();
        let may_come = self.moved.is_some_and(|moved| Instant::now() < moved + COMES_LATE);
        let is_old = |claim: &Claim| {
            source_stays && had_left(claim) && (may_come || others.contains(&claim.session.0))
        };
        let speaks = |claim: &Claim| claim.has_spoken && !is_old(claim);
        let mut speakers = BTreeMap::<_, BTreeSet<_>>::new();
        for claim in self.claims.iter().filter(|claim| speaks(claim)) {
            speakers.entry(claim.session.0).or_default().insert(claim.channel);
        }
        let Some((elected, _)) = speakers.into_iter().find(|(_, ids)| ids.len() == usize::from(channels)) else {
            self.is_due = self.claims.iter().any(is_old);
            self.given_up = given_up;
            return None;
        };
        let own = std::mem::take(&mut self.claims).into_iter();
        let own = own.filter(|claim| speaks(claim) && claim.session.0 == elected);
        let newest: BTreeMap<_, _> = own.map(|claim| (claim.channel, claim.stream)).collect();
        Some((SessionId(elected), newest.into_values().collect()))
    }

    /// A channel that nobody claims to be.
    fn unclaimed(&self, channels: u8) -> Option<ChannelId> {
        let claimed: BTreeSet<_> = self.claims.iter().map(|claim| claim.channel).collect();
        (0..channels).map(ChannelId).find(|id| !claimed.contains(id))
    }
}

impl Driver<'_> {
    /// Takes a connection in for the time being.
    pub fn greet_early(&mut self, stream: Stream, hello: &Hello, channels: u8) {
        // On this wire nobody is heard of who has nothing to say.
        stream.socket().set_keep_alive();
        let (origin, session) = (Origin::of(stream.socket().peer_ip()), hello.session);
        match hello.role {
            HelloRole::Control if self.begun.is_none() => match self.welcome(stream, hello) {
                Ok(control) => {
                    if self.early.apply(Applicant { control, origin, session, since: Instant::now(), given_up: Vec::new() }) {
                        self.turn_away(unfit("too many others came before it had said Setup"));
                    }
                }
                Err(e) => self.turn_away(Failure::Control { doing: "setting it up", reason: e.into() }),
            },
            HelloRole::Data(channel) if channel.0 < channels && self.lanes.is_none() => {
                let has_spoken = stream.has_received();
                let claim = Claim { stream, origin, channel, session, has_spoken, number: 0, place: None };
                self.turned_away += self.early.claim(claim, channels);
            }
            HelloRole::Control | HelloRole::Data(_) => self.turned_away += 1,
        }
    }

    fn turn_away(&mut self, why: Failure) {
        self.turned_away += 1;
        self.remark(format!("a control connection was turned away before its list of RAM blocks: {why}"));
        self.early.refusal = Some(why);
    }

    /// Hears those who may be the source, until one of them has said Setup. Who leaves before, or does not come to it in
    /// time, was somebody else. But who has said what only a source says, and then leaves, was the source; and who says what
    /// no source says is heard no further, as it may well be one that this side does not understand: the migration fails,
    /// and both sides are told.
    pub fn hear_applicants(&mut self) -> Result<(), Over> {
        let mut index = 0;
        while self.begun.is_none() && index < self.early.applicants.len() {
            let applicant = &mut self.early.applicants[index];
            let mut first = None;
            let flushed = applicant.control.flush();
            let heard = applicant.control.hear(|heard| match heard {
                Heard::Frame(frame) => {
                    first = Some(frame);
                    ControlFlow::Break(())
                }
                Heard::Page { .. } | Heard::Zero { .. } | Heard::Barrier(_) => ControlFlow::Continue(()),
            });
            let unread_bytes = applicant.control.unsent_bytes();
            let waited = applicant.since.elapsed();
            let is_late = waited >= self.settings.timeouts.hello;
            match (first, heard) {
                (Some(frame), _) => {
                    // What was answered before it must not wait until there is memory for the guest.
                    let _ = applicant.control.flush();
                    self.choose(index);
                    return self.event(TargetEvent::Frame(frame));
                }
                (None, Err(e)) if e.is_nonsense() || applicant.control.is_known() => {
                    self.choose(index);
                    return self.control_lost(e.into_failure("waiting for the source"));
                }
                (None, Err(e)) => self.dismiss(index, e.into_failure("waiting for the list of RAM blocks")),
                (None, Ok(())) if flushed.is_err() || unread_bytes > UNREAD_BYTES_MAX => self.dismiss(index, unfit("it does not listen")),
                (None, Ok(())) if is_late => {
                    let ms = waited.as_millis() as u64;
                    self.dismiss(index, Failure::Silent { waiting_for: "the list of RAM blocks", ms });
                }
                (None, Ok(())) => index += 1,
            }
        }
        Ok(())
    }

    fn choose(&mut self, index: usize) {
        let Applicant { control, session, since, given_up, .. } = self.early.applicants.remove(index);
        (self.begun, self.id, self.control) = (Some(since), session, Some(control));
        self.early.given_up = given_up;
        self.turned_away += std::mem::take(&mut self.early.applicants).len() as u64;
    }

    fn dismiss(&mut self, index: usize, why: Failure) {
        let mut applicant = self.early.applicants.remove(index);
        // The socket's buffer takes so little at once; nobody is waited for.
        let _ = applicant.control.send(&TargetFrame::Refused { reason: why.to_string() });
        self.turn_away(why);
    }

    /// Takes the channels, once it is known which they are.
    pub fn seat_channels(&mut self) -> Result<(), Over> {
        if self.settings.framing.channels().is_none() || !self.session.awaits_channels() {
            return Ok(());
        }
        self.turned_away += self.early.look(self.bell.sleeper().set());
        let here = self.early.claims.len();
        let source_stays = self.control.as_ref().is_some_and(|control| !control.has_left());
        let elected = self.early.elect(self.channels, source_stays);
        let Some((session, streams)) = elected else { return self.miss_channels() };
        self.turned_away += (here - streams.len()) as u64;
        self.settings.framing.chosen(session);
        let seat = |stream| Some((stream, FIRST_GENERATION));
        self.streams = streams.into_iter().map(seat).collect();
        (0..self.channels).map(ChannelId).try_for_each(|channel| {
            self.event(TargetEvent::ChannelConnected { channel, generation: FIRST_GENERATION })
        })
    }

    /// Ends the wait for channels where nobody else can come.
    fn miss_channels(&mut self) -> Result<(), Over> {
        match self.early.unclaimed(self.channels) {
            Some(channel) if self.listener.is_exhausted() && self.lobby.is_empty() => {
                self.channel_lost(channel, "it ended before its first packet, or never came".to_owned())
            }
            _ => Ok(()),
        }
    }
}

/// Who has to leave where there are too many: of those that weigh most, the one in the middle.
fn one_too_many<T, W: Ord + Copy>(all: &[T], weight: impl Fn(&T) -> W) -> Option<usize> {
    let most = all.iter().map(&weight).max()?;
    let heaviest: Vec<_> = (0..all.len()).filter(|index| weight(&all[*index]) == most).collect();
    heaviest.get(heaviest.len() / 2).copied()
}

fn unfit(text: &str) -> Failure {
    let reason = OsReason { errno: None, text: text.to_owned() };
    Failure::Control { doing: "waiting for the list of RAM blocks", reason }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::socket::Socket;
    use std::net::IpAddr;
    use std::os::unix::net::UnixStream;

    const CHANNELS: u8 = 128;

    fn origin(host: u8) -> Origin {
        Origin::of(Some(IpAddr::from([10, 0, 0, host])))
    }

    fn stream() -> Stream {
        Socket::from_fd(UnixStream::pair().unwrap().0.into()).unwrap().into()
    }

    /// Somebody claims to be this channel, and stays.
    fn claim(early: &mut Early, host: u8, channel: u8, peers: &mut Vec<UnixStream>) {
        let (here, there) = UnixStream::pair().unwrap();
        peers.push(there);
        let (stream, channel) = (Socket::from_fd(here.into()).unwrap().into(), ChannelId(channel));
        let (origin, session) = (origin(host), SessionId([0; 16]));
        let claim = Claim { stream, origin, channel, session, has_spoken: false, number: 0, place: None };
        early.claim(claim, CHANNELS);
    }

    fn claims_of(early: &Early, host: u8) -> usize {
        early.claims.iter().filter(|claim| claim.origin == origin(host)).count()
    }

    #[test]
    fn a_crowd_from_another_address_takes_no_seat_of_the_sources() {
        for (before, ids) in [(0, 128), (500, 128), (1000, 128), (0, 1), (500, 1), (1000, 1)] {
            let (mut early, mut peers) = (Early::default(), Vec::new());
            (0..before).for_each(|n| claim(&mut early, 9, (n % ids) as u8, &mut peers));
            (0..CHANNELS).for_each(|channel| claim(&mut early, 1, channel, &mut peers));
            (before..1000).for_each(|n| claim(&mut early, 9, (n % ids) as u8, &mut peers));
            assert_eq!(claims_of(&early, 1), usize::from(CHANNELS), "{before} before, to {ids} channels");
            assert_eq!(claims_of(&early, 9), usize::from(CHANNELS) + SPARE_CLAIMS);
        }
    }

    #[test]
    fn a_crowd_of_main_connections_from_another_address_does_not_push_the_source_out() {
        for before in [0, 20, 40] {
            let mut early = Early::default();
            let mut apply = |host| {
                let control = Control::new(stream()).unwrap();
                let (session, since) = (SessionId([0; 16]), Instant::now());
                early.apply(Applicant { control, origin: origin(host), session, since, given_up: Vec::new() });
            };
            (0..before).for_each(|_| apply(9));
            apply(1);
            (before..40).for_each(|_| apply(9));
            let of = |host| early.applicants.iter().filter(|applicant| applicant.origin == origin(host)).count();
            assert_eq!((of(1), of(9)), (1, APPLICANTS_MAX - 1), "{before} before");
        }
    }

    #[test]
    fn who_has_left_is_given_up_first() {
        let (mut early, mut peers) = (Early::default(), Vec::new());
        (0..CHANNELS).for_each(|channel| claim(&mut early, 1, channel, &mut peers));
        let mut left = Vec::new();
        (0..CHANNELS).for_each(|channel| claim(&mut early, 1, channel, &mut left));
        drop(left);
        assert_eq!(early.make_room(), u64::from(CHANNELS));
        assert_eq!(claims_of(&early, 1), peers.len());
        assert_eq!(early.make_room(), 0, "there is one to each channel");
    }
}
