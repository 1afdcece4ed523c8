#![forbid(unsafe_code)]
//! Who is at a target's door before it is known whose migration this is, on a wire where anybody can claim to be a source
//! or one of its channels: no Hello names a session that only the source knows.
//!
//! A source is known by what it does. It says Setup on its control connection, and then, without an answer, something on
//! every channel. So each control connection is heard until one of them has said Setup, and each claim to be a channel is
//! kept until claims of one session to all the channels have gone on behind their Hellos. Nothing is read from a claim
//! before that, and whoever has left, or says no more, is in nobody's way.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crate::error::{Failure, OsReason};
use crate::framing::Heard;
use crate::net::{Control, Stream};
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
/// Claims that are kept beyond one to each channel.
const SPARE_CLAIMS: usize = 64;

/// Those who have come early.
#[derive(Debug, Default)]
pub(super) struct Early {
    /// From the oldest to the newest.
    applicants: Vec<Applicant>,
    /// From the oldest to the newest.
    claims: Vec<Claim>,
    /// Claims have spoken since the last election.
    is_due: bool,
    /// Why the last applicant was turned away.
    refusal: Option<Failure>,
}

/// A control connection that has not said Setup yet.
#[derive(Debug)]
struct Applicant {
    control: Control<TargetFrame, SourceFrame>,
    session: SessionId,
    since: Instant,
}

/// A connection that claims to be a data channel.
#[derive(Debug)]
struct Claim {
    stream: Stream,
    channel: ChannelId,
    session: SessionId,
    /// Something has come behind its Hello.
    has_spoken: bool,
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

    /// Keeps a claim. How many were given up for it: the oldest to the channel that has the most, where there are too many.
    fn claim(&mut self, stream: Stream, channel: ChannelId, session: SessionId, channels: u8) -> u64 {
        let has_spoken = stream.has_received();
        self.is_due |= has_spoken;
        self.claims.push(Claim { stream, channel, session, has_spoken, place: None });
        if self.claims.len() <= usize::from(channels) + SPARE_CLAIMS {
            return 0;
        }
        let before = self.claims.len();
        self.claims.retain(|claim| !claim.stream.socket().is_spent());
        if self.claims.len() == before {
            self.make_room();
        }
        (before - self.claims.len()) as u64
    }

    /// Gives a claim up, the oldest to the channel that has the most of them, if that is not the only one. True if there
    /// was one.
    pub fn make_room(&mut self) -> bool {
        let mut counts = BTreeMap::<ChannelId, usize>::new();
        self.claims.iter().for_each(|claim| *counts.entry(claim.channel).or_default() += 1);
        let Some(most) = counts.values().copied().max().filter(|most| *most > 1) else { return false };
        let oldest = self.claims.iter().position(|claim| counts[&claim.channel] == most);
        oldest.map(|index| self.claims.remove(index)).is_some()
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

    /// The first session of which every channel has spoken: its channels in order, of several claims to one the newest.
    fn elect(&mut self, channels: u8) -> Option<Vec<Stream>> {
        if !std::mem::take(&mut self.is_due) {
            return None;
        }
        let mut speakers = BTreeMap::<_, BTreeSet<_>>::new();
        for claim in self.claims.iter().filter(|claim| claim.has_spoken) {
            speakers.entry(claim.session.0).or_default().insert(claim.channel);
        }
        let (elected, _) = speakers.into_iter().find(|(_, ids)| ids.len() == usize::from(channels))?;
        let speaks_for_it = |claim: &Claim| claim.has_spoken && claim.session.0 == elected;
        let own = std::mem::take(&mut self.claims).into_iter().filter(speaks_for_it);
        let newest: BTreeMap<_, _> = own.map(|claim| (claim.channel, claim.stream)).collect();
        Some(newest.into_values().collect())
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
        match hello.role {
            HelloRole::Control if self.begun.is_none() => {
                let since = Instant::now();
                match self.welcome(stream, hello) {
                    Ok(control) => self.early.applicants.push(Applicant { control, session: hello.session, since }),
                    Err(e) => self.turn_away(Failure::Control { doing: "setting it up", reason: e.into() }),
                }
                if self.early.applicants.len() > APPLICANTS_MAX {
                    drop(self.early.applicants.remove(0));
                    self.turn_away(unfit("too many others came before it had said Setup"));
                }
            }
            HelloRole::Data(channel) if channel.0 < channels && self.lanes.is_none() => {
                self.turned_away += self.early.claim(stream, channel, hello.session, channels);
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
        let Applicant { control, session, since } = self.early.applicants.remove(index);
        (self.begun, self.id, self.control) = (Some(since), session, Some(control));
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
        let Some(streams) = self.early.elect(self.channels) else { return self.miss_channels() };
        self.turned_away += (here - streams.len()) as u64;
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

fn unfit(text: &str) -> Failure {
    let reason = OsReason { errno: None, text: text.to_owned() };
    Failure::Control { doing: "waiting for the list of RAM blocks", reason }
}
