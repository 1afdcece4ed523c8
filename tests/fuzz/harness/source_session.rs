//! The source's state machine over a simulated transport: the input is a script of a target's frames, of what the rounds
//! come to, and of what goes wrong. Every frame goes through the encoder and the decoder, both ways.

use std::collections::BTreeSet;

use pageferry::Outcome;
use pageferry::error::Failure;
use pageferry::session::EPOCHS_OUTSTANDING_MAX;
use pageferry::session::source::{Facts, SourceAction, SourceEvent, SourceSession};
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Item, PageSize, Round, Verify};
use pageferry::wire::control::{BlockInfo, FrameDecoder, FrameEncoder, Setup, SourceFrame, TargetFrame};

use super::OPEN;
use super::frames::{sealed, target_frame};
use super::script::Script;

const CHANNELS: u8 = 2;
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

/// How far the driver is: it tells the session only what can happen there.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Stage {
    Fresh,
    Connecting,
    Live,
    Pausing,
    Paused,
    FinalSent,
    Gate,
    Committed,
}

struct World {
    session: SourceSession,
    to_source: (FrameEncoder<TargetFrame>, FrameDecoder<TargetFrame>),
    to_target: (FrameEncoder<SourceFrame>, FrameDecoder<SourceFrame>),
    frames: u32,
    stage: Stage,
    joined: BTreeSet<ChannelId>,
    /// Rounds whose end was marked, and epochs.
    rounds: u32,
    epochs: u64,
    /// The epoch after the last that the target says is applied.
    applied: u64,
    last: Option<Round>,
    loaded: bool,
    ended: bool,
    end: &'static str,
}

impl World {
    fn new() -> World {
        World {
            session: SourceSession::new(CHANNELS),
            to_source: (FrameEncoder::new(), FrameDecoder::new()),
            to_target: (FrameEncoder::new(), FrameDecoder::new()),
            frames: 0,
            stage: Stage::Fresh,
            joined: BTreeSet::new(),
            rounds: 0,
            epochs: 0,
            applied: 0,
            last: None,
            loaded: false,
            ended: false,
            end: OPEN,
        }
    }

    fn turn(&mut self, s: &mut Script<'_>) {
        if self.stage == Stage::Fresh {
            return self.event(SourceEvent::Connected(setup()));
        }
        match s.below(16) {
            0..=3 => self.honest(),
            4 => self.say(&target_frame(s)),
            5 => self.say_raw(s),
            6 => self.round(),
            7 => self.epoch(),
            8 => self.say(&self.applied(s.below(3) as u64)),
            9 => self.overrun(),
            10 => self.plausible(s),
            11 if self.stage == Stage::Gate => self.event(SourceEvent::CommitGranted),
            12 => self.say(&TargetFrame::Loaded { round: self.last.unwrap_or(Round(0)) }),
            _ => match s.below(16) {
                0 => self.event(SourceEvent::CancelAsked),
                1 => self.event(SourceEvent::Failed(Failure::Worker("a finding of ours".to_owned()))),
                2 => self.event(channel_failed(ChannelId(s.below(3) as u8))),
                _ => self.say(&TargetFrame::Pong { nonce: s.number(), lanes: Vec::new() }),
            },
        }
    }

    /// Whatever brings the migration on.
    fn honest(&mut self) {
        let missing = (0..CHANNELS).map(ChannelId).find(|channel| !self.joined.contains(channel));
        match self.stage {
            Stage::Fresh => {}
            Stage::Connecting if !self.session.awaits_lanes() => {
                self.say(&TargetFrame::Ready { instance: InstanceId([5; 16]), features: 0 });
            }
            Stage::Connecting => {
                if let Some(channel) = missing {
                    self.say(&TargetFrame::ChannelJoined { channel, generation: Generation(1) });
                }
            }
            Stage::Live if self.rounds == 0 => self.round(),
            Stage::Live => self.event(SourceEvent::SwitchOver),
            Stage::Pausing => self.event(SourceEvent::GuestPaused),
            Stage::Paused => self.event(SourceEvent::Drained(Facts::default())),
            Stage::FinalSent => self.say(&TargetFrame::Loaded { round: self.last.unwrap_or(Round(0)) }),
            Stage::Gate => self.event(SourceEvent::CommitGranted),
            Stage::Committed => self.say(&TargetFrame::Running),
        }
    }

    fn round(&mut self) {
        if matches!(self.stage, Stage::Live | Stage::Paused) {
            self.event(SourceEvent::RoundPushed);
        }
    }

