//! A target that strangers crowd around: they disturb nobody, whatever they say and however many they are.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use pageferry::units::{BlockId, ChannelId, Epoch, PageSize, Round};
use pageferry::wire::control::{SourceFrame, TargetFrame};
use pageferry::wire::hello::{HelloRole, Side};
use pageferry::wire::packet::PacketHeader;
use pageferry::{DirtyBitmap, Outcome, Source, Target, Verify};

use super::IN_TIME;
use super::at_target::{against, was_closed};
use super::leaks::alone;
use super::peer::*;
use super::vmm::{self, TestGuest, TestIncoming};

/// Where strangers come from; the source is at 127.0.0.1.
const ELSEWHERE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 66);

/// Sends one page and hands over; the source's channels have joined.
fn complete(source: &mut FakeSource, channels: u8) {
    source.send_data(0, &page_packet(0, Round(0), &[1; 4096]));
    for channel in 0..channels {
        let packets = u64::from(channel == 0);
        source.send_data(channel.into(), &mark(PacketHeader::round_end(Round(0), Epoch(0), packets)));
    }
    source.control.send(&SourceFrame::Final(last(channels)));
    assert_eq!(source.next(), Some(TargetFrame::Loaded { round: Round(0) }));
    source.control.send(&SourceFrame::Commit);
    assert_eq!(source.next(), Some(TargetFrame::Running));
}

#[test]
fn channels_that_came_before_a_crowd_of_silent_strangers_are_heard() {
    vmm::allow_many_descriptors();
    let (release, held) = mpsc::channel::<()>();
    let mut incoming = TestIncoming::new();
    let (began, begun) = mpsc::channel::<()>();
    incoming.on_prepare = Some(Box::new(move || {
        began.send(()).unwrap();
        held.recv().unwrap();
    }));
    let (report, incoming) = against(incoming, move |to| {
        let mut source = FakeSource::greet(to);
        source.control.send(&SourceFrame::Setup(setup(1, &[16, 16])));
        begun.recv().unwrap();
        // While the VMM prepares: nobody accepts. The channel is the first in the queue, and has said its Hello.
        source.join(ChannelId(0));
        let crowd: Vec<_> = (0..600).map(|_| source.visit(&[])).collect();
        release.send(()).unwrap();
        assert!(matches!(source.next(), Some(TargetFrame::Ready { .. })));
        let joined = source.next();
        assert!(matches!(joined, Some(TargetFrame::ChannelJoined { .. })), "{joined:?}");
        drop(crowd);
        drop(source);
    });
    assert_eq!((incoming.runs, incoming.discards), (0, 1));
    assert!(report.outcome.to_string().contains("closed"), "{}", report.outcome);
}

#[test]
fn six_hundred_silent_strangers_do_not_keep_a_migration_from_completing() {
    vmm::allow_many_descriptors();
    let ram = vmm::ram(pageferry::units::PageSize::SIZE_4K, &[500]);
    vmm::fill(&ram, 1);
    let mut guest = vmm::TestGuest::new(&ram, &pageferry::DirtyBitmap::for_ram(&ram));
    guest.start(50);
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let before: Vec<_> = (0..300).map(|_| TcpStream::connect(&to).unwrap()).collect();
    let (sender, crowd) = mpsc::channel();
    let source = pageferry::Source::builder(ram).channels(8).verify(Verify::Full).connect(&to).unwrap();
    let mut incoming = TestIncoming::new();
    incoming.on_prepare = Some(Box::new(move || {
        let crowd: Vec<_> = (0..300).map(|_| TcpStream::connect(&to).unwrap()).collect();
        sender.send(crowd).unwrap();
    }));
    let mut dirty = guest.dirty.clone();
    let trip = vmm::travel(source, &mut dirty, &mut guest, target, incoming);
    vmm::assert_arrived(&guest, &trip);
    assert!(trip.received.turned_away >= 600 - 512, "{}", trip.received.turned_away);
    assert_eq!(before.len() + crowd.recv().unwrap().len(), 600);
}

#[test]
fn a_crowd_that_comes_between_a_channels_connect_and_its_hello_does_not_push_it_out() {
    vmm::allow_many_descriptors();
    let (report, _) = against(TestIncoming::new(), |to| {
        let mut source = FakeSource::ready(to, 2);
        let data: Vec<_> = (0..2).map(|_| source.visit(&[])).collect();
        // More than the lobby holds. The last one says nonsense, and that it is dropped shows that all were let in.
        let _crowd: Vec<_> = (0..700).map(|_| vmm::connect_from(ELSEWHERE, to).unwrap()).collect();
        let mut last = vmm::connect_from(ELSEWHERE, to).unwrap();
        last.write_all(&[0xa5; 64]).unwrap();
        assert!(was_closed(last));
        for (channel, mut stream) in (0..).map(ChannelId).zip(data) {
            stream.write_all(&hello(HelloRole::Data(channel), Side::Source, SESSION).encode()).unwrap();
            assert_eq!(source.next(), Some(TargetFrame::ChannelJoined { channel, generation: FIRST }));
            source.data.push(stream);
        }
        complete(&mut source, 2);
    });
    assert_eq!(report.outcome, Outcome::Completed);
    assert!(report.turned_away >= 700 + 1 + 2 - 512, "{}", report.turned_away);
}

