//! The target's state machine over a simulated transport: the input is a script of frames, of lanes that come, move and
//! fail, and of what the VMM says to its hooks. Every frame goes through the encoder and the decoder, both ways.
//!
//! What must hold whatever comes is in [`World::judge`]; it knows nothing of how the machine does it.

use std::collections::BTreeMap;

use pageferry::Outcome;
use pageferry::barrier::LaneWord;
use pageferry::error::Failure;
use pageferry::session::FEATURE_RESUME;
use pageferry::session::target::{Check, TargetAction, TargetEvent, TargetSession};
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{BlockInfo, Final, FrameDecoder, FrameEncoder, Setup, SourceFrame, TargetFrame};

use super::OPEN;
use super::frames::{sealed, source_frame};
use super::script::Script;

const STATE_BYTES_MAX: u64 = 40;
const INSTANCE: InstanceId = InstanceId([3; 16]);
/// Events of one script, at the most: none needs more to reach anything.
const EVENTS_MAX: usize = 400;
/// What one event can ask for, beside one frame for each of 255 lanes.
const ACTIONS_MAX: usize = 300;

pub fn run(input: &[u8]) -> &'static str {
    let mut script = Script::new(input);
    let mut world = World::new();
    for _ in 0..EVENTS_MAX {
        if script.is_over() {
            break;
        }
        world.turn(&mut script);
    }
    world.end
}

/// What the VMM is asked for and has not yet answered.
#[derive(PartialEq)]
enum Asked {
    Prepare,
    LoadState,
    Run,
}

struct World {
    session: TargetSession,
    to_target: (FrameEncoder<SourceFrame>, FrameDecoder<SourceFrame>),
    to_source: (FrameEncoder<TargetFrame>, FrameDecoder<TargetFrame>),
    /// Whether there is a control connection, and how many frames have come on it.
    connected: bool,
    frames: u32,
    /// Connections that were offered, and what each channel's lane was last said to have done: rounds, epochs.
    offered: Vec<(ChannelId, Generation)>,
    joined: BTreeMap<ChannelId, Generation>,
    told: BTreeMap<ChannelId, (u64, u64)>,
    channels: u8,
    /// Device state that was to be kept since it was last to be forgotten.
    kept: u64,
    applied: Option<Epoch>,
    checking: Option<Final>,
    /// Checks that came to nothing while they went on: their results come all the same, after those of later ones.
    stale: u32,
    /// Whether the event is the result of a check that counts.
    answered: bool,
    asked: Vec<Asked>,
    prepared: bool,
    loaded: bool,
    ran: Option<bool>,
    discarded: bool,
    refused_to_run: bool,
    ended: bool,
    end: &'static str,
    /// Which of the hooks fail.
    failing: u8,
}

impl World {
    fn new() -> World {
        World {
            session: TargetSession::new(STATE_BYTES_MAX, true),
            to_target: (FrameEncoder::new(), FrameDecoder::new()),
            to_source: (FrameEncoder::new(), FrameDecoder::new()),
            connected: true,
            frames: 0,
            offered: Vec::new(),
            joined: BTreeMap::new(),
            told: BTreeMap::new(),
            channels: 0,
            kept: 0,
            applied: None,
            checking: None,
            stale: 0,
            answered: false,
            asked: Vec::new(),
            prepared: false,
            loaded: false,
            ran: None,
            discarded: false,
            refused_to_run: false,
            ended: false,
            end: OPEN,
            failing: 0,
        }
    }

    fn turn(&mut self, s: &mut Script<'_>) {
        match s.below(20) {
            0..=3 => self.honest(),
            4 => self.say(&source_frame(s)),
            5 => self.say_raw(s),
            6 => self.offer(ChannelId(s.byte()), Generation(s.u32())),
            7 => self.offer(ChannelId(s.below(4) as u8), Generation(1 + s.below(3) as u32)),
            8 => self.passes(ChannelId(s.below(4) as u8), 1),
            9 => self.flushes(ChannelId(s.below(4) as u8), 1),
            10 => self.passes(ChannelId(s.byte()), s.number()),
            11 => self.flushes(ChannelId(s.byte()), s.number()),
            12 => self.event(lane_failed(ChannelId(s.below(4) as u8))),
            13 => self.answer_check(s.below(3)),
            14 => self.say(&SourceFrame::State { offset: self.kept, bytes: s.bytes().to_vec() }),
            15 => self.say(&SourceFrame::State { offset: 0, bytes: Vec::new() }),
            16 => self.say(&self.last()),
            17 => self.plausible(s),
            18 => self.failing = s.byte(),
            _ => match s.below(10) {
                0 => self.event(TargetEvent::CancelAsked),
                1 => self.event(TargetEvent::QueryAsked),
                2 => self.event(TargetEvent::ControlLost(Failure::Protocol("a damaged frame".to_owned()))),
                3 => {
                    let instance = if s.flag() { InstanceId([4; 16]) } else { INSTANCE };
                    self.event(TargetEvent::ResumeAsked { instance, epoch: Epoch(s.number()) });
                }
                4 => self.event(TargetEvent::Failed(Failure::Worker("a finding of ours".to_owned()))),
                _ => self.say(&SourceFrame::Commit),
            },
        }
    }

