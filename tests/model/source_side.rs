//! The source's side of the world: its driver, its workers, its guest.

use std::collections::VecDeque;

use pageferry::barrier::{LaneWord, min_over_set};
use pageferry::journal;
use pageferry::session::FEATURE_RESUME;
use pageferry::session::source::{Facts, SourceAction, SourceEvent, SourceSession};
use pageferry::units::{BlockId, Item, Round, Run, Verify};
use pageferry::wire::control::{Setup, SourceFrame, TargetFrame};
use pageferry::{Failure, Outcome};

use crate::link::Packet;
use crate::mutants::Mutant;
use crate::world::{Bounds, CHANNELS, Entry, Gate, PAGES, Process, Verdict, World, after, channel, digest, index};

/// Where the driver stands: `Driver::flow` of the source, line by line.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Step {
    Connect,
    /// Waits for Ready, opens the channels, waits for the lanes.
    Await,
    /// In a round, with this page to look at next.
    Round(usize),
    /// Between rounds: another one, or switch over.
    Decide,
    /// In the VMM's pause hook, in which it hears nothing.
    Pause,
    /// In the paused round beside which `save_state` runs.
    First(usize),
    /// That round is pushed, and `save_state` still runs.
    Save,
    /// In the round after `save_state`, or one for what came back since.
    Last(usize),
    /// Waits until every ring and hand is empty.
    Drain,
    /// Waits for Loaded, and later for Running.
    HandOver,
    /// The downtime limit was exceeded, and the guest runs again: waits for the answer to the Final that was withdrawn.
    Withdraw,
    /// Loaded has come: the gate is to be asked.
    Gate,
    Over,
}

/// The guest, as the source has it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Guest {
    Running,
    Paused,
    /// Its process is gone.
    Gone,
}

/// Whether a channel has a worker.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Line {
    #[default]
    Down,
    Up,
    /// The worker was joined. What it left behind is not given back yet.
    Closed,
}

/// One channel's ring, the worker that empties it, and its journal.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Worker {
    pub line: Line,
    /// Connected, and not yet in the set.
    pub joining: bool,
    pub ring: VecDeque<Item>,
    pub hand: Option<Run>,
    pub journal: VecDeque<Item>,
    /// Rounds whose end has been sent; retired where there is no worker.
    pub sent: LaneWord,
    /// Only with [`Mutant::ClearAfterRead`]: a page that was read, and whose bit is to be cleared.
    pub to_clear: Option<usize>,
}

/// The source's process.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct SourceSide {
    pub process: Process,
    pub session: SourceSession,
    pub verdict: Option<Verdict>,
    pub gate: Gate,
    pub step: Step,
    pub saved: bool,
    pub guest: Guest,
    /// What is in each page, as a number that grows with every write.
    pub version: [u8; PAGES],
    pub dirty: [bool; PAGES],
    /// Pages that the scanner puts into the next round whether they are dirty or not; and those that were given back while a
    /// round was being filled, which are not for that one.
    pub kept: [bool; PAGES],
    pub returned: [bool; PAGES],
    /// A page that is written and not yet marked, or the other way round with [`Mutant::MarkBeforeWrite`].
    pub writing: Option<usize>,
    pub writes_left: u8,
    pub save_writes_left: u8,
    pub overruns_left: u8,
    pub redials_left: u8,
    pub resumes_left: u8,
    /// Whether there is a control connection.
    pub online: bool,
    /// Only with [`Mutant::LateLoadedCounts`]: a Loaded that was for nothing.
    pub late_loaded: bool,
    pub workers: [Worker; CHANNELS],
    /// What was sent, as the digest table remembers it.
    pub digest: [Entry; PAGES],
}

