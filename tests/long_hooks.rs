//! Hooks of the VMM that take long: the migration goes on meanwhile, and neither side takes it for silence.
#![cfg(not(loom))]

#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, Failure, Guest, HookError, Outcome, Ram, Source, StateWriter, Target, Timeouts};
use vmm::{TestGuest, TestIncoming};

/// Takes longer than either side of [`completes`] would bear of silence.
fn long() {
    let (_nobody, never) = std::sync::mpsc::channel::<()>();
    let _ = never.recv_timeout(Duration::from_millis(1500));
}

fn completes(ram: Ram, mut guest: TestGuest) {
    let timeouts = Timeouts { silence: Duration::from_millis(600), ..Timeouts::default() };
    let target = Target::builder().timeouts(timeouts).listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()).outcome);
    let source = Source::builder(ram).timeouts(timeouts).connect(&to).unwrap();
    let mut dirty = guest.dirty.clone();
    assert_eq!(source.migrate(&mut dirty, &mut guest).outcome, Outcome::Completed);
    assert_eq!(receiving.join().unwrap(), Outcome::Completed);
}

#[test]
fn a_hook_that_takes_long_to_save_the_state_is_no_silence() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    guest.on_save = Some(Box::new(|_, _| long()));
    completes(ram, guest);
}

#[test]
fn a_hook_that_takes_long_to_pause_the_guest_is_no_silence() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    let mut guest = TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram));
    guest.on_pause = Some(Box::new(long));
    completes(ram, guest);
}

/// Cannot be resumed.
struct Stuck(TestGuest);

impl Guest for Stuck {
    fn pause(&mut self) -> Result<(), HookError> {
        self.0.pause()
    }
    fn resume(&mut self) -> Result<(), HookError> {
        Err("the vCPUs are gone".into())
    }
    fn save_state(&mut self, _: &mut StateWriter) -> Result<(), HookError> {
        Err("no room for the state".into())
    }
}

#[test]
fn a_guest_that_could_not_be_resumed_is_what_the_outcome_speaks_of() {
    let ram = vmm::ram(PageSize::SIZE_4K, &[100]);
    let mut guest = Stuck(TestGuest::new(&ram, &DirtyBitmap::for_ram(&ram)));
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let to = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut TestIncoming::new()).outcome);
    let mut dirty = guest.0.dirty.clone();
    let outcome = Source::builder(ram).connect(&to).unwrap().migrate(&mut dirty, &mut guest).outcome;
    let Outcome::Failed(Failure::Hook { hook: "resume", reason }) = outcome else { panic!("{outcome:?}") };
    assert!(reason.contains("the vCPUs are gone") && reason.contains("no room for the state"), "{reason}");
    assert!(matches!(receiving.join().unwrap(), Outcome::Failed(_)));
}
