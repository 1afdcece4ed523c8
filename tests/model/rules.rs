//! What can happen next: the transitions of the world, each enabled where the drivers and threads could take it.

use pageferry::Failure;
use pageferry::session::source::SourceEvent;
use pageferry::session::target::TargetEvent;
use pageferry::units::Item;
use pageferry::wire::control::TargetFrame;
use stateright::{Model, Property};

use crate::link::Packet;
use crate::mutants::Mutant;
use crate::oracle;
use crate::source_side::{Guest, Line, Step, connection_lost, silence};
use crate::world::{Bounds, Fault, Gate, Process, Side, World, channel};

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
    ChannelFails(usize),
    // The source's way back.
    Dial(usize),
    NoChannelLeft,
    MoreRounds,
    ComeBack,
    WindowEnds(Side),
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
    TearPage(usize),
    ZombieReads(usize),
    HookReturns(bool),
    CheckReturns,
    HearVisitor,
    DropVisitor,
    ActOnQuery,
    // What goes wrong.
    Crash(Side),
    PutBack,
    Cut,
    ChannelDies(usize),
    TakeForDead(usize),
    Damage(usize),
    Deadline(Side),
    /// Somebody asks the gate to cancel; the driver sees it later.
    AskCancel(Side),
    SeesCancel(Side),
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
            _ if source.is_away() => {}
            Step::Connect => out.push(Action::Connect),
            Step::Round(page) | Step::First(page) | Step::Last(page) if page < bounds.pages => {
                if source.dirty[page] || source.kept[page] {
                    let rings = bounds.channels().filter(|c| source.has_room_for_run(bounds, *c));
                    // Until the first run is pushed the channels are alike: one choice stands for both.
                    let alike =
                        usize::from(source.step != Step::Round(0) || source.round().0 > 0 || !w.is_fresh(bounds));
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
            Step::Drain if source.session.channels_are_settled() || bounds.is(Mutant::FinalBeforeDrained) => {
                if source.has_more() {
                    out.push(Action::MoreRounds);
                } else if bounds.is(Mutant::FinalBeforeDrained) || source.all_sent(bounds) {
                    out.push(Action::Drained);
                }
            }
            // What was said of Final came to nothing.
            Step::HandOver if source.session.is_paused() => out.push(Action::MoreRounds),
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
            self.source_listens(w, out);
        }
    }

    fn source_listens(&self, w: &World, out: &mut Vec<Action>) {
        let (bounds, source) = (&self.0, &w.source);
        if source.online && !w.line().to_source.items().is_empty() {
            out.push(Action::FrameTo(Side::Source));
        } else if source.online && w.line().to_source.at_end() {
            out.push(Action::EndOfStreamAt(Side::Source));
        }
        for c in bounds.channels().filter(|c| source.workers[*c].joining && !w.wires[*c].pipe.takes()) {
            out.push(Action::ChannelFails(c));
        }
        let wants = source.ships() && !source.is_away() && source.session.wants_channels();
        let down = |c: &usize| source.workers[*c].line == Line::Down && source.session.is_down(channel(*c));
        if wants && source.redials_left > 0 {
            out.extend(bounds.channels().filter(down).map(Action::Dial));
        } else if wants && source.session.live_channels() == 0 && source.session.channels_are_settled() {
            out.push(Action::NoChannelLeft);
        }
        let nobody = w.target.process == Process::Crashed;
        if source.session.wants_control() {
            if source.resumes_left > 0 && !nobody {
                out.push(Action::ComeBack);
            }
            if !bounds.patient || source.resumes_left == 0 || nobody {
                out.push(Action::WindowEnds(Side::Source));
            }
        }
        if source.gate == Gate::Cancelled && !source.session.is_committed() {
            out.push(Action::SeesCancel(Side::Source));
        }
    }

    fn worker_progress(&self, w: &World, out: &mut Vec<Action>) {
        for c in self.0.channels().filter(|c| w.source.workers[*c].line == Line::Up) {
            let (worker, pipe) = (&w.source.workers[c], &w.wires[c].pipe);
            let mark_next = matches!(worker.ring.front(), Some(Item::RoundEnd(_) | Item::Flush(_)));
            if worker.to_clear.is_some() {
                out.push(Action::Clear(c));
            } else if worker.hand.is_none() && !mark_next {
                if !worker.ring.is_empty() {
                    out.push(Action::Pop(c));
                }
            } else if !pipe.takes() {
                // A worker learns that its channel is dead when it sends, and not before.
                let told = !w.source.session.is_live(channel(c)) && !w.source.workers[c].joining;
                if w.source.listens() && !w.source.is_away() && !w.source.session.is_committed() && !told {
                    out.push(Action::ChannelFails(c));
                }
            } else if pipe.items().len() < self.0.wire_slots {
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
            let (reads, pipe) = (target.reads(bounds, c), &w.wires[c].pipe);
            let same = target.lanes[c].generation == w.wires[c].generation;
            if reads && same && !pipe.items().is_empty() {
                out.push(Action::LaneReads(c));
            }
            if !w.zombies[c].items().is_empty() {
                out.push(Action::ZombieReads(c));
            }
            if target.listens() {
                if target.lobby[c].first().is_some_and(|g| *g < w.wires[c].generation || pipe.takes()) {
                    out.push(Action::ChannelArrives(c));
                }
                if reads && (!same || pipe.at_end()) {
                    out.push(Action::LaneFails(c));
                }
            }
        }
        if target.listens() {
            self.target_listens(w, out);
        }
    }

    fn target_listens(&self, w: &World, out: &mut Vec<Action>) {
        let (bounds, target) = (&self.0, &w.target);
        if bounds.channels().any(|c| target.has_moved(bounds, c)) {
            out.push(Action::LanesMoved);
        }
        if target.check.is_some() {
            out.push(Action::CheckReturns);
        }
        if target.online && !w.control.to_target.items().is_empty() {
            out.push(Action::FrameTo(Side::Target));
        } else if target.online && w.control.to_target.at_end() && !bounds.is(Mutant::NobodyAtTheTarget) {
            out.push(Action::EndOfStreamAt(Side::Target));
        }
        if let Some(visitor) = w.visitor().map(|at| &w.visitors[at]) {
            if !visitor.to_target.items().is_empty() {
                out.push(Action::HearVisitor);
            } else if visitor.to_target.at_end() {
                out.push(Action::DropVisitor);
            }
        }
        if target.query {
            out.push(Action::ActOnQuery);
        }
        let hopeless = w.source.process != Process::Alive;
        if target.session.is_dormant() && (!bounds.patient || hopeless) {
            out.push(Action::WindowEnds(Side::Target));
        }
        if target.gate == Gate::Cancelled {
            out.push(Action::SeesCancel(Side::Target));
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
        if source.step == Step::Decide && !source.is_away() && source.round().0 < bounds.live_rounds {
            out.push(Action::AnotherRound);
        }
        if source.may_overrun(bounds) {
            out.push(Action::Overrun);
        }
        let marks_due = source.scans().is_some() && w.seen.epochs_closed < u64::from(bounds.epochs);
        if marks_due && source.session.may_close_epoch() && source.has_room_for_marks(bounds) {
            out.push(Action::EpochDue);
        }
        if source.online && w.line().to_source.may_lose() {
            out.push(Action::LoseFramesTo(Side::Source));
        }
        if w.target.online && w.control.to_target.may_lose() {
            out.push(Action::LoseFramesTo(Side::Target));
        }
        if let Some(at) = w.visitor().filter(|_| w.target.listens()) {
            if at + 1 < w.visitors.len() || w.visitors[at].to_target.may_lose() {
                out.push(Action::DropVisitor);
            }
        }
        for c in bounds.channels().filter(|c| w.wires[*c].pipe.may_lose()) {
            out.push(Action::LosePackets(c));
            let reads = w.target.process == Process::Alive && w.target.reads(bounds, c);
            if reads && matches!(w.wires[c].pipe.next(), Some(Packet::Page { .. })) {
                out.push(Action::TearPage(c));
            }
        }
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
            // An image of a guest that runs is another matter.
            Fault::PutBack if w.target.prepared && alive(&Side::Target) && w.target.hook.is_none() => {
                out.push(Action::PutBack);
            }
            Fault::Cut if w.source.online && !w.line().is_cut() => out.push(Action::Cut),
            Fault::ChannelDeath => {
                let stands = |c: &usize| w.wires[*c].generation > 0 && w.wires[*c].pipe.takes();
                out.extend(self.0.channels().filter(stands).map(Action::ChannelDies));
            }
            Fault::Stall if w.source.listens() && !w.source.is_away() => {
                let live = |c: &usize| w.source.session.is_live(channel(*c));
                out.extend(self.0.channels().filter(live).map(Action::TakeForDead));
            }
            Fault::Damage => {
                let page = |c: &usize| matches!(w.wires[*c].pipe.next(), Some(Packet::Page { .. }));
                out.extend(self.0.channels().filter(page).map(Action::Damage));
            }
            Fault::Deadline => {
                let listens = |side: &Side| match side {
                    Side::Source => w.source.listens() && w.source.online,
                    Side::Target => w.target.listens() && w.target.online,
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
            Fault::Cut | Fault::PutBack | Fault::Stall => {}
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
            Action::ChannelFails(c) | Action::TakeForDead(c) => w.channel_fails(bounds, c),
            Action::Dial(c) => w.dials(bounds, c),
            Action::NoChannelLeft => {
                w.source_event(bounds, SourceEvent::Failed(Failure::Worker(String::new())));
            }
            Action::MoreRounds => w.source.step = if w.source.has_more() { Step::Last(0) } else { Step::Drain },
            Action::ComeBack => w.comes_back(bounds),
            Action::WindowEnds(Side::Source) => {
                w.source_event(bounds, SourceEvent::Failed(Failure::NotResumed { ms: 0, lost: String::new() }));
            }
            Action::WindowEnds(Side::Target) => {
                w.target_event(bounds, TargetEvent::Failed(Failure::NotResumed { ms: 0, lost: String::new() }));
            }
            Action::Write(page) => w.writes(bounds, page),
            Action::Mark => w.marks(bounds),
            Action::FrameTo(Side::Source) => {
                if let Some(frame) = w.line_mut().to_source.receive() {
                    w.source_hears(bounds, frame);
                }
            }
            Action::FrameTo(Side::Target) => {
                if let Some(frame) = w.control.to_target.receive() {
                    w.target_hears(bounds, frame);
                }
            }
            Action::EndOfStreamAt(Side::Source) if bounds.is(Mutant::NoAnswerIsNo) && w.asks() => {
                w.source_event(bounds, SourceEvent::Frame(TargetFrame::QueryAnswer { running: false }));
            }
            Action::EndOfStreamAt(Side::Source) => {
                w.source_event(bounds, SourceEvent::ControlLost(connection_lost()));
            }
            Action::EndOfStreamAt(Side::Target) => {
                w.target_event(bounds, TargetEvent::ControlLost(connection_lost()));
            }
            Action::LoseFramesTo(Side::Source) => w.line_mut().to_source.lose(),
            Action::LoseFramesTo(Side::Target) => w.control.to_target.lose(),
            Action::ChannelArrives(c) => w.channel_arrives(bounds, c),
            Action::LaneReads(c) => w.lane_reads(bounds, c),
            Action::LaneFails(c) => w.lane_fails(bounds, c),
            Action::LanesMoved => w.tells_of_lanes(bounds),
            Action::LosePackets(c) => w.wires[c].pipe.lose(),
            Action::TearPage(c) => w.tears(c),
            Action::ZombieReads(c) => w.zombie_reads(c),
            Action::HookReturns(good) => w.hook_returns(bounds, good),
            Action::CheckReturns => w.check_returns(bounds),
            Action::HearVisitor => w.hears_visitor(bounds),
            Action::DropVisitor => w.drops_visitor(),
            Action::ActOnQuery => w.target_event(bounds, TargetEvent::QueryAsked),
            Action::Crash(Side::Source) => w.source_crashes(),
            Action::Crash(Side::Target) => w.target_crashes(),
            Action::PutBack => w.target_is_put_back(bounds),
            Action::Cut => w.line_mut().cut(),
            Action::ChannelDies(c) => w.wires[c].pipe.close(),
            Action::Damage(c) => w.damages(c),
            Action::Deadline(Side::Source) => w.source_event(bounds, SourceEvent::ControlLost(silence())),
            Action::Deadline(Side::Target) => w.target_event(bounds, TargetEvent::ControlLost(silence())),
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
            Action::Crash(_) | Action::PutBack | Action::Cut | Action::Deadline(_) | Action::AskCancel(_) => true,
            Action::ChannelDies(_) | Action::TakeForDead(_) | Action::Damage(_) => true,
            Action::PauseReturns(good) | Action::SaveReturns(good) | Action::HookReturns(good) => !good,
            _ => false,
        }
    }
}

impl Model for Ferry {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let mut w = World::new(&self.0);
        // What happens before rounds begin is a matter of its own: here, the channels join without a hitch.
        while self.0.under_way && w.source.step != Step::Round(0) {
            let mut next = Vec::new();
            self.progress(&w, &mut next);
            let Some(action) = next.first() else { break };
            self.apply(&mut w, *action);
        }
        vec![w]
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

impl World {
    /// Whether nothing has happened to a channel yet that would tell it from the others.
    fn is_fresh(&self, bounds: &Bounds) -> bool {
        let stands = |c: usize| self.wires[c].generation == 1 && self.wires[c].pipe.takes();
        let up = |c: usize| self.source.workers[c].line == Line::Up && self.target.lanes[c].up;
        bounds.channels().all(|c| stands(c) && up(c)) && self.source.workers.windows(2).all(|two| two[0] == two[1])
    }

    /// Whether the source has sent a Query, and waits for the answer.
    fn asks(&self) -> bool {
        self.source.session.is_committed() && !self.visitors.is_empty()
    }
}

/// Whether the source may run its guest.
pub fn source_runs(w: &World) -> bool {
    w.source.guest == Guest::Running
}
