//! Hooks of the VMM that take long: the migration goes on meanwhile, and neither side takes it for silence.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Outcome, Source, Target, Timeouts};
use vmm::{TestGuest, TestIncoming};

#[test]
fn a_hook_that_takes_long_to_save_the_state_is_no_silence() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    let (_nobody, never) = std::sync::mpsc::channel::<()>();
    guest.on_save = Some(Box::new(move |_, _| {
        let _ = never.recv_timeout(Duration::from_millis(1500));
    }));
    let timeouts = Timeouts { silence: Duration::from_millis(600), ..Timeouts::default() };
    let target = Target::builder().timeouts(timeouts).listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()).outcome);
    let source = Source::builder(ram).timeouts(timeouts).connect(&to).unwrap();
    let mut dirty = guest.dirty.clone();
    assert_eq!(source.migrate(&mut dirty, &mut guest).outcome, Outcome::Completed);
    assert_eq!(receiving.join().unwrap(), Outcome::Completed);
}
