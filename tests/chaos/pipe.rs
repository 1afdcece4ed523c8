//! One direction of a connection through the proxy: what is to come of its bytes, byte by byte.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use crate::plan::{Act, Fault, Link, Since};
use crate::stream::Follower;

/// Bytes that wait in the proxy, at the most.
const BUFFER_BYTES: usize = 64 << 10;
/// The longest that bytes wait for others to go with them, or for others to go first.
const WAIT_MAX: Duration = Duration::from_millis(250);
const GATHER_MAX: Duration = Duration::from_millis(3);

/// What a direction asks of its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Nothing happens before this has something to read or to write.
    GoOn,
    /// Both ends are to be reset.
    Reset,
    /// This fault is to be carried out on more than this direction.
    Wider(Fault),
}

/// How bytes are cut into writes.
#[derive(Clone, Copy, Debug)]
struct Shape {
    /// The most and the least in one write.
    most: usize,
    least: usize,
    gap: Duration,
    /// Where it ends.
    end: u64,
}

#[derive(Debug)]
pub struct Pipe {
    pub link: Link,
    follower: Follower,
    /// Not yet carried out.
    faults: Vec<Fault>,
    /// Bytes that were read, and that were written.
    pub read: u64,
    pub passed: u64,
    buffer: Vec<u8>,
    /// Where the buffer's bytes begin that have not been written.
    begin: usize,
    shape: Option<Shape>,
    held_until: Option<Instant>,
    /// Others are to have carried so many bytes in all.
    held_for: Option<u64>,
    gathered_since: Option<Instant>,
    /// Nothing passes any more.
    pub stalled: bool,
    /// What comes is thrown away.
    discards: bool,
    /// The end of the stream was read, and was passed on.
    ended: bool,
    pub closed: bool,
}

impl Pipe {
    pub fn new(link: Link, faults: Vec<Fault>) -> Pipe {
        Pipe {
            link,
            follower: Follower::new(link == Link::Control),
            faults,
            read: 0,
            passed: 0,
            buffer: Vec::with_capacity(BUFFER_BYTES),
            begin: 0,
            shape: None,
            held_until: None,
            held_for: None,
            gathered_since: None,
            stalled: false,
            discards: false,
            ended: false,
            closed: false,
        }
    }

    pub fn done(&self) -> bool {
        self.closed && (self.ended || self.stalled)
    }

    fn waiting(&self) -> usize {
        self.buffer.len() - self.begin
    }

    pub fn wants_to_read(&self) -> bool {
        !self.ended && !self.stalled && (self.discards || self.waiting() < self.shape.map_or(1, |shape| shape.least))
    }

    /// Whether there is something to write now; else when to ask again.
    pub fn wants_to_write(&mut self, now: Instant, carried: u64) -> Result<(), Option<Instant>> {
        if self.closed || self.stalled || self.discards || (self.waiting() == 0 && !self.ended) {
            return Err(None);
        }
        if self.held_until.is_some_and(|until| now < until) {
            let released = self.held_for.is_some_and(|count| carried >= count);
            if !released {
                return Err(self.held_until);
            }
        }
        (self.held_until, self.held_for) = (None, None);
        if let Some(shape) = self.shape {
            let since = *self.gathered_since.get_or_insert(now);
            if self.waiting() < shape.least && !self.ended && now < since + GATHER_MAX {
                return Err(Some(since + GATHER_MAX));
            }
        }
        Ok(())
    }

    /// From now on bytes are those since the pause, too.
    pub fn pause(&mut self) {
        for fault in self.faults.iter_mut().filter(|fault| fault.since == Since::Pause) {
            (fault.since, fault.bytes) = (Since::Start, fault.bytes + self.read);
        }
    }

    /// Reads what is there, and turns over the bits that are to be; gives the faults that this carried out.
    pub fn receive(&mut self, mut from: &TcpStream) -> (Verdict, Vec<Fault>) {
        let mut fired = Vec::new();
        if self.begin == self.buffer.len() || self.discards {
            (self.begin, self.gathered_since) = (0, None);
            self.buffer.clear();
        }
        let start = self.buffer.len();
        self.buffer.resize(start + BUFFER_BYTES, 0);
        let got = from.read(&mut self.buffer[start..]);
        self.buffer.truncate(start + *got.as_ref().unwrap_or(&0));
        match got {
            Ok(0) => self.ended = true,
            Ok(_) => self.arrive(start, &mut fired),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => return (Verdict::Reset, fired),
        }
        if self.discards && self.ended {
            self.closed = true;
        }
        (Verdict::GoOn, fired)
    }

    /// Takes bytes that were read elsewhere: the Hello.
    pub fn preload(&mut self, bytes: &[u8]) -> Vec<Fault> {
        let mut fired = Vec::new();
        self.buffer.extend_from_slice(bytes);
        self.arrive(0, &mut fired);
        fired
    }

