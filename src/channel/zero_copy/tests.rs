//! The ledger against every order of completions, and the whole against real sockets.

use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::memory::{Backing, Ram, RamBlock, words};
use crate::sync::AtomicU64;
use crate::sync::Ordering::Relaxed;
use crate::units::{BlockId, PageSize, Run};

/// A ledger whose next send has this number.
fn ledger_at(number: u32, insists: bool) -> Ledger {
    Ledger { first: number, next: number, ..Ledger::new(insists, None) }
}

fn completion(first: u32, last: u32, copied: bool) -> Completion {
    Completion { first, last, copied }
}

proptest! {
    /// The oracle keeps a list of what is outstanding.
    #[test]
    fn completions_count_once_in_whatever_order_and_size_they_come(
        start in prop_oneof![Just(0), (u32::MAX - 100)..=u32::MAX, any::<u32>()],
        steps in prop::collection::vec((0u8..3, any::<u32>(), 1u32..20, any::<bool>()), 1..300),
    ) {
        let mut ledger = ledger_at(start, true);
        let (mut open, mut next): (Vec<(u32, u64)>, u32) = (Vec::new(), start);
        let (mut sent, mut copied_bytes) = (0, 0);
        for (what, pick, length, copied) in steps {
            if what == 0 || open.is_empty() {
                if !ledger.is_full() {
                    let bytes = 1 + u64::from(pick % (1 << 20));
                    ledger.sent(bytes as usize);
                    open.push((next, bytes));
                    next = next.wrapping_add(1);
                    sent += bytes;
                }
            } else {
                // Some of it may be complete already, or not sent yet.
                let first = open[pick as usize % open.len()].0;
                let last = first.wrapping_add(length - 1);
                ledger.completed(completion(first, last, copied));
                open.retain(|(number, bytes)| {
                    let hit = number.wrapping_sub(first) < length;
                    if hit && copied {
                        copied_bytes += bytes;
                    }
                    !hit
                });
            }
            let oldest = open.first().map_or(next, |(number, _)| *number);
            prop_assert_eq!(ledger.first, oldest);
            prop_assert_eq!(ledger.outstanding(), next.wrapping_sub(oldest));
            prop_assert_eq!(ledger.outstanding_bytes, open.iter().map(|(_, bytes)| bytes).sum::<u64>());
            prop_assert_eq!((ledger.sent_bytes, ledger.copied_bytes), (sent, copied_bytes));
            let bytes_full = ledger.outstanding_bytes >= BYTES_MAX;
            prop_assert_eq!(ledger.is_full(), bytes_full || ledger.outstanding() == SENDS_MAX);
        }
    }
}

#[test]
fn the_number_wraps_around_and_nothing_is_forgotten() {
    let mut ledger = ledger_at(u32::MAX - 1, false);
    (0..SENDS_MAX).for_each(|_| ledger.sent(40_000));
    assert!(ledger.is_full());
    ledger.completed(completion(u32::MAX, 3, false));
    assert_eq!((ledger.first, ledger.outstanding()), (u32::MAX - 1, SENDS_MAX), "the oldest one is outstanding");
    ledger.completed(completion(u32::MAX - 1, u32::MAX - 1, false));
    assert_eq!((ledger.first, ledger.outstanding()), (4, SENDS_MAX - 6));
    ledger.completed(completion(4, u32::MAX - 2, false));
    assert_eq!((ledger.outstanding(), ledger.outstanding_bytes), (0, 0));
}

#[test]
fn completions_of_what_was_never_sent_change_nothing() {
    let mut ledger = ledger_at(7, false);
    ledger.sent(40_000);
    ledger.completed(completion(8, 6, true));
    assert_eq!((ledger.outstanding(), ledger.copied_running), (1, 0));
}

