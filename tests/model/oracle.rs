//! What must be true in every state, and what must be possible: the invariants of the design, judged from outside.

use pageferry::units::Item;
use pageferry::wire::control::SourceFrame;
use stateright::Property;

use crate::link::Packet;
use crate::rules::{Ferry, source_runs};
use crate::target_side::Hook;
use crate::world::{Bounds, Fault, Gate, Process, Verdict, World};

pub const ONE_OWNER: &str = "INV-8: never both sides run the guest";
pub const RUNS_WHAT_WAS: &str = "INV-7: what the target runs is the memory of the source";
pub const NOTHING_LOST_ON_THE_WAY: &str = "INV-7: a page that differs is dirty, waits to be read, or is on its way";
pub const JOURNAL_KEEPS: &str = "INV-6: what has not landed is dirty, in a ring or in a journal";
pub const RUNS_AFTER_COMMIT: &str = "the target runs only after Commit";
pub const COMPLETED_IS_TRUE: &str = "INV-9: completed means that the target runs";
pub const OURS_IS_TRUE: &str = "INV-9: failed or cancelled means that the target does not run and never will";
pub const UNCERTAIN_IS_RARE: &str = "INV-9: uncertain only after Commit";
pub const TARGET_SAYS_TRUE: &str = "INV-9: the target completes if and only if it ran";
pub const CANCEL_IS_KEPT: &str = "a cancel that was accepted keeps the guest at the source";
pub const TWO_EPOCHS: &str = "at most two epochs are outstanding";
pub const EPOCHS_ARE_TOLD: &str = "an epoch that every lane of the set has flushed is acknowledged";
pub const ACKS_FIND_MARKS: &str = "the mark of an acknowledged epoch is in the journal";
pub const DIGESTS_AGREE: &str = "the digests of an honest run agree";
pub const DISCARDED_ONCE: &str = "what was prepared and did not run is discarded, once";
pub const SURVIVES: &str = "what can be survived is survived";
pub const LOADS_IN_PEACE: &str = "no page lands while load_state runs";
pub const NOBODY_HANGS: &str = "whoever is alive can go on";

