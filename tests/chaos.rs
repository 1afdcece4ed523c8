//! Chaos between source and target: whatever happens to the connections, a migration completes with every byte, or the
//! guest runs on at the source and a second attempt completes.
//!
//! A seed stands for a guest, a migration, and the faults that a proxy commits, at bytes that the seed chose. Without
//! settings a few seeds are tried; `tests/soak` tries as many as it is told. PAGEFERRY_CHAOS_RUNS and
//! PAGEFERRY_CHAOS_SEED are how many, and the first.
#![cfg(not(loom))]

#[path = "chaos/expect.rs"]
mod expect;
#[path = "chaos/growth.rs"]
mod growth;
#[path = "chaos/guest.rs"]
mod guest;
#[path = "chaos/kill.rs"]
mod kill;
#[path = "lifecycle/leaks.rs"]
mod leaks;
#[path = "chaos/pipe.rs"]
mod pipe;
#[path = "chaos/plan.rs"]
mod plan;
#[path = "chaos/proxy.rs"]
mod proxy;
#[path = "chaos/run.rs"]
mod run;
#[path = "chaos/stream.rs"]
mod stream;
mod support;
#[path = "support/vmm.rs"]
mod vmm;
#[path = "chaos/watch.rs"]
mod watch;

use plan::{CLASSES, Plan};
use run::Counts;

/// Runs at the same time: most of the time of one that fails is waiting.
const AT_ONCE: usize = 4;

/// A number from the environment, or this one.
fn setting(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

#[test]
fn every_seed_ends_with_the_whole_guest_at_the_target_or_running_on_at_the_source() {
    let first = setting("PAGEFERRY_CHAOS_SEED", 0);
    let runs = setting("PAGEFERRY_CHAOS_RUNS", CLASSES.len() as u64);
    let plans = (first..first + runs).map(Plan::of).collect();
    let (records, failures) = run::all(plans, AT_ONCE, |seed| format!("tests/soak chaos 1 {seed}"));
    println!("{}", Counts::of(&records));
    assert!(failures.is_empty(), "{} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
}

#[test]
fn the_same_seed_commits_the_same_faults() {
    for seed in 0..200 {
        assert_eq!(Plan::of(seed), Plan::of(seed));
        assert_eq!(Plan::kill(seed, 256), Plan::kill(seed, 256));
        assert!(seed < 20 || Plan::of(seed) != Plan::of(seed - 20), "two seeds, one plan");
    }
}