impl SourceSide {
    pub fn new(bounds: &Bounds) -> SourceSide {
        SourceSide {
            process: Process::Alive,
            session: SourceSession::new(bounds.channels as u8),
            verdict: None,
            gate: Gate::Open,
            step: Step::Connect,
            saved: false,
            guest: Guest::Running,
            version: [1; PAGES],
            dirty: [false; PAGES],
            kept: [false; PAGES],
            returned: [false; PAGES],
            writing: None,
            writes_left: bounds.writes,
            save_writes_left: bounds.save_writes,
            overruns_left: bounds.overruns,
            redials_left: bounds.redials,
            resumes_left: bounds.resumes,
            online: true,
            late_loaded: false,
            workers: Default::default(),
            digest: Default::default(),
        }
    }

    /// Whether the driver listens: not inside a hook that runs on its thread.
    pub fn listens(&self) -> bool {
        self.process == Process::Alive && !matches!(self.step, Step::Connect | Step::Pause)
    }

    /// Whether dirty tracking is on, and everything in RAM is the migration's to move.
    pub fn ships(&self) -> bool {
        self.process == Process::Alive && !matches!(self.step, Step::Connect | Step::Await)
    }

    /// Whether the driver is on its way back to the target, and does nothing else.
    pub fn is_away(&self) -> bool {
        self.session.wants_control() || self.session.awaits_resumed()
    }

    /// The page the scanner looks at next, where it is in a round.
    pub fn scans(&self) -> Option<usize> {
        match self.step {
            _ if self.is_away() => None,
            Step::Round(page) | Step::First(page) | Step::Last(page) => Some(page),
            _ => None,
        }
    }

    /// Whether somebody writes guest RAM: the guest, or the VMM while it saves the state of a paused one.
    pub fn may_write(&self) -> bool {
        let left = match self.step {
            Step::First(_) | Step::Save if !self.saved => self.save_writes_left,
            _ if self.guest == Guest::Running => self.writes_left,
            _ => 0,
        };
        self.ships() && self.writing.is_none() && left > 0
    }

    /// Whether the driver may find that the guest has stood still for too long: whenever it looks before the gate.
    pub fn may_overrun(&self, bounds: &Bounds) -> bool {
        let looks = match self.step {
            Step::Drain => self.saved,
            // In the middle of a round: it is ended where it stands.
            Step::First(_) | Step::Last(_) => self.saved && self.has_room_for_marks(bounds),
            Step::HandOver => !self.session.is_committed() && !self.session.is_paused(),
            Step::Gate => true,
            _ => false,
        };
        looks && !self.is_away() && self.overruns_left > 0
    }

    pub fn has_room_for_marks(&self, bounds: &Bounds) -> bool {
        self.workers.iter().all(|worker| worker.line != Line::Up || worker.ring.len() < bounds.ring_slots)
    }

    pub fn has_room_for_run(&self, bounds: &Bounds, c: usize) -> bool {
        self.workers[c].line == Line::Up && self.workers[c].ring.len() + 1 < bounds.ring_slots
    }

    /// Whether what was given back waits for a round.
    pub fn has_more(&self) -> bool {
        self.kept.contains(&true) || self.returned.contains(&true)
    }

    /// Whether the last round's end has been sent on every channel: the rule that ships, over this world's workers.
    pub fn all_sent(&self, bounds: &Bounds) -> bool {
        let sent = min_over_set(bounds.channels().map(|c| self.workers[c].sent)).unwrap_or(0);
        sent >= u64::from(self.session.round().0)
    }
}

fn setup(bounds: &Bounds) -> Setup {
    Setup {
        verify: Verify::Wire,
        channels: bounds.channels as u8,
        features: if bounds.resumes > 0 { FEATURE_RESUME } else { 0 },
        state_bytes_max: 0,
        blocks: Vec::new(),
        opaque: Vec::new(),
    }
}

impl World {
    /// Tells the source's session what happened, and does what it says.
    pub fn source_event(&mut self, bounds: &Bounds, event: SourceEvent) {
        for action in self.source.session.on(event) {
            self.source_does(bounds, action);
            if self.source.process != Process::Alive {
                return;
            }
        }
    }

