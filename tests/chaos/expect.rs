//! What must come of each class of faults, in one table.

use crate::plan::Class;

/// What a run must come to, where its faults came in time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Must {
    /// Nothing less than a guest at the target, whole.
    Complete,
    /// That, or a guest that runs on at the source, from where a second attempt completes.
    EndTruthfully,
}

use Class::*;
use Must::*;

/// Each class and what must come of it.
const TABLE: [(Class, Must); 20] = [
    (Clean, Complete),
    (Delay, Complete),
    (Trickle, Complete),
    (SplitAndMerge, Complete),
    (Reorder, Complete),
    (ResetData, EndTruthfully),
    (CloseData, EndTruthfully),
    (HalfClose, EndTruthfully),
    (StallData, EndTruthfully),
    (StallControl, EndTruthfully),
    (CutControl, EndTruthfully),
    (DropAtAccept, EndTruthfully),
    (FlipHello, EndTruthfully),
    (FlipHeader, EndTruthfully),
    (FlipTable, EndTruthfully),
    (FlipPayload, EndTruthfully),
    (FlipFrame, EndTruthfully),
    (KillSome, EndTruthfully),
    (KillAll, EndTruthfully),
    (Mixed, EndTruthfully),
];

pub fn must(class: Class) -> Must {
    TABLE.iter().find(|(row, _)| *row == class).expect("every class has a row").1
}

/// Whether the source may not know what became of its guest: only where its word with the target can have been lost.
pub fn may_be_uncertain(class: Class) -> bool {
    matches!(class, HalfClose | StallControl | CutControl | FlipFrame | KillAll)
}
