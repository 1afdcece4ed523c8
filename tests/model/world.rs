//! The world that is explored: both sessions as they ship, and around each a driver, workers, lanes and a guest.

use pageferry::barrier::LaneWord;
use pageferry::units::{ChannelId, Round};

use crate::link::{Control, Packet, Pipe};
use crate::source_side::SourceSide;
use crate::target_side::TargetSide;

/// Pages and channels at the most; [`Bounds`] may use fewer.
pub const PAGES: usize = 2;
pub const CHANNELS: usize = 2;

/// A rule that is broken on purpose, to see that the properties notice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// The dirty bit is cleared after the page was read.
    ClearAfterRead,
    /// The guest's write is marked before it is done.
    MarkBeforeWrite,
    /// The lanes do not wait for lane 0 between rounds.
    BarrierIgnoresLane0,
    /// A journal is freed when its Flush mark is sent.
    FreeAtFlush,
    /// A run enters the journal when it is sent, not when it is popped.
    JournalAfterSend,
    /// The target is told that every lane is as far as the furthest.
    AllLanesAsTheFurthest,
    /// The target's VMM runs the guest once its state is loaded.
    RunOnLoaded,
    /// The source resumes the guest when the control connection is lost after Commit.
    ResumeAfterCommit,
    /// Final is sent while pages are still in rings and hands.
    FinalBeforeDrained,
    /// The dirty bits are not harvested again after `save_state`.
    NoHarvestAfterSave,
    /// Commit is sent without asking the gate.
    CommitPastTheGate,
    /// The target says Running before its `run` hook has returned.
    RunningBeforeRun,
    /// After an overrun, rounds go on before the target has answered the Final that was withdrawn.
    RoundsBeforeTheAnswer,
    /// The target does not notice that the control connection is gone.
    NobodyAtTheTarget,
}

/// What may go wrong, beside what the guest and the policy do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// A process vanishes.
    Crash,
    /// The control connection breaks.
    Cut,
    /// A data channel breaks.
    ChannelDeath,
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

    /// Journals are kept where epochs free them; where none is ever freed they say nothing, and only make more states.
    pub fn journals(&self) -> bool {
        self.epochs > 0
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

/// A page's entry in a digest table: an older round never replaces a newer one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct Entry {
    round: u8,
    version: u8,
}

impl Entry {
    /// `round` counts from 1 here: 0 is for a page that was never recorded.
    pub fn record(&mut self, rounds_before: LaneWord, version: u8) {
        let round = rounds_before.count() as u8 + 1;
        if round >= self.round {
            *self = Entry { round, version };
        }
    }
}

/// The digest of a block. It knows nothing of rounds, and no two memories of this size have the same.
pub fn digest(entries: &[Entry; PAGES]) -> u64 {
    entries.iter().fold(0, |sum, entry| sum << 8 | u64::from(entry.version))
}

/// Everything there is.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct World {
    pub source: SourceSide,
    pub target: TargetSide,
    pub control: Control,
    pub wires: [Pipe<Packet>; CHANNELS],
    pub faults_left: u8,
    pub seen: Seen,
}

/// What an onlooker has noted, who knows nothing of the sessions' own books.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Seen {
    pub commit_sent: bool,
    /// Epochs whose Flush marks were pushed, and those acknowledged.
    pub epochs_closed: u64,
    pub epochs_acked: u64,
    /// An acknowledged epoch's mark was not in a journal.
    pub mark_missing: bool,
    /// The digests were compared and differed.
    pub digests_differed: bool,
    /// A page's older version replaced a newer one at the target.
    pub went_back: bool,
    /// A page landed while `load_state` ran.
    pub landed_under_load: bool,
}

impl World {
    pub fn new(bounds: &Bounds) -> World {
        World {
            source: SourceSide::new(bounds),
            target: TargetSide::new(),
            control: Control::default(),
            wires: Default::default(),
            faults_left: bounds.faults,
            seen: Seen::default(),
        }
    }

    pub fn is_over(&self) -> bool {
        self.source.process != Process::Alive && self.target.process != Process::Alive
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

pub fn rounds(count: u64) -> LaneWord {
    LaneWord::counting(count)
}

pub fn after(round: Round) -> LaneWord {
    rounds(u64::from(round.0) + 1)
}
