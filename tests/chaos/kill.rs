//! The experiment: 3 of 4 channels die, each at a byte of its own, many of them while the guest is paused.
//!
//! PAGEFERRY_KILL_RUNS migrations of PAGEFERRY_KILL_MIB of RAM, from PAGEFERRY_KILL_SEED on; `tests/soak kill` sets them.

use pageferry::Outcome;

use crate::plan::{Link, Plan};
use crate::proxy::{Fired, Phase};
use crate::run::{self, Record};
use crate::setting;

/// Bytes after which an epoch ends, and epochs that may be outstanding, the open one among them.
const EPOCH_BYTES: u64 = 128 << 20;
const EPOCHS: u64 = 3;
/// Bytes that a channel has taken and that have not come to the proxy: its hand, and what both sockets' buffers grow to
/// (4 and 32 MiB by `net.ipv4.tcp_wmem` and `tcp_rmem`).
const ON_THE_WAY_BYTES: u64 = 40 << 20;

/// The most that may travel again: of each channel that was killed what it had carried, as far as that can be in epochs
/// that were not applied.
fn reshipped_bytes_max(kills: &[Fired]) -> u64 {
    kills.iter().map(|kill| (kill.carried + ON_THE_WAY_BYTES).min(EPOCHS * EPOCH_BYTES)).sum()
}

/// Kills that came in time, of data channels.
fn kills(record: &Record) -> Vec<Fired> {
    record.in_time().filter(|fired| fired.fault.link != Link::Control).copied().collect()
}

#[test]
fn all_channels_but_one_may_die_anywhere() {
    let first = setting("PAGEFERRY_KILL_SEED", 0);
    let (runs, ram_mib) = (setting("PAGEFERRY_KILL_RUNS", 3), setting("PAGEFERRY_KILL_MIB", 64));
    let plans = (first..first + runs).map(|seed| Plan::kill(seed, ram_mib)).collect();
    let again = |seed| format!("PAGEFERRY_KILL_MIB={ram_mib} tests/soak kill 1 {seed}");
    let (records, failures) = run::all(plans, 2, again);
    let kills: Vec<_> = records.iter().map(kills).collect();
    let count: usize = kills.iter().map(Vec::len).sum();
    let paused = kills.iter().flatten().filter(|kill| kill.phase == Phase::Paused).count();
    let completed = records.iter().filter(|record| record.sent.outcome == Outcome::Completed).count();
    let late = 3 * records.len() - count;
    let reshipped = records.iter().map(|record| record.sent.reshipped_bytes);
    let (most, sum) = (reshipped.clone().max().unwrap_or(0), reshipped.sum::<u64>());
    let lost: u32 = records.iter().map(|record| record.sent.channels_lost).sum();
    let reconnects: u32 = records.iter().map(|record| record.sent.reconnects).sum();
    println!(
        "{runs} migrations of {ram_mib} MiB, 3 of 4 channels to be killed: {count} kills, {paused} of them while paused, \
         {late} too late; {completed} completed, {} not as they must; {lost} channels lost, {reconnects} connected again; \
         {} MiB travelled again, at most {} MiB of one guest",
        failures.len(),
        sum >> 20,
        most >> 20
    );
    for (record, kills) in records.iter().zip(&kills) {
        let (plan, sent, max) = (&record.plan, &record.sent, reshipped_bytes_max(kills));
        assert_eq!(sent.outcome, Outcome::Completed, "seed {}", plan.seed);
        assert!(sent.reshipped_bytes <= max, "seed {}: {} bytes again, not {max}", plan.seed, sent.reshipped_bytes);
        assert!(sent.channels_lost as usize >= kills.len(), "seed {}: {:?}", plan.seed, sent.remarks);
    }
    assert!(failures.is_empty(), "{} of {runs} runs failed:\n{}", failures.len(), failures.join("\n"));
    // Of a few, chance may make it none.
    assert!(runs < 30 || 10 * paused >= count, "{paused} of {count} kills came while the guest was paused");
}
