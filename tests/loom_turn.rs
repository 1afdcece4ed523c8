//! The turn under loom: one thread at a time, and what one did the next one sees.
#![cfg(loom)]
#![forbid(unsafe_code)]

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering::Relaxed};
use pageferry::dirty::kvm::turn::Turn;

/// What the turn protects, with no ordering of its own: as the staged entries and the places in the rings.
#[derive(Default)]
struct Protected {
    turn: Turn,
    staged: AtomicU64,
    taken: AtomicU64,
}

impl Protected {
    /// Both words go up together; whoever has the turn must find them equal.
    fn collect(&self) -> bool {
        let Some(_mine) = self.turn.try_take() else { return false };
        let seen = self.staged.load(Relaxed);
        assert_eq!(seen, self.taken.load(Relaxed), "another thread is in the middle of it, or its work is not seen");
        self.staged.store(seen + 1, Relaxed);
        self.taken.store(seen + 1, Relaxed);
        true
    }
}

#[test]
fn one_thread_at_a_time_and_the_next_sees_what_it_did() {
    loom::model(|| {
        let shared = Arc::new(Protected::default());
        let others: Vec<_> = (0..2)
            .map(|_| {
                let shared = shared.clone();
                loom::thread::spawn(move || u64::from(shared.collect()))
            })
            .collect();
        let mine = u64::from(shared.collect());
        let done = mine + others.into_iter().map(|other| other.join().unwrap()).sum::<u64>();
        assert!(done >= 1, "somebody gets the turn");
        assert_eq!(shared.staged.load(Relaxed), done, "a collection was lost");
    });
}

#[test]
fn who_waits_for_the_turn_gets_it() {
    loom::model(|| {
        let shared = Arc::new(Protected::default());
        let other = {
            let shared = shared.clone();
            loom::thread::spawn(move || shared.collect())
        };
        // What a round does: it may not go on before whoever was at it is done, and sees that.
        let mine = shared.turn.take();
        let seen = shared.staged.load(Relaxed);
        assert_eq!(seen, shared.taken.load(Relaxed));
        drop(mine);
        let done = other.join().unwrap();
        assert!(seen <= u64::from(done));
        assert_eq!(shared.staged.load(Relaxed), u64::from(done));
    });
}
