//! Peers that break every rule, over real sockets: each ends with a clear error, in time, and nobody runs the guest twice.
#![cfg(not(loom))]

#[path = "hostile/at_source.rs"]
mod at_source;
#[path = "hostile/at_target.rs"]
mod at_target;
#[path = "hostile/crowds.rs"]
mod crowds;
#[path = "lifecycle/leaks.rs"]
mod leaks;
#[path = "hostile/memory.rs"]
mod memory;
#[path = "hostile/numbers.rs"]
mod numbers;
#[path = "support/peer.rs"]
mod peer;
#[path = "support/vmm.rs"]
mod vmm;

use std::time::Duration;

use pageferry::Timeouts;

/// Short enough for a test, long enough for a machine that is busy: a heartbeat comes every 200 ms.
fn timeouts() -> Timeouts {
    let ms = Duration::from_millis;
    Timeouts { connect: ms(1000), hello: ms(500), silence: ms(800), hook: ms(900), stall: ms(600) }
}

/// The longest of the time limits, with time for a machine that is busy.
const IN_TIME: Duration = Duration::from_secs(4);
