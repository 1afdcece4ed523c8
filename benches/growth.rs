//! Question: how does the cost of a migration grow with the guest's RAM, and with the number of its RAM blocks?
//!
//! Rival: proportion. A line through the logarithms of size and cost has the slope 1 where twice the RAM costs twice.
//! Limit: slopes from 0.95 to 1.05, for seconds, CPU seconds and system calls, with 1, 8 and 64 blocks. (What untouched
//! RAM costs beside touched RAM is asked by `idle`.)
//!
//! From 0.25 to 8 GiB of RAM, all of it full and mapped, in memory of 256 MiB a side that is mapped over and over again:
//! a machine need not have 16 GiB to itself. That is eight times what this machine's last-level cache holds, so a page
//! is out of cache by the time it comes again; every page has a page table entry of its own on both sides, and its own
//! place in bitmaps and digests. What is left out is the larger spread in physical memory; `own` is 1 GiB of memory of
//! its own in the same run, to show what that makes.
//!
//! Seconds count from the arming of the dirty source until `migrate` returns, CPU seconds are those of the whole process,
//! which is source and target. Sizes are interleaved; a slope is fitted to each turn.
//!
//! `--blocks 1,8`, `--channels N`, `--turns N`, `--mib 256,512` choose what is measured.
// Unsafe because it maps one file at many addresses, and vouches for the mapping to `RamBlock::new`.
#![expect(unsafe_code)]

#[path = "support/kinds.rs"]
mod kinds;
mod support;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use kinds::still::{NoDevices, Vmm};
use kinds::{Content, DirtyAt, Still, WORDS, all_arrived, spoil};
use pageferry::memory::{Backing, Initial, Presence, RamBlock};
use pageferry::units::PageSize;
use pageferry::{Outcome, Ram, Source, Target};
use support::{Options, Spread, Verdict, cpu_seconds, interleave};

/// The slope of a cost that grows in proportion, and how far it may be off.
const SLOPE_MIN: f64 = 0.95;
const SLOPE_MAX: f64 = 1.05;

/// What is measured of a run.
const COSTS: [&str; 3] = ["seconds", "CPU seconds", "system calls"];