    fn source_does(&mut self, bounds: &Bounds, action: SourceAction) {
        let source = &mut self.source;
        match action {
            SourceAction::Send(frame) => {
                self.seen.commit_sent |= frame == SourceFrame::Commit;
                if source.online {
                    self.line_mut().to_target.send(frame);
                }
            }
            SourceAction::OpenChannels => {
                for c in bounds.channels() {
                    source.workers[c].joining = true;
                    source.workers[c].line = Line::Up;
                    self.wires[c].generation = 1;
                    self.target.lobby[c] = vec![1];
                }
            }
            SourceAction::StartRounds => {
                // Armed, and round 0 takes every page there is.
                source.dirty = std::array::from_fn(|page| page < bounds.pages);
                source.step = Step::Round(0);
                source.workers.iter_mut().for_each(|worker| worker.joining = false);
            }
            SourceAction::PushMark(mark) => {
                for worker in source.workers.iter_mut().filter(|worker| worker.line == Line::Up) {
                    worker.ring.push_back(mark);
                }
                self.seen.epochs_closed += u64::from(matches!(mark, Item::Flush(_)));
            }
            SourceAction::FreeJournal { channel, through } => self.frees_journal(bounds, index(channel), through),
            SourceAction::CloseChannel { channel, .. } => {
                self.seen.voided |= source.step == Step::HandOver;
                self.closes_channel(index(channel));
            }
            SourceAction::GiveBack { channel } => self.gives_back(bounds, index(channel)),
            SourceAction::StartChannel { channel, round, epoch, .. } => {
                self.starts_channel(bounds, index(channel), round, epoch);
            }
            SourceAction::HangUp { channel } => self.hangs_up(index(channel)),
            SourceAction::FindDamage { block, chunk_digests } => {
                let own = source.digest.iter().take(bounds.pages).zip(&chunk_digests).enumerate();
                let chunks = own.filter(|(_, (own, there))| own.digest() != **there).map(|(page, _)| page as u32);
                let chunks = chunks.collect();
                self.source_event(bounds, SourceEvent::Damaged { block, chunks });
            }
            SourceAction::ShipAgain { chunks, .. } => {
                for page in chunks.into_iter().filter(|_| !bounds.is(Mutant::RepairNotShipped)) {
                    source.returned[page as usize] = true;
                }
                self.seen.repaired = true;
                self.takes_back(bounds);
            }
            SourceAction::Reconnect => self.loses_everything(bounds),
            SourceAction::PauseGuest => source.step = Step::Pause,
            SourceAction::AskCommit => source.step = Step::Gate,
            SourceAction::End(outcome) => self.source_ends(bounds, &outcome),
        }
    }

    /// `Driver::finish` of the source: the guest is resumed where it is ours, and everything is closed.
    fn source_ends(&mut self, bounds: &Bounds, outcome: &Outcome) {
        let verdict = Verdict::from(outcome);
        let ours = matches!(verdict, Verdict::Failed | Verdict::Cancelled);
        let resumes = ours || (verdict == Verdict::Uncertain && bounds.is(Mutant::ResumeAfterCommit));
        if resumes && self.source.guest == Guest::Paused {
            self.source.guest = Guest::Running;
        }
        self.source.verdict = Some(verdict);
        self.source_leaves(Process::Ended);
    }

    /// The process vanishes, and its guest with it.
    pub fn source_crashes(&mut self) {
        self.source.guest = Guest::Gone;
        self.source_leaves(Process::Crashed);
    }

    /// All that remains of a source that is gone is what it had sent; the rest is forgotten, so that states merge.
    fn source_leaves(&mut self, how: Process) {
        let source = &mut self.source;
        source.process = how;
        source.session = SourceSession::new(0);
        source.step = Step::Over;
        source.dirty = [false; PAGES];
        (source.kept, source.returned, source.late_loaded) = ([false; PAGES], [false; PAGES], false);
        (source.redials_left, source.resumes_left) = (0, 0);
        source.digest = Default::default();
        source.workers = Default::default();
        (source.writing, source.writes_left, source.save_writes_left) = (None, 0, 0);
        source.overruns_left = 0;
        if std::mem::take(&mut self.source.online) {
            self.line_mut().source_leaves();
        }
        self.wires.iter_mut().for_each(|wire| wire.pipe.close());
    }