    /// Whatever brings the migration on.
    fn honest(&mut self) {
        let first = Generation(1);
        if !self.prepared {
            return self.say(&SourceFrame::Setup(setup()));
        }
        if let Some(channel) = (0..self.channels).map(ChannelId).find(|c| self.session.expects(*c, first)) {
            return self.offer(channel, first);
        }
        if self.checking.is_some() {
            return self.answer_check(0);
        }
        if self.loaded {
            return self.say(&SourceFrame::Commit);
        }
        if self.kept == 0 {
            return self.say(&SourceFrame::State { offset: 0, bytes: vec![7; 3] });
        }
        let rounds = |channel: &ChannelId| self.told.get(channel).map_or(0, |told| told.0);
        match self.joined.keys().copied().find(|channel| rounds(channel) == 0) {
            Some(channel) => self.passes(channel, 1),
            None => self.say(&self.last()),
        }
    }

    /// A Final that fits what has happened.
    fn last(&self) -> SourceFrame {
        SourceFrame::Final(Final {
            round: Round(0),
            epoch: Epoch(0),
            lanes: self.joined.iter().map(|(channel, generation)| (*channel, *generation)).collect(),
            block_digests: vec![1],
            full_digests: Vec::new(),
            state_bytes: self.kept,
            state_crc: 0,
        })
    }

    /// A frame with numbers that may mean something.
    fn plausible(&mut self, s: &mut Script<'_>) {
        let (channel, generation) = (ChannelId(s.below(4) as u8), Generation(1 + s.below(3) as u32));
        let (round, epoch) = (Round(s.below(4) as u32), Epoch(s.below(4) as u64));
        let (session, instance) = (SessionId([0; 16]), InstanceId([0; 16]));
        let frame = match s.below(6) {
            0 => SourceFrame::ChannelLost { channel, generation },
            1 => SourceFrame::ChannelJoin { channel, generation },
            2 => SourceFrame::Repair { round, chunks: vec![(BlockId(0), 0)] },
            3 => SourceFrame::Resume { session, instance, round, epoch },
            4 => SourceFrame::Query { session },
            _ => SourceFrame::Ping { nonce: 1 },
        };
        self.say(&frame);
    }

    fn say(&mut self, frame: &SourceFrame) {
        let mut bytes = Vec::new();
        // What the encoder refuses no decoder would take.
        if self.to_target.0.encode(frame, &mut bytes).is_ok() {
            self.hear(&bytes);
        }
    }

    fn say_raw(&mut self, s: &mut Script<'_>) {
        let frame_type = u16::from(s.byte());
        let bytes = sealed(frame_type, self.frames, s.bytes());
        if self.hear(&bytes) {
            // The encoder's number follows.
            self.to_target.0.encode(&SourceFrame::Commit, &mut Vec::new()).expect("a frame without fields");
        }
    }

    /// Bytes come on the control connection; false if they end it.
    fn hear(&mut self, bytes: &[u8]) -> bool {
        if self.ended || !self.connected {
            return false;
        }
        match self.to_target.1.pull(&mut &bytes[..]) {
            Ok(Some(frame)) => {
                self.frames += 1;
                self.event(TargetEvent::Frame(frame));
                true
            }
            Ok(None) => panic!("a whole frame came"),
            Err(error) => {
                self.event(TargetEvent::Failed(Failure::Protocol(error.to_string())));
                false
            }
        }
    }

    fn offer(&mut self, channel: ChannelId, generation: Generation) {
        self.offered.push((channel, generation));
        self.event(TargetEvent::ChannelConnected { channel, generation });
    }

    fn passes(&mut self, channel: ChannelId, rounds: u64) {
        let (before, epochs) = self.told.get(&channel).copied().unwrap_or_default();
        self.moved(channel, before.saturating_add(rounds), epochs);
    }