    /// Looks at what arrived, from this place of the buffer on.
    fn arrive(&mut self, start: usize, fired: &mut Vec<Fault>) {
        let mut at = start;
        while at < self.buffer.len() {
            let (place, n) = self.follower.step(&self.buffer[at..]);
            let (begin, end) = (self.read, self.read + n as u64);
            let mut kept = Vec::new();
            for mut fault in self.faults.drain(..) {
                match fault.act {
                    Act::Flip { place: wanted, skip, mask }
                        if wanted == place && fault.since == Since::Start && fault.bytes < end =>
                    {
                        // Bytes of other kinds do not count.
                        let from = fault.bytes.max(begin);
                        let left = end - from;
                        if skip < left {
                            self.buffer[at + (from - begin + skip) as usize] ^= mask;
                            fired.push(fault);
                        } else {
                            (fault.bytes, fault.act) = (end, Act::Flip { place, skip: skip - left, mask });
                            kept.push(fault);
                        }
                    }
                    _ => kept.push(fault),
                }
            }
            self.faults = kept;
            (self.read, at) = (end, at + n);
        }
    }

    /// Writes up to the next byte at which something happens, and lets it happen.
    pub fn send(&mut self, mut to: &TcpStream, carried: u64, now: Instant) -> (Verdict, Vec<Fault>, u64) {
        let mut fired = Vec::new();
        if let Some(verdict) = self.act(to, carried, now, &mut fired) {
            return (verdict, fired, 0);
        }
        if self.stalled || self.discards || self.closed || self.held_until.is_some() {
            return (Verdict::GoOn, fired, 0);
        }
        if self.waiting() == 0 {
            if self.ended {
                let _ = to.shutdown(Shutdown::Write);
                self.closed = true;
            }
            return (Verdict::GoOn, fired, 0);
        }
        let here = self.passed;
        let far = self.next_fault().map_or(u64::MAX, |fault| fault.bytes - here);
        if self.shape.is_some_and(|shape| here >= shape.end) {
            self.shape = None;
        }
        let most = self.shape.map_or(usize::MAX, |shape| shape.most) as u64;
        let n = (self.waiting() as u64).min(far).min(most) as usize;
        let sent = match to.write(&self.buffer[self.begin..self.begin + n]) {
            Ok(sent) => sent,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => 0,
            Err(_) => return (Verdict::Reset, fired, 0),
        };
        (self.begin, self.passed) = (self.begin + sent, self.passed + sent as u64);
        if let Some(shape) = self.shape.filter(|shape| !shape.gap.is_zero()) {
            self.held_until = Some(now + shape.gap);
        }
        let verdict = self.act(to, carried, now, &mut fired).unwrap_or(Verdict::GoOn);
        (verdict, fired, sent as u64)
    }

    /// The next fault that happens as bytes are written.
    fn next_fault(&self) -> Option<Fault> {
        let on_write = |fault: &&Fault| fault.since == Since::Start && !matches!(fault.act, Act::Flip { .. });
        self.faults.iter().filter(on_write).min_by_key(|fault| fault.bytes.max(self.passed)).copied().map(
            |mut fault| {
                fault.bytes = fault.bytes.max(self.passed);
                fault
            },
        )
    }

    /// Carries out what happens at this byte.
    fn act(&mut self, to: &TcpStream, carried: u64, now: Instant, fired: &mut Vec<Fault>) -> Option<Verdict> {
        while let Some(fault) = self.next_fault().filter(|fault| fault.bytes == self.passed) {
            let same = |other: &Fault| other.act == fault.act && other.bytes <= self.passed;
            let place = self.faults.iter().position(same).unwrap();
            self.faults.remove(place);
            fired.push(fault);
            match fault.act {
                Act::Reset => return Some(Verdict::Reset),
                Act::Close | Act::ResetAll { .. } => return Some(Verdict::Wider(fault)),
                Act::HalfClose => {
                    let _ = to.shutdown(Shutdown::Write);
                    self.discard();
                }
                Act::Stall => self.stalled = true,
                Act::Wait(time) => self.held_until = Some(now + time),
                Act::LetOthersGo(bytes) => {
                    (self.held_until, self.held_for) = (Some(now + WAIT_MAX), Some(carried + bytes));
                }
                Act::Pieces { bytes, each, gap } => {
                    self.shape = Some(Shape { most: each, least: 1, gap, end: self.passed + bytes });
                }
                Act::Gather { bytes, each } => {
                    let shape = Shape { most: usize::MAX, least: each, gap: Duration::ZERO, end: self.passed + bytes };
                    self.shape = Some(shape);
                }
                Act::Flip { .. } => unreachable!("bits are turned over as bytes are read"),
            }
        }
        None
    }

    /// From now on what comes is thrown away, until its end.
    pub fn discard(&mut self) {
        (self.discards, self.closed) = (true, self.ended);
    }
}
