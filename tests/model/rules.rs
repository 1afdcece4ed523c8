//! What can happen next: the transitions of the world, each enabled where the drivers and threads could take it.

use pageferry::session::source::SourceEvent;
use pageferry::session::target::TargetEvent;
use pageferry::units::Item;
use stateright::{Model, Property};

use crate::oracle;
use crate::source_side::{Guest, Step, connection_lost, silence};
use crate::world::{Bounds, Fault, Gate, Mutant, Process, Side, World};

/// One step of the world.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Action {
    // The source's driver.
    Connect,
    Scan {
        to: Option<usize>,
    },
    EndRound,
    EpochDue,
    AnotherRound,
    SwitchOver,
    PauseReturns(bool),
    SaveReturns(bool),
    Drained,
    AskGate,
    Overrun,
    RoundsGoOn,
    // The source's workers.
    Pop(usize),
    SendPage(usize),
    SendMark(usize),
    Clear(usize),
    WorkerFails(usize),
    // Whoever writes the source's RAM.
    Write(usize),
    Mark,
    // The control connection.
    FrameTo(Side),
    EndOfStreamAt(Side),
    LoseFramesTo(Side),
    // The target.
    ChannelArrives(usize),
    LaneReads(usize),
    LaneFails(usize),
    LanesMoved,
    LosePackets(usize),
    HookReturns(bool),
    // What goes wrong.
    Crash(Side),
    Cut,
    ChannelDies(usize),
    Deadline(Side),
    /// Somebody asks the gate to cancel; the driver sees it later.
    AskCancel(Side),
    SeesCancel(Side),
    /// The lanes have not joined in time.
    JoinDeadline,
}

/// The model: the bounds, and the world within them.
#[derive(Clone, Debug)]
pub struct Ferry(pub Bounds);

impl Ferry {
    /// Steps that processes and threads take by themselves: while one of these is left, nobody waits for ever.
    pub fn progress(&self, w: &World, out: &mut Vec<Action>) {
        if w.is_over() {
            return;
        }
        if w.source.process == Process::Alive {
            self.source_progress(w, out);
            self.worker_progress(w, out);
        }
        if w.target.process == Process::Alive {
            self.target_progress(w, out);
        }
    }

    fn source_progress(&self, w: &World, out: &mut Vec<Action>) {
        let (bounds, source) = (&self.0, &w.source);
        match source.step {
            Step::Connect => out.push(Action::Connect),
            Step::Round(page) | Step::First(page) | Step::Last(page) if page < bounds.pages => {
                if source.dirty[page] {
                    let rings = bounds.channels().filter(|c| source.has_room_for_run(bounds, *c));
                    // Until the first run is pushed the channels are alike: one choice stands for both.
                    let alike = usize::from(source.step != Step::Round(0) || source.round().0 > 0);
                    out.extend(rings.take_while(|c| *c == 0 || alike == 1).map(|c| Action::Scan { to: Some(c) }));
                } else {
                    out.push(Action::Scan { to: None });
                }
            }
            // Not even a broken driver gets a mark out of the session before the answer.
            Step::Round(_) if source.session.is_withdrawing() => {}
            Step::Round(_) | Step::First(_) | Step::Last(_) if source.has_room_for_marks(bounds) => {
                out.push(Action::EndRound);
            }
            Step::Decide => out.push(Action::SwitchOver),
            Step::Pause if source.writing.is_none() => out.push(Action::PauseReturns(true)),
            Step::Drain if bounds.is(Mutant::FinalBeforeDrained) || source.all_sent(bounds) => {
                out.push(Action::Drained);
            }
            Step::Gate => out.push(Action::AskGate),
            Step::Withdraw if !source.session.is_withdrawing() || bounds.is(Mutant::RoundsBeforeTheAnswer) => {
                out.push(Action::RoundsGoOn);
            }
            _ => {}
        }
        if matches!(source.step, Step::First(_) | Step::Save) && !source.saved && source.writing.is_none() {
            out.push(Action::SaveReturns(true));
        }
        if source.writing.is_some() {
            out.push(Action::Mark);
        }
        if source.listens() {
            if !w.control.to_source.items().is_empty() {
                out.push(Action::FrameTo(Side::Source));
            } else if w.control.to_source.at_end() {
                out.push(Action::EndOfStreamAt(Side::Source));
            }
            // Only where it must come; that any deadline may come too early is a fault of its own.
            let lost = bounds.channels().any(|c| w.target.lobby[c] && !w.wires[c].takes());
            if source.session.awaits_lanes() && lost {
                out.push(Action::JoinDeadline);
            }
            if source.gate == Gate::Cancelled && !source.session.is_committed() {
                out.push(Action::SeesCancel(Side::Source));
            }
        }
    }