/// The properties, and the examples that show that these bounds reach what the properties speak of.
pub fn properties(bounds: &Bounds) -> Vec<Property<Ferry>> {
    let mut all = vec![
        Property::always(ONE_OWNER, |_, w: &World| !(w.target.ran && source_runs(w))),
        Property::always(RUNS_WHAT_WAS, |m: &Ferry, w: &World| !w.target.ran || differing(&m.0, w).next().is_none()),
        Property::always(NOTHING_LOST_ON_THE_WAY, |m: &Ferry, w: &World| {
            broken(m, w) || differing(&m.0, w).all(|page| waits(w, page) || travels(w, page))
        }),
        Property::always(JOURNAL_KEEPS, |m: &Ferry, w: &World| {
            let owed = |page| w.seen.damaged[page] || can_be_given_back(w, page);
            !m.0.journals() || !w.source.ships() || w.seen.commit_sent || differing(&m.0, w).all(owed)
        }),
        Property::always(SURVIVES, |m: &Ferry, w: &World| {
            let gone = matches!(w.source.verdict, Some(Verdict::Failed | Verdict::Cancelled | Verdict::Uncertain));
            // Its last words may be lost with the target that ran.
            let in_doubt = w.seen.commit_sent && (w.target.ran || m.0.kinds.contains(&Fault::Cut));
            !m.0.survives || in_doubt || !gone
        }),
        Property::always(RUNS_AFTER_COMMIT, |_, w: &World| !w.target.ran || w.seen.commit_sent),
        Property::always(COMPLETED_IS_TRUE, |_, w: &World| {
            w.source.verdict != Some(Verdict::Completed) || w.target.ran
        }),
        Property::always(OURS_IS_TRUE, |_, w: &World| {
            !matches!(w.source.verdict, Some(Verdict::Failed | Verdict::Cancelled)) || !may_ever_run(w)
        }),
        Property::always(UNCERTAIN_IS_RARE, |_, w: &World| {
            w.source.verdict != Some(Verdict::Uncertain) || w.seen.commit_sent
        }),
        Property::always(TARGET_SAYS_TRUE, |_, w: &World| match w.target.verdict {
            Some(verdict) => (verdict == Verdict::Completed) == w.target.ran && verdict != Verdict::Uncertain,
            None => true,
        }),
        Property::always(CANCEL_IS_KEPT, |_, w: &World| w.source.gate != Gate::Cancelled || !may_ever_run(w)),
        Property::always(TWO_EPOCHS, |_, w: &World| w.seen.epochs_closed <= w.seen.epochs_acked + 2),
        Property::always(EPOCHS_ARE_TOLD, |m: &Ferry, w: &World| {
            let (target, mut lanes) = (&w.target, m.0.channels());
            let busy = !target.listens() || target.session.waits_for() != "pages or Final";
            busy || lanes.any(|c| target.has_moved(&m.0, c)) || target.all_flushed(&m.0) <= w.seen.epochs_told
        }),
        Property::always(ACKS_FIND_MARKS, |_, w: &World| !w.seen.mark_missing),
        Property::always(DIGESTS_AGREE, |_, w: &World| !w.seen.digests_differed),
        Property::always(LOADS_IN_PEACE, |_, w: &World| !w.seen.landed_under_load),
        Property::always(DISCARDED_ONCE, |_, w: &World| match w.target.process {
            Process::Ended => w.target.discards == u8::from(w.target.prepared && !w.target.ran),
            _ => w.target.discards == 0,
        }),
        // Every step uses up something that is bounded, so there is no path without an end: that everybody can go on
        // until they are done means that they do.
        Property::always(NOBODY_HANGS, |m: &Ferry, w: &World| {
            let mut next = Vec::new();
            m.progress(w, &mut next);
            w.is_over() || !next.is_empty()
        }),
        Property::sometimes("both sides complete", |_, w: &World| {
            w.source.verdict == Some(Verdict::Completed) && w.target.verdict == Some(Verdict::Completed)
        }),
    ];
    if bounds.mutant.is_none() {
        all.extend(examples(bounds));
    }
    all
}

