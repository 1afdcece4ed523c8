//! Stands between source and target, knows each connection by its Hello, and does to it what the plan says.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use pageferry::sys::event::{EventFd, PollSet};
use pageferry::wire::hello::{HELLO_BYTES, Hello, HelloRole};

use crate::pipe::{Pipe, Verdict};
use crate::plan::{Act, Fault, Link, Plan, Way};
use crate::vmm;

/// How long what is under way may take after the source has left.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a Hello may take.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// Where the guest stands, as its VMM says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    Running,
    Paused,
    /// It runs at the target, or was resumed after a pause.
    After,
}

const PHASES: [Phase; 3] = [Phase::Running, Phase::Paused, Phase::After];

/// A fault that happened.
#[derive(Clone, Copy, Debug)]
pub struct Fired {
    pub fault: Fault,
    pub phase: Phase,
    /// Bytes that had come to its connection from the source.
    pub carried: u64,
}

/// What a connection was about to do; pairs are to the target and to the source.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code, reason = "is there to be shown")]
struct Seen {
    link: Link,
    made: u32,
    read: [u64; 2],
    passed: [u64; 2],
    stalled: [bool; 2],
}

/// What the proxy shares with the guest's VMM and with whoever waits for it.
#[derive(Debug)]
pub struct Shared {
    plan: Plan,
    phase: AtomicU8,
    ending: AtomicBool,
    /// How often all connections were reset.
    resets: AtomicU64,
    /// How many connections are to be dropped as they are made.
    refuse: AtomicU32,
    /// Bytes carried, by all connections.
    carried: AtomicU64,
    bells: Mutex<Vec<Arc<EventFd>>>,
    /// How often each link has been made.
    made: Mutex<BTreeMap<Link, u32>>,
    fired: Mutex<Vec<Fired>>,
    /// What each connection was seen doing last, for whoever asks why nothing goes on.
    seen: Mutex<BTreeMap<u32, Seen>>,
}

impl Shared {
    /// Says where the guest stands.
    pub fn enter(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Relaxed);
        self.ring();
    }

    pub fn phase(&self) -> Phase {
        PHASES[usize::from(self.phase.load(Ordering::Relaxed))]
    }

    /// Resets every connection that there is, and so many that are made next.
    pub fn reset_all(&self, refuse: u32) {
        self.refuse.fetch_add(refuse, Ordering::Relaxed);
        self.resets.fetch_add(1, Ordering::Relaxed);
        self.ring();
    }

    fn ring(&self) {
        self.bells.lock().unwrap().iter().for_each(|bell| bell.signal());
    }

    pub fn fired(&self) -> Vec<Fired> {
        self.fired.lock().unwrap().clone()
    }

    fn fire(&self, faults: Vec<Fault>, carried: u64) {
        let phase = self.phase();
        self.fired.lock().unwrap().extend(faults.into_iter().map(|fault| Fired { fault, phase, carried }));
    }

    /// What each connection was seen doing last.
    pub fn seen(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|(number, seen)| format!("connection {number}: {seen:?}")).collect()
    }

    /// The faults of a connection: of a link, made so many times, one direction.
    fn faults(&self, link: Link, made: u32, way: Way) -> Vec<Fault> {
        let all = self.plan.faults.iter();
        all.filter(|fault| (fault.link, fault.made, fault.way) == (link, made, way)).copied().collect()
    }

    fn is_dropped(&self, number: u32) -> bool {
        let refused = |left: u32| left.checked_sub(1);
        self.plan.drops.contains(&number)
            || self.refuse.fetch_update(Ordering::Relaxed, Ordering::Relaxed, refused).is_ok()
    }
}

pub struct Proxy {
    address: String,
    pub shared: Arc<Shared>,
    accepting: JoinHandle<Vec<JoinHandle<()>>>,
}

impl Proxy {
    /// A proxy before the target at this address.
    pub fn before(target: &str, plan: &Plan) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let shared = Arc::new(Shared {
            plan: plan.clone(),
            phase: AtomicU8::new(Phase::Running as u8),
            ending: AtomicBool::new(false),
            resets: AtomicU64::new(0),
            refuse: AtomicU32::new(0),
            carried: AtomicU64::new(0),
            bells: Mutex::default(),
            made: Mutex::default(),
            fired: Mutex::default(),
            seen: Mutex::default(),
        });
        let (to, share) = (target.to_owned(), shared.clone());
        let accepting = thread::spawn(move || accept_all(&listener, &to, &share));
        Proxy { address, shared, accepting }
    }

    pub fn address(&self) -> &str {
        &self.address
    }

    /// Call when the source has closed its connections: what is under way is passed on first.
    pub fn end(self) {
        self.shared.ending.store(true, Ordering::Relaxed);
        self.shared.ring();
        // Wakes whoever accepts; and if nobody does any more, nobody has to be woken.
        drop(TcpStream::connect(&self.address));
        self.accepting.join().unwrap().into_iter().for_each(|thread| thread.join().unwrap());
    }
}

fn accept_all(listener: &TcpListener, target: &str, shared: &Arc<Shared>) -> Vec<JoinHandle<()>> {
    let mut threads = Vec::new();
    for number in 0.. {
        let (near, _) = listener.accept().unwrap();
        if shared.ending.load(Ordering::Relaxed) {
            break;
        }
        let (target, shared) = (target.to_owned(), shared.clone());
        threads.push(thread::spawn(move || {
            if shared.is_dropped(number) {
                vmm::reset_on_close(&near);
                return;
            }
            carry(number, near, &target, &shared);
        }));
    }
    threads
}

