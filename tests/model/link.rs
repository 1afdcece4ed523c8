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
    /// Something that was sent was lost on the way.
    lost: bool,
}

impl<T> Default for Pipe<T> {
    fn default() -> Self {
        Pipe { queue: VecDeque::new(), closed: false, deaf: false, lost: false }
    }
}

impl<T> Pipe<T> {
    /// Sends without a word: whoever sends into a broken connection learns of it when it next reads, or when
    /// [`Pipe::takes`] is asked.
    pub fn send(&mut self, item: T) {
        if self.takes() {
            self.queue.push_back(item);
        } else {
            self.lost = true;
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
        self.lost |= !self.queue.is_empty();
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
        self.lost = true;
    }

    pub fn has_lost(&self) -> bool {
        self.lost
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
}

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