    fn worker_progress(&self, w: &World, out: &mut Vec<Action>) {
        for c in self.0.channels() {
            let (worker, wire) = (&w.source.workers[c], &w.wires[c]);
            let mark_next = matches!(worker.ring.front(), Some(Item::RoundEnd(_) | Item::Flush(_)));
            if worker.to_clear.is_some() {
                out.push(Action::Clear(c));
            } else if worker.hand.is_none() && !mark_next {
                if !worker.ring.is_empty() {
                    out.push(Action::Pop(c));
                }
            } else if !wire.takes() {
                // A worker learns that its channel is dead when it sends, and not before.
                if w.source.listens() {
                    out.push(Action::WorkerFails(c));
                }
            } else if wire.items().len() < self.0.wire_slots {
                out.push(if mark_next && worker.hand.is_none() { Action::SendMark(c) } else { Action::SendPage(c) });
            }
        }
    }

    fn target_progress(&self, w: &World, out: &mut Vec<Action>) {
        let (bounds, target) = (&self.0, &w.target);
        if target.hook.is_some() {
            out.push(Action::HookReturns(true));
        }
        for c in bounds.channels() {
            let reads = target.reads(bounds, c);
            if reads && !w.wires[c].items().is_empty() {
                out.push(Action::LaneReads(c));
            }
            if target.listens() {
                if target.lobby[c] && w.wires[c].takes() {
                    out.push(Action::ChannelArrives(c));
                }
                if reads && w.wires[c].at_end() {
                    out.push(Action::LaneFails(c));
                }
            }
        }
        if target.listens() {
            if bounds.channels().any(|c| target.has_moved(bounds, c)) {
                out.push(Action::LanesMoved);
            }
            if !w.control.to_target.items().is_empty() {
                out.push(Action::FrameTo(Side::Target));
            } else if w.control.to_target.at_end() && !bounds.is(Mutant::NobodyAtTheTarget) {
                out.push(Action::EndOfStreamAt(Side::Target));
            }
            if target.gate == Gate::Cancelled {
                out.push(Action::SeesCancel(Side::Target));
            }
        }
    }

    /// Steps of the guest, the policy, the network and fate: none of them has to come.
    fn environment(&self, w: &World, out: &mut Vec<Action>) {
        let (bounds, source) = (&self.0, &w.source);
        if w.is_over() {
            return;
        }
        if source.may_write() {
            out.extend((0..bounds.pages).map(Action::Write));
        }
        if source.step == Step::Decide && source.round().0 < bounds.live_rounds {
            out.push(Action::AnotherRound);
        }
        if source.may_overrun(bounds) {
            out.push(Action::Overrun);
        }
        let marks_due = source.scans().is_some() && w.seen.epochs_closed < u64::from(bounds.epochs);
        if marks_due && source.has_room_for_marks(bounds) {
            out.push(Action::EpochDue);
        }
        if w.control.to_source.may_lose() {
            out.push(Action::LoseFramesTo(Side::Source));
        }
        if w.control.to_target.may_lose() {
            out.push(Action::LoseFramesTo(Side::Target));
        }
        out.extend(bounds.channels().filter(|c| w.wires[*c].may_lose()).map(Action::LosePackets));
        if w.faults_left > 0 {
            bounds.kinds.iter().for_each(|kind| self.fault(w, *kind, out));
        }
    }

    fn fault(&self, w: &World, kind: Fault, out: &mut Vec<Action>) {
        let alive = |side: &Side| match side {
            Side::Source => w.source.process == Process::Alive,
            Side::Target => w.target.process == Process::Alive,
        };
        let sides = [Side::Source, Side::Target].into_iter().filter(alive);
        match kind {
            Fault::Crash => out.extend(sides.map(Action::Crash)),
            Fault::Cut if !w.control.is_cut() => out.push(Action::Cut),
            Fault::ChannelDeath => {
                out.extend(self.0.channels().filter(|c| w.wires[*c].takes()).map(Action::ChannelDies))
            }
            Fault::Deadline => {
                let listens = |side: &Side| match side {
                    Side::Source => w.source.listens(),
                    Side::Target => w.target.listens(),
                };
                out.extend(sides.filter(listens).map(Action::Deadline));
            }
            Fault::Hook => {
                if w.source.step == Step::Pause && w.source.writing.is_none() {
                    out.push(Action::PauseReturns(false));
                }
                if w.source.step == Step::Save && w.source.writing.is_none() {
                    out.push(Action::SaveReturns(false));
                }
                if w.target.hook.is_some() {
                    out.push(Action::HookReturns(false));
                }
            }
            Fault::Cancel => {
                if w.source.gate == Gate::Open && w.source.process == Process::Alive {
                    out.push(Action::AskCancel(Side::Source));
                }
                if w.target.gate == Gate::Open && w.target.process == Process::Alive {
                    out.push(Action::AskCancel(Side::Target));
                }
            }
            Fault::Cut => {}
        }
    }