/// Addresses at which one file is mapped, window after window.
struct Mapping {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: a number of bytes at an address that is this value's alone; what is done there goes through RAM blocks.
unsafe impl Send for Mapping {}
// SAFETY: as above; nothing about the value itself ever changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: BorrowedFd<'_>, window: usize, bytes: usize) -> Mapping {
        let none = std::ptr::null_mut();
        let (reserved, flags) = (libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: new addresses, wherever the kernel likes.
        let at = unsafe { libc::mmap(none, bytes, reserved, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED, "no addresses: {}", io::Error::last_os_error());
        let mapping = Mapping { at: at.cast(), bytes };
        for offset in (0..bytes).step_by(window) {
            let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_FIXED);
            let len = window.min(bytes - offset);
            // SAFETY: replaces a part of what was just reserved, which nobody knows of.
            let part =
                unsafe { libc::mmap(mapping.at.add(offset).cast(), len, protection, flags, file.as_raw_fd(), 0) };
            assert_ne!(part, libc::MAP_FAILED, "mapping a window: {}", io::Error::last_os_error());
        }
        mapping
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`; the blocks that point into it kept it alive until now.
        unsafe { libc::munmap(self.at.cast(), self.bytes) };
    }
}

/// Memory of one side: a window, and guests made of it.
struct Side {
    window: Ram,
}

impl Side {
    fn new(window_bytes: u64) -> Side {
        let block = RamBlock::memfd("window", 0, window_bytes, PageSize::SIZE_4K, Backing::Base).expect("memory");
        let window = Ram::new([block]).expect("one block is RAM");
        Content::Noise.fill(&window);
        Side { window }
    }

    /// A guest of so many bytes in so many blocks, all of its page tables filled in.
    fn guest(&self, bytes: u64, blocks: u64) -> Ram {
        let window = &self.window.blocks()[0];
        let file = window.fd().expect("a memfd has a descriptor");
        let mapping = Arc::new(Mapping::new(file, window.bytes() as usize, bytes as usize));
        let each = bytes / blocks;
        let block = |index: u64| {
            let at = mapping.at.wrapping_add((index * each) as usize);
            // SAFETY: a part of the mapping, which the block keeps alive; nobody has a reference into it.
            let block = unsafe { RamBlock::new(&format!("ram{index}"), index * each, at, each, PageSize::SIZE_4K) };
            let block = block.expect("whole pages").with_keep_alive(mapping.clone()).with_initial(Initial::Zeroed);
            // Every page has an entry in the page tables, so that the question for them is asked, and answered in full.
            block.prefault(0, block.pages()).expect("page tables");
            block.with_presence(Presence::Anonymous)
        };
        Ram::new((0..blocks).map(block)).expect("the blocks are apart")
    }
}

/// What one size is: the same on both sides.
struct Guest {
    name: String,
    gib: f64,
    source: Ram,
    target: Ram,
    /// The memory at the target, once, for the check.
    landed: Ram,
}

/// Seconds, CPU seconds and system calls of one run.
fn migrate(guest: &Guest, channels: usize, turn: u64) -> [f64; 3] {
    let landed = &guest.landed.blocks()[0];
    let pages: Vec<u64> = (0..landed.pages()).collect();
    spoil(landed, Content::Noise, &pages, turn);
    let cpu = cpu_seconds();
    let target = Target::builder().listen("127.0.0.1:0").expect("a port");
    let to = target.address().expect("it listens on TCP").to_string();
    let memory = guest.target.clone();
    let receiving = thread::spawn(move || target.receive(&mut Vmm(memory)));
    let mut dirty = Still::new(0, Vec::new(), DirtyAt::RoundZero);
    let source = Source::builder(guest.source.clone()).channels(channels as u8).connect(&to);
    let sent = source.expect("the settings make sense").migrate(&mut dirty, &mut NoDevices);
    let seconds = dirty.begun().elapsed().as_secs_f64();
    let received = receiving.join().expect("the target does not panic");
    let cpu_seconds = cpu_seconds() - cpu;
    assert_eq!((&sent.outcome, &received.outcome), (&Outcome::Completed, &Outcome::Completed), "{sent:?}");
    assert_eq!(sent.payload_bytes, guest.source.bytes(), "every page travels once: {sent:?}");
    assert!(all_arrived(landed, Content::Noise, &pages, turn), "a page is not what was sent");
    [seconds, cpu_seconds, (sent.send_syscalls + received.recv_syscalls) as f64]
}

/// The slope of the line through these points' logarithms that has the least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let logs: Vec<(f64, f64)> = points.iter().map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = logs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
    let (x, y) = (mean(|log| log.0), mean(|log| log.1));
    let covariance: f64 = logs.iter().map(|log| (log.0 - x) * (log.1 - y)).sum();
    covariance / logs.iter().map(|log| (log.0 - x).powi(2)).sum::<f64>()
}

fn main() -> ExitCode {
    let options = Options::from_args();
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|e| panic!("{text:?}: {e}"));
    let window_bytes = options.pick(4 << 20, 256 << 20, 256 << 20);
    let sizes = options.list("--mib", number);
    let sizes = sizes.unwrap_or(options.pick(vec![4, 8], vec![256, 512, 1024], vec![256, 512, 1024, 2048, 4096, 8192]));
    let block_counts =
        options.list("--blocks", number).unwrap_or(options.pick(vec![1, 8], vec![1, 64], vec![1, 8, 64]));
    let channels = options.number("--channels").unwrap_or(2);
    let turns = options.number("--turns").unwrap_or(options.pick(1, 3, 5));
    let own_bytes = options.pick(8 << 20, 1 << 30, 1 << 30);
    let (source, target) = (Side::new(window_bytes), Side::new(window_bytes));
    let own = [kinds::ram(own_bytes), kinds::ram(own_bytes)];
    own.iter().for_each(|ram| Content::Noise.fill(ram));
    let mut verdict = Verdict::default();
    let mut turn = 0;
    for &blocks in &block_counts {
        let guest = |&mib: &u64| Guest {
            name: format!("{mib} MiB"),
            gib: mib as f64 / 1024.0,
            source: source.guest(mib << 20, blocks),
            target: target.guest(mib << 20, blocks),
            landed: target.window.clone(),
        };
        let [own_source, own_target] = own.clone();
        let own = Guest {
            name: format!("{} MiB, own", own_bytes >> 20),
            gib: own_source.bytes() as f64 / (1u64 << 30) as f64,
            source: own_source,
            landed: own_target.clone(),
            target: own_target,
        };
        let guests: Vec<Guest> = sizes.iter().map(guest).chain([own]).collect();
        let runs = interleave(turns, guests.len(), |which| {
            turn = (turn + 37) % WORDS;
            migrate(&guests[which], channels, turn)
        });
        println!("\n{blocks} blocks, {channels} channels, {turns} turns");
        println!("  {:<18}{:>26}{:>14}{:>14}{:>14}", "RAM", "seconds", "GiB/s", "CPU s/GiB", "calls/GiB");
        for (guest, runs) in guests.iter().zip(&runs) {
            let of = |cost: usize| Spread::of(runs.iter().map(|run| run[cost]));
            println!(
                "  {:<18}{:>26}{:>14.2}{:>14.3}{:>14.0}",
                guest.name,
                format!("{:.4}", of(0)),
                guest.gib / of(0).median,
                of(1).median / guest.gib,
                of(2).median / guest.gib
            );
        }
        for (cost, name) in COSTS.iter().enumerate() {
            let points = |turn: usize| (0..sizes.len()).map(move |which| (which, turn));
            let of_turn = |turn| {
                let points: Vec<_> =
                    points(turn).map(|(which, turn)| (guests[which].gib, runs[which][turn][cost])).collect();
                slope(&points)
            };
            let slopes = Spread::of((0..turns).map(of_turn));
            println!("  {name} grow with RAM to the power of {slopes:.3}");
            verdict.limit((SLOPE_MIN..=SLOPE_MAX).contains(&slopes.median), || {
                format!("{name}, {blocks} blocks: power {:.3}, wanted {SLOPE_MIN} to {SLOPE_MAX}", slopes.median)
            });
        }
    }
    println!("\nLimit: a power from {SLOPE_MIN} to {SLOPE_MAX}, for each cost.");
    verdict.finish(&options)
}