    fn flushes(&mut self, channel: ChannelId, epochs: u64) {
        let (rounds, before) = self.told.get(&channel).copied().unwrap_or_default();
        self.moved(channel, rounds, before.saturating_add(epochs));
    }

    /// A lane moves, if there are lanes.
    fn moved(&mut self, channel: ChannelId, rounds: u64, epochs: u64) {
        if !self.joined.contains_key(&channel) {
            return;
        }
        self.told.insert(channel, (rounds, epochs));
        let (rounds, epochs) = (LaneWord::counting(rounds), LaneWord::counting(epochs));
        self.event(TargetEvent::LaneMoved { channel, rounds, epochs });
    }

    fn answer_check(&mut self, how: usize) {
        if self.ended {
            return;
        }
        if self.checking.take().is_some() {
            self.answered = true;
        } else if let Some(stale) = self.stale.checked_sub(1) {
            self.stale = stale;
        } else {
            return;
        }
        self.event(TargetEvent::Checked(match how {
            0 => Check::Agrees,
            1 => Check::Differs { block: BlockId(0), chunk_digests: vec![1, 2] },
            _ => Check::StateDiffers("the device state differs".to_owned()),
        }));
    }

    /// Tells the session, judges what it wants, and lets the VMM answer what it is asked.
    fn event(&mut self, event: TargetEvent) {
        let mut actions = self.session.on(event.clone());
        self.judge(&event, &actions);
        self.answered = false;
        while let Some(asked) = self.asked.pop() {
            let fails = |bit: u8| self.failing & bit != 0;
            let answer = |fails: bool| if fails { Err("the VMM says no".to_owned()) } else { Ok(()) };
            let event = match asked {
                Asked::Prepare if fails(1) => TargetEvent::Refused("the VMM says no".to_owned()),
                Asked::Prepare => TargetEvent::Prepared(INSTANCE),
                Asked::LoadState => TargetEvent::StateLoaded(answer(fails(2))),
                Asked::Run => TargetEvent::RunReturned(answer(fails(4))),
            };
            actions = self.session.on(event.clone());
            self.judge(&event, &actions);
        }
    }

    fn judge(&mut self, event: &TargetEvent, actions: &[TargetAction]) {
        assert!(!self.ended || actions.is_empty(), "after its end: {event:?} -> {actions:?}");
        assert!(actions.len() <= ACTIONS_MAX, "{} actions for {event:?}", actions.len());
        match event {
            TargetEvent::Prepared(_) => self.prepared = true,
            TargetEvent::RunReturned(ran) => self.ran = Some(ran.is_ok()),
            _ => {}
        }
        for action in actions {
            assert!(!self.ended, "its end is the last word: {actions:?}");
            self.judge_one(event, action);
        }
        assert_eq!(self.session.is_ended(), self.ended);
        assert!(!self.session.waits_for().is_empty());
    }

