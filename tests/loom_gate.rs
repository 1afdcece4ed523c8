//! Models of the gate. Exhaustive, with or without a bound on preemptions.
#![cfg(loom)]

use loom::thread;
use pageferry::gate::{CancelAnswer, Gate};

#[test]
fn of_cancel_and_commit_exactly_one_wins() {
    loom::model(|| {
        let gate = Gate::new();
        let canceller = gate.clone();
        let cancel = thread::spawn(move || canceller.cancel());
        let committed = gate.commit();
        let answer = cancel.join().unwrap();
        assert_eq!(answer, if committed { CancelAnswer::TooLate } else { CancelAnswer::Accepted });
        assert_eq!(gate.is_cancelled(), !committed);
    });
}

#[test]
fn of_two_cancels_exactly_one_is_accepted() {
    loom::model(|| {
        let gate = Gate::new();
        let cancels = [gate.clone(), gate.clone()].map(|gate| thread::spawn(move || gate.cancel()));
        let answers = cancels.map(|cancel| cancel.join().unwrap());
        assert!(answers.contains(&CancelAnswer::Accepted));
        assert!(answers.contains(&CancelAnswer::AlreadyCancelled));
        assert!(!gate.commit());
    });
}