    fn epoch(&mut self) {
        if matches!(self.stage, Stage::Live | Stage::Paused) {
            self.event(SourceEvent::EpochDue);
        }
    }

    fn overrun(&mut self) {
        let loading = self.stage == Stage::FinalSent && self.session.awaits_loaded();
        if loading || matches!(self.stage, Stage::Paused | Stage::Gate) {
            self.event(SourceEvent::Overran);
        }
    }

    /// The next epoch, or one beside it.
    fn applied(&self, ahead: u64) -> TargetFrame {
        let lanes = self.joined.iter().map(|channel| (*channel, Generation(1))).collect();
        TargetFrame::EpochApplied { epoch: Epoch(self.applied + ahead), lanes }
    }

    /// A frame with numbers that may mean something.
    fn plausible(&mut self, s: &mut Script<'_>) {
        let (channel, generation) = (ChannelId(s.below(3) as u8), Generation(1 + s.below(3) as u32));
        let reason = "the target says so".to_owned();
        let frame = match s.below(9) {
            0 => TargetFrame::ChannelFailed { channel, generation, reason },
            1 => TargetFrame::ChannelRetired { channel, generation },
            2 => TargetFrame::ChannelJoined { channel, generation },
            3 => TargetFrame::DigestMismatch {
                round: self.last.unwrap_or(Round(0)),
                block: BlockId(0),
                chunk_digests: vec![1],
            },
            4 => TargetFrame::Discarded { reason },
            5 => TargetFrame::RunFailed { reason },
            6 => TargetFrame::QueryAnswer { running: s.flag() },
            7 => TargetFrame::Refused { reason },
            _ => TargetFrame::Running,
        };
        self.say(&frame);
    }

    fn say(&mut self, frame: &TargetFrame) {
        let mut bytes = Vec::new();
        // What the encoder refuses no decoder would take.
        if self.to_source.0.encode(frame, &mut bytes).is_ok() {
            self.hear(&bytes);
        }
    }

    fn say_raw(&mut self, s: &mut Script<'_>) {
        let frame_type = 0x80 | u16::from(s.byte());
        let bytes = sealed(frame_type, self.frames, s.bytes());
        if self.hear(&bytes) {
            // The encoder's number follows.
            self.to_source.0.encode(&TargetFrame::Running, &mut Vec::new()).expect("a frame without fields");
        }
    }

    /// Bytes come on the control connection; false if they end it.
    fn hear(&mut self, bytes: &[u8]) -> bool {
        if self.ended {
            return false;
        }
        match self.to_source.1.pull(&mut &bytes[..]) {
            Ok(Some(frame)) => {
                self.frames += 1;
                self.event(SourceEvent::Frame(frame));
                true
            }
            Ok(None) => panic!("a whole frame came"),
            Err(error) => {
                self.event(SourceEvent::Failed(Failure::Protocol(error.to_string())));
                false
            }
        }
    }

    fn event(&mut self, event: SourceEvent) {
        if self.ended {
            assert_eq!(self.session.on(event), [], "after its end");
            return;
        }
        let actions = self.session.on(event.clone());
        assert!(actions.len() <= ACTIONS_MAX, "{} actions for {event:?}", actions.len());
        match (&event, self.stage) {
            (SourceEvent::Connected(_), _) => self.stage = Stage::Connecting,
            (SourceEvent::GuestPaused, _) => self.stage = Stage::Paused,
            (SourceEvent::Overran, Stage::Paused | Stage::Gate) => (self.stage, self.loaded) = (Stage::Live, false),
            (SourceEvent::Frame(TargetFrame::ChannelJoined { channel, .. }), _) => drop(self.joined.insert(*channel)),
            (SourceEvent::Frame(TargetFrame::EpochApplied { epoch, .. }), _) if !self.session.is_ended() => {
                assert!(epoch.0 < self.epochs, "epoch {epoch} is not closed");
                self.applied = epoch.0 + 1;
            }
            _ => {}
        }
        for action in &actions {
            assert!(!self.ended, "its end is the last word: {actions:?}");
            self.judge(&event, action);
        }
        if self.stage == Stage::FinalSent && !self.session.awaits_loaded() && !self.session.is_withdrawing() {
            // An attempt that was withdrawn and answered: rounds go on.
            self.stage = Stage::Live;
        }
        assert_eq!(self.session.is_ended(), self.ended);
        assert_eq!(self.session.round(), Round(self.rounds));
        assert!(self.ended || self.session.is_committed() == (self.stage == Stage::Committed));
    }

