//! Whole migrations inside one process, over real sockets: every byte of guest RAM arrives.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use pageferry::units::{BlockId, PageSize};
use pageferry::{DirtyBitmap, Outcome, Source, SourceReport, Target, TargetReport, Verify};
use vmm::{TestGuest, TestIncoming};

/// Migrates and compares every byte.
fn migrate(
    address: &str,
    channels: u8,
    verify: Verify,
    guest: &mut TestGuest,
    incoming: TestIncoming,
) -> (SourceReport, TargetReport, TestIncoming) {
    let target = Target::builder().listen(address).unwrap();
    let to = target.address().unwrap().to_string();
    let receiving = std::thread::spawn({
        let mut incoming = incoming;
        move || (target.receive(&mut incoming), incoming)
    });
    let source = Source::builder(guest.ram.clone()).channels(channels).verify(verify).connect(&to).unwrap();
    let mut dirty = guest.dirty.clone();
    let sent = source.migrate(&mut dirty, guest);
    let (received, incoming) = receiving.join().unwrap();
    (sent, received, incoming)
}

fn assert_arrived(guest: &TestGuest, sent: &SourceReport, received: &TargetReport, incoming: &TestIncoming) {
    assert_eq!(sent.outcome, Outcome::Completed, "{:?}", sent.remarks);
    assert_eq!(received.outcome, Outcome::Completed, "{:?}", received.remarks);
    assert_eq!(incoming.state, guest.state);
    assert_eq!(incoming.setup, guest.setup);
    assert_eq!((incoming.runs, incoming.discards), (1, 0));
    assert_eq!((guest.paused, guest.resumed), (1, 0));
    assert_eq!(vmm::first_difference(&guest.ram, incoming.ram.as_ref().unwrap()), None);
}

#[test]
fn ram_that_lies_still_arrives_over_tcp() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[1000]);
    for page in 0..700 {
        vmm::write_page(&ram, BlockId(0), page, 1);
    }
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let (sent, received, incoming) = migrate("127.0.0.1:0", 2, Verify::Full, &mut guest, TestIncoming::default());
    assert_arrived(&guest, &sent, &received, &incoming);
    assert_eq!(sent.payload_bytes, 700 * 4096);
    assert_eq!(sent.untouched_bytes, 300 * 4096);
    println!("{sent:?}\n{received:?}");
}

#[test]
fn ram_that_is_written_all_the_time_arrives() {
    for channels in [1, 2, 3, 8] {
        let ram = vmm::ram(PageSize::SIZE_4K, &[5000, 77]);
        for page in 0..5000 {
            vmm::write_page(&ram, BlockId(0), page, 1);
        }
        let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
        guest.start(500);
        let (sent, received, incoming) =
            migrate("127.0.0.1:0", channels, Verify::Full, &mut guest, TestIncoming::default());
        assert_arrived(&guest, &sent, &received, &incoming);
    }
}
