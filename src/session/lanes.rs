#![forbid(unsafe_code)]
//! Which lane is in the set, and how far each has come: the target's list. It follows the source's word.

use crate::barrier::{LaneWord, min_over_set};
use crate::units::{FIRST_GENERATION, ChannelId, Generation};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    /// At first: its connection is to come.
    Expected,
    /// At first: its connection is there, those of others are to come. Then: in the set, even if its lane has failed.
    Live,
    /// Out of the set.
    Down,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Lane {
    link: Link,
    /// Of its latest connection that was in the set, or was given up.
    generation: Generation,
    /// The source has announced this one.
    announced: Option<Generation>,
    /// This one has come.
    here: Option<Generation>,
    rounds: LaneWord,
    epochs: LaneWord,
}

/// What a connection means for its channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Arrival {
    /// It is the channel's first.
    First,
    /// The source has announced it: the lane can join.
    Announced,
    /// The source's word is still to come.
    Early,
}

/// All lanes of the target.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub(super) struct Lanes(Vec<Lane>);

impl Lanes {
    /// So many lanes, none of them connected.
    pub fn expected(channels: u8) -> Lanes {
        let lane = Lane {
            link: Link::Expected,
            generation: FIRST_GENERATION,
            announced: None,
            here: None,
            rounds: LaneWord::default(),
            epochs: LaneWord::default(),
        };
        Lanes(vec![lane; channels.into()])
    }

    /// Whether there are none, and never will be.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a connection of this generation could be the channel's next.
    pub fn expects(&self, channel: ChannelId, generation: Generation) -> bool {
        self.0.get(usize::from(channel.0)).is_some_and(|lane| match lane.link {
            Link::Expected => generation == FIRST_GENERATION,
            // One that comes while another waits to be announced takes its place only if it is newer.
            Link::Down => generation > lane.generation && lane.here.is_none_or(|here| generation > here),
            Link::Live => false,
        })
    }

    /// A connection that was expected is there.
    pub fn arrived(&mut self, channel: ChannelId, generation: Generation) -> Arrival {
        let Some(lane) = self.0.get_mut(usize::from(channel.0)) else { return Arrival::Early };
        if lane.link == Link::Expected {
            lane.link = Link::Live;
            return Arrival::First;
        }
        lane.here = Some(generation);
        if lane.announced == lane.here { Arrival::Announced } else { Arrival::Early }
    }

    /// The source says that the channel is connected again. False if that cannot be.
    pub fn announced(&mut self, channel: ChannelId, generation: Generation) -> bool {
        let Some(lane) = self.0.get_mut(usize::from(channel.0)) else { return false };
        let possible = lane.link == Link::Down && generation > lane.generation && lane.announced.is_none();
        if possible {
            lane.announced = Some(generation);
        }
        possible
    }

    /// Whether the connection that the source has announced is there.
    pub fn is_here(&self, channel: ChannelId) -> bool {
        self.0.get(usize::from(channel.0)).is_some_and(|lane| lane.here.is_some() && lane.here == lane.announced)
    }

    /// The lane of the announced connection is put into the set. It counts as having passed nothing.
    pub fn joined(&mut self, channel: ChannelId) {
        let Some(lane) = self.0.get_mut(usize::from(channel.0)) else { return };
        if let Some(generation) = lane.announced.take() {
            (lane.link, lane.generation, lane.here) = (Link::Live, generation, None);
            (lane.rounds, lane.epochs) = (LaneWord::default(), LaneWord::default());
        }
    }

    /// The source says that a connection is lost: one that is in the set, or was announced. False if there is no such.
    pub fn lost(&mut self, channel: ChannelId, generation: Generation) -> bool {
        let Some(lane) = self.0.get_mut(usize::from(channel.0)) else { return false };
        let in_set = lane.link != Link::Down && lane.generation == generation;
        let announced = lane.link == Link::Down && lane.announced == Some(generation);
        if in_set || announced {
            (lane.link, lane.generation, lane.announced) = (Link::Down, generation, None);
            lane.here = lane.here.filter(|here| *here > generation);
        }
        in_set || announced
    }

    /// Every connection is lost.
    pub fn all_lost(&mut self) {
        for lane in &mut self.0 {
            let newest = lane.here.max(lane.announced).unwrap_or(lane.generation).max(lane.generation);
            (lane.link, lane.generation, lane.announced, lane.here) = (Link::Down, newest, None, None);
        }
    }

    pub fn moved(&mut self, channel: ChannelId, rounds: LaneWord, epochs: LaneWord) {
        if let Some(lane) = self.0.get_mut(usize::from(channel.0)).filter(|lane| lane.link == Link::Live) {
            (lane.rounds, lane.epochs) = (rounds, epochs);
        }
    }

    pub fn generation(&self, channel: ChannelId) -> Generation {
        self.0.get(usize::from(channel.0)).map_or(FIRST_GENERATION, |lane| lane.generation)
    }

    /// The lanes in the set, in order.
    pub fn set(&self) -> impl Iterator<Item = (ChannelId, Generation)> + '_ {
        let live = self.0.iter().enumerate().filter(|(_, lane)| lane.link == Link::Live);
        live.map(|(index, lane)| (ChannelId(index as u8), lane.generation))
    }

    /// Whether no connection is to come any more, and at least one has come.
    pub fn all_are_there(&self) -> bool {
        self.0.iter().all(|lane| lane.link != Link::Expected) && self.set().next().is_some()
    }

    /// Rounds that every lane of the set has passed.
    pub fn passed_by_all(&self) -> u64 {
        self.min(|lane| lane.rounds)
    }

    /// Epochs that every lane of the set has flushed.
    pub fn flushed_by_all(&self) -> u64 {
        self.min(|lane| lane.epochs)
    }

    fn min(&self, of: impl Fn(&Lane) -> LaneWord) -> u64 {
        min_over_set(self.0.iter().filter(|lane| lane.link == Link::Live).map(of)).unwrap_or(0)
    }
}
