//! What lies between the two processes: queues that can break, and then give a part of what was in them, or nothing.

use std::collections::VecDeque;

use pageferry::units::{Epoch, Round};
use pageferry::wire::control::{SourceFrame, TargetFrame};

/// One direction of a connection.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Pipe<T> {
    queue: VecDeque<T>,
    /// Nothing more comes in: the writer has left, or the connection was cut.
    closed: bool,
    /// Nobody takes anything out any more.
    deaf: bool,
}

impl<T> Default for Pipe<T> {
    fn default() -> Self {
        Pipe { queue: VecDeque::new(), closed: false, deaf: false }
    }
}

impl<T> Pipe<T> {
    /// Sends without a word: whoever sends into a broken connection learns of it when it next reads, or when
    /// [`Pipe::takes`] is asked.
    pub fn send(&mut self, item: T) {
        if self.takes() {
            self.queue.push_back(item);
        }
    }

    /// Whether a send would go through.
    pub fn takes(&self) -> bool {
        !self.closed && !self.deaf
    }

    pub fn receive(&mut self) -> Option<T> {
        self.queue.pop_front()
    }

    pub fn items(&self) -> &VecDeque<T> {
        &self.queue
    }

    /// What the reader finds next.
    pub fn next(&self) -> Option<&T> {
        self.queue.front()
    }

    /// What arrives next is not what was sent.
    pub fn replace_next(&mut self, item: T) {
        if let Some(next) = self.queue.front_mut() {
            *next = item;
        }
    }

    /// Whether the reader has left.
    pub fn is_deaf(&self) -> bool {
        self.deaf
    }

    /// Whether a reader finds the end of the stream.
    pub fn at_end(&self) -> bool {
        self.closed && self.queue.is_empty()
    }

    /// The writer leaves, or the connection is cut. What is on its way may still arrive.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// The reader leaves: what is on its way arrives nowhere.
    pub fn deafen(&mut self) {
        self.queue.clear();
        self.deaf = true;
    }

    /// Whether what is on its way may be lost: never while the connection stands.
    pub fn may_lose(&self) -> bool {
        self.closed && !self.queue.is_empty()
    }

    /// Loses all that has not arrived. As it can come after any delivery, every beginning of the stream may arrive.
    pub fn lose(&mut self) {
        self.queue.clear();
    }
}

/// The control connection.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Control {
    pub to_target: Pipe<SourceFrame>,
    pub to_source: Pipe<TargetFrame>,
}

impl Control {
    pub fn cut(&mut self) {
        self.to_target.close();
        self.to_source.close();
    }

    pub fn is_cut(&self) -> bool {
        !self.to_target.takes() || !self.to_source.takes()
    }

    /// The source leaves it.
    pub fn source_leaves(&mut self) {
        self.to_target.close();
        self.to_source.deafen();
    }

    /// The target leaves it.
    pub fn target_leaves(&mut self) {
        self.to_source.close();
        self.to_target.deafen();
    }
}

/// The latest connection of a data channel. One before it has ended at the target: a channel is connected again only when
/// its lane was retired.
#[derive(Clone, PartialEq, Eq, Hash, Debug, Default)]
pub struct Wire {
    pub generation: u32,
    pub pipe: Pipe<Packet>,
}

/// A page of which a part has landed, and then its channel died.
pub const TORN: u8 = 255;
/// A page that was damaged on its way.
pub const DAMAGED: u8 = 254;

/// What a data channel carries. Its round is that of the marks before it: packets of any other round are refused.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Packet {
    /// A page, as it was when the worker read it.
    Page {
        page: usize,
        version: u8,
    },
    RoundEnd(Round),
    Flush(Epoch),
}