#[test]
fn two_copied_sends_running_end_it_unless_it_was_insisted_on() {
    for insists in [false, true] {
        let mut ledger = ledger_at(0, insists);
        (0..6).for_each(|_| ledger.sent(40_000));
        ledger.completed(completion(0, 0, true));
        ledger.completed(completion(1, 1, false));
        ledger.completed(completion(2, 2, true));
        assert!(ledger.wants(BYTES_MIN), "no two of them running");
        ledger.completed(completion(3, 4, true));
        assert_eq!(ledger.why_copied, (!insists).then_some(WhyCopied::AfterAll));
        assert_eq!(ledger.wants(BYTES_MIN), insists);
        // What is outstanding is still waited for.
        assert_eq!(ledger.outstanding(), 1);
    }
}

#[test]
fn refusals_end_it_when_they_persist_and_a_send_forgives_them() {
    for (errno, why) in [(libc::ENOBUFS, WhyCopied::NoMemory), (libc::EFAULT, WhyCopied::NoPages)] {
        let refusal = io::Error::from_raw_os_error(errno);
        assert!(is_refusal(&refusal));
        let mut ledger = ledger_at(0, true);
        (1..REFUSED_MAX).for_each(|_| ledger.refused(&refusal));
        ledger.sent(40_000);
        (1..REFUSED_MAX).for_each(|_| ledger.refused(&refusal));
        assert_eq!(ledger.why_copied, None);
        ledger.refused(&refusal);
        assert_eq!(ledger.why_copied, Some(why), "however much it was insisted on");
    }
    assert!(!is_refusal(&io::Error::from_raw_os_error(libc::EPIPE)));
}

#[test]
fn a_socket_that_wants_to_see_the_bytes_gets_copies_at_once() {
    let refusal = io::Error::from_raw_os_error(libc::EOPNOTSUPP);
    assert!(is_refusal(&refusal));
    let mut ledger = ledger_at(0, true);
    ledger.refused(&refusal);
    assert_eq!(ledger.why_copied, Some(WhyCopied::Kernel));
}

#[test]
fn small_payloads_are_copied() {
    let ledger = ledger_at(0, true);
    assert_eq!([BYTES_MIN - 1, BYTES_MIN].map(|bytes| ledger.wants(bytes)), [false, true]);
}

const PAGES: u64 = 128;
const PAYLOAD: usize = PAGES as usize * 4096;
const HEAD: &[u8] = b"head";

/// A channel over loopback, its peer, and a packet of half a MiB of guest RAM.
struct Bench {
    stream: Stream,
    peer: TcpStream,
    ram: Ram,
    packet: Gather,
    by_reference: ByReference,
}

impl Bench {
    fn new(asked: ZeroCopy) -> Bench {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let stream = Stream::from(Socket::from_fd(near.into()).unwrap());
        let (peer, _) = listener.accept().unwrap();
        let block = RamBlock::anonymous("ram", 0, PAYLOAD as u64, PageSize::SIZE_4K, Backing::Base).unwrap();
        let ram = Ram::new([block]).unwrap();
        (0..PAGES).for_each(|page| write(&ram, page, 1));
        let by_reference = ByReference::new(asked, &stream).unwrap();
        Bench { packet: Gather::new(ram.clone(), 64), stream, peer, ram, by_reference }
    }

    fn send(&mut self) -> Sent {
        self.packet.clear();
        assert!(self.packet.push(&Run { block: BlockId(0), first: 0, pages: PAGES as u32 }));
        self.packet.head_mut()[..HEAD.len()].copy_from_slice(HEAD);
        let sent = self.by_reference.send(&mut self.packet, HEAD.len(), &mut self.stream).unwrap();
        // The next packet's header comes here while this one may still be on its way.
        self.packet.head_mut().fill(0xee);
        assert_eq!(sent.bytes, HEAD.len() + PAYLOAD);
        sent
    }
}

/// Writes a page's first word.
fn write(ram: &Ram, page: u64, value: u64) {
    assert!(words::store(ram.block(BlockId(0)).unwrap(), page, 0, value));
}

