//! What must come of each class of faults, in one table.

use crate::plan::{Act, Class, Link, Plan};

/// What a run must come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Must {
    /// Nothing less than a guest at the target, whole.
    Complete,
    /// That, or a guest that runs on at the source, from where a second attempt completes.
    EndTruthfully,
}

use Class::*;
use Must::*;

/// Each class, what must come of it, and what must come of it where both sides have a resume window.
const TABLE: [(Class, Must, Must); 20] = [
    (Clean, Complete, Complete),
    (Delay, Complete, Complete),
    (Trickle, Complete, Complete),
    (SplitAndMerge, Complete, Complete),
    (Reorder, Complete, Complete),
    (ResetData, Complete, Complete),
    (CloseData, Complete, Complete),
    (HalfClose, EndTruthfully, Complete),
    (StallData, Complete, Complete),
    (StallControl, EndTruthfully, Complete),
    (CutControl, EndTruthfully, Complete),
    (DropAtAccept, Complete, Complete),
    (FlipHello, EndTruthfully, EndTruthfully),
    (FlipHeader, Complete, Complete),
    (FlipTable, Complete, Complete),
    (FlipPayload, Complete, Complete),
    (FlipFrame, EndTruthfully, Complete),
    (KillSome, Complete, Complete),
    (KillAll, EndTruthfully, Complete),
    (Mixed, Complete, Complete),
];

pub fn must(plan: &Plan) -> Must {
    let (_, without, with) = TABLE.iter().find(|(class, ..)| *class == plan.class).expect("every class has a row");
    match plan.class {
        // A target that cannot be reached is no target.
        DropAtAccept if plan.drops.contains(&0) => EndTruthfully,
        // With one channel, one that stalls is no worse off than the others.
        StallData if plan.channels == 1 => EndTruthfully,
        // Before the two sides have met there is nothing to resume.
        HalfClose | StallControl | CutControl | FlipFrame | KillAll if is_early(plan) => EndTruthfully,
        HalfClose if plan.faults.iter().all(|fault| fault.link != Link::Control) => *with,
        _ if plan.window_ms > 0 => *with,
        _ => *without,
    }
}

/// Bytes of the control connection, and of a channel, within which a migration may not have begun.
const EARLY_BYTES: u64 = 500;

fn is_early(plan: &Plan) -> bool {
    let early =
        plan.faults.iter().filter(|fault| fault.link == Link::Control || matches!(fault.act, Act::ResetAll { .. }));
    early.into_iter().any(|fault| fault.since == crate::plan::Since::Start && fault.bytes < EARLY_BYTES)
}

/// Whether the source may not know what became of its guest: only where its word with the target can have been lost.
pub fn may_be_uncertain(plan: &Plan) -> bool {
    must(plan) == EndTruthfully && matches!(plan.class, HalfClose | StallControl | CutControl | FlipFrame | KillAll)
}
