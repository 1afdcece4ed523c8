//! The hand-over, harmed at every message of it and inside each: never two guests, and no report that is not true.
#![cfg(all(not(loom), feature = "cli"))]

#[path = "hand_over/fence.rs"]
mod fence;
#[path = "hand_over/part.rs"]
mod part;
#[path = "hand_over/play.rs"]
mod play;
#[path = "support/program.rs"]
mod program;
#[path = "hand_over/proxy.rs"]
mod proxy;
#[path = "support/vmm.rs"]
mod vmm;
#[path = "hand_over/witness.rs"]
mod witness;

use std::collections::BTreeMap;
use std::sync::Mutex;

use pageferry::units::{Epoch, Round};
use pageferry::wire::control::{Final, FrameEncoder, SourceFrame, TargetFrame};
use play::{Cast, play};
use proxy::{HEARD, Harm, Message, Place, Way};

/// The test that a process of this program runs in order to be one of the sides.
const PLAYER: &str = "undisturbed_it_moves_the_guest_once_and_both_sides_say_so";

/// Migrations at the same time: each has several processes, which wait for each other most of the time; and for time
/// limits, where a connection stalls.
const AT_ONCE: usize = 8;
const STALLED_AT_ONCE: usize = 24;

/// How often a place is tried that does not come.
const TRIES: u32 = 5;

#[test]
fn undisturbed_it_moves_the_guest_once_and_both_sides_say_so() {
    if let Ok(part) = std::env::var(part::PART) {
        part::play(&part);
    }
    for cast in [Cast::Guests, Cast::Program] {
        let scene = play(cast, None);
        scene.check(cast);
        assert_eq!((scene.source.outcome(), scene.target.outcome()), (Some("completed"), Some("completed")));
    }
}

fn kind(way: Way, bytes: &[u8]) -> (Way, u16) {
    (way, u16::from_le_bytes([bytes[0], bytes[1]]))
}

/// The numbers of the messages around the point of no return.
struct Kinds {
    last: (Way, u16),
    loaded: (Way, u16),
    commit: (Way, u16),
    running: (Way, u16),
    periodic: [(Way, u16); 2],
}

impl Kinds {
    fn new() -> Kinds {
        let to_target = |frame| {
            let mut bytes = Vec::new();
            FrameEncoder::new().encode(&frame, &mut bytes).unwrap();
            kind(Way::ToTarget, &bytes)
        };
        let to_source = |frame| {
            let mut bytes = Vec::new();
            FrameEncoder::new().encode(&frame, &mut bytes).unwrap();
            kind(Way::ToSource, &bytes)
        };
        let nothing = Final {
            round: Round(0),
            epoch: Epoch(0),
            lanes: Vec::new(),
            block_digests: Vec::new(),
            full_digests: Vec::new(),
            state_bytes: 0,
            state_crc: 0,
        };
        Kinds {
            last: to_target(SourceFrame::Final(nothing)),
            loaded: to_source(TargetFrame::Loaded { round: Round(0) }),
            commit: to_target(SourceFrame::Commit),
            running: to_source(TargetFrame::Running),
            periodic: [
                to_target(SourceFrame::Ping { nonce: 1 }),
                to_source(TargetFrame::Pong { nonce: 1, lanes: Vec::new() }),
            ],
        }
    }

    /// Whether Commit may have left the source by then.
    fn after_commit(&self, place: Place, length: usize) -> bool {
        let kind = (place.message.way, place.message.kind);
        let answered = kind == self.loaded && place.offset == length;
        answered || kind == self.commit || kind == self.running || kind.1 == HEARD || self.periodic.contains(&kind)
    }
}

/// How many bytes of a message are let through: none, all, and some; of those that decide who owns the guest each number.
fn offsets(kinds: &Kinds, message: Message, length: usize) -> Vec<usize> {
    let kind = (message.way, message.kind);
    if [kinds.loaded, kinds.commit, kinds.running].contains(&kind) {
        return (0..=length).collect();
    }
    let mut some = vec![0, 1, 15, 16, length - 1, length];
    some.retain(|offset| *offset <= length);
    some.dedup();
    some
}

/// Harms it at every place of every message that passes when nobody does.
fn sweep(cast: Cast, harms: &[Harm]) {
    let clean = play(cast, None);
    let kinds = Kinds::new();
    let mut plays = Vec::new();
    for (message, length) in &clean.seen.passed {
        for offset in offsets(&kinds, *message, *length) {
            plays.extend(harms.iter().map(|harm| (Place { message: *message, offset }, *length, *harm)));
        }
    }
    let names: Vec<_> = clean.seen.passed.iter().map(|(m, length)| (m.way, m.kind, m.turn, *length)).collect();
    println!("{} messages, {} plays: {names:?}", names.len(), plays.len());
    let total = plays.len();
    let (queue, ends) = (Mutex::new(plays.into_iter()), Mutex::new(BTreeMap::<_, u32>::new()));
    let at_once = if harms == [Harm::Stall] { STALLED_AT_ONCE } else { AT_ONCE };
    std::thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let Some((place, length, harm)) = queue.lock().unwrap().next() else { return };
                    let words = (0..TRIES).find_map(|_| judge(&kinds, cast, place, length, harm));
                    let words = words.unwrap_or_else(|| panic!("{harm:?} at {place:?} never came"));
                    *ends.lock().unwrap().entry(words).or_default() += 1;
                }
            });
        }
    });
    let ends = ends.into_inner().unwrap();
    println!("{cast:?}: {total} places: {ends:#?}");
}

/// Plays one and checks it; gives how it ended, in words. `None` if it ended, truthfully, before that place came: on a busy
/// machine a time limit may be over first.
fn judge(kinds: &Kinds, cast: Cast, place: Place, length: usize, harm: Harm) -> Option<String> {
    let scene = play(cast, Some((place, harm)));
    let what = format!("{harm:?} at {place:?}");
    println!("{what}: {:?} and {:?}", scene.source, scene.target);
    scene.check(cast);
    if !scene.seen.harmed {
        // One Ping more or less; and a target that was dismissed does not wait for the source's courtesy.
        let kind = (place.message.way, place.message.kind);
        let may_lack = kinds.periodic.contains(&kind) || kind.1 == HEARD;
        return may_lack.then(|| format!("{harm:?}: a message that was not there"));
    }
    if scene.source.outcome() == Some("uncertain") {
        assert!(kinds.after_commit(place, length), "{what}: in doubt too soon: {scene:?}");
    }
    let word = |outcome: Option<&str>| outcome.unwrap_or("killed").to_owned();
    Some(format!("{harm:?}: {} and {}", word(scene.source.outcome()), word(scene.target.outcome())))
}

#[test]
fn guests_survive_every_cut_of_the_control_connection() {
    sweep(Cast::Guests, &[Harm::Reset, Harm::Close]);
}

#[test]
fn guests_survive_a_control_connection_that_stalls_anywhere() {
    sweep(Cast::Guests, &[Harm::Stall]);
}

#[test]
fn guests_survive_the_death_of_either_side() {
    sweep(Cast::Guests, &[Harm::KillSource, Harm::KillTarget]);
}

#[test]
fn the_program_tells_the_truth_by_code_and_report_wherever_it_is_cut_or_killed() {
    sweep(Cast::Program, &[Harm::Reset, Harm::Close, Harm::KillSource, Harm::KillTarget]);
}
