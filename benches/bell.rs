//! Question: what does it cost to wake an idle worker, and to ring one that is awake?
//!
//! Rivals: for the bell that parks its thread a bare futex word, for the one that sleeps in poll(2) a bare eventfd and
//! poll(2); std's park and unpark with a flag stand beside them. For a ring that wakes nobody: a bare `fetch_or`.
//! Limit: at most 1.2 times the rival's time, each.
//!
//! Ping-pong: two threads on two CPUs wake each other in turns; a hop is half a round trip. Idle: the worker has slept
//! for 200 us when it is rung, which lets its CPU go to sleep, too; its wake-up counts from before the ring until it
//! runs, and beside it stands what the ring took from the one who rang. Both have real-time priority where that is
//! allowed.
// Unsafe because the rivals make their system calls themselves: futex(2), eventfd(2), poll(2).
#![expect(unsafe_code)]

mod support;

use std::hint::black_box;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_utils::CachePadded;
use pageferry::bell::{Bell, Park, Ringer, Sleeper, Wake};
use pageferry::poll::PollSleeper;
use support::{Options, Size, Spread, Verdict, consume, cpus, interleave, run_undisturbed};

/// Of the rival's time, at most.
const LIMIT: f64 = 1.2;

/// How long an idle worker has slept when it is rung.
const IDLE: Duration = Duration::from_micros(200);

/// Something that a thread can sleep in.
trait Sleep {
    type Ring: Ring;
    /// For the calling thread.
    fn here() -> Self;
    fn ringer(&self) -> Self::Ring;
    /// Until somebody rings, or at once if somebody has since the last wait.
    fn wait(&mut self);
}

trait Ring: Send {
    fn ring(&self);
}

/// One word: 1 after a ring. Whoever waits sleeps while it is 0, and whoever rings always calls the kernel.
struct Futex(Arc<AtomicU32>);

fn futex(word: &AtomicU32, operation: libc::c_int, value: u32) {
    // SAFETY: the word outlives the call; without a time-out no other pointer is read.
    unsafe {
        let none = std::ptr::null::<libc::timespec>();
        libc::syscall(libc::SYS_futex, word.as_ptr(), operation | libc::FUTEX_PRIVATE_FLAG, value, none);
    }
}

impl Sleep for Futex {
    type Ring = Arc<AtomicU32>;

    fn here() -> Futex {
        Futex(Arc::default())
    }

    fn ringer(&self) -> Arc<AtomicU32> {
        self.0.clone()
    }

    fn wait(&mut self) {
        while self.0.swap(0, Ordering::Acquire) == 0 {
            futex(&self.0, libc::FUTEX_WAIT, 0);
        }
    }
}

impl Ring for Arc<AtomicU32> {
    fn ring(&self) {
        self.store(1, Ordering::Release);
        futex(self, libc::FUTEX_WAKE, 1);
    }
}

/// What the standard library gives: a flag, and park beside it.
struct StdPark(Arc<AtomicBool>);

impl Sleep for StdPark {
    type Ring = (Arc<AtomicBool>, thread::Thread);

    fn here() -> StdPark {
        StdPark(Arc::default())
    }

    fn ringer(&self) -> Self::Ring {
        (self.0.clone(), thread::current())
    }

    fn wait(&mut self) {
        while !self.0.swap(false, Ordering::Acquire) {
            thread::park();
        }
    }
}

impl Ring for (Arc<AtomicBool>, thread::Thread) {
    fn ring(&self) {
        self.0.store(true, Ordering::Release);
        self.1.unpark();
    }
}

/// An eventfd, and poll(2) to wait for it.
struct EventFd(Arc<OwnedFd>);

impl Sleep for EventFd {
    type Ring = Arc<OwnedFd>;

