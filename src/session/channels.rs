#![forbid(unsafe_code)]
//! Which channel is in the set, about to join it, or on its way out: the source's list. The set is the source's to decide.

use crate::units::{FIRST_GENERATION, ChannelId, Generation};

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Link {
    /// Not connected, or of no use.
    Down,
    /// Connected; the target has not yet said that its lane is in the set.
    Joining,
    /// In the set: it carries pages.
    Live,
    /// Lost; the target has not yet said that its lane is out of the set.
    Lost,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Channel {
    link: Link,
    /// Of its latest connection.
    generation: Generation,
}

/// What to make of a frame that names a channel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    /// It says what was to come.
    Expected,
    /// It crossed our word that the channel is lost.
    TooLate,
    /// No honest target says it.
    Impossible,
}

/// All channels of the source.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Channels(Vec<Channel>);

impl Channels {
    /// So many channels, all of them about to join for the first time.
    pub fn joining(channels: u8) -> Channels {
        Channels(vec![Channel { link: Link::Joining, generation: FIRST_GENERATION }; channels.into()])
    }

    /// The channels in the set, in order.
    pub fn set(&self) -> impl Iterator<Item = (ChannelId, Generation)> + '_ {
        self.that_are(Link::Live)
    }

    /// The channels that are about to join it.
    pub fn joining_now(&self) -> impl Iterator<Item = (ChannelId, Generation)> + '_ {
        self.that_are(Link::Joining)
    }

    /// How many are in the set.
    pub fn live(&self) -> usize {
        self.set().count()
    }

    pub fn is_live(&self, channel: ChannelId) -> bool {
        self.0.get(usize::from(channel.0)).is_some_and(|c| c.link == Link::Live)
    }

    pub fn is_down(&self, channel: ChannelId) -> bool {
        self.0.get(usize::from(channel.0)).is_some_and(|c| c.link == Link::Down)
    }

    pub fn generation(&self, channel: ChannelId) -> Generation {
        self.0.get(usize::from(channel.0)).map_or(FIRST_GENERATION, |c| c.generation)
    }

    /// Whether none is about to join or to leave.
    pub fn are_settled(&self) -> bool {
        self.0.iter().all(|c| matches!(c.link, Link::Live | Link::Down))
    }

    /// Whether the target has still to say of one that it is out of the set.
    pub fn any_is_lost(&self) -> bool {
        self.that_are(Link::Lost).next().is_some()
    }

    /// Whether none is in the set, and none is about to join it.
    pub fn all_lost(&self) -> bool {
        self.0.iter().all(|c| matches!(c.link, Link::Lost | Link::Down))
    }

    /// There is a new connection, of a generation that was not there before.
    pub fn opened(&mut self, channel: ChannelId, generation: Generation) -> bool {
        let Some(c) = self.0.get_mut(usize::from(channel.0)) else { return false };
        let news = c.link == Link::Down && generation > c.generation;
        if news {
            *c = Channel { link: Link::Joining, generation };
        }
        news
    }

    /// A connection was closed before the target was told of it.
    pub fn gone(&mut self, channel: ChannelId) {
        if let Some(c) = self.0.get_mut(usize::from(channel.0)).filter(|c| c.link == Link::Joining) {
            c.link = Link::Down;
        }
    }

    /// Every connection is gone.
    pub fn all_gone(&mut self) {
        self.0.iter_mut().for_each(|c| c.link = Link::Down);
    }

    /// The target says that the channel has joined.
    pub fn joined(&mut self, channel: ChannelId, generation: Generation) -> Fate {
        match self.0.get_mut(usize::from(channel.0)) {
            Some(c) if c.generation == generation && c.link == Link::Joining => {
                c.link = Link::Live;
                Fate::Expected
            }
            Some(c) if c.generation == generation && c.link == Link::Lost => Fate::TooLate,
            _ => Fate::Impossible,
        }
    }

    /// Somebody noticed that this connection is lost. False if it is known already, or if it is not the latest.
    pub fn lose(&mut self, channel: ChannelId, generation: Generation) -> bool {
        match self.0.get_mut(usize::from(channel.0)) {
            Some(c) if c.generation == generation && matches!(c.link, Link::Live | Link::Joining) => {
                c.link = Link::Lost;
                true
            }
            _ => false,
        }
    }

    /// The target says that the channel's lane has ended. False if it was not told to.
    pub fn retired(&mut self, channel: ChannelId, generation: Generation) -> bool {
        match self.0.get_mut(usize::from(channel.0)) {
            Some(c) if c.generation == generation && c.link == Link::Lost => {
                c.link = Link::Down;
                true
            }
            _ => false,
        }
    }

    /// The target names the channel as one of those whose epoch is applied.
    pub fn named(&self, channel: ChannelId, generation: Generation) -> Fate {
        match self.0.get(usize::from(channel.0)) {
            Some(c) if c.generation == generation && c.link == Link::Live => Fate::Expected,
            Some(c) if c.generation == generation && c.link == Link::Lost => Fate::TooLate,
            _ => Fate::Impossible,
        }
    }

    fn that_are(&self, link: Link) -> impl Iterator<Item = (ChannelId, Generation)> + '_ {
        let all = self.0.iter().enumerate();
        all.filter(move |(_, c)| c.link == link).map(|(index, c)| (ChannelId(index as u8), c.generation))
    }
}
