//! Losses that come at the worst moment: on top of each other, behind Final, while nobody looks.
#![cfg(not(loom))]
// UNSAFETY: clock_gettime(2) of another thread is a C call.
#![expect(unsafe_code)]
#![expect(clippy::unnecessary_safety_comment, reason = "takes the UNSAFETY line of a crate root for one")]
#![allow(dead_code)]

#[path = "support/peer.rs"]
mod peer;
#[path = "support/vmm.rs"]
mod vmm;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::precopy::Overrun;
use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Outcome, Ram, Source, Target, Timeouts, Verify};
use vmm::{TestGuest, TestIncoming};

const MIB: u64 = 1 << 20;
const MS: Duration = Duration::from_millis(1);

fn timeouts() -> Timeouts {
    let ms = Duration::from_millis;
    Timeouts { connect: ms(2000), hello: ms(1000), silence: ms(5000), hook: ms(5000), stall: ms(4000) }
}

/// A proxy that can be told to do harm.
#[derive(Clone, Default)]
struct Net(Arc<State>);

#[derive(Default)]
struct State {
    open: Mutex<Vec<(usize, TcpStream, TcpStream)>>,
    /// What the target says on the control connection is not passed on.
    hold: AtomicBool,
    refuse: AtomicBool,
    /// The connection with this number is accepted, and nothing of it is passed on; 0: none.
    mute: AtomicU64,
    passed: AtomicU64,
    slow_us: AtomicU64,
}

impl Net {
    fn before(&self, target: String) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let net = self.clone();
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            for (number, near) in listener.incoming().enumerate() {
                let near = near.unwrap();
                if number > 0 && net.0.refuse.load(Relaxed) {
                    continue;
                }
                if number > 0 && number as u64 == net.0.mute.load(Relaxed) {
                    kept.push(near);
                    continue;
                }
                let Ok(far) = TcpStream::connect(&target) else { continue };
                near.set_nodelay(true).unwrap();
                far.set_nodelay(true).unwrap();
                net.0.open.lock().unwrap().push((number, near.try_clone().unwrap(), far.try_clone().unwrap()));
                let (back_from, back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let (a, b) = (net.clone(), net.clone());
                std::thread::spawn(move || a.pump(near, far, number, true));
                std::thread::spawn(move || b.pump(back_from, back_to, number, false));
            }
        });
        address
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, number: usize, there: bool) {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            while !there && number == 0 && self.0.hold.load(Relaxed) {
                vmm::wait(MS);
            }
            if there && number > 0 {
                vmm::wait(Duration::from_micros(self.0.slow_us.load(Relaxed)));
                self.0.passed.fetch_add(n as u64, Relaxed);
            }
            if to.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    }

    fn cut(&self, which: impl Fn(usize) -> bool) {
        self.0.open.lock().unwrap().retain(|(number, near, far)| {
            if which(*number) {
                let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
            }
            !which(*number)
        });
    }

    fn wait_for(&self, bytes: u64) {
        while self.0.passed.load(Relaxed) < bytes {
            vmm::wait(MS);
        }
    }
}

fn ram(mib: u64) -> Ram {
    let ram = vmm::ram(PageSize::SIZE_4K, &[mib << 8]);
    vmm::fill(&ram, 1);
    ram
}

fn guest_of(ram: &Ram) -> TestGuest {
    TestGuest::new(ram, &DirtyBitmap::for_ram(ram))
}

/// A channel is closed and not yet retired when the control connection goes, too.
#[test]
fn what_a_closed_channel_held_survives_the_loss_of_everything() {
    lose_a_channel_and_then_everything(Verify::Off);
}

/// The same: what was queued and never sent, no digest knows of.
#[test]
fn what_a_closed_channel_had_queued_is_not_verified_away() {
    lose_a_channel_and_then_everything(Verify::Wire);
}

fn lose_a_channel_and_then_everything(verify: Verify) {
    let ram = ram(64);
    let mut guest = guest_of(&ram);
    let window = Duration::from_secs(5);
    let target = Target::builder().timeouts(timeouts()).resume_window(window).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    net.0.slow_us.store(2000, Relaxed);
    let address = net.before(target.address().unwrap().to_string());
    let builder = Source::builder(ram).channels(2).verify(verify).timeouts(timeouts()).resume_window(window);
    let source = builder.connect(&address).unwrap();
    let villain = std::thread::spawn({
        let net = net.clone();
        move || {
            net.wait_for(8 * MIB);
            net.0.hold.store(true, Relaxed);
            net.cut(|number| number == 1);
            vmm::wait(300 * MS);
            net.cut(|_| true);
            net.0.hold.store(false, Relaxed);
            net.0.slow_us.store(0, Relaxed);
        }
    });
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, TestIncoming::new());
    villain.join().unwrap();
    println!("{:?}", trip.sent);
    assert_eq!(trip.sent.outcome, Outcome::Completed, "{:?}", trip.sent.remarks);
    assert_eq!(trip.sent.resumes, 1);
    assert_eq!(vmm::first_difference(&guest.ram, trip.incoming.ram.as_ref().unwrap()), None, "pages were lost");
}