    fn judge_one(&mut self, event: &TargetEvent, action: &TargetAction) {
        match action {
            TargetAction::Send(frame) => self.judge_frame(event, frame),
            TargetAction::Prepare(setup) => {
                assert!(!self.prepared && setup.channels > 0);
                self.channels = setup.channels;
                self.asked.push(Asked::Prepare);
            }
            TargetAction::StartLanes | TargetAction::StartLane { .. } => assert!(self.prepared),
            TargetAction::RetireLane { channel } => {
                self.joined.remove(channel);
                self.told.remove(channel);
                // A Final that it stood in comes to nothing, and so does the check of it.
                self.stale += u32::from(self.checking.take().is_some());
                self.loaded = false;
            }
            TargetAction::DropControl => {
                self.stale += u32::from(self.checking.take().is_some());
                (self.connected, self.loaded) = (false, false);
            }
            TargetAction::TakeVisitor => {
                self.to_target = (FrameEncoder::new(), FrameDecoder::new());
                self.to_source = (FrameEncoder::new(), FrameDecoder::new());
                // What is applied is counted from where the source says.
                (self.connected, self.frames, self.applied) = (true, 0, None);
                assert!(self.joined.is_empty(), "a lane of before may still land: {:?}", self.joined);
            }
            TargetAction::AnswerVisitor(TargetFrame::QueryAnswer { running }) => {
                assert_eq!(*running, self.ran == Some(true));
                self.refused_to_run = !running;
            }
            TargetAction::AnswerVisitor(frame) => assert!(matches!(frame, TargetFrame::Refused { .. }), "{frame:?}"),
            TargetAction::KeepState(bytes) => {
                self.kept += bytes.len() as u64;
                self.loaded = false;
                assert!(self.kept <= STATE_BYTES_MAX, "{} bytes of state are kept", self.kept);
            }
            TargetAction::ForgetState => (self.kept, self.loaded) = (0, false),
            TargetAction::Pong { .. } => {}
            TargetAction::Check(last) => {
                let passed = |channel| self.told.get(channel).map_or(0, |told| told.0);
                let all = last.lanes.iter().all(|(channel, _)| passed(channel) > last.round.0.into());
                assert!(all && !last.lanes.is_empty(), "checked before all has landed: {last:?}, {:?}", self.told);
                assert_eq!(last.state_bytes, self.kept, "all of the state is there");
                self.checking = Some(last.clone());
                self.loaded = false;
            }
            TargetAction::LoadState => {
                assert!(*event == TargetEvent::Checked(Check::Agrees) && self.answered, "{event:?}");
                self.asked.push(Asked::LoadState);
            }
            TargetAction::Run => {
                assert_eq!(*event, TargetEvent::Frame(SourceFrame::Commit));
                assert!(self.loaded && !self.discarded && !self.refused_to_run && self.ran.is_none());
                self.asked.push(Asked::Run);
            }
            TargetAction::Discard => {
                assert!(self.prepared && !self.discarded && self.ran != Some(true), "discarded: {event:?}");
                self.discarded = true;
            }
            TargetAction::End(outcome) => {
                (self.ended, self.end) = (true, outcome.word());
                self.asked.clear();
                assert_eq!(*outcome == Outcome::Completed, self.ran == Some(true), "{outcome}");
                assert!(!matches!(outcome, Outcome::Uncertain(_)), "the target always knows");
                assert!(self.discarded == self.prepared || self.ran == Some(true), "what was prepared is undone");
            }
        }
    }

    fn judge_frame(&mut self, event: &TargetEvent, frame: &TargetFrame) {
        let mut bytes = Vec::new();
        self.to_source.0.encode(frame, &mut bytes).expect("what it says can be sent");
        let heard = self.to_source.1.pull(&mut &bytes[..]).expect("and is understood");
        assert!(heard.is_some());
        match frame {
            TargetFrame::ChannelJoined { channel, generation } => {
                assert!(self.offered.contains(&(*channel, *generation)), "nobody connected channel {channel}");
                self.joined.insert(*channel, *generation);
                self.told.insert(*channel, (0, 0));
            }
            TargetFrame::EpochApplied { epoch, lanes } => {
                assert!(self.applied.is_none_or(|before| before < *epoch), "epoch {epoch} was applied before");
                self.applied = Some(*epoch);
                for (channel, generation) in lanes {
                    assert_eq!(self.joined.get(channel), Some(generation), "channel {channel} is no lane");
                    let flushed = self.told.get(channel).map_or(0, |told| told.1);
                    assert!(flushed > epoch.0, "channel {channel} has not flushed epoch {epoch}");
                }
            }
            TargetFrame::Loaded { .. } => {
                assert_eq!(*event, TargetEvent::StateLoaded(Ok(())));
                self.loaded = true;
            }
            TargetFrame::Running => assert_eq!(*event, TargetEvent::RunReturned(Ok(()))),
            TargetFrame::RunFailed { .. } => assert_eq!(self.ran, Some(false)),
            TargetFrame::Discarded { .. } => {
                assert!(self.ran != Some(true));
                self.refused_to_run = true;
            }
            TargetFrame::QueryAnswer { running } => {
                assert_eq!(*running, self.ran == Some(true));
                self.refused_to_run = !running;
            }
            _ => {}
        }
    }
}

/// The only way in which a lane's end is told.
fn lane_failed(channel: ChannelId) -> TargetEvent {
    TargetEvent::LaneFailed { channel, reason: "reset".to_owned() }
}

fn setup() -> Setup {
    let block = BlockInfo {
        id: BlockId(0),
        name: "ram".to_owned(),
        guest_address: 0,
        bytes: 1 << 20,
        page_size: PageSize::SIZE_4K,
        backing_page_bytes: 4096,
    };
    let blocks = vec![block];
    Setup {
        verify: Verify::Wire,
        channels: 2,
        features: FEATURE_RESUME,
        state_bytes_max: 0,
        blocks,
        opaque: Vec::new(),
    }
}
