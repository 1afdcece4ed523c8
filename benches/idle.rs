//! Question: what does guest RAM cost that nobody ever touched?
//!
//! Rival: the same guest without it. Limit: 32 GiB of which 1 GiB was touched ship in the time of that 1 GiB alone plus
//! 100 ms, under write protection tracking and with default settings, from the call of `migrate` to its return.
//!
//! Both memories are private and anonymous; the touched pages lie in eight stretches all over the larger one. Runs are
//! interleaved; the target's memory is fresh in each.

#[path = "support/still.rs"]
mod still;
mod support;

use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use pageferry::memory::{Backing, Initial, words};
use pageferry::units::PageSize;
use pageferry::wire::control::Setup;
use pageferry::{DirtySource, HookError, Incoming, Outcome, Ram, RamBlock, Source, Target, WriteProtect};
use still::NoDevices;
use support::{Options, Spread, Verdict, interleave};

/// Of the time that the rival takes, at the most more.
const LIMIT: Duration = Duration::from_millis(100);

const STRETCHES: u64 = 8;

struct Fresh;

impl Incoming for Fresh {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        let info = &setup.blocks[0];
        let block = RamBlock::anonymous(&info.name, 0, info.bytes, info.page_size, Backing::Base)?;
        Ok(Ram::new([block.with_initial(Initial::Zeroed)])?)
    }
    fn load_state(&mut self, _: &mut dyn Read) -> Result<(), HookError> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), HookError> {
        Ok(())
    }
}

fn guest(bytes: u64, touched: u64) -> Ram {
    let ram = Ram::new([RamBlock::anonymous("ram", 0, bytes, PageSize::SIZE_4K, Backing::Base).unwrap()]).unwrap();
    let block = &ram.blocks()[0];
    let (stride, length) = (block.pages() / STRETCHES, touched / STRETCHES / 4096);
    for stretch in 0..STRETCHES {
        for page in stretch * stride..stretch * stride + length {
            words::fill(block, page, |word| (page << 9 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
    }
    ram
}

fn migrate(ram: &Ram, touched: u64) -> f64 {
    let target = Target::builder().listen("127.0.0.1:0").unwrap();
    let address = target.address().unwrap().to_string();
    let receiving = std::thread::spawn(move || target.receive(&mut Fresh));
    let mut dirty = WriteProtect::new().unwrap();
    let report = Source::builder(ram.clone()).connect(&address).unwrap().migrate(&mut dirty, &mut NoDevices);
    dirty.disarm();
    assert_eq!(report.outcome, Outcome::Completed);
    assert_eq!(receiving.join().unwrap().outcome, Outcome::Completed);
    assert_eq!((report.payload_bytes, report.untouched_bytes), (touched, ram.bytes() - touched));
    report.total.as_secs_f64() * 1e3
}

fn main() -> ExitCode {
    let options = Options::from_args();
    if let Err(e) = WriteProtect::new() {
        println!("SKIPPED idle: {e}");
        return ExitCode::SUCCESS;
    }
    let (bytes, touched) = options.pick((1 << 30, 64 << 20), (32 << 30, 1 << 30), (32 << 30, 1 << 30));
    let rams = [guest(touched, touched), guest(bytes, touched)];
    let runs = interleave(options.pick(1, 3, 9), 2, |contender| migrate(&rams[contender], touched));
    let (alone, with) = (Spread::of(runs[0].clone()), Spread::of(runs[1].clone()));
    let more = Spread::of(runs[1].iter().zip(&runs[0]).map(|(with, alone)| with - alone));
    println!("{:>4} MiB touched, alone         {alone} ms", touched >> 20);
    println!("{:>4} MiB touched, of {:>2} GiB     {with} ms", touched >> 20, bytes >> 30);
    println!("the untouched rest costs         {more} ms");
    let mut verdict = Verdict::default();
    let limit = LIMIT.as_secs_f64() * 1e3;
    verdict.limit(more.median <= limit, || format!("untouched RAM costs {:.1} ms, limit {limit} ms", more.median));
    verdict.finish(&options)
}
