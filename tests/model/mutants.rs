//! Rules that are broken on purpose, one at a time, to see that the properties notice.

/// A broken rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// The dirty bit is cleared after the page was read.
    ClearAfterRead,
    /// The guest's write is marked before it is done.
    MarkBeforeWrite,
    /// The lanes do not wait for lane 0 between rounds.
    BarrierIgnoresLane0,
    /// A journal is freed when its Flush mark is sent.
    FreeAtFlush,
    /// A run enters the journal when it is sent, not when it is popped.
    JournalAfterSend,
    /// The target is told that every lane is as far as the furthest.
    AllLanesAsTheFurthest,
    /// The target's VMM runs the guest once its state is loaded.
    RunOnLoaded,
    /// The source resumes the guest when the control connection is lost after Commit.
    ResumeAfterCommit,
    /// Final is sent while pages are still in rings and hands.
    FinalBeforeDrained,
    /// The dirty bits are not harvested again after `save_state`.
    NoHarvestAfterSave,
    /// Commit is sent without asking the gate.
    CommitPastTheGate,
    /// The target says Running before its `run` hook has returned.
    RunningBeforeRun,
    /// After an overrun, rounds go on before the target has answered the Final that was withdrawn.
    RoundsBeforeTheAnswer,
    /// The target does not notice that the control connection is gone.
    NobodyAtTheTarget,
    /// An applied epoch frees every journal, whether its lane is named or not: also that of a lost channel.
    FreeUnnamed,
    /// What is given back enters the round that is being filled, though it may have been pushed in it.
    GiveBackIntoThisRound,
    /// What is given back is dropped.
    NoGiveBack,
    /// Only what a worker had taken is given back, and not what was left in its ring.
    RingForgotten,
    /// A lane is taken out of the set, and goes on reading.
    RetireWithoutJoin,
    /// The others are not woken when a lane leaves the set.
    NoWakeAfterRetire,
    /// What a lost lane had kept the others from is not looked at again: an epoch, a Final.
    NoLookAfterRetire,
    /// A Loaded for a Final that was void counts for the next one.
    LateLoadedCounts,
    /// A connection is taken for the one that was announced, whatever its generation.
    AnyGeneration,
    /// A channel that comes back does not begin with the end of the last round.
    NoMarkOnRejoin,
    /// What stands before the first mark that an epoch does not reach is freed with it.
    FreePastLaterMarks,
    /// A target that is taken up again leaves the old lanes to themselves.
    ResumeWithoutJoin,
    /// A target that is another process takes the session up.
    ResumeByAnother,
    /// The round that was being filled when all was lost begins anew, under its number.
    RoundBeginsAnew,
    /// What was outstanding when all was lost is not given back.
    ResumeWithoutGiveBack,
    /// The target answers a Query, and gives the guest up later.
    AnswerBeforeDiscard,
    /// The source takes the loss of its Query's connection for a no.
    NoAnswerIsNo,
    /// What is found damaged is not shipped again.
    RepairNotShipped,
    /// A block that differs is taken as it is.
    DigestIgnored,
}
