//! Link it into your VMM: from the memory map to the hand-over, and what to do when it ends otherwise.
//!
//! This module holds no code. It goes the way of one migration, at the source and at the target, and says what the VMM
//! owes at each step and what it may rely on. [`process`] says what all this does to the VMM's process: threads, system
//! calls for seccomp lists, signals, memory, descriptors, fork, time limits. Sketches against the public types of three
//! VMMs: `cloud_hypervisor` and `firecracker` (both built on `vm-memory`, and documented where that feature is on), and
//! [`crosvm`].
//!
//! # The source, step by step
//!
//! **1. RAM blocks.** One [`RamBlock`](crate::RamBlock) for each piece of guest RAM that is one mapping: a name that both
//! sides know it by, where the guest sees it, where it is mapped, how long it is. ROM and device memory that the guest
//! can write belong to it too, or to the device state: what is in neither does not travel. With `vm-memory`, `GuestRam`
//! makes the blocks of the regions. Elsewhere, [`RamBlock::new`](crate::RamBlock::new) takes pointer and length; give it
//! what owns the mapping to hold. Say how the block is mapped if you know it for sure
//! ([`Presence`](crate::memory::Presence)): then what nobody ever touched is neither read nor sent. A wrong claim loses
//! pages, and of all checks only `Verify::Full` would find them. No block may come, go or move until `migrate` returns.
//!
//! **2. Something that knows what is dirty.** Whoever writes guest RAM while it travels must be seen by one of these;
//! [`Combined`](crate::dirty::combined::Combined) joins as many as it takes:
//!
//! | who writes | KVM's log or ring | `WriteProtect` | a bitmap |
//! |---|---|---|---|
//! | vCPUs | sees it | sees it | only if an emulator marks it |
//! | threads of the VMM | no | sees it | `RegionBitmaps` if they write through `vm-memory`'s accessors; else they mark |
//! | the kernel for the VMM: read(2), buffered io_uring, vhost in the kernel | no; vhost has a log of its own | sees it | mark at completion |
//! | DMA: VFIO, reads with O_DIRECT, io_uring's fixed buffers | no | **no**: it sees the page being pinned, not what lands later | mark at completion |
//! | other processes: vhost-user, jailed devices | no | no | mark when they say what they wrote |
//! | nobody: a stopped VM, an image | | | [`Still`](crate::dirty::combined::Still) |
//!
//! A mark comes **after** the write, and for DMA at its completion: a mark that comes first can be harvested, and the
//! page read, before the write lands, and nobody would send that page again. KVM's sources (feature `kvm`) cost the guest
//! a fault for the first write to a page after each harvest, as does [`WriteProtect`](crate::WriteProtect) (about 1 µs,
//! Linux 6.7 on), which needs no KVM and no slots. A [`DirtyBitmap`](crate::DirtyBitmap) costs whoever marks one atomic
//! OR. None of them sees memory that a balloon gives back, which changes without a write: mark it, or the target keeps the
//! old bytes, which is no harm to the guest, and which `Verify::Full` takes for damage.
//!
//! **3. The hooks** of [`Guest`](crate::Guest). All are called on the thread that called `migrate`, never two at a time.
//!
//! | hook | on return it must be true that | may it block | an error means |
//! |---|---|---|---|
//! | `setup_bytes` | | yes: nothing is connected | the migration fails, nothing was begun |
//! | `throttle(p)` | each vCPU gets `100 - p` percent of its time until told otherwise | shortly: nothing new is harvested meanwhile | it gets no slower; the migration goes on |
//! | `pause` | no vCPU is in KVM_RUN, or will be; every DMA has completed and is marked, or never lands; no device thread writes guest RAM | yes: it is downtime | the guest must be running again |
//! | `save_state` | the state is written; what it wrote to guest RAM is marked | yes: RAM travels meanwhile | the guest is resumed here |
//! | `resume` | the guest runs, throttled as it was last told | it is downtime | the guest stands still, and is the VMM's to deal with |
//!
//! `pause` is where migrations go wrong. It is not enough that vCPUs have left KVM_RUN: requests that devices have
//! taken from their queues must be finished or put back, I/O that is under way must have completed, vhost and vhost-user
//! rings must be stopped and their logs read, VFIO devices must be in their stopped state. `pause` and `resume` come in
//! pairs, and may come several times in one migration (see below).
//!
//! **4. The call.**
//!
//! ```no_run
//! # use std::time::Duration;
//! # use pageferry::*;
//! # fn give_away(ram: Ram, tracking: &mut dyn DirtySource, vm: &mut dyn Guest) -> Result<(), Failure> {
//! let source = Source::builder(ram.clone())
//!     .channels(4)
//!     .downtime_limit(Duration::from_millis(50))
//!     .connect("10.0.0.2:4444")?; // nothing is connected yet
//! let (cancel, progress) = (source.cancel_handle(), source.progress()); // for other threads
//! let report = source.migrate(tracking, vm); // blocks until it has ended
//! match report.outcome {
//!     Outcome::Completed => { /* it runs there: destroy it here, and never resume it */ }
//!     Outcome::Cancelled => { /* it runs here */ }
//!     Outcome::Failed(Failure::Hook { hook: "resume", .. }) => { /* it is ours, and stands still */ }
//!     Outcome::Failed(why) => eprintln!("it runs on here: {why}"), // a second attempt may be made
//!     Outcome::Uncertain(why) => eprintln!("ask the target about session {}: {why}", report.session),
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # The target, step by step
//!
//! [`Target::receive`](crate::Target::receive) blocks in the same way, and calls the hooks of
//! [`Incoming`](crate::Incoming) on the thread that called it.
//!
//! | hook | what has happened | what it must do | an error means |
//! |---|---|---|---|
//! | `prepare(setup)` | a source has said what it has: blocks, page sizes, and its `setup_bytes` | check that this machine can be built here; map the same blocks, in the same order; give back a [`Ram`](crate::Ram) | refused, and the source is told why: say it in words for a person |
//! | `load_state(state)` | all of RAM and of the state has arrived, and is what was sent | load devices and vCPUs; run nothing; may be called again with newer state | the guest runs on at the source |
//! | `run` | the source has given the guest up, for good | start vCPUs and devices | **proves that no vCPU ran and none will**: the source resumes it. If one may have run, do not return |
//! | `discard` | the guest will not run here | undo `prepare` and `load_state`; called at most once, and only after `prepare` has succeeded | |
//!
//! Blocks are made to read as zeros before pages arrive. Memory just mapped should say so
//! ([`Initial::Zeroed`](crate::memory::Initial)); otherwise all of it is looked at, and zeros are written where something
//! else stands. Between `prepare` and `run` the lanes write guest RAM whenever they like, and nobody else may. Nothing
//! of what the source says is trusted: lengths, offsets and counts are checked before anything is written.
//!
//! ```no_run
//! # use pageferry::*;
//! # fn take_in(vm: &mut dyn Incoming) -> Result<(), Failure> {
//! let target = Target::builder().listen("0.0.0.0:4444")?; // the source may connect from now on
//! let report = target.receive(vm);
//! match report.outcome {
//!     Outcome::Completed => { /* it runs here */ }
//!     other => eprintln!("it does not run here: {other}"), // and `discard` was called if there was something to undo
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # What each outcome obliges to
//!
//! At the target there are two cases: it runs here, or it does not and nothing is left of it. At the source:
//!
//! | outcome | the guest | `resume` was called | the dirty source | what to do |
//! |---|---|---|---|---|
//! | `Completed` | runs at the target | no | disarmed | destroy it; never resume it |
//! | `Cancelled`, `Failed` | runs here | if it was paused | disarmed, and has back all that was harvested since it was armed | go on; a second attempt may be made |
//! | `Failed` by the `resume` hook | stands still here | it failed | the same | resume it by other means, or end it |
//! | `Uncertain` | stands still here, and may run at the target | no | disarmed | ask the target ([`settle`](crate::settle::settle)): destroy it, or resume it; without an answer fence the target by other means, and only then resume |
//!
//! `Uncertain` is rare: the connection broke in the moment between Commit and the target's answer. No time-out turns it
//! into anything else, because no time-out can: whoever resumes a guest without proof runs it twice, and its disks pay
//! for it. An orchestrator that can fence a host has that proof, and so has whoever asked the target: it gives up a guest
//! that it does not run yet before it answers. For that it has to be there still: a VMM that calls
//! [`receive_and_witness`](crate::Target::receive_and_witness) gets a [`Witness`](crate::target::Witness), and lets it answer
//! for a while where it [is needed](crate::target::Witness::is_needed), on a thread of its own beside the guest.
//!
//! **A second attempt** is a new [`Source`](crate::Source) over the same `Ram` (a clone is a handle) and a new
//! [`Target`](crate::Target); the same dirty source may be used again. It begins at round 0: tracking was off in between,
//! and the target has forgotten everything. What was dirty is given back for the VMM's own use of its bitmaps.
//!
//! # When the guest outruns the link
//!
//! Rounds go on until what is left, at the measured rate, fits the downtime limit. A guest that dirties memory faster
//! than the link carries it never gets there by itself. The VMM chooses what happens, in this order:
//!
//! - `throttle_max` lets the source slow the vCPUs down, step by step, through the `throttle` hook, which is called with 0
//!   before the migration ends, however it ends. Without it the hook is never called.
//! - `rounds_max` and `precopy_time_max` bound how long it is tried; `at_limit` says whether the migration then fails,
//!   which leaves the guest alone, or the guest is paused for as long as the rest takes.
//! - `overrun` says what happens when a pause turns out longer than the limit, before the point of no return: accept it,
//!   or resume the guest and try again. Then `pause`, `save_state` and, at the target, `load_state` are called anew; the
//!   new state replaces all of the former, and nothing that was read from RAM before holds any more.
//! - `bandwidth_max` caps the rounds for the sake of others on the link; the pause is not capped.
//!
//! What a hook takes is downtime like any other: a `pause` of 40 ms leaves 10 of a limit of 50 for the pages.

#[cfg(feature = "vm-memory")]
pub mod cloud_hypervisor;
pub mod crosvm;
#[cfg(feature = "vm-memory")]
pub mod firecracker;
pub mod process;
