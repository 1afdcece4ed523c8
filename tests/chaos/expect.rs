//! What must come of each class of faults, in one table.

use crate::plan::{Act, Class, Fault, Link, Plan, Since};

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
    let listed = if plan.window_ms > 0 || !plan.faults.iter().any(touches_control) { *with } else { *without };
    let excused = match plan.class {
        // A target that cannot be reached is no target; and with one channel, that one has to be made.
        DropAtAccept => plan.drops.contains(&0) || plan.channels == 1,
        // Where all wait for a lane that lags at the same barrier, or for the word of a target that is not heard, what
        // stalls is the migration.
        StallData | StallControl => true,
        // Before the two sides have met there is nothing to resume.
        HalfClose | CutControl | FlipFrame => is_early(plan),
        // Nor is one who is turned away on the way back let in later.
        KillAll => is_early(plan) || plan.faults.iter().any(|fault| matches!(fault.act, Act::ResetAll { refuse: 1.. })),
        _ => false,
    };
    if excused { EndTruthfully } else { listed }
}

fn touches_control(fault: &Fault) -> bool {
    fault.link == Link::Control || matches!(fault.act, Act::ResetAll { .. })
}

/// Bytes of the control connection, and of a channel, within which a migration may not have begun.
const EARLY_BYTES: u64 = 500;

fn is_early(plan: &Plan) -> bool {
    let mut control = plan.faults.iter().filter(|fault| touches_control(fault));
    control.any(|fault| fault.since == Since::Start && fault.bytes < EARLY_BYTES)
}

/// Whether the source may not know what became of its guest: only where its word with the target can have been lost.
pub fn may_be_uncertain(plan: &Plan) -> bool {
    must(plan) == EndTruthfully && matches!(plan.class, HalfClose | StallControl | CutControl | FlipFrame | KillAll)
}
