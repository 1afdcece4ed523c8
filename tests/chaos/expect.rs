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
        // Where the only channel stalls, what stalls is the migration.
        StallData => plan.channels == 1,
        // Before the two sides have met there is nothing to resume.
        StallControl | HalfClose | CutControl | FlipFrame | KillAll => is_early(plan) || may_hit_commit(plan),
        // A channel that dies before it has joined is not made again where it is the only one.
        ResetData | CloseData | FlipHeader | Mixed if plan.channels == 1 => is_early_on_data(plan),
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

/// Whether something happens to a data connection before its channel has joined.
fn is_early_on_data(plan: &Plan) -> bool {
    let early = |fault: &Fault| fault.link != Link::Control && fault.since == Since::Start && fault.bytes < EARLY_BYTES;
    plan.faults.iter().any(early)
}

/// A Commit that is lost is not said again: a target that is asked and has not read it gives the guest up.
fn may_hit_commit(plan: &Plan) -> bool {
    plan.faults.iter().any(|fault| touches_control(fault) && fault.since == Since::Pause)
}

/// Whether the source may not know what became of its guest: only where its word with the target can have been lost.
pub fn may_be_uncertain(plan: &Plan) -> bool {
    must(plan) == EndTruthfully && matches!(plan.class, HalfClose | StallControl | CutControl | FlipFrame | KillAll)
}
