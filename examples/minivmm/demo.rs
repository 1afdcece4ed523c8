//! `minivmm demo`: a guest migrates between two VMM processes, and tells whether all of it arrived.
#![forbid(unsafe_code)]

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::guest::Config;
use crate::options::{Machine, Shipping, Tracking, human};
use crate::process::{Orders, Process};
use crate::protocol::{CheckedPart, Order, Said, Trial};
use crate::report::{Arrival, Attempt, Departure, End, Report};
use crate::show::Bar;
use crate::with_mutants::Mutant;

/// Migrate a running guest from one VMM process to another, and have it check every page of its RAM there.
///
/// The guest writes its hot set round and round, sweeps slowly over all other RAM, and knows what every page must hold;
/// a device of its VMM writes RAM behind KVM's back, and counts the guest's ticks: none may be missing, none come twice.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  minivmm demo
  minivmm demo --ram 1G --hot 64 --vcpus 2 --channels 4 --dirty-source ring --downtime-limit 50
  minivmm demo --hot 256 --dirty-rate 800 --throttle-max 99 --bandwidth-max 400M --json | tail -n 1
  minivmm demo --migrations 10 --cancel-while-paused

Exit code: 0 if every migration completed and every check found all in order; 1 failed, 3 uncertain, 4 damaged (all
completed, and a check found what did not arrive), 130 cancelled.")]
pub struct Args {
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    how: Shipping,
    /// How writes of vCPUs are noticed
    #[arg(long, value_name = "HOW", default_value = "log")]
    dirty_source: Tracking,
    /// How often the guest migrates, there and back again
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    migrations: u32,
    /// Cancel the first attempt of each migration after so many microseconds; then try again
    #[arg(long, value_name = "US")]
    cancel_after: Option<u64>,
    /// Cancel the first attempt of each migration when the guest has been paused; then try again
    #[arg(long, conflicts_with = "cancel_after")]
    cancel_while_paused: bool,
    /// Kill the target's process so many milliseconds into the first attempt; the guest is to run on at the source
    #[arg(long, value_name = "MS")]
    kill_target_after: Option<u64>,
    /// Print one JSON object a line on standard output: progress, then a report
    #[arg(long)]
    json: bool,
    /// Make a mistake with dirty bits, which the guest is to find
    #[arg(long, hide = true)]
    mutant: Option<Mutant>,
}

/// How many ticks of the guest are waited for after a migration: its first steps belong to it.
const FIRST_TICKS: u64 = 64;

pub fn run(args: &Args) -> ExitCode {
    let mut demo = Demo { args, report: Report::new(args.dirty_source.word()), interrupt: Interrupt::default() };
    let (outcome, error) = match demo.go() {
        Ok(()) => match demo.report.damage() {
            None => (End::Completed, None),
            Some(damage) => (End::Damaged, Some(damage)),
        },
        Err((outcome, error)) => (outcome, Some(error)),
    };
    (demo.report.outcome, demo.report.error) = (outcome, error);
    demo.report.sum_up(args.how.downtime_limit as f64);
    demo.end()
}

/// Why it goes no further.
type Stop = (End, String);

fn failed(error: String) -> Stop {
    (End::Failed, error)
}

struct Demo<'a> {
    args: &'a Args,
    report: Report,
    interrupt: Interrupt,
}

