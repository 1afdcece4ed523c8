//! Question: what does TLS cost?
//!
//! Rival: the same migration without it.
//! Limit: at least a third of its rate, on 1 and 2 channels.
//!
//! Full RAM of noise, default settings, over loopback TCP, into memory that was used before; source and target are
//! threads of one process, so that both share its CPUs. The clock runs from the arming of the dirty source, when
//! everything is connected and hands are shaken, until `migrate` returns. Runs are interleaved, each ratio is of two runs
//! of one turn, and every run is checked to have brought every page.
//!
//! `--channels 1,2`, `--turns N` and `--ram-mib N` choose what is measured.

#[path = "../tests/support/certs.rs"]
mod certs;
#[path = "support/kinds.rs"]
mod kinds;
mod support;

use std::process::ExitCode;
use std::thread;

use certs::Ca;
use kinds::still::{NoDevices, Vmm};
use kinds::{Content, DirtyAt, Still, WORDS, all_arrived, spoil};
use pageferry::net::Tls;
use pageferry::{Outcome, Ram, Source, Target};
use support::{Options, Spread, Verdict, cpu_seconds, interleave};

/// Of the rate without TLS, at least.
const LIMIT: f64 = 0.33;
const LIMITED_CHANNELS: [usize; 2] = [1, 2];

struct Field {
    source: Ram,
    target: Ram,
    /// What the source goes by, and the target.
    sides: [Tls; 2],
    turn: u64,
}

impl Field {
    /// Seconds, and CPU seconds.
    fn run(&mut self, tls: bool, channels: usize) -> (f64, f64) {
        let pages: Vec<u64> = (0..self.source.pages()).collect();
        self.turn = (self.turn + 37) % WORDS;
        spoil(&self.target.blocks()[0], Content::Noise, &pages, self.turn);
        let [here, there] = self.sides.clone();
        let (source, target) = (Source::builder(self.source.clone()).channels(channels as u8), Target::builder());
        let (source, target) = if tls { (source.tls(here), target.tls(there)) } else { (source, target) };
        let target = target.listen("127.0.0.1:0").expect("a port");
        let source = source.connect(&target.address().expect("it listens on TCP").to_string()).expect("sound settings");
        let memory = self.target.clone();
        let cpu = cpu_seconds();
        let receiving = thread::spawn(move || target.receive(&mut Vmm(memory)));
        let mut dirty = Still::new(self.source.pages(), Vec::new(), DirtyAt::RoundZero);
        let sent = source.migrate(&mut dirty, &mut NoDevices);
        let seconds = dirty.begun().elapsed().as_secs_f64();
        let received = receiving.join().expect("the target does not panic");
        let cpu = cpu_seconds() - cpu;
        assert_eq!((&sent.outcome, &received.outcome), (&Outcome::Completed, &Outcome::Completed), "{sent:?}");
        assert_eq!((sent.payload_bytes, sent.tls.is_some()), (self.source.bytes(), tls), "{sent:?}");
        assert!(
            all_arrived(&self.target.blocks()[0], Content::Noise, &pages, self.turn),
            "a page is not what was sent"
        );
        (seconds, cpu)
    }
}

fn main() -> ExitCode {
    let options = Options::from_args();
    let number = |text: &str| text.parse::<usize>().unwrap_or_else(|e| panic!("{text:?}: {e}"));
    let channels = options.list("--channels", number).unwrap_or(options.pick(vec![2], vec![1, 2], vec![1, 2, 4]));
    let turns = options.number("--turns").unwrap_or(options.pick(1, 7, 15));
    let mib = options.number("--ram-mib").unwrap_or(options.pick(8, 256, 512)) as u64;
    let ca = Ca::new("ca");
    let (source, target) = (kinds::ram(mib << 20), kinds::ram(mib << 20));
    Content::Noise.fill(&source);
    Content::Noise.fill(&target);
    let mut field = Field { source, target, sides: [ca.side(&["source"]), ca.side(&["127.0.0.1"])], turn: 0 };
    let gib = mib as f64 / 1024.0;
    let mut verdict = Verdict::default();
    println!("{mib} MiB of RAM, {turns} turns");
    println!("{:<10}{:<8}{:>24}{:>24}{:>11}", "channels", "", "GiB/s", "ratio to plain", "CPU s/GiB");
    for channels in channels {
        let runs = interleave(turns, 2, |which| field.run(which == 1, channels));
        let rates = runs.iter().map(|runs| runs.iter().map(|run| gib / run.0).collect::<Vec<_>>()).collect::<Vec<_>>();
        for (which, name) in ["plain", "TLS"].into_iter().enumerate() {
            println!(
                "{:<10}{name:<8}{:>24}{:>24}{:>11.3}",
                if which == 0 { channels.to_string() } else { String::new() },
                format!("{:.2}", Spread::of(rates[which].iter().copied())),
                format!("{:.2}", Spread::of_ratios(&rates[which], &rates[0])),
                Spread::of(runs[which].iter().map(|run| run.1)).median / gib,
            );
        }
        let ratio = Spread::of_ratios(&rates[1], &rates[0]).median;
        if LIMITED_CHANNELS.contains(&channels) {
            verdict.limit(ratio >= LIMIT, || format!("{channels} channels: {ratio:.2} of the rate, {LIMIT} wanted"));
        }
    }
    verdict.finish(&options)
}
