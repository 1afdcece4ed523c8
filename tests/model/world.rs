//! The world that is explored: both sessions as they ship, and around each a driver, workers, lanes and a guest.

use std::collections::VecDeque;

use pageferry::barrier::LaneWord;
use pageferry::units::{ChannelId, Generation, Round};

use crate::link::{Control, Packet, Pipe, Wire};
use crate::mutants::Mutant;
use crate::source_side::SourceSide;
use crate::target_side::TargetSide;

/// Pages and channels at the most; [`Bounds`] may use fewer.
pub const PAGES: usize = 2;
pub const CHANNELS: usize = 2;

/// What may go wrong, beside what the guest and the policy do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A process vanishes.
    Crash,
    /// The target's process vanishes, and is put back as an image of it says, which is another process.
    PutBack,
    /// The control connection breaks.
    Cut,
    /// A data channel breaks. Each end learns of it for itself, or from the other.
    ChannelDeath,
    /// The source takes a channel for dead that is only slow.
    Stall,
    /// A page is damaged on its way.
    Damage,
    /// A deadline passes at either side.
    Deadline,
    /// A hook of either VMM fails.
    Hook,
    /// Somebody asks either side to cancel.
    Cancel,
}

/// How much of the world is explored.
#[derive(Clone, Debug)]
pub struct Bounds {
    pub pages: usize,
    pub channels: usize,
    /// Writes of the guest while it runs.
    pub writes: u8,
    /// Writes of `save_state` while the guest is paused.
    pub save_writes: u8,
    /// Attempts at the hand-over that take too long, and are withdrawn.
    pub overruns: u8,
    /// Rounds while the guest runs; two more follow when it is paused.
    pub live_rounds: u32,
    /// Epochs that are closed; the last one stays open.
    pub epochs: u8,
    /// Items a ring holds; runs leave one slot to marks.
    pub ring_slots: usize,
    /// Packets a data channel holds.
    pub wire_slots: usize,
    /// Whether it begins when the channels have joined; else with the first connection.
    pub under_way: bool,
    /// How often a lost channel may be connected again, over all channels.
    pub redials: u8,
    /// How often the source may connect anew when the control connection is lost; with 0 there is no resume window.
    pub resumes: u8,
    /// Whether a resume window lasts until there is no way back any more.
    pub patient: bool,
    /// Whether these faults, however they come, must not end the migration before Commit.
    pub survives: bool,
    /// Whether the target hears frames while it checks a Final, as it does where all of RAM is hashed.
    pub slow_checks: bool,
    /// Faults at the most, of these kinds.
    pub faults: u8,
    pub kinds: &'static [Fault],
    pub mutant: Option<Mutant>,
}

impl Bounds {
    pub fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    pub fn channels(&self) -> impl Iterator<Item = usize> + use<> {
        0..self.channels
    }

    fn has(&self, kind: Fault) -> bool {
        self.kinds.contains(&kind)
    }

    /// Journals are kept where epochs free them, or lost channels give them back; elsewhere they say nothing, and only
    /// make more states.
    pub fn journals(&self) -> bool {
        self.epochs > 0 || self.resumes > 0 || self.has(Fault::ChannelDeath) || self.has(Fault::Stall)
    }
}

/// Whether a side still takes part.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Process {
    Alive,
    /// Its session has ended, and its driver with it.
    Ended,
    Crashed,
}

/// How a side reports that it ended: [`pageferry::Outcome`] without the reason.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    Completed,
    Cancelled,
    Failed,
    Uncertain,
}

impl From<&pageferry::Outcome> for Verdict {
    fn from(outcome: &pageferry::Outcome) -> Verdict {
        match outcome {
            pageferry::Outcome::Completed => Verdict::Completed,
            pageferry::Outcome::Cancelled => Verdict::Cancelled,
            pageferry::Outcome::Failed(_) => Verdict::Failed,
            pageferry::Outcome::Uncertain(_) => Verdict::Uncertain,
        }
    }
}

