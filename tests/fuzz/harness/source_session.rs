//! The source's state machine over a simulated transport: the input is a script of a target's frames, of what the rounds
//! come to, and of what goes wrong. Every frame goes through the encoder and the decoder, both ways.

use std::collections::BTreeSet;

use pageferry::Outcome;
use pageferry::error::Failure;
use pageferry::session::source::{Facts, SourceAction, SourceEvent, SourceSession};
use pageferry::session::{EPOCHS_OUTSTANDING_MAX, FEATURE_RESUME};
use pageferry::units::{BlockId, ChannelId, Epoch, Generation, InstanceId, Item, PageSize, Round, SessionId, Verify};
use pageferry::wire::control::{BlockInfo, FrameDecoder, FrameEncoder, Setup, SourceFrame, TargetFrame};

use super::OPEN;
use super::frames::{sealed, target_frame};
use super::script::Script;

const CHANNELS: u8 = 2;
const INSTANCE: InstanceId = InstanceId([5; 16]);
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
    /// Final was sent, and counts no more: it was withdrawn, or a channel is lost.
    Void,
    Gate,
    Committed,
    /// The control connection is lost.
    Lost,
    /// Resume was sent.
    Resuming,
}

struct World {
    session: SourceSession,
    to_source: (FrameEncoder<TargetFrame>, FrameDecoder<TargetFrame>),
    to_target: (FrameEncoder<SourceFrame>, FrameDecoder<SourceFrame>),
    frames: u32,
    stage: Stage,
    joined: BTreeSet<ChannelId>,
    /// What the target is to be asked for, of a mismatch that it has told.
    damage: bool,
    /// Whether there is a control connection.
    connected: bool,
    /// Rounds whose end was marked, and epochs.
    rounds: u32,
    epochs: u64,
    /// The epoch after the last that the target says is applied.
    applied: u64,
    last: Option<Round>,
    loaded: bool,
    committed: bool,
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
            damage: false,
            connected: true,
            rounds: 0,
            epochs: 0,
            applied: 0,
            last: None,
            loaded: false,
            committed: false,
            ended: false,
            end: OPEN,
        }
    }

    fn turn(&mut self, s: &mut Script<'_>) {
        if self.stage == Stage::Fresh {
            return self.event(SourceEvent::Connected(setup()));
        }
        match s.below(18) {
            0..=3 => self.honest(),
            4 => self.say(&target_frame(s)),
            5 => self.say_raw(s),
            6 => self.round(),
            7 => self.epoch(),
            8 => self.say(&self.applied(s.below(3) as u64)),
            9 => self.overrun(),
            10 => self.plausible(s),
            11 if self.stage == Stage::Gate => self.event(SourceEvent::CommitGranted),
            15 => self.channel(s),
            16 if self.damage => {
                self.damage = false;
                let chunks = s.list(Script::u32);
                self.event(SourceEvent::Damaged { block: BlockId(0), chunks });
            }
            12 => self.say(&TargetFrame::Loaded { round: self.last.unwrap_or(Round(0)) }),
            _ => match s.below(16) {
                0 => self.event(SourceEvent::CancelAsked),
                1 => self.event(SourceEvent::Failed(Failure::Worker("a finding of ours".to_owned()))),
                2 => self.event(SourceEvent::ControlLost(Failure::Protocol("a damaged frame".to_owned()))),
                3 if self.stage == Stage::Lost || self.session.wants_control() => self.reconnect(),
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
                self.say(&TargetFrame::Ready { instance: INSTANCE, features: FEATURE_RESUME });
            }
            Stage::Connecting => {
                if let Some(channel) = missing {
                    self.say(&TargetFrame::ChannelJoined { channel, generation: Generation(1) });
                }
            }
            Stage::Live if self.rounds == 0 => self.round(),
            Stage::Live => self.event(SourceEvent::SwitchOver),
            Stage::Pausing => self.event(SourceEvent::GuestPaused),
            Stage::Paused if self.rounds == 0 || !self.session.channels_are_settled() => self.round(),
            Stage::Paused => self.event(SourceEvent::Drained(Facts::default())),
            Stage::Lost => self.reconnect(),
            Stage::Resuming => self.say(&TargetFrame::Ready { instance: INSTANCE, features: FEATURE_RESUME }),
            Stage::Committed if self.session.wants_control() => self.reconnect(),
            Stage::Void => {}
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
        let voided = self.stage == Stage::Void && !self.session.is_withdrawing();
        if voided || matches!(self.stage, Stage::Paused | Stage::Gate | Stage::FinalSent) {
            self.event(SourceEvent::Overran);
        }
    }

    /// A new control connection: nothing of the old one counts.
    fn reconnect(&mut self) {
        self.to_source = (FrameEncoder::new(), FrameDecoder::new());
        self.to_target = (FrameEncoder::new(), FrameDecoder::new());
        (self.frames, self.connected) = (0, true);
        self.event(SourceEvent::Reconnected(SessionId([9; 16])));
    }

    /// What the channels come to.
    fn channel(&mut self, s: &mut Script<'_>) {
        let channel = ChannelId(s.below(CHANNELS.into()) as u8);
        let (generation, reason) = (self.session.generation(channel), "reset".to_owned());
        match s.below(3) {
            0 => self.event(SourceEvent::ChannelFailed { channel, generation, reason }),
            1 if self.session.is_down(channel) && self.session.wants_channels() => {
                self.event(SourceEvent::ChannelOpened { channel, generation: Generation(generation.0 + 1) });
            }
            _ => self.say(&TargetFrame::ChannelRetired { channel, generation }),
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
        if self.ended || !self.connected {
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
            // What is not applied travels again, in new epochs.
            (SourceEvent::ControlLost(_), _) => self.applied = self.epochs,
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
        self.stage = self.stage_now();
        self.damage &= self.session.waits_for_hook().is_some() && !self.session.is_committed();
        assert_eq!(self.session.is_ended(), self.ended);
        assert_eq!(self.session.round(), Round(self.rounds));
        assert!(self.ended || self.session.is_committed() == self.committed, "{event:?}");
    }

    /// Where the session is, as it says by itself, or as its last actions have said.
    fn stage_now(&self) -> Stage {
        let session = &self.session;
        match self.stage {
            Stage::Committed => Stage::Committed,
            _ if session.wants_control() => Stage::Lost,
            _ if session.awaits_resumed() => Stage::Resuming,
            _ if session.is_paused() => Stage::Paused,
            _ if session.awaits_loaded() => Stage::FinalSent,
            Stage::FinalSent | Stage::Void if session.waits_for_hook().is_some() => Stage::Void,
            Stage::Lost | Stage::Resuming => Stage::Live,
            stage => stage,
        }
    }

    fn judge(&mut self, event: &SourceEvent, action: &SourceAction) {
        match action {
            SourceAction::Send(frame) => self.judge_frame(event, frame),
            SourceAction::Reconnect => self.connected = false,
            SourceAction::FindDamage { .. } => self.damage = true,
            SourceAction::GiveBack { .. } => {
                assert!(matches!(event, SourceEvent::Frame(TargetFrame::ChannelRetired { .. })), "{event:?}");
            }
            SourceAction::StartChannel { channel, .. } => assert!(self.session.is_live(*channel)),
            SourceAction::CloseChannel { channel, .. } | SourceAction::HangUp { channel } => {
                assert!(!self.session.is_live(*channel));
            }
            SourceAction::ShipAgain { .. } => assert!(matches!(event, SourceEvent::Damaged { .. })),
            SourceAction::OpenChannels => assert!(matches!(event, SourceEvent::Frame(TargetFrame::Ready { .. }))),
            SourceAction::StartRounds => {
                // The last that was waited for has joined, or is out.
                let SourceEvent::Frame(TargetFrame::ChannelJoined { .. } | TargetFrame::ChannelRetired { .. }) = event
                else {
                    panic!("{event:?}")
                };
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
            SourceAction::PushMark(Item::Run(_) | Item::Untouched(_)) => panic!("a run is no mark"),
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
            SourceFrame::State { offset: 0, bytes } if bytes.is_empty() => {
                (self.stage, self.loaded) = (Stage::Live, false)
            }
            SourceFrame::Commit => {
                assert_eq!(*event, SourceEvent::CommitGranted);
                assert!(self.loaded && self.stage == Stage::Gate);
                (self.stage, self.committed) = (Stage::Committed, true);
            }
            _ => {}
        }
    }

    /// Who owns the guest is the truth, or `uncertain`.
    fn judge_end(&mut self, event: &SourceEvent, outcome: &Outcome) {
        (self.ended, self.end) = (true, outcome.word());
        let SourceEvent::Frame(frame) = event else {
            let ours = matches!(outcome, Outcome::Failed(_) | Outcome::Cancelled);
            return assert_eq!(ours, !self.committed, "{event:?}: {outcome}");
        };
        let runs = matches!(frame, TargetFrame::Running | TargetFrame::QueryAnswer { running: true });
        let never_runs = matches!(
            frame,
            TargetFrame::RunFailed { .. } | TargetFrame::Discarded { .. } | TargetFrame::QueryAnswer { running: false }
        );
        match outcome {
            Outcome::Completed => assert!(self.committed && runs, "{frame:?}"),
            Outcome::Uncertain(_) => assert!(self.committed),
            Outcome::Failed(_) => assert!(!self.committed || never_runs, "{frame:?}: {outcome}"),
            Outcome::Cancelled => panic!("nobody asked to cancel"),
        }
    }
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
        channels: CHANNELS,
        features: FEATURE_RESUME,
        state_bytes_max: 0,
        blocks,
        opaque: Vec::new(),
    }
}