/// The Hello that a connection begins with, and what it is for.
fn greeting(mut near: &TcpStream) -> Option<([u8; HELLO_BYTES], Link)> {
    let mut hello = [0; HELLO_BYTES];
    near.set_read_timeout(Some(HELLO_TIME)).unwrap();
    near.read_exact(&mut hello).ok()?;
    let link = match Hello::decode(&hello).ok()?.role {
        HelloRole::Control => Link::Control,
        HelloRole::Data(channel) => Link::Data(channel.0),
    };
    Some((hello, link))
}

fn carry(number: u32, near: TcpStream, target: &str, shared: &Shared) {
    let Some((hello, link)) = greeting(&near) else { return };
    let Ok(far) = TcpStream::connect(target) else {
        vmm::reset_on_close(&near);
        return;
    };
    let bell = Arc::new(EventFd::new().unwrap());
    shared.bells.lock().unwrap().push(bell.clone());
    let made = {
        let mut made = shared.made.lock().unwrap();
        let made = made.entry(link).or_insert(0);
        *made += 1;
        *made
    };
    let pipes = [Way::ToTarget, Way::ToSource].map(|way| Pipe::new(link, shared.faults(link, made, way)));
    let resets = shared.resets.load(Ordering::Relaxed);
    let mut connection = Connection { number, near, far, pipes, shared, resets, made };
    for end in [&connection.near, &connection.far] {
        end.set_nodelay(true).unwrap();
        end.set_nonblocking(true).unwrap();
    }
    let fired = connection.pipes[0].preload(&hello);
    connection.fire(fired);
    connection.run(PollSet::new(bell));
}

struct Connection<'a> {
    number: u32,
    near: TcpStream,
    far: TcpStream,
    /// To the target, and to the source.
    pipes: [Pipe; 2],
    shared: &'a Shared,
    /// How often all connections had been reset when this one was made.
    resets: u64,
    made: u32,
}

impl Connection<'_> {
    fn run(&mut self, mut set: PollSet) {
        let mut give_up = None;
        loop {
            if self.shared.ending.load(Ordering::Relaxed) {
                let limit = *give_up.get_or_insert_with(|| Instant::now() + LAST_WORDS);
                if Instant::now() >= limit || self.pipes.iter().any(|pipe| pipe.stalled) {
                    return;
                }
            }
            if self.shared.resets.load(Ordering::Relaxed) != self.resets {
                return self.reset();
            }
            if self.shared.phase() == Phase::Paused {
                self.pipes.iter_mut().for_each(Pipe::pause);
            }
            match self.turn(&mut set, give_up) {
                Verdict::GoOn => {}
                Verdict::Reset => return self.reset(),
                Verdict::Wider(fault) => self.carry_out(fault),
            }
            if self.pipes.iter().all(Pipe::done) {
                return;
            }
        }
    }

    /// Waits until something can be done, and does it.
    fn turn(&mut self, set: &mut PollSet, give_up: Option<Instant>) -> Verdict {
        self.note();
        let (now, carried) = (Instant::now(), self.shared.carried.load(Ordering::Relaxed));
        set.clear();
        if let Some(limit) = give_up {
            set.until(limit);
        }
        let ends = [(&self.near, &self.far), (&self.far, &self.near)];
        let mut places = [(None, None); 2];
        for ((pipe, (from, to)), place) in self.pipes.iter_mut().zip(ends).zip(&mut places) {
            if pipe.wants_to_read() {
                place.0 = Some(set.watch(from.as_fd(), true, false));
            }
            match pipe.wants_to_write(now, carried) {
                Ok(()) => place.1 = Some(set.watch(to.as_fd(), false, true)),
                Err(Some(then)) => set.until(then),
                Err(None) => {}
            }
        }
        set.wait();
        let mut verdict = Verdict::GoOn;
        let mut all_fired = Vec::new();
        for ((pipe, (from, to)), place) in self.pipes.iter_mut().zip(ends).zip(places) {
            if verdict == Verdict::GoOn && place.0.is_some_and(|place| set.ready(place).readable) {
                let (then, fired) = pipe.receive(from);
                all_fired.extend(fired);
                verdict = then;
            }
            if verdict == Verdict::GoOn && place.1.is_some_and(|place| set.ready(place).writable) {
                let (then, fired, bytes) = pipe.send(to, carried, now);
                all_fired.extend(fired);
                verdict = then;
                if self.shared.carried.fetch_add(bytes, Ordering::Relaxed) % (1 << 20) + bytes >= 1 << 20 {
                    // Somebody may wait for others to go first.
                    self.shared.ring();
                }
            }
        }
        self.fire(all_fired);
        verdict
    }

    fn fire(&self, fired: Vec<Fault>) {
        if !fired.is_empty() {
            self.shared.fire(fired, self.pipes[0].read);
        }
    }

    fn reset(&mut self) {
        vmm::reset_on_close(&self.near);
        vmm::reset_on_close(&self.far);
    }

    /// What goes beyond one direction.
    fn carry_out(&mut self, fault: Fault) {
        if let Act::ResetAll { refuse } = fault.act {
            return self.shared.reset_all(refuse);
        }
        // Closed, not reset: whoever has bytes under way to it may still send them.
        for (end, pipe) in [&self.far, &self.near].into_iter().zip(&mut self.pipes) {
            let _ = end.shutdown(Shutdown::Write);
            pipe.discard();
        }
    }

    /// Leaves word of what it is about to do.
    fn note(&self) {
        let each = |of: fn(&Pipe) -> u64| [of(&self.pipes[0]), of(&self.pipes[1])];
        let (read, passed) = (each(|pipe| pipe.read), each(|pipe| pipe.passed));
        let stalled = [self.pipes[0].stalled, self.pipes[1].stalled];
        let seen = Seen { link: self.pipes[0].link, made: self.made, read, passed, stalled };
        self.shared.seen.lock().unwrap().insert(self.number, seen);
    }
}