fn examples(bounds: &Bounds) -> Vec<Property<Ferry>> {
    let mut all = Vec::new();
    if bounds.writes > 1 && bounds.live_rounds > 1 && bounds.channels > 1 {
        all.push(Property::sometimes("an older copy lands after a newer one", |_, w: &World| w.seen.went_back));
    }
    if bounds.epochs > 1 {
        all.push(Property::sometimes("two epochs are outstanding", |_, w: &World| {
            w.seen.epochs_closed == w.seen.epochs_acked + 2
        }));
    }
    if bounds.overruns > 0 {
        all.push(Property::sometimes("a second attempt completes", |_, w: &World| {
            w.source.overruns_left == 0 && w.source.verdict.is_none() && w.target.ran
        }));
    }
    if bounds.redials > 0 && bounds.kinds.contains(&Fault::ChannelDeath) {
        all.push(Property::sometimes("a channel that was lost carries again", |_, w: &World| {
            w.seen.rejoined && !w.seen.resumed && w.source.verdict == Some(Verdict::Completed)
        }));
    }
    if bounds.kinds.contains(&Fault::ChannelDeath) && bounds.survives && bounds.resumes == 0 {
        all.push(Property::sometimes("a channel is lost behind Final, and it completes", |_, w: &World| {
            w.seen.voided && w.source.verdict == Some(Verdict::Completed)
        }));
    }
    if bounds.kinds.contains(&Fault::Damage) {
        all.push(Property::sometimes("what was damaged is repaired", |_, w: &World| {
            w.seen.repaired && w.source.verdict == Some(Verdict::Completed)
        }));
    }
    if bounds.resumes > 0 && bounds.kinds.contains(&Fault::Cut) {
        all.push(Property::sometimes("a session is taken up again and completes", |_, w: &World| {
            w.seen.resumed && w.source.verdict == Some(Verdict::Completed)
        }));
    }
    if bounds.kinds.contains(&Fault::Cut) && bounds.resumes > 0 {
        all.push(Property::sometimes("a Query is answered with yes", |_, w: &World| {
            !w.visitors.is_empty() && w.source.verdict == Some(Verdict::Completed)
        }));
        all.push(Property::sometimes("a Query is answered with no", |_, w: &World| {
            w.seen.commit_sent && w.source.verdict == Some(Verdict::Failed) && source_runs(w)
        }));
    }
    if bounds.kinds.contains(&Fault::Cut) && !bounds.patient {
        all.push(Property::sometimes("uncertain, and the target runs", |_, w: &World| {
            w.source.verdict == Some(Verdict::Uncertain) && w.target.ran
        }));
        all.push(Property::sometimes("uncertain, and the target never ran", |_, w: &World| {
            w.source.verdict == Some(Verdict::Uncertain) && !may_ever_run(w)
        }));
    }
    if bounds.kinds.contains(&Fault::Cancel) {
        all.push(Property::sometimes("cancelled at the source after Loaded was sent", |_, w: &World| {
            w.source.verdict == Some(Verdict::Cancelled) && w.target.session.waits_for() == "Commit"
        }));
    }
    if bounds.kinds.contains(&Fault::Hook) {
        all.push(Property::sometimes("the source resumes after RunFailed", |_, w: &World| {
            w.seen.commit_sent && w.source.verdict == Some(Verdict::Failed) && source_runs(w)
        }));
    }
    all
}

/// Pages in which the two memories differ.
fn differing<'a>(bounds: &Bounds, w: &'a World) -> impl Iterator<Item = usize> + 'a {
    (0..bounds.pages).filter(|page| w.source.version[*page] != w.target.memory[*page])
}

/// Whether what is on its way may be gone, or damaged: then only journals, and digests, know what is to travel again.
fn broken(m: &Ferry, w: &World) -> bool {
    !w.source.ships() || w.target.process != Process::Alive || w.faults_left < m.0.faults
}

fn is_run_of(item: &Item, page: usize) -> bool {
    matches!(item, Item::Run(run) if run.first == page as u64)
}

/// Whether a round to come takes this page.
fn will_be_scanned(w: &World, page: usize) -> bool {
    w.source.dirty[page] || w.source.kept[page] || w.source.returned[page]
}

/// Whether a write of this page is under way, it is dirty, or it is in a ring or a hand and will be read.
fn waits(w: &World, page: usize) -> bool {
    w.source.writing == Some(page)
        || will_be_scanned(w, page)
        || w.source.workers.iter().any(|worker| {
            worker.ring.iter().any(|item| is_run_of(item, page))
                || worker.hand.is_some_and(|run| run.first == page as u64)
        })
}

/// Whether the page as it is now is on its way.
fn travels(w: &World, page: usize) -> bool {
    let now = Packet::Page { page, version: w.source.version[page] };
    w.wires.iter().any(|wire| wire.pipe.items().contains(&now))
}

/// Whether the page would be sent again if every channel died now: what a worker has in its hand is not given back.
fn can_be_given_back(w: &World, page: usize) -> bool {
    w.source.writing == Some(page)
        || will_be_scanned(w, page)
        || w.source
            .workers
            .iter()
            .any(|worker| worker.ring.iter().chain(&worker.journal).any(|item| is_run_of(item, page)))
}

/// Whether the guest has run at the target, or a Commit is still on its way to one that would take it.
fn may_ever_run(w: &World) -> bool {
    let alive = w.target.process == Process::Alive;
    let commit_travels = w.control.to_target.items().contains(&SourceFrame::Commit);
    w.target.ran || (alive && (commit_travels || w.target.hook == Some(Hook::Run)))
}
