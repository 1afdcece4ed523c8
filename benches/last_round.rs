//! Question: what does the last, paused round cost, and what do more channels bring there?
//!
//! Rival: the bare loop over the same pages on as many channels (`support/pages_loop.rs`), which has no digests to
//! compare and nobody to ask.
//! Limit: 64 MiB over 4 channels at least 1.8 times as fast as over 1, in one stretch and scattered.
//!
//! A guest of 512 MiB dirties so much in the last instant before it stands still, and nothing before: as one stretch, or
//! every second page. The clock runs from the end of its pause hook until the target has said that all of it has landed,
//! that the digests agree and that the state is loaded: `ship` and `load` of the report's downtime parts. Source and
//! target are threads of one process; the target's memory was used before. Runs are interleaved over all numbers of
//! channels, and every run is checked to have brought every page.
//!
//! `--mib 16,64`, `--channels 1,4`, `--turns N` choose what is measured.

#[path = "support/kinds.rs"]
mod kinds;
#[path = "support/pages_loop.rs"]
mod pages_loop;
mod support;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use kinds::still::Vmm;
use kinds::{Content, DirtyAt, PAGE, Pausing, Still, WORDS, all_arrived, spoil};
use pageferry::{Outcome, Ram, Source, Target};
use pages_loop::{Listener, Over};
use support::{Options, Spread, Verdict, cpu_seconds, interleave};

/// Of the speed over one channel, 64 MiB over 4 channels, at least.
const LIMIT: f64 = 1.8;
/// What the limit holds for: so many MiB, and so many channels.
const LIMITED: (u64, usize) = (64, 4);

/// Who ships, over how many channels.
#[derive(Clone, Copy)]
struct Contender {
    ours: bool,
    channels: usize,
}

/// One run.
#[derive(Clone, Copy)]
struct Run {
    ms: f64,
    ship_ms: f64,
    cpu_seconds: f64,
    syscalls: u64,
}

struct Field {
    source: Ram,
    target: Ram,
    turn: u64,
}

impl Field {
    fn run(&mut self, contender: Contender, pages: &[u64]) -> Run {
        self.turn = (self.turn + 37) % WORDS;
        let at = self.turn;
        spoil(&self.target.blocks()[0], Content::Noise, pages, at);
        let cpu = cpu_seconds();
        let run = if contender.ours { self.migrate(contender, pages) } else { self.bare(contender, pages) };
        let cpu_seconds = cpu_seconds() - cpu;
        assert!(all_arrived(&self.target.blocks()[0], Content::Noise, pages, at), "a page is not what was sent");
        Run { cpu_seconds, ..run }
    }

    fn migrate(&self, contender: Contender, pages: &[u64]) -> Run {
        let target = Target::builder().listen("127.0.0.1:0").expect("a port");
        let to = target.address().expect("it listens on TCP").to_string();
        let memory = self.target.clone();
        let receiving = thread::spawn(move || target.receive(&mut Vmm(memory)));
        let paused = Arc::new(AtomicBool::new(false));
        let mut dirty = Still::new(self.source.pages(), pages.to_vec(), DirtyAt::Pause(paused.clone()));
        let source = Source::builder(self.source.clone()).channels(contender.channels as u8).connect(&to);
        let sent = source.expect("the settings make sense").migrate(&mut dirty, &mut Pausing(paused));
        let received = receiving.join().expect("the target does not panic");
        assert_eq!((&sent.outcome, &received.outcome), (&Outcome::Completed, &Outcome::Completed), "{sent:?}");
        // Round 0 ships the last page: see `passed_off_as_untouched`.
        assert_eq!(sent.payload_bytes, (pages.len() as u64 + 1) * PAGE, "every page travels once: {sent:?}");
        let parts = sent.downtime_parts;
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        let syscalls = sent.send_syscalls + received.recv_syscalls;
        Run { ms: ms(parts.ship + parts.load), ship_ms: ms(parts.ship), cpu_seconds: 0.0, syscalls }
    }