    fn apply(&self, w: &mut World, action: Action) {
        let bounds = &self.0;
        match action {
            Action::Connect => w.connects(bounds),
            Action::Scan { to } => w.scans_page(bounds, to),
            Action::EndRound => w.ends_round(bounds),
            Action::EpochDue => w.source_event(bounds, SourceEvent::EpochDue),
            Action::AnotherRound => w.source.step = Step::Round(0),
            Action::SwitchOver => w.source_event(bounds, SourceEvent::SwitchOver),
            Action::PauseReturns(good) => w.pause_returns(bounds, good),
            Action::SaveReturns(good) => w.save_returns(bounds, good),
            Action::Drained => w.drained(bounds),
            Action::AskGate => w.asks_gate(bounds),
            Action::Overrun => w.overruns(bounds),
            Action::RoundsGoOn => w.source.step = Step::Round(0),
            Action::Pop(c) => w.pops(bounds, c),
            Action::SendPage(c) => w.sends_page(bounds, c),
            Action::SendMark(c) => w.sends_mark(bounds, c),
            Action::Clear(c) => w.clears(c),
            Action::WorkerFails(c) => w.worker_fails(bounds, c),
            Action::Write(page) => w.writes(bounds, page),
            Action::Mark => w.marks(bounds),
            Action::FrameTo(Side::Source) => {
                if let Some(frame) = w.control.to_source.receive() {
                    w.source_event(bounds, SourceEvent::Frame(frame));
                }
            }
            Action::FrameTo(Side::Target) => {
                if let Some(frame) = w.control.to_target.receive() {
                    w.target_hears(bounds, frame);
                }
            }
            Action::EndOfStreamAt(Side::Source) => w.source_event(bounds, SourceEvent::Failed(connection_lost())),
            Action::EndOfStreamAt(Side::Target) => {
                w.target_event(bounds, TargetEvent::Failed(connection_lost()));
            }
            Action::LoseFramesTo(Side::Source) => w.control.to_source.lose(),
            Action::LoseFramesTo(Side::Target) => w.control.to_target.lose(),
            Action::ChannelArrives(c) => w.channel_arrives(bounds, c),
            Action::LaneReads(c) => w.lane_reads(c),
            Action::LaneFails(c) => w.lane_fails(bounds, c),
            Action::LanesMoved => w.tells_of_lanes(bounds),
            Action::LosePackets(c) => w.wires[c].lose(),
            Action::HookReturns(good) => w.hook_returns(bounds, good),
            Action::Crash(Side::Source) => w.source_crashes(),
            Action::Crash(Side::Target) => w.target_crashes(),
            Action::Cut => w.control.cut(),
            Action::ChannelDies(c) => w.wires[c].close(),
            Action::Deadline(Side::Source) | Action::JoinDeadline => {
                w.source_event(bounds, SourceEvent::Failed(silence()))
            }
            Action::Deadline(Side::Target) => w.target_event(bounds, TargetEvent::Failed(silence())),
            Action::AskCancel(Side::Source) => w.source.gate = Gate::Cancelled,
            Action::AskCancel(Side::Target) => w.target.gate = Gate::Cancelled,
            Action::SeesCancel(Side::Source) => w.source_event(bounds, SourceEvent::CancelAsked),
            Action::SeesCancel(Side::Target) => w.target_event(bounds, TargetEvent::CancelAsked),
        }
    }
}

impl Action {
    /// Whether it is one of the faults that are counted.
    fn is_fault(self) -> bool {
        match self {
            Action::Crash(_) | Action::Cut | Action::ChannelDies(_) | Action::Deadline(_) | Action::AskCancel(_) => {
                true
            }
            Action::PauseReturns(good) | Action::SaveReturns(good) | Action::HookReturns(good) => !good,
            _ => false,
        }
    }
}

impl Model for Ferry {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(&self.0)]
    }

    fn actions(&self, w: &World, out: &mut Vec<Action>) {
        self.progress(w, out);
        self.environment(w, out);
    }

    fn next_state(&self, w: &World, action: Action) -> Option<World> {
        let mut next = w.clone();
        next.faults_left -= u8::from(action.is_fault());
        self.apply(&mut next, action);
        (next != *w).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Ferry>> {
        oracle::properties(&self.0)
    }
}

/// Whether the source may run its guest.
pub fn source_runs(w: &World) -> bool {
    w.source.guest == Guest::Running
}