/// The word behind [`pageferry::gate::Gate`], whose own model is `tests/loom_gate.rs`: it leaves Open once.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Gate {
    Open,
    Committed,
    Cancelled,
}

impl Gate {
    pub fn commit(&mut self) -> bool {
        if *self == Gate::Open {
            *self = Gate::Committed;
        }
        *self == Gate::Committed
    }
}

/// A page's entry in a digest table, which keeps the higher one: of two rounds the later, and of two hashes in one round
/// whichever happens to be higher. Here that is the older version, so that nothing may hang on luck.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Entry {
    round: u8,
    hash: u8,
}

impl Entry {
    /// `round` counts from 1 here: 0 is for a page that was never recorded.
    pub fn record(&mut self, rounds_before: LaneWord, version: u8) {
        let entry = Entry { round: rounds_before.count() as u8 + 1, hash: u8::MAX - version };
        *self = entry.max(*self);
    }

    /// The digest of a chunk of this page alone.
    pub fn digest(self) -> u64 {
        u64::from(self.round) << 8 | u64::from(self.hash)
    }
}

/// The digest of a block: no two tables of this size have the same.
pub fn digest(entries: &[Entry; PAGES]) -> u64 {
    entries.iter().fold(0, |sum, entry| sum << 16 | entry.digest())
}

/// Everything there is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    pub source: SourceSide,
    pub target: TargetSide,
    /// The control connection that the target listens to. The source speaks on the newest there is.
    pub control: Control,
    /// Newer ones, of which the target has not yet heard what they want, or that it has turned away; the newest last.
    pub visitors: VecDeque<Control>,
    pub wires: [Wire; CHANNELS],
    /// Only with mutants: what a lane that was not joined goes on reading.
    pub zombies: [Pipe<Packet>; CHANNELS],
    pub faults_left: u8,
    pub seen: Seen,
}

/// What an onlooker has noted, who knows nothing of the sessions' own books.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Seen {
    pub commit_sent: bool,
    /// Epochs whose Flush marks were pushed, and those acknowledged, or given back.
    pub epochs_closed: u64,
    pub epochs_acked: u64,
    /// Epochs that the target has said to be applied, or that the source said need not be.
    pub epochs_told: u64,
    /// An acknowledged epoch's mark was not in a journal.
    pub mark_missing: bool,
    /// The digests were compared and differed, without damage.
    pub digests_differed: bool,
    /// Pages that were damaged on their way, and may still be.
    pub damaged: [bool; PAGES],
    /// A page's older version replaced a newer one at the target.
    pub went_back: bool,
    /// A page landed while `load_state` ran.
    pub landed_under_load: bool,
    /// A channel that had been lost carries again; a session was taken up again; a page was repaired.
    pub rejoined: bool,
    pub resumed: bool,
    pub repaired: bool,
    /// A channel was lost behind Final.
    pub voided: bool,
}

impl World {
    pub fn new(bounds: &Bounds) -> World {
        World {
            source: SourceSide::new(bounds),
            target: TargetSide::new(bounds.resumes > 0),
            control: Control::default(),
            visitors: VecDeque::new(),
            wires: Default::default(),
            zombies: Default::default(),
            faults_left: bounds.faults,
            seen: Seen::default(),
        }
    }

    pub fn is_over(&self) -> bool {
        self.source.process != Process::Alive && self.target.process != Process::Alive
    }

    /// The control connection as the source has it.
    pub fn line(&self) -> &Control {
        self.visitors.back().unwrap_or(&self.control)
    }

    pub fn line_mut(&mut self) -> &mut Control {
        self.visitors.back_mut().unwrap_or(&mut self.control)
    }
}

/// Which side.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Side {
    Source,
    Target,
}

pub fn channel(index: usize) -> ChannelId {
    ChannelId(index as u8)
}

pub fn index(channel: ChannelId) -> usize {
    channel.0.into()
}

pub fn generation(number: u32) -> Generation {
    Generation(number)
}

pub fn rounds(count: u64) -> LaneWord {
    LaneWord::counting(count)
}

pub fn after(round: Round) -> LaneWord {
    rounds(u64::from(round.0) + 1)
}