    fn bare(&self, contender: Contender, pages: &[u64]) -> Run {
        let listener = Listener::bind(Over::Tcp).expect("a port");
        let to = listener.address().expect("it is bound");
        let channels = contender.channels;
        thread::scope(|scope| {
            let target = &self.target.blocks()[0];
            let receiving = scope.spawn(|| pages_loop::receive(target, pages, &listener, channels));
            let sent = pages_loop::send(&self.source.blocks()[0], pages, &to, channels).expect("the loop sends");
            let received = receiving.join().expect("the loop does not panic").expect("the loop receives");
            let ms = sent.0.as_secs_f64() * 1e3;
            Run { ms, ship_ms: ms, cpu_seconds: 0.0, syscalls: sent.1 + received }
        })
    }
}

fn table(field: &mut Field, mib: u64, every: u64, channels: &[usize], turns: usize, verdict: &mut Verdict) {
    let pages: Vec<u64> = (0..mib << 20 >> 12).map(|page| page * every).collect();
    let contenders: Vec<Contender> =
        channels.iter().flat_map(|&channels| [true, false].map(|ours| Contender { ours, channels })).collect();
    let runs = interleave(turns, contenders.len(), |which| field.run(contenders[which], &pages));
    let shape = if every == 1 { "in one stretch" } else { "every second page" };
    println!("\n{mib} MiB {shape}, {turns} turns");
    println!(
        "  {:<13}{:>26}{:>9}{:>22}{:>22}{:>11}{:>12}",
        "channels", "ms", "of ship", "times as fast as on 1", "bare loop's ms", "CPU s/GiB", "calls/GiB"
    );
    let gib = mib as f64 / 1024.0;
    let of = |which: usize, part: fn(&Run) -> f64| runs[which].iter().map(part).collect::<Vec<f64>>();
    for (place, &channels) in channels.iter().enumerate() {
        let (ours, bare) = (2 * place, 2 * place + 1);
        let speedup = Spread::of_ratios(&of(0, |run| run.ms), &of(ours, |run| run.ms));
        println!(
            "  {channels:<13}{:>26}{:>9.2}{:>22}{:>22}{:>11.3}{:>12.0}",
            format!("{:.2}", Spread::of(of(ours, |run| run.ms))),
            Spread::of(of(ours, |run| run.ship_ms)).median,
            format!("{speedup:.2}"),
            format!("{:.2}", Spread::of(of(bare, |run| run.ms))),
            Spread::of(of(ours, |run| run.cpu_seconds)).median / gib,
            Spread::of(of(ours, |run| run.syscalls as f64)).median / gib,
        );
        if (mib, channels) == LIMITED && contenders[0].channels == 1 {
            verdict.limit(speedup.median >= LIMIT, || {
                format!(
                    "{mib} MiB {shape} over {channels} channels: {:.2} times as fast, {LIMIT} wanted",
                    speedup.median
                )
            });
        }
    }
}

fn main() -> ExitCode {
    let options = Options::from_args();
    let number = |text: &str| text.parse::<u64>().unwrap_or_else(|e| panic!("{text:?}: {e}"));
    let sizes = options.list("--mib", number).unwrap_or(options.pick(vec![1], vec![4, 64], vec![1, 4, 16, 64, 256]));
    let channels = options.list("--channels", |text| number(text) as usize);
    let channels = channels.unwrap_or(options.pick(vec![1, 2], vec![1, 2, 4], vec![1, 2, 4, 8]));
    let turns = options.number("--turns").unwrap_or(options.pick(1, 7, 15));
    // Room for every second page of the largest, and a clean last page.
    let bytes = (sizes.iter().max().expect("there is a size") << 21) + PAGE;
    let (source, target) = (kinds::ram(bytes), kinds::ram(bytes));
    Content::Noise.fill(&source);
    Content::Noise.fill(&target);
    let mut field = Field { source: kinds::passed_off_as_untouched(&source), target, turn: 0 };
    let mut verdict = Verdict::default();
    for &mib in &sizes {
        for every in [1, 2] {
            table(&mut field, mib, every, &channels, turns, &mut verdict);
        }
    }
    let (mib, channels) = LIMITED;
    println!("\nLimit: {mib} MiB over {channels} channels at least {LIMIT} times as fast as over 1.");
    verdict.finish(&options)
}