impl Demo<'_> {
    fn go(&mut self) -> Result<(), Stop> {
        let args = self.args;
        let config = args.machine.config(args.dirty_source == Tracking::Ring).map_err(failed)?;
        self.interrupt.listen();
        self.note(&config);
        let mut here = self.start()?;
        let running = |said| matches!(said, Said::Running { .. }).then_some(());
        here.ask(&Order::Boot { config: config.clone() }, running).map_err(failed)?;
        self.say(&format!(
            "guest: {} of RAM, {} MiB of it hot, vCPUs: {}; runs in process {}",
            human(config.ram_bytes),
            args.machine.hot,
            config.vcpus,
            here.pid()
        ));
        let mut there = self.start()?;
        let trial = Trial {
            cancel_after_us: args.cancel_after,
            cancel_while_paused: args.cancel_while_paused,
            mutant: args.mutant,
        };
        for migration in 1..=args.migrations {
            let mut ended = self.attempt(migration, &here, &mut there, trial)?;
            let on_purpose = trial.cancel_after_us.is_some() || trial.cancel_while_paused;
            if ended.0 == End::Cancelled && on_purpose && !self.interrupt.asked() {
                // The guest runs on, and the other side is as it was: as if nothing had been.
                ended =
                    self.attempt(migration, &here, &mut there, Trial { mutant: args.mutant, ..Trial::default() })?;
            }
            if ended.0 != End::Completed {
                return Err(ended);
            }
            if self.report.damage().is_some() {
                return Ok(());
            }
            std::mem::swap(&mut here, &mut there);
        }
        Ok(())
    }

    fn start(&self) -> Result<Process, Stop> {
        let process = Process::start().map_err(failed)?;
        self.interrupt.tell(process.orders());
        Ok(process)
    }

    /// One attempt to migrate, and a check of the guest where it is then: how the attempt ended.
    fn attempt(&mut self, migration: u32, here: &Process, there: &mut Process, trial: Trial) -> Result<Stop, Stop> {
        if self.interrupt.asked() {
            return Err((End::Cancelled, "cancelled".to_owned()));
        }
        let listening = |said| if let Said::Listening { addr } = said { Some(addr) } else { None };
        let to = there.ask(&Order::Receive, listening).map_err(failed)?;
        let how = self.args.how.clone();
        here.order(&Order::Send { to, how, trial }).map_err(failed)?;
        let source = self.follow(migration, here, there).map_err(failed)?;
        let received = |said| if let Said::Received(arrival) = said { Some(*arrival) } else { None };
        let arrival: Result<Arrival, String> = there.wait(received);

        let ended = (source.outcome, source.error.clone().unwrap_or_default());
        let mut attempt =
            Attempt { migration, source, target: None, gap_ms: None, downtime_outside_ms: None, check: None };
        let at = match ended.0 {
            End::Completed => there,
            _ => here,
        };
        let checked = match &arrival {
            Err(why) if ended.0 == End::Completed => Err(format!("the source says that the guest is gone, and {why}")),
            Ok(arrival) if (arrival.outcome == End::Completed) != (ended.0 == End::Completed) => {
                Err("the source and the target do not agree on how it ended".to_owned())
            }
            _ if ended.0 == End::Uncertain => Ok(()), // the guest stands still, and may not be touched
            _ => look(at, &mut attempt),
        };
        attempt.target = arrival.ok();
        self.tell(&attempt);
        self.report.add(attempt);
        checked.map(|()| ended).map_err(failed)
    }

    /// Waits for the source to come to an end; kills the target on the way if that is asked for.
    fn follow(&self, migration: u32, here: &Process, there: &mut Process) -> Result<Departure, String> {
        let mut kill_at = self.args.kill_target_after.map(|ms| Instant::now() + Duration::from_millis(ms));
        let mut bar = Bar::new(self.args.json, migration);
        loop {
            match here.next(kill_at)? {
                None => {
                    kill_at = None;
                    there.kill();
                }
                Some(Said::Sent(departure)) => return Ok(*departure),
                Some(Said::Progress(line)) => {
                    bar.show(&line);
                    if self.args.json {
                        print_json(&Said::Progress(line));
                    }
                }
                Some(_) => {}
            }
        }
    }

    fn note(&mut self, config: &Config) {
        let report = &mut self.report;
        report.vcpus = config.vcpus;
        report.hot_bytes = config.hot_bytes;
        report.dirty_rate_asked_mib_s = self.args.machine.dirty_rate;
        report.seed = self.args.machine.seed;
    }

    fn tell(&self, attempt: &Attempt) {
        let (source, numbers) = (&attempt.source, &attempt.source.numbers);
        let sent = human(numbers.payload_bytes);
        let (ms, rounds) = (numbers.total_ms, numbers.rounds);
        let mut line = format!("migration {}: ", attempt.migration);
        match (source.outcome, attempt.gap_ms, attempt.downtime_outside_ms) {
            (End::Completed, Some(gap), Some(longest)) => {
                line += &format!(
                    "{ms:.0} ms, {rounds} rounds, {sent} sent; the guest stood still for {:.1} ms (its ticks say {gap:.1}; \
                     the longest they were apart was {longest:.1})",
                    numbers.downtime_ms
                );
            }
            (End::Completed, ..) => {
                line += &format!("{ms:.0} ms, {rounds} rounds, {sent} sent; no word from the guest")
            }
            _ => line += &format!("{} after {ms:.0} ms", source.error.as_deref().unwrap_or("failed")),
        }
        if numbers.throttle_percent > 0 {
            line += &format!("; held back by {} % for {:.0} ms", numbers.throttle_percent, numbers.throttle_ms);
        }
        self.say(&line);
        if let Some(check) = &attempt.check {
            self.say(&format!(
                "  check: the guest, {} pages: {}; the device: {} ({:.0} ms)",
                check.guest_pages, check.guest, check.device, check.ms
            ));
        }
    }

    fn say(&self, line: &str) {
        if !self.args.json {
            print_line(line);
        }
    }

    fn end(&self) -> ExitCode {
        let report = &self.report;
        if let Some(error) = &report.error {
            let _ = writeln!(io::stderr().lock(), "minivmm: {error}");
        }
        if self.args.json {
            print_json(report);
        } else if report.outcome == End::Completed {
            if report.migrations_completed > 1 {
                self.say(&format!(
                    "downtime: {:.1} ms in the middle, {:.1} at the worst, the limit of {} kept in {} of {}; by the guest's \
                     ticks {:.1}, {:.1}, {} of {}",
                    report.downtime_median_ms,
                    report.downtime_worst_ms,
                    self.args.how.downtime_limit,
                    report.kept_limit,
                    report.migrations_completed,
                    report.gap_median_ms,
                    report.gap_worst_ms,
                    report.kept_limit_outside,
                    report.migrations_completed
                ));
            }
            self.say(
                "completed; every page is what the guest and the device wrote, and no tick was lost or came twice",
            );
        }
        report.outcome.exit_code()
    }
}

