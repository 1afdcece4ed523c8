//! What a seed stands for: a guest, a migration, and what happens to its connections. The same seed, the same faults.

use std::fmt;
use std::time::Duration;

use pageferry::Verify;

use crate::stream::Place;
use crate::vmm::mix;

/// A direction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    ToTarget,
    ToSource,
}

/// What a connection is for, by its Hello.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Link {
    Control,
    Data(u8),
}

/// From where bytes are counted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Since {
    /// The start of the connection.
    Start,
    /// The first pause of the guest.
    Pause,
}

/// What happens at a byte.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    /// Both ends are reset.
    Reset,
    /// Both ends are closed, after everything before this byte.
    Close,
    /// This direction is closed, the other goes on.
    HalfClose,
    /// Nothing passes any more, and nobody is told.
    Stall,
    /// Nothing passes for so long.
    Wait(Duration),
    /// Nothing passes until the other connections have carried so many bytes, or for as long as a delay may take.
    LetOthersGo(u64),
    /// So many bytes go on in writes of so many each, with a gap between two.
    Pieces { bytes: u64, each: usize, gap: Duration },
    /// So many bytes go on in writes of at least so many each, where they come in time.
    Gather { bytes: u64, each: usize },
    /// The byte, so many of its kind later, has these bits turned over.
    Flip { place: Place, skip: u64, mask: u8 },
    /// Every connection is reset, and so many that are made next.
    ResetAll { refuse: u32 },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fault {
    pub link: Link,
    /// Which connection of this link, in the order in which they are made; the first is 1.
    pub made: u32,
    pub way: Way,
    pub since: Since,
    pub bytes: u64,
    pub act: Act,
}

/// What a seed does, in one word: expectations and counts go by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Class {
    Clean,
    Delay,
    Trickle,
    SplitAndMerge,
    Reorder,
    ResetData,
    CloseData,
    HalfClose,
    StallData,
    StallControl,
    CutControl,
    DropAtAccept,
    FlipHello,
    FlipHeader,
    FlipTable,
    FlipPayload,
    FlipFrame,
    KillSome,
    KillAll,
    Mixed,
}

pub const CLASSES: [Class; 20] = {
    use Class::*;
    [
        Clean,
        KillSome,
        FlipPayload,
        CutControl,
        Delay,
        ResetData,
        FlipFrame,
        KillAll,
        Trickle,
        HalfClose,
        FlipHeader,
        StallData,
        SplitAndMerge,
        CloseData,
        FlipTable,
        DropAtAccept,
        Reorder,
        StallControl,
        FlipHello,
        Mixed,
    ]
};

/// What a guest is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct GuestPlan {
    pub ram_mib: u64,
    pub writers: usize,
    /// Pages that each of them writes in a millisecond, about.
    pub pages_per_ms: u64,
    /// Pages that are written, from the first on.
    pub hot_pages: u64,
    pub state_bytes: usize,
}

/// A run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub seed: u64,
    pub class: Class,
    pub guest: GuestPlan,
    pub channels: u8,
    pub verify: Verify,
    pub downtime_ms_limit: u64,
    pub rounds_max: u32,
    /// Tries after the first, of a hand-over that takes too long.
    pub retries: u32,
    /// How long nothing may move; the other time limits are in proportion.
    pub stall_ms: u64,
    /// For how long both sides keep a session that has lost all its connections; 0 is not at all.
    pub window_ms: u64,
    pub faults: Vec<Fault>,
    /// Connections that are reset as soon as they are made, by their number.
    pub drops: Vec<u32>,
}

/// Numbers that follow from a seed.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice(mix(seed ^ 0x9e37_79b9_7f4a_7c15))
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0) % end
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// Some of the numbers below `end`, each once.
    pub fn some(&mut self, count: u8, end: u8) -> Vec<u8> {
        let mut all: Vec<u8> = (0..end).collect();
        (0..count).map(|_| all.swap_remove(self.below(all.len() as u64) as usize)).collect()
    }
}

const MIB: u64 = 1 << 20;
/// Long enough for a machine that is busy with several runs.
const STALL_MS: u64 = 2500;
const WINDOW_MS: u64 = 10_000;