#[test]
fn a_hello_that_comes_byte_by_byte_is_heard_in_time_or_not_at_all() {
    let (report, _) = against(TestIncoming::new(), |to| {
        let mut source = FakeSource::connect(to);
        // As slow as a link can be whose packets hold one byte each.
        for byte in hello(HelloRole::Control, Side::Source, SESSION).encode() {
            source.control.raw(&[byte]);
        }
        let mut answer = [0; 64];
        source.control.stream.read_exact(&mut answer).unwrap();
        source.control.send(&SourceFrame::Setup(setup(1, &[16])));
        assert!(matches!(source.next(), Some(TargetFrame::Ready { .. })));
        // Slower than the limit allows: a byte every 20 ms, where 500 ms are given for all 64.
        let mut slow = source.visit(&[]);
        let begun = Instant::now();
        let mut said = 0;
        slow.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        for byte in hello(HelloRole::Data(ChannelId(0)), Side::Source, SESSION).encode() {
            if slow.write_all(&[byte]).is_err() || slow.read(&mut [0]).is_ok() {
                break;
            }
            said += 1;
            source.control.send(&SourceFrame::Ping { nonce: 1 });
        }
        assert!(said < 64 && begun.elapsed() < IN_TIME, "{said} bytes were listened to for {:?}", begun.elapsed());
        source.join(ChannelId(0));
        assert!(matches!(source.next(), Some(TargetFrame::ChannelJoined { .. })));
        complete(&mut source, 1);
    });
    assert_eq!((report.outcome, report.turned_away), (Outcome::Completed, 1));
}

#[test]
fn data_connections_before_setup_and_in_a_flood_are_dropped_one_by_one() {
    vmm::allow_many_descriptors();
    let (report, incoming) = against(TestIncoming::new(), |to| {
        let mut source = FakeSource::greet(to);
        source.join(ChannelId(0));
        assert!(was_closed(source.data.pop().unwrap()), "before Setup");
        source.control.send(&SourceFrame::Setup(setup(2, &[16, 16])));
        assert!(matches!(source.next(), Some(TargetFrame::Ready { .. })));
        for channel in (0..2).map(ChannelId) {
            source.join(channel);
            assert_eq!(source.next(), Some(TargetFrame::ChannelJoined { channel, generation: FIRST }));
        }
        let flood: Vec<_> = (0..1000)
            .map(|_| source.visit(&hello(HelloRole::Data(ChannelId(0)), Side::Source, SESSION).encode()))
            .collect();
        assert!(flood.into_iter().all(was_closed));
        complete(&mut source, 2);
    });
    assert_eq!((report.outcome, report.turned_away), (Outcome::Completed, 1001));
    assert_eq!(vmm::read_page(incoming.ram.as_ref().unwrap(), BlockId(0), 3), [1; 4096]);
}

/// A migration of a guest that writes, while `storm` strangers come at the target from elsewhere and stay. Gives the CPU
/// time that the target's controller took, and how many strangers came.
fn weather(storm: usize) -> (Duration, u64) {
    let ram = vmm::ram(PageSize::SIZE_4K, &[4000]);
    vmm::fill(&ram, 1);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    guest.start(50);
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let strangers = {
        let to = to.clone();
        move |count: usize| -> Vec<_> { (0..count).map(|_| vmm::connect_from(ELSEWHERE, &to).unwrap()).collect() }
    };
    // A third of them is there before the source, a third comes while it waits for Ready, a third while pages travel.
    let before = strangers(storm / 3);
    let (sender, crowd) = mpsc::channel();
    let (while_prepared, while_shipped) = (strangers.clone(), strangers);
    let (sender_too, over) = (sender.clone(), Arc::new(AtomicBool::new(false)));
    let source = Source::builder(ram).channels(8).verify(Verify::Wire).connect(&to).unwrap();
    let progress = source.progress();
    let mut incoming = TestIncoming::new();
    incoming.on_prepare = Some(Box::new(move || sender.send(while_prepared(storm / 3)).unwrap()));
    let dirty = guest.dirty.clone();
    let trip = std::thread::scope(|scope| {
        let done = over.clone();
        let shipped = scope.spawn(move || {
            while progress.now().channels.payload_bytes == 0 && !done.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            sender_too.send(while_shipped(storm / 3)).unwrap();
        });
        let receiving = scope.spawn(|| {
            let mut incoming = incoming;
            let report = target.receive(&mut incoming);
            (report, incoming, vmm::thread_cpu_time())
        });
        // The guest goes on until they have come: the last round is not over before.
        let mut waits = Some(shipped);
        let mut script = vmm::Script {
            bitmap: dirty,
            rounds: 0,
            between: Box::new(move |_, _| {
                if let Some(shipped) = waits.take() {
                    shipped.join().unwrap();
                }
            }),
        };
        let sent = source.migrate(&mut script, &mut guest);
        over.store(true, Ordering::Relaxed);
        let (received, incoming, cpu) = receiving.join().unwrap();
        (vmm::Trip { sent, received, incoming }, cpu)
    });
    vmm::assert_arrived(&guest, &trip.0);
    let came = before.len() + crowd.try_iter().map(|crowd| crowd.len()).sum::<usize>();
    assert_eq!(came, storm / 3 * 3);
    // Those that are still in the lobby, or in the kernel's queue, have not been turned away.
    assert!(trip.0.received.turned_away >= came.saturating_sub(512 + 1024) as u64, "{}", trip.0.received.turned_away);
    (trip.1, came as u64)
}

#[test]
fn three_thousand_connections_that_say_nothing_cost_a_migration_next_to_nothing() {
    alone("crowds::three_thousand_connections_that_say_nothing_cost_a_migration_next_to_nothing", || {
        vmm::allow_many_descriptors();
        let (calm, _) = weather(0);
        let (storm, came) = weather(3000);
        let each = storm.saturating_sub(calm) / came as u32;
        eprintln!("the controller took {calm:?} in a calm, {storm:?} in a storm of {came}: {each:?} a stranger");
        // An unoptimised build lets one in, finds a place for it and sends it away again in some 20 us.
        assert!(each < Duration::from_micros(200), "{each:?} a stranger");
    });
}