    fn here() -> EventFd {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        assert!(fd >= 0, "no eventfd");
        // SAFETY: it is new, and nobody else's.
        EventFd(Arc::new(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ringer(&self) -> Arc<OwnedFd> {
        self.0.clone()
    }

    fn wait(&mut self) {
        let mut fd = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut count = 0u64;
        loop {
            // SAFETY: one descriptor, a local.
            unsafe { libc::poll(&raw mut fd, 1, -1) };
            // SAFETY: writes eight bytes to a local.
            let got = unsafe { libc::read(fd.fd, (&raw mut count).cast(), 8) };
            if got == 8 {
                return;
            }
        }
    }
}

impl Ring for Arc<OwnedFd> {
    fn ring(&self) {
        let one = 1u64;
        // SAFETY: reads eight bytes of a local.
        let wrote = unsafe { libc::write(self.as_raw_fd(), (&raw const one).cast(), 8) };
        assert_eq!(wrote, 8, "the count is never full");
    }
}

impl Sleep for Bell<Park> {
    type Ring = Ringer<Park>;

    fn here() -> Self {
        Bell::here()
    }

    fn ringer(&self) -> Ringer<Park> {
        self.ringer()
    }

    fn wait(&mut self) {
        while self.wait() != Wake::Rung {}
    }
}

impl Sleep for Bell<PollSleeper> {
    type Ring = Ringer<PollSleeper>;

    fn here() -> Self {
        PollSleeper::bell().expect("an eventfd")
    }

    fn ringer(&self) -> Ringer<PollSleeper> {
        self.ringer()
    }

    fn wait(&mut self) {
        while self.wait() != Wake::Rung {}
    }
}

impl<S: Sleeper> Ring for Ringer<S>
where
    Ringer<S>: Send,
{
    fn ring(&self) {
        self.ring();
    }
}

/// Runs two threads on CPUs of their own; each gets its sleeper and the other's ringer. What the first one gives.
fn pair<S: Sleep, T: Send>(first: impl FnOnce(S, S::Ring) -> T + Send, second: impl FnOnce(S, S::Ring) + Send) -> T {
    fn meet<S: Sleep>(which: usize, mine: &mpsc::Sender<S::Ring>, other: &mpsc::Receiver<S::Ring>) -> (S, S::Ring) {
        let _pinned = cpus().get(which).copied().is_some_and(core_affinity::set_for_current);
        run_undisturbed();
        let sleep = S::here();
        mine.send(sleep.ringer()).expect("the other thread is there");
        (sleep, other.recv().expect("the other thread is there"))
    }
    let (to_second, from_first) = mpsc::channel();
    let (to_first, from_second) = mpsc::channel();
    thread::scope(|scope| {
        let first = scope.spawn(move || {
            let (sleep, ring) = meet::<S>(0, &to_second, &from_second);
            first(sleep, ring)
        });
        scope.spawn(move || {
            let (sleep, ring) = meet::<S>(1, &to_first, &from_first);
            second(sleep, ring);
        });
        first.join().expect("the first thread does not panic")
    })
}

/// Microseconds of a hop.
fn ping_pong<S: Sleep>(rounds: u32) -> f64 {
    pair::<S, f64>(
        |mut sleep, other| {
            let begun = Instant::now();
            for _ in 0..rounds {
                other.ring();
                sleep.wait();
            }
            begun.elapsed().as_secs_f64() * 1e6 / f64::from(2 * rounds)
        },
        |mut sleep, other| {
            for _ in 0..rounds {
                sleep.wait();
                other.ring();
            }
        },
    )
}

/// Microseconds until an idle worker runs, and of the ring itself: the medians of so many.
fn idle<S: Sleep>(rings: u32) -> (f64, f64) {
    // When the worker ran, in nanoseconds since the beginning; 0 until it has.
    let ran_at = AtomicU64::new(0);
    let epoch = Instant::now();
    let since = |then: Instant| then.duration_since(epoch).as_nanos() as u64;
    let spin_until = |done: &dyn Fn() -> bool| {
        while !done() {
            std::hint::spin_loop();
        }
    };
    let (woken, rung): (Vec<f64>, Vec<f64>) = pair::<S, Vec<(f64, f64)>>(
        |_, worker| {
            let one = |_| {
                let asleep = Instant::now() + IDLE;
                spin_until(&|| Instant::now() >= asleep);
                ran_at.store(0, Ordering::Relaxed);
                let begun = Instant::now();
                worker.ring();
                let rung = begun.elapsed();
                spin_until(&|| ran_at.load(Ordering::Acquire) != 0);
                let woken = ran_at.load(Ordering::Relaxed).saturating_sub(since(begun));
                (woken as f64 / 1e3, rung.as_secs_f64() * 1e6)
            };
            (0..rings).map(one).collect()
        },
        |mut sleep, _| {
            for _ in 0..rings {
                sleep.wait();
                ran_at.store(since(Instant::now()), Ordering::Release);
            }
        },
    )
    .into_iter()
    .unzip();
    (Spread::of(woken).median, Spread::of(rung).median)
}

/// What a worker may sleep in, and its rival among them.
struct Contender {
    name: &'static str,
    ping_pong: fn(u32) -> f64,
    idle: fn(u32) -> (f64, f64),
    rival: usize,
}

fn contender<S: Sleep>(name: &'static str, rival: usize) -> Contender {
    Contender { name, ping_pong: ping_pong::<S>, idle: idle::<S>, rival }
}

/// One table; our bells are the last two.
fn table(title: &str, contenders: &[Contender], values: &[Vec<f64>], verdict: Option<&mut Verdict>) {
    println!("\n{title}");
    let ratio = |which: usize| Spread::of_ratios(&values[which], &values[contenders[which].rival]);
    for (which, Contender { name, rival, .. }) in contenders.iter().enumerate() {
        let time = format!("{:.2}", Spread::of(values[which].iter().copied()));
        println!("  {name:<24}{time:>28} us   {:.2} times {}", ratio(which), contenders[*rival].name);
    }
    let Some(verdict) = verdict else { return };
    for which in [contenders.len() - 2, contenders.len() - 1] {
        let times = ratio(which).median;
        let name = contenders[which].name;
        verdict.limit(times <= LIMIT, || format!("{title}: {name} takes {times:.2} times, at most {LIMIT} wanted"));
    }
}

/// Nanoseconds of one of so many calls.
fn each(calls: u32, mut call: impl FnMut()) -> f64 {
    let begun = Instant::now();
    (0..calls).for_each(|_| call());
    begun.elapsed().as_secs_f64() * 1e9 / f64::from(calls)
}

fn awake(calls: u32, turns: usize, verdict: &mut Verdict) {
    let bell = Bell::here();
    let ringer = bell.ringer();
    let word = CachePadded::new(AtomicU32::new(0));
    let times = interleave(turns, 2, |which| match which {
        0 => each(calls, || consume(black_box(&word).fetch_or(1, Ordering::Release))),
        _ => each(calls, || consume(black_box(&ringer).ring())),
    });
    let ratio = Spread::of_ratios(&times[1], &times[0]);
    println!("\nA ring that wakes nobody");
    println!("  bare fetch_or           {:>28} ns", format!("{:.2}", Spread::of(times[0].iter().copied())));
    println!(
        "  Bell                    {:>28} ns   {ratio:.2} times that",
        format!("{:.2}", Spread::of(times[1].iter().copied()))
    );
    verdict.limit(ratio.median <= LIMIT, || format!("a ring takes {:.2} fetch_or, {LIMIT} wanted", ratio.median));
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if options.size != Size::Smoke && cpus().len() < 2 {
        println!("this machine has one CPU: two threads on two cannot be measured");
        return ExitCode::SUCCESS;
    }
    let contenders = [
        contender::<Futex>("bare futex", 0),
        contender::<EventFd>("bare eventfd and poll", 1),
        contender::<StdPark>("std park and a flag", 0),
        contender::<Bell<Park>>("Bell, parked", 0),
        contender::<Bell<PollSleeper>>("Bell, in poll", 1),
    ];
    let turns = options.pick(1, 21, 61);
    let (rounds, rings) = (options.pick(20, 1000, 2000), options.pick(5, 100, 200));
    let mut verdict = Verdict::default();
    let hops = interleave(turns, contenders.len(), |which| (contenders[which].ping_pong)(rounds));
    table(&format!("Ping-pong, a hop; {turns} turns of {rounds} round trips"), &contenders, &hops, Some(&mut verdict));
    let idle = interleave(turns, contenders.len(), |which| (contenders[which].idle)(rings));
    let part = |of: fn(&(f64, f64)) -> f64| idle.iter().map(|turns| turns.iter().map(of).collect()).collect::<Vec<_>>();
    table(
        &format!("Wake-up of an idle worker; {turns} turns of {rings}"),
        &contenders,
        &part(|t| t.0),
        Some(&mut verdict),
    );
    table("What that takes from the one who rings", &contenders, &part(|t| t.1), None);
    awake(options.pick(1000, 1_000_000, 1_000_000), turns, &mut verdict);
    println!("\nLimit: at most {LIMIT} times the rival's time, each.");
    verdict.finish(&options)
}