/// Looks at the guest where it is: it has to tick, and all of RAM has to be right.
fn look(at: &Process, attempt: &mut Attempt) -> Result<(), String> {
    let running = |said| if let Said::Running { ticks } = said { Some(ticks) } else { None };
    let now = at.ask(&Order::Watch { ticks: FIRST_TICKS }, running)?;
    if attempt.source.outcome == End::Completed {
        let before = attempt.source.ticks;
        let ms = |ns: u64| ns as f64 / 1e6;
        let gap = now.first_ns.saturating_sub(before.last_ns);
        attempt.gap_ms = Some(ms(gap));
        attempt.downtime_outside_ms = Some(ms(gap.max(before.longest_gap_ns).max(now.longest_gap_ns)));
    }
    let checked = |said| if let Said::Checked(part) = said { Some(part) } else { None };
    let anew = attempt.source.outcome != End::Completed;
    let check: CheckedPart = at.ask(&Order::Check { anew }, checked)?;
    attempt.check = Some(check);
    Ok(())
}

/// Ctrl-C: cancels the migration that is under way, and lets no other begin.
#[derive(Clone, Default)]
struct Interrupt(Arc<Mutex<(bool, Vec<Orders>)>>);

impl Interrupt {
    fn listen(&self) {
        let interrupt = self.clone();
        let asked = move || {
            let mut inner = interrupt.0.lock().unwrap_or_else(PoisonError::into_inner);
            inner.0 = true;
            inner.1.iter().for_each(|orders| drop(orders.give(&Order::Cancel)));
        };
        if let Err(e) = ctrlc::set_handler(asked) {
            eprintln!("minivmm: Ctrl-C will end the program the hard way: {e}");
        }
    }

    fn tell(&self, orders: Orders) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.push(orders);
    }

    fn asked(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).0
    }
}

fn print_json(what: &impl serde::Serialize) {
    if let Ok(line) = serde_json::to_string(what) {
        print_line(&line);
    }
}

fn print_line(line: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}