/// One of two data connections is never heard: it costs itself.
#[test]
fn a_first_connection_that_is_never_heard_costs_only_itself() {
    let ram = ram(8);
    let mut guest = guest_of(&ram);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    net.0.mute.store(2, Relaxed);
    let address = net.before(target.address().unwrap().to_string());
    let source = Source::builder(ram).channels(2).timeouts(timeouts()).connect(&address).unwrap();
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, TestIncoming::new());
    println!("{:?}", trip.sent);
    vmm::assert_arrived(&guest, &trip);
    assert_eq!(trip.sent.channels_lost, 1, "{:?}", trip.sent.remarks);
}

/// Of one thread, to 10 ms.
fn cpu_time(thread: libc::pid_t) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/self/task/{thread}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
    Duration::from_millis(ticks * 10)
}

/// While a lost channel is not yet retired, the control thread sleeps.
#[test]
fn nobody_spins_while_a_lost_channel_is_not_yet_retired() {
    let ram = ram(64);
    // Longer than the target's word is held back.
    let patient = Timeouts { hello: 5000 * MS, ..timeouts() };
    let mut guest = guest_of(&ram);
    let target = Target::builder().timeouts(patient).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    let address = net.before(target.address().unwrap().to_string());
    let builder = Source::builder(ram).channels(2).timeouts(patient).bandwidth_max(8 * MIB);
    let source = builder.connect(&address).unwrap();
    // SAFETY: takes nothing, gives a number.
    let migrating = unsafe { libc::gettid() };
    let used = std::thread::spawn({
        let net = net.clone();
        move || {
            net.wait_for(4 * MIB);
            let before = cpu_time(migrating);
            vmm::wait(1000 * MS);
            let quiet = cpu_time(migrating) - before;
            net.0.hold.store(true, Relaxed);
            net.cut(|number| number == 1);
            vmm::wait(100 * MS);
            let before = cpu_time(migrating);
            vmm::wait(1000 * MS);
            let used = cpu_time(migrating) - before;
            net.0.hold.store(false, Relaxed);
            (quiet, used)
        }
    });
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, TestIncoming::new());
    vmm::assert_arrived(&guest, &trip);
    let (quiet, used) = used.join().unwrap();
    println!("CPU time in a second: {quiet:?} before, {used:?} while a channel waits to be retired");
    assert!(used < quiet + 100 * MS, "{used:?}, {quiet:?} before");
}

/// The guest is not paused while the only channel is down, and what it held is to be sent again.
#[test]
fn the_guest_is_not_paused_while_no_channel_is_left() {
    let ram = ram(32);
    let mut guest = guest_of(&ram);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    net.0.slow_us.store(1000, Relaxed);
    let address = net.before(target.address().unwrap().to_string());
    let builder = Source::builder(ram).channels(1).timeouts(timeouts()).downtime_limit(20 * MS);
    let source = builder.connect(&address).unwrap();
    let villain = std::thread::spawn({
        let net = net.clone();
        move || {
            net.wait_for(28 * MIB);
            net.0.refuse.store(true, Relaxed);
            net.cut(|number| number == 1);
            vmm::wait(1000 * MS);
            net.0.refuse.store(false, Relaxed);
        }
    });
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, TestIncoming::new());
    villain.join().unwrap();
    vmm::assert_arrived(&guest, &trip);
    println!("downtime {:?}, expected {:?}, {:?}", trip.sent.downtime, trip.sent.downtime_expected, trip.sent.remarks);
    assert!(trip.sent.downtime < 500 * MS, "{:?} where 20 ms were allowed", trip.sent.downtime);
}