    fn judge(&mut self, event: &SourceEvent, action: &SourceAction) {
        match action {
            SourceAction::Send(frame) => self.judge_frame(event, frame),
            SourceAction::OpenChannels => assert!(matches!(event, SourceEvent::Frame(TargetFrame::Ready { .. }))),
            SourceAction::StartRounds => {
                let SourceEvent::Frame(TargetFrame::ChannelJoined { .. }) = event else { panic!("{event:?}") };
                assert!(!self.joined.is_empty());
                self.stage = Stage::Live;
            }
            SourceAction::PushMark(Item::RoundEnd(round)) => {
                assert_eq!(*round, Round(self.rounds));
                self.rounds += 1;
            }
            SourceAction::PushMark(Item::Flush(epoch)) => {
                assert_eq!(*epoch, Epoch(self.epochs));
                self.epochs += 1;
                assert!(self.epochs - self.applied <= EPOCHS_OUTSTANDING_MAX);
            }
            SourceAction::PushMark(Item::Run(_)) => panic!("a run is no mark"),
            SourceAction::FreeJournal { channel, through } => {
                let SourceEvent::Frame(TargetFrame::EpochApplied { epoch, lanes }) = event else { panic!("{event:?}") };
                let named = lanes.iter().any(|(named, _)| named == channel);
                assert!(named && through <= epoch && through.0 < self.epochs, "{channel} through {through}");
            }
            SourceAction::PauseGuest => {
                assert_eq!(*event, SourceEvent::SwitchOver);
                self.stage = Stage::Pausing;
            }
            SourceAction::AskCommit => {
                let Some(round) = self.last else { panic!("before Final") };
                assert_eq!(*event, SourceEvent::Frame(TargetFrame::Loaded { round }));
                (self.stage, self.loaded) = (Stage::Gate, true);
            }
            SourceAction::End(outcome) => self.judge_end(event, outcome),
        }
    }

    fn judge_frame(&mut self, event: &SourceEvent, frame: &SourceFrame) {
        let mut bytes = Vec::new();
        self.to_target.0.encode(frame, &mut bytes).expect("what it says can be sent");
        assert!(self.to_target.1.pull(&mut &bytes[..]).expect("and is understood").is_some());
        match frame {
            SourceFrame::Final(last) => {
                assert!(matches!(event, SourceEvent::Drained(_)) && last.round.0 + 1 == self.rounds);
                (self.stage, self.last, self.loaded) = (Stage::FinalSent, Some(last.round), false);
            }
            SourceFrame::Commit => {
                assert_eq!(*event, SourceEvent::CommitGranted);
                assert!(self.loaded && self.stage == Stage::Gate);
                self.stage = Stage::Committed;
            }
            _ => {}
        }
    }

    /// Who owns the guest is the truth, or `uncertain`.
    fn judge_end(&mut self, event: &SourceEvent, outcome: &Outcome) {
        (self.ended, self.end) = (true, outcome.word());
        let SourceEvent::Frame(frame) = event else {
            let ours = matches!(outcome, Outcome::Failed(_) | Outcome::Cancelled);
            return assert_eq!(ours, self.stage != Stage::Committed, "{event:?}: {outcome}");
        };
        let runs = matches!(frame, TargetFrame::Running | TargetFrame::QueryAnswer { running: true });
        let never_runs = matches!(
            frame,
            TargetFrame::RunFailed { .. } | TargetFrame::Discarded { .. } | TargetFrame::QueryAnswer { running: false }
        );
        match outcome {
            Outcome::Completed => assert!(self.stage == Stage::Committed && runs, "{frame:?}"),
            Outcome::Uncertain(_) => assert_eq!(self.stage, Stage::Committed),
            Outcome::Failed(_) => assert!(self.stage != Stage::Committed || never_runs, "{frame:?}: {outcome}"),
            Outcome::Cancelled => panic!("nobody asked to cancel"),
        }
    }
}

/// The only way in which a worker's end is told.
fn channel_failed(channel: ChannelId) -> SourceEvent {
    SourceEvent::ChannelFailed { channel, generation: Generation(1), reason: "reset".to_owned() }
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
    Setup { verify: Verify::Wire, channels: CHANNELS, features: 0, state_bytes_max: 0, blocks, opaque: Vec::new() }
}