impl Plan {
    /// The run of this seed: seeds that follow each other take turns through all classes.
    pub fn of(seed: u64) -> Plan {
        let class = CLASSES[(seed % CLASSES.len() as u64) as usize];
        let mut dice = Dice::new(seed);
        let ram_mib = if dice.chance(8) { 64 } else { dice.pick(&[2, 4, 8, 12]) };
        let channels = match class {
            Class::KillSome => dice.pick(&[2, 3, 4, 8]),
            _ => dice.pick(&[1, 2, 3, 4]),
        };
        let guest = GuestPlan {
            ram_mib,
            writers: dice.pick(&[1, 2]),
            pages_per_ms: dice.pick(&[1, 4, 16]),
            hot_pages: ram_mib * 256 / dice.pick(&[2, 4, 16]),
            state_bytes: dice.pick(&[0, 12, 70_000, 1_500_000]),
        };
        let may_go_unverified = !matches!(class, Class::FlipPayload | Class::Mixed);
        let verify = match dice.below(10) {
            0 if may_go_unverified => Verify::Off,
            7.. if ram_mib < 64 => Verify::Full,
            _ => Verify::Wire,
        };
        let mut plan = Plan {
            seed,
            class,
            guest,
            channels,
            verify,
            downtime_ms_limit: dice.pick(&[5, 30, 300, 2000]),
            rounds_max: dice.pick(&[2, 4, 8]),
            retries: dice.pick(&[0, 0, 2]),
            stall_ms: STALL_MS,
            window_ms: if dice.chance(60) { WINDOW_MS } else { 0 },
            faults: Vec::new(),
            drops: Vec::new(),
        };
        plan.draw(class, &mut dice);
        plan
    }

    /// A run of this class that takes as little as it can.
    pub fn small(class: Class, seed: u64, stall_ms: u64) -> Plan {
        let mut dice = Dice::new(seed ^ (class as u64) << 32);
        let guest = GuestPlan { ram_mib: 1, writers: 1, pages_per_ms: 1, hot_pages: 64, state_bytes: 1000 };
        let mut plan = Plan {
            seed,
            class,
            guest,
            channels: 2,
            verify: Verify::Wire,
            downtime_ms_limit: 300,
            rounds_max: 3,
            retries: 0,
            stall_ms,
            window_ms: 0,
            faults: Vec::new(),
            drops: Vec::new(),
        };
        plan.draw(class, &mut dice);
        plan
    }

    /// The experiment: all channels but one are killed, each somewhere in what it carries, one in three after the pause.
    pub fn kill(seed: u64, ram_mib: u64) -> Plan {
        let mut dice = Dice::new(seed ^ 0x6b69_6c6c);
        let channels = 4;
        let guest = GuestPlan { ram_mib, writers: 2, pages_per_ms: 8, hot_pages: ram_mib * 64, state_bytes: 70_000 };
        let mut plan = Plan {
            seed,
            class: Class::KillSome,
            guest,
            channels,
            verify: if dice.chance(10) { Verify::Full } else { Verify::Wire },
            downtime_ms_limit: 2000,
            rounds_max: dice.pick(&[1, 2, 4]),
            retries: 0,
            stall_ms: STALL_MS,
            window_ms: 0,
            faults: Vec::new(),
            drops: Vec::new(),
        };
        for channel in dice.some(channels - 1, channels) {
            let act = dice.pick(&[Act::Reset, Act::Close]);
            let (since, bytes) = match dice.below(3) {
                0 => (Since::Pause, dice.below(256 << 10)),
                _ => (Since::Start, 64 + dice.below(ram_mib * MIB / u64::from(channels) * 7 / 8)),
            };
            plan.faults.push(Fault { link: Link::Data(channel), made: 1, way: Way::ToTarget, since, bytes, act });
        }
        plan
    }