    pub fn connects(&mut self, bounds: &Bounds) {
        self.source.step = Step::Await;
        self.source_event(bounds, SourceEvent::Connected(setup(bounds)));
    }

    /// Writes a page: two steps, as the guest's store and its mark are.
    pub fn writes(&mut self, bounds: &Bounds, page: usize) {
        let source = &mut self.source;
        if source.guest == Guest::Paused {
            source.save_writes_left -= 1;
        } else {
            source.writes_left -= 1;
        }
        source.writing = Some(page);
        if bounds.is(Mutant::MarkBeforeWrite) {
            source.dirty[page] = true;
        } else {
            source.version[page] += 1;
        }
    }

    pub fn marks(&mut self, bounds: &Bounds) {
        let source = &mut self.source;
        let Some(page) = source.writing.take() else { return };
        if bounds.is(Mutant::MarkBeforeWrite) {
            source.version[page] += 1;
        } else {
            source.dirty[page] = true;
        }
    }

    /// Looks at the next page of the round: harvests it and pushes it to a ring, or passes it by.
    ///
    /// One step for both: nobody sees the scanner's hand, and a write between the two does what a write after both does.
    pub fn scans_page(&mut self, bounds: &Bounds, to: Option<usize>) {
        let source = &mut self.source;
        let Some(page) = source.scans() else { return };
        if let Some(c) = to {
            if !bounds.is(Mutant::ClearAfterRead) {
                source.dirty[page] = false;
            }
            source.kept[page] = false;
            let run = Run { block: BlockId(0), first: page as u64, pages: 1 };
            source.workers[c].ring.push_back(Item::Run(run));
        }
        source.step = match source.step {
            Step::Round(_) => Step::Round(page + 1),
            Step::First(_) => Step::First(page + 1),
            _ => Step::Last(page + 1),
        };
    }

    pub fn ends_round(&mut self, bounds: &Bounds) {
        self.source_event(bounds, SourceEvent::RoundPushed);
        let source = &mut self.source;
        source.step = match source.step {
            Step::Round(_) => Step::Decide,
            Step::First(_) if source.saved => source.after_save(bounds),
            Step::First(_) => Step::Save,
            _ => Step::Drain,
        };
        self.takes_back(bounds);
    }

    pub fn pause_returns(&mut self, bounds: &Bounds, good: bool) {
        if good {
            self.source.guest = Guest::Paused;
            self.source.step = Step::First(0);
            self.source_event(bounds, SourceEvent::GuestPaused);
        } else {
            self.source_event(bounds, SourceEvent::Failed(hook_failure("pause")));
        }
    }

    pub fn save_returns(&mut self, bounds: &Bounds, good: bool) {
        if !good {
            return self.source_event(bounds, SourceEvent::Failed(hook_failure("save_state")));
        }
        self.source.saved = true;
        if self.source.online {
            self.line_mut().to_target.send(SourceFrame::State { offset: 0, bytes: vec![7] });
        }
        if self.source.step == Step::Save {
            self.source.step = self.source.after_save(bounds);
        }
    }

    pub fn drained(&mut self, bounds: &Bounds) {
        self.source.step = Step::HandOver;
        let block_digests = vec![digest(&self.source.digest)];
        let facts = Facts { block_digests, state_bytes: 1, ..Facts::default() };
        self.source_event(bounds, SourceEvent::Drained(facts));
        if std::mem::take(&mut self.source.late_loaded) {
            let round = Round(self.source.session.round().0 - 1);
            self.source_event(bounds, SourceEvent::Frame(TargetFrame::Loaded { round }));
        }
    }

