//! What the source does about lost connections: `src/source/losses.rs`, step by step.

use pageferry::journal;
use pageferry::session::source::SourceEvent;
use pageferry::units::{Epoch, Item, Round, SessionId};
use pageferry::wire::control::{SourceFrame, TargetFrame};

use crate::link::{Control, Wire};
use crate::mutants::Mutant;
use crate::source_side::{Guest, Line, Step};
use crate::world::{Bounds, PAGES, Process, World, after, channel, generation, rounds};

const SESSION: SessionId = SessionId([0; 16]);

impl World {
    pub fn frees_journal(&mut self, bounds: &Bounds, c: usize, through: Epoch) {
        let journal = &mut self.source.workers[c].journal;
        if !bounds.journals() || bounds.is(Mutant::FreeAtFlush) {
            return;
        }
        if bounds.is(Mutant::FreePastLaterMarks) {
            // Up to the first mark, whichever it is, and the runs behind it.
            while journal.pop_front().is_some_and(|item| item != Item::Flush(through)) {}
            return;
        }
        self.seen.mark_missing |= !journal::free_through(journal, through);
    }

    /// The worker is joined; what it leaves behind stays.
    pub fn closes_channel(&mut self, c: usize) {
        let worker = &mut self.source.workers[c];
        worker.joining = false;
        if worker.line == Line::Up {
            worker.line = Line::Closed;
            worker.hand = None;
            worker.sent = worker.sent.retired();
        }
        self.wires[c].pipe.close();
    }

    pub fn gives_back(&mut self, bounds: &Bounds, c: usize) {
        let (source, mut runs) = (&mut self.source, Vec::new());
        let worker = &mut source.workers[c];
        if worker.line == Line::Closed {
            journal::drain_runs(&mut worker.journal, |run| runs.push(run));
            let queued = &mut worker.ring;
            journal::drain_runs(queued, |run| runs.extend((!bounds.is(Mutant::RingForgotten)).then_some(run)));
            worker.line = Line::Down;
            worker.sent = rounds(0).retired();
        }
        for run in runs.into_iter().filter(|_| !bounds.is(Mutant::NoGiveBack)) {
            source.returned[run.first as usize] = true;
        }
        self.takes_back(bounds);
    }

    /// What was given back enters the next round: not one that is being filled.
    pub fn takes_back(&mut self, bounds: &Bounds) {
        let source = &mut self.source;
        let filling = source.scans().is_some_and(|page| page > 0);
        if !filling || bounds.is(Mutant::GiveBackIntoThisRound) {
            let returned = std::mem::replace(&mut source.returned, [false; PAGES]);
            returned.iter().zip(&mut source.kept).for_each(|(returned, kept)| *kept |= returned);
            if let (true, Step::Round(_), Some(first)) = (filling, source.step, returned.iter().position(|page| *page))
            {
                source.step = Step::Round(first);
            }
        }
    }

    pub fn dials(&mut self, bounds: &Bounds, c: usize) {
        let source = &mut self.source;
        source.redials_left -= 1;
        // Of a connection that was made before, in vain, the number is not used again.
        let next = self.wires[c].generation.max(source.session.generation(channel(c)).0) + 1;
        source.workers[c].joining = true;
        self.wires[c] = Wire { generation: next, ..Wire::default() };
        self.target.lobby[c].push(next);
        let opened = SourceEvent::ChannelOpened { channel: channel(c), generation: generation(next) };
        self.source_event(bounds, opened);
    }

    pub fn hangs_up(&mut self, c: usize) {
        self.source.workers[c].joining = false;
        self.wires[c].pipe.close();
    }

    /// The target has taken the channel in: its worker begins with the last marks.
    pub fn starts_channel(&mut self, bounds: &Bounds, c: usize, round: Option<Round>, epoch: Option<Epoch>) {
        let worker = &mut self.source.workers[c];
        worker.joining = false;
        worker.line = Line::Up;
        worker.sent = round.map_or(rounds(0), after);
        let first = round.filter(|_| !bounds.is(Mutant::NoMarkOnRejoin)).map(Item::RoundEnd);
        worker.ring = [first, epoch.map(Item::Flush)].into_iter().flatten().collect();
        self.seen.rejoined = true;
    }

    /// Everything is lost: no worker is left, and all that was outstanding is dirty again. A guest that was paused runs on,
    /// unless it may run at the target.
    pub fn loses_everything(&mut self, bounds: &Bounds) {
        if std::mem::take(&mut self.source.online) {
            self.line_mut().source_leaves();
        }
        // No round is being filled any more.
        let at = match self.source.step {
            Step::Round(page) | Step::First(page) | Step::Last(page) => page,
            _ => 0,
        };
        self.source.step = Step::HandOver;
        for c in bounds.channels() {
            self.closes_channel(c);
            if bounds.is(Mutant::ResumeWithoutGiveBack) {
                let worker = &mut self.source.workers[c];
                (worker.line, worker.sent) = (Line::Down, rounds(0).retired());
                worker.journal.clear();
                worker.ring.clear();
            }
            self.gives_back(bounds, c);
        }
        self.seen.epochs_acked = self.seen.epochs_closed;
        let source = &mut self.source;
        if !source.session.is_committed() {
            source.guest = Guest::Running;
            (source.saved, source.late_loaded) = (false, false);
            // The round that was interrupted goes on behind the last page that was looked at.
            source.step = Step::Round(if bounds.is(Mutant::RoundBeginsAnew) { 0 } else { at });
        }
    }

    /// A new control connection: to the target, or to whoever tells how a target ended.
    pub fn comes_back(&mut self, bounds: &Bounds) {
        self.source.resumes_left -= 1;
        self.source.online = true;
        // What the target has turned away is of no use to anybody.
        self.visitors.retain(|visitor| !visitor.to_target.is_deaf());
        self.visitors.push_back(Control::default());
        self.source_event(bounds, SourceEvent::Reconnected(SESSION));
        if self.target.process == Process::Ended {
            let runs = self.target.ran;
            let Some(witness) = self.visitors.back_mut() else { return };
            let answer = match witness.to_target.receive() {
                Some(SourceFrame::Query { .. }) => TargetFrame::QueryAnswer { running: runs },
                _ => TargetFrame::Refused { reason: String::new() },
            };
            witness.to_source.send(answer);
            witness.target_leaves();
        }
    }

    pub fn source_hears(&mut self, bounds: &Bounds, frame: TargetFrame) {
        match &frame {
            TargetFrame::EpochApplied { epoch, .. } => {
                self.seen.epochs_acked = self.seen.epochs_acked.max(epoch.0 + 1);
                if bounds.is(Mutant::FreeUnnamed) {
                    bounds.channels().for_each(|c| self.frees_journal(bounds, c, *epoch));
                    self.seen.mark_missing = false;
                }
            }
            TargetFrame::Loaded { .. } if bounds.is(Mutant::LateLoadedCounts) => {
                self.source.late_loaded = self.source.step == Step::HandOver && !self.source.session.awaits_loaded();
            }
            _ => {}
        }
        self.source_event(bounds, SourceEvent::Frame(frame));
    }
}