    fn draw(&mut self, class: Class, dice: &mut Dice) {
        let ms = |ms| Duration::from_millis(ms);
        let channel = Link::Data(dice.below(self.channels.into()) as u8);
        match class {
            Class::Clean => {}
            Class::Delay => {
                for _ in 0..1 + dice.below(3) {
                    let act = Act::Wait(ms(1 + dice.below(150)));
                    let link = self.any_link(dice);
                    self.anywhere(link, act, dice);
                }
            }
            Class::Trickle => {
                let each = dice.pick(&[1, 3, 16, 100]);
                let act = Act::Pieces { bytes: each as u64 * dice.below(200), each, gap: ms(1) };
                let link = self.any_link(dice);
                self.anywhere(link, act, dice);
            }
            Class::SplitAndMerge => {
                for number in 0..=self.channels {
                    let bytes = dice.below(2 * MIB);
                    let act = match dice.below(2) {
                        0 => Act::Pieces { bytes, each: dice.pick(&[61, 700, 4095]), gap: Duration::ZERO },
                        _ => Act::Gather { bytes, each: dice.pick(&[100, 5000, 60_000]) },
                    };
                    let link = number.checked_sub(1).map_or(Link::Control, Link::Data);
                    self.anywhere(link, act, dice);
                }
            }
            Class::Reorder => {
                for _ in 0..1 + dice.below(2) {
                    let act = Act::LetOthersGo(dice.below(4 * MIB));
                    let link = self.any_link(dice);
                    self.anywhere(link, act, dice);
                }
            }
            Class::ResetData => self.anywhere(channel, Act::Reset, dice),
            Class::CloseData => self.anywhere(channel, Act::Close, dice),
            Class::HalfClose => {
                let link = self.any_link(dice);
                self.anywhere(link, Act::HalfClose, dice);
            }
            Class::StallData => self.anywhere(channel, Act::Stall, dice),
            Class::StallControl => self.anywhere(Link::Control, Act::Stall, dice),
            Class::CutControl => {
                let act = dice.pick(&[Act::Reset, Act::Close]);
                self.anywhere(Link::Control, act, dice);
            }
            Class::DropAtAccept => {
                let connection = dice.below(1 + u64::from(self.channels)) as u32;
                self.drops.push(connection);
            }
            Class::FlipHello => {
                let link = self.any_link(dice);
                // A data connection carries nothing towards the source.
                let to_source = link == Link::Control && dice.chance(50);
                let way = if to_source { Way::ToSource } else { Way::ToTarget };
                let act = flip(Place::Hello, 64, dice);
                self.faults.push(Fault { link, made: 1, way, since: Since::Start, bytes: 0, act });
            }
            Class::FlipHeader => self.damage(channel, Place::Header, 64, dice),
            Class::FlipTable => self.damage(channel, Place::Table, 256, dice),
            Class::FlipPayload => self.damage(channel, Place::Payload, 100_000, dice),
            Class::FlipFrame => {
                let act = flip(Place::Frame, 40, dice);
                self.anywhere(Link::Control, act, dice);
            }
            Class::KillSome => {
                let killed = 1 + dice.below(u64::from(self.channels) - 1) as u8;
                for channel in dice.some(killed, self.channels) {
                    let act = dice.pick(&[Act::Reset, Act::Close]);
                    self.anywhere(Link::Data(channel), act, dice);
                    if dice.chance(30) {
                        // Once more, when it has been connected again.
                        let fault = Fault { made: 2, bytes: dice.below(100_000), ..self.faults[self.faults.len() - 1] };
                        self.faults.push(fault);
                    }
                }
            }
            Class::KillAll => {
                let link = self.any_link(dice);
                let act = Act::ResetAll { refuse: dice.below(4) as u32 };
                self.anywhere(link, act, dice);
            }
            Class::Mixed => {
                use Class::{Delay, FlipPayload, KillSome, Reorder, ResetData, SplitAndMerge, Trickle};
                for _ in 0..3 {
                    let more = dice.pick(&[Delay, Trickle, SplitAndMerge, Reorder, FlipPayload, ResetData, KillSome]);
                    if more != KillSome || self.channels > 1 {
                        self.draw(more, dice);
                    }
                }
            }
        }
    }

    fn any_link(&self, dice: &mut Dice) -> Link {
        (dice.below(1 + u64::from(self.channels)) as u8).checked_sub(1).map_or(Link::Control, Link::Data)
    }

    /// Lets something happen at some byte of this link, mostly towards the target, often while the guest is paused.
    fn anywhere(&mut self, link: Link, act: Act, dice: &mut Dice) {
        let share = self.guest.ram_mib * MIB / u64::from(self.channels);
        // A data connection carries nothing towards the source.
        let to_source = link == Link::Control && dice.chance(50);
        let way = if to_source { Way::ToSource } else { Way::ToTarget };
        let since = if dice.chance(35) { Since::Pause } else { Since::Start };
        let bytes = match (link, way, since) {
            (Link::Control, Way::ToTarget, Since::Start) => dice.below(600),
            (Link::Control, Way::ToSource, Since::Start) => dice.below(400),
            (Link::Control, Way::ToTarget, Since::Pause) => dice.below(200 + self.guest.state_bytes as u64),
            (Link::Control, Way::ToSource, Since::Pause) => dice.below(80),
            (Link::Data(_), _, Since::Pause) => dice.below(100_000),
            (Link::Data(_), _, Since::Start) if dice.chance(10) => dice.below(300),
            (Link::Data(_), _, Since::Start) => dice.below(share),
        };
        self.faults.push(Fault { link, made: 1, way, since, bytes, act });
    }

    fn damage(&mut self, channel: Link, place: Place, skip_max: u64, dice: &mut Dice) {
        let act = flip(place, skip_max, dice);
        let since = if dice.chance(35) { Since::Pause } else { Since::Start };
        let bytes = if since == Since::Pause { 0 } else { dice.below(self.guest.ram_mib * MIB / 4) };
        self.faults.push(Fault { link: channel, made: 1, way: Way::ToTarget, since, bytes, act });
    }
}

fn flip(place: Place, skip_max: u64, dice: &mut Dice) -> Act {
    Act::Flip { place, skip: dice.below(skip_max), mask: 1 << dice.below(8) }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let GuestPlan { ram_mib, writers, pages_per_ms, .. } = self.guest;
        write!(f, "{:?}: {ram_mib} MiB, {writers} writers of {pages_per_ms} pages/ms, ", self.class)?;
        write!(f, "{} channels, verify {:?}, ", self.channels, self.verify)?;
        write!(f, "{} ms, {} rounds, window {} ms", self.downtime_ms_limit, self.rounds_max, self.window_ms)?;
        for Fault { link, made, way, since, bytes, act } in &self.faults {
            write!(f, "; {act:?} on {link:?}/{made} {way:?} at {since:?} + {bytes}")?;
        }
        if self.drops.is_empty() { Ok(()) } else { write!(f, "; connections {:?} dropped", self.drops) }
    }
}