/// Reads a packet, and gives the first word of each of its pages.
fn read_packet(peer: &mut TcpStream) -> Vec<u64> {
    let mut bytes = vec![0; HEAD.len() + PAYLOAD];
    peer.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes[..HEAD.len()], HEAD);
    bytes[HEAD.len()..].chunks(4096).map(|page| u64::from_le_bytes(page[..8].try_into().unwrap())).collect()
}

#[test]
fn what_was_handed_over_by_reference_is_read_later_and_headers_are_not() {
    for (asked, last) in [(ZeroCopy::On, 2), (ZeroCopy::Off, 1)] {
        let mut bench = Bench::new(asked);
        // Nobody reads yet: a receive window's worth is on its way, and the rest is not.
        bench.send();
        write(&bench.ram, PAGES - 1, 2);
        let pages = read_packet(&mut bench.peer);
        assert_eq!((pages[0], pages[PAGES as usize - 1]), (1, last), "{asked:?}");
    }
}

#[test]
fn settling_waits_for_the_peer_and_learns_that_loopback_copies() {
    let mut bench = Bench::new(ZeroCopy::On);
    assert_eq!(bench.send().calls, 2, "header, payload");
    assert!(bench.by_reference.is_outstanding());
    let (read, mut peer) = (AtomicU64::new(0), bench.peer.try_clone().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut part = [0; 4096];
            while read.load(Relaxed) < (HEAD.len() + PAYLOAD) as u64 {
                let bytes = peer.read(&mut part).unwrap();
                read.fetch_add(bytes as u64, Relaxed);
            }
        });
        bench.by_reference.settle(bench.stream.socket()).unwrap();
        // What the peer's kernel has taken need not have been read by the peer.
        assert!(read.load(Relaxed) >= PAYLOAD as u64 / 4, "settled after {} bytes", read.load(Relaxed));
    });
    assert!(!bench.by_reference.is_outstanding());
    assert_eq!(bench.by_reference.counts(), (PAYLOAD as u64, PAYLOAD as u64));
    assert_eq!(bench.by_reference.why_copied(), None, "it was insisted on");
}

#[test]
fn a_shutdown_ends_the_wait_for_a_peer_that_does_not_read() {
    let mut bench = Bench::new(ZeroCopy::On);
    bench.send();
    std::thread::scope(|scope| {
        let (by_reference, socket) = (&mut bench.by_reference, &**bench.stream.socket());
        let settling = scope.spawn(move || by_reference.settle(socket));
        std::thread::park_timeout(Duration::from_millis(50));
        assert!(!settling.is_finished(), "nobody reads, and it settled");
        socket.shutdown();
        assert_eq!(settling.join().unwrap().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    });
}

#[test]
fn a_peer_that_resets_ends_the_wait_and_the_next_send_fails() {
    let mut bench = Bench::new(ZeroCopy::On);
    bench.send();
    // Closed with bytes unread: that resets the connection, and the kernel lets go of the pages.
    let mut part = [0; 1];
    bench.peer.read_exact(&mut part).unwrap();
    drop(bench.peer);
    let _ = bench.by_reference.settle(bench.stream.socket());
    assert!(bench.by_reference.send(&mut bench.packet, HEAD.len(), &mut bench.stream).is_err());
}

#[test]
fn auto_leaves_this_host_and_unix_sockets_alone_and_on_says_what_cannot_be() {
    assert_eq!(Bench::new(ZeroCopy::Auto).by_reference.why_copied(), Some(WhyCopied::PeerIsHere));
    assert_eq!(Bench::new(ZeroCopy::Off).by_reference.why_copied(), Some(WhyCopied::Asked));
    let (near, _far) = UnixStream::pair().unwrap();
    let stream = Stream::from(Socket::from_fd(near.into()).unwrap());
    assert_eq!(ByReference::new(ZeroCopy::Auto, &stream).unwrap().why_copied(), Some(WhyCopied::NotTcp));
    assert_eq!(ByReference::new(ZeroCopy::On, &stream).unwrap_err(), WhyCopied::NotTcp);
}
