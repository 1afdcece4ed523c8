//! `minivmm run`: a guest at home, which goes nowhere. Shows that the VMM works, and what its parts cost.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::options::{Machine, human};
use crate::vm::Vm;

/// Run the guest in this process, stop it, save it, load it, let it go on, and have it check all of its RAM.
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    machine: Machine,
    /// Percent of the time that it is held back
    #[arg(long, value_name = "PERCENT", default_value_t = 0, value_parser = clap::value_parser!(u8).range(..=99))]
    throttle: u8,
    /// Milliseconds that it runs before it is stopped
    #[arg(long, value_name = "MS", default_value_t = 500)]
    run_ms: u64,
}

/// How long the guest may take for anything.
const PATIENCE: Duration = Duration::from_secs(30);

pub fn run(args: &Args) -> ExitCode {
    match try_run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("minivmm: {error}");
            ExitCode::FAILURE
        }
    }
}

fn try_run(args: &Args) -> Result<(), String> {
    let config = args.machine.config(false)?;
    let begun = Instant::now();
    let (mut vm, ()) = Vm::new(&config, |_| Ok(()))?;
    vm.fill()?;
    println!("guest: {} of RAM, filled in {} ms", human(config.ram_bytes), begun.elapsed().as_millis());
    vm.throttle(args.throttle);
    vm.resume()?;
    if !vm.device().await_ticks(1, PATIENCE) {
        return Err(vm.vcpus().broken().unwrap_or("the guest does not tick".to_owned()));
    }
    let (begun, before) = (Instant::now(), vm.device().ticks().count);
    vm.device().mark();
    vm.device().await_ticks(u64::MAX / 2, Duration::from_millis(args.run_ms));
    let (ticks, seconds) = (vm.device().ticks(), begun.elapsed().as_secs_f64());
    println!(
        "ticks: {:.0} a second, the longest gap {} us",
        (ticks.count - before) as f64 / seconds,
        ticks.longest_gap_ns / 1000
    );
    vm.throttle(0);

    let begun = Instant::now();
    vm.pause()?;
    let paused = Instant::now();
    let mut state = Vec::new();
    vm.save(&mut state)?;
    let saved = Instant::now();
    vm.load(&state[..])?;
    println!(
        "state: paused in {} us, saved in {} us ({} bytes), loaded in {} us",
        (paused - begun).as_micros(),
        (saved - paused).as_micros(),
        state.len(),
        saved.elapsed().as_micros()
    );
    vm.resume()?;

    let begun = Instant::now();
    let checked = vm.check(PATIENCE);
    checked.guest.map_err(|why| format!("the guest: {why}"))?;
    checked.device.map_err(|why| format!("the device: {why}"))?;
    println!("check: {} pages are good, in {} ms", checked.guest_pages, begun.elapsed().as_millis());
    Ok(())
}