    pub fn asks_gate(&mut self, bounds: &Bounds) {
        self.source.step = Step::HandOver;
        let granted = self.source.gate.commit() || bounds.is(Mutant::CommitPastTheGate);
        self.source_event(bounds, if granted { SourceEvent::CommitGranted } else { SourceEvent::CancelAsked });
    }

    /// The guest runs again, and this attempt to hand it over is withdrawn.
    pub fn overruns(&mut self, bounds: &Bounds) {
        self.source.overruns_left -= 1;
        self.source.guest = Guest::Running;
        self.source.saved = false;
        if self.source.scans().is_some() {
            self.source_event(bounds, SourceEvent::RoundPushed);
        }
        self.source.step = Step::Withdraw;
        self.takes_back(bounds);
        self.source_event(bounds, SourceEvent::Overran);
    }

    /// The worker takes a run into its hand, journals it, and looks at its page: that is what the digest remembers.
    pub fn pops(&mut self, bounds: &Bounds, c: usize) {
        let worker = &mut self.source.workers[c];
        let Some(Item::Run(run)) = worker.ring.pop_front() else { return };
        if bounds.journals() && !bounds.is(Mutant::JournalAfterSend) {
            worker.journal.push_back(Item::Run(run));
        }
        worker.hand = Some(run);
        let page = run.first as usize;
        self.source.digest[page].record(worker.sent, self.source.version[page]);
    }

    /// The worker sends the run in its hand: only now does the kernel read the page.
    pub fn sends_page(&mut self, bounds: &Bounds, c: usize) {
        let worker = &mut self.source.workers[c];
        let Some(run) = worker.hand.take() else { return };
        let page = run.first as usize;
        self.wires[c].pipe.send(Packet::Page { page, version: self.source.version[page] });
        if bounds.journals() && bounds.is(Mutant::JournalAfterSend) {
            worker.journal.push_back(Item::Run(run));
        }
        if bounds.is(Mutant::ClearAfterRead) {
            worker.to_clear = Some(page);
        }
    }

    /// The worker takes a mark, journals and sends it. One step: a mark has nothing that could change in a hand.
    pub fn sends_mark(&mut self, bounds: &Bounds, c: usize) {
        let worker = &mut self.source.workers[c];
        let Some(mark) = worker.ring.pop_front() else { return };
        if bounds.journals() {
            worker.journal.push_back(mark);
        }
        match mark {
            Item::RoundEnd(round) => {
                self.wires[c].pipe.send(Packet::RoundEnd(round));
                worker.sent = after(round);
            }
            Item::Flush(epoch) => {
                self.wires[c].pipe.send(Packet::Flush(epoch));
                if bounds.is(Mutant::FreeAtFlush) {
                    journal::free_through(&mut worker.journal, epoch);
                }
            }
            Item::Run(_) | Item::Untouched(_) => {}
        }
    }

    pub fn clears(&mut self, c: usize) {
        if let Some(page) = self.source.workers[c].to_clear.take() {
            self.source.dirty[page] = false;
        }
    }

    /// A worker ends with an error, or the connection that was to join is gone, or the source takes it for dead.
    pub fn channel_fails(&mut self, bounds: &Bounds, c: usize) {
        let (channel, reason) = (channel(c), String::new());
        let generation = self.source.session.generation(channel);
        self.source_event(bounds, SourceEvent::ChannelFailed { channel, generation, reason });
    }
}

impl SourceSide {
    fn after_save(&self, bounds: &Bounds) -> Step {
        if bounds.is(Mutant::NoHarvestAfterSave) { Step::Drain } else { Step::Last(0) }
    }

    /// The round that is being filled.
    pub fn round(&self) -> Round {
        self.session.round()
    }
}

pub fn hook_failure(hook: &'static str) -> Failure {
    Failure::Hook { hook, reason: String::new() }
}

pub fn silence() -> Failure {
    Failure::Silent { waiting_for: "", ms: 0 }
}

pub fn connection_lost() -> Failure {
    let reason = pageferry::error::OsReason { errno: None, text: String::new() };
    Failure::Control { doing: "", reason }
}