/// Everything is lost while the answer to a Final that was withdrawn is waited for.
#[test]
fn everything_dies_behind_an_overrun_and_the_session_is_taken_up_again() {
    let ram = ram(16);
    let mut guest = guest_of(&ram);
    let window = Duration::from_secs(5);
    let target = Target::builder().timeouts(timeouts()).resume_window(window).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    let address = net.before(target.address().unwrap().to_string());
    let builder = Source::builder(ram).channels(2).timeouts(timeouts()).resume_window(window);
    let builder = builder.downtime_limit(150 * MS).overrun(Overrun::Retry { tries: 3 });
    let source = builder.connect(&address).unwrap();
    let mut incoming = TestIncoming::new();
    let mut first = true;
    incoming.on_load = Some(Box::new({
        let net = net.clone();
        move || {
            if std::mem::take(&mut first) {
                vmm::wait(600 * MS);
                net.cut(|_| true);
            }
        }
    }));
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, incoming);
    println!("{:?}", trip.sent);
    assert_eq!(trip.sent.outcome, Outcome::Completed, "{:?}; target {:?}", trip.sent.remarks, trip.received.outcome);
    assert_eq!(trip.sent.resumes, 1);
}

/// All lanes fail while the source hashes all of RAM for Final; their network is back before the stall limit.
#[test]
fn channels_die_while_all_of_ram_is_hashed() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[32 << 8]);
    let mut guest = guest_of(&ram);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    let address = net.before(target.address().unwrap().to_string());
    let builder = Source::builder(ram).channels(2).timeouts(timeouts()).verify(Verify::Full);
    let source = builder.downtime_limit(2000 * MS).connect(&address).unwrap();
    guest.on_save = Some(Box::new({
        let net = net.clone();
        move |_, _| {
            let net = net.clone();
            std::thread::spawn(move || {
                vmm::wait(20 * MS);
                net.0.refuse.store(true, Relaxed);
                net.cut(|number| number > 0);
                vmm::wait(2500 * MS);
                net.0.refuse.store(false, Relaxed);
            });
        }
    }));
    let begun = Instant::now();
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, TestIncoming::new());
    println!("{:?} {:?}", begun.elapsed(), trip.sent);
    vmm::assert_arrived(&guest, &trip);
}

/// After Loaded a channel is lost, and what comes back takes a while: the source is heard all the time.
#[test]
fn a_target_whose_load_came_to_nothing_does_not_wait_for_commit() {
    use pageferry::units::ChannelId;
    use pageferry::wire::control::{SourceFrame, TargetFrame};
    let limits = Timeouts { silence: 500 * MS, ..timeouts() };
    let target = Target::builder().timeouts(limits).listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()));
    let mut source = peer::FakeSource::loaded(&address);
    let (channel, generation) = (ChannelId(0), peer::FIRST);
    source.control.send(&SourceFrame::ChannelLost { channel, generation });
    assert_eq!(source.next(), Some(TargetFrame::ChannelRetired { channel, generation }));
    for nonce in 1..=15 {
        vmm::wait(100 * MS);
        source.control.send(&SourceFrame::Ping { nonce });
    }
    source.control.send(&SourceFrame::Cancel { reason: "enough".to_owned() });
    let frames = source.until_closed();
    let report = receiving.join().unwrap();
    assert!(report.outcome.to_string().contains("enough"), "{}: {frames:?}", report.outcome);
}

/// A channel is lost behind Final: the limit on the pause still holds.
#[test]
fn the_limit_on_the_pause_holds_when_a_final_came_to_nothing() {
    let ram = ram(16);
    let mut guest = guest_of(&ram);
    let target = Target::builder().timeouts(timeouts()).listen("127.0.0.1:0").unwrap();
    let net = Net::default();
    let address = net.before(target.address().unwrap().to_string());
    let builder = Source::builder(ram).channels(1).timeouts(timeouts());
    let builder = builder.downtime_limit(400 * MS).overrun(Overrun::Retry { tries: 3 });
    let source = builder.connect(&address).unwrap();
    let (once, dirty) = (AtomicBool::new(false), guest.dirty.clone());
    guest.on_pause = Some(Box::new({
        let net = net.clone();
        move || {
            if once.swap(true, Relaxed) {
                return;
            }
            dirty.mark_range(pageferry::units::BlockId(0), 0, 96);
            net.0.slow_us.store(40_000, Relaxed);
            let net = net.clone();
            std::thread::spawn(move || {
                vmm::wait(150 * MS);
                net.0.refuse.store(true, Relaxed);
                net.cut(|number| number > 0);
                net.0.slow_us.store(0, Relaxed);
                vmm::wait(2000 * MS);
                net.0.refuse.store(false, Relaxed);
            });
        }
    }));
    let trip = vmm::travel(source, &mut guest.dirty.clone(), &mut guest, target, TestIncoming::new());
    println!("{:?}", trip.sent);
    vmm::assert_arrived(&guest, &trip);
    let stood_still = trip.sent.downtime.max(trip.sent.interrupted);
    assert!(stood_still < 1000 * MS, "{stood_still:?} where 400 ms were allowed");
}
