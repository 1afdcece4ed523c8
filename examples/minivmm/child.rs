//! `minivmm vmm`: one VMM process of the demo. Does what standard input says, and ends when that ends.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::ferry::{self, Berth, CancelHandle, Home, Outcome, Progress, Target};
use crate::guest::Config;
use crate::options::Shipping;
use crate::protocol::{CheckedPart, Line, Order, Said, Trial};
use crate::report::{Arrival, Departure, ms};
use crate::with_mutants::spoil;

/// How long the guest may take to tick, or to check itself.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often progress is told.
const LOOK: Duration = Duration::from_millis(50);

/// What cancels the migration that is under way.
#[derive(Clone, Default)]
struct Cancel(Arc<Mutex<Option<CancelHandle>>>);

impl Cancel {
    fn set(&self, handle: Option<CancelHandle>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = handle;
    }

    fn cancel(&self) {
        if let Some(handle) = &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            handle.cancel();
        }
    }
}

pub fn run() -> ExitCode {
    let cancel = Cancel::default();
    let orders = match listen(cancel.clone()) {
        Ok(orders) => orders,
        Err(e) => {
            eprintln!("minivmm: nobody to read orders: {e}");
            return ExitCode::FAILURE;
        }
    };
    let mut vmm = Vmm { home: None, cancel };
    for order in orders {
        match vmm.obey(order) {
            Ok(answer) => say(&answer),
            Err(error) => say(&Said::Error { error }),
        }
    }
    ExitCode::SUCCESS
}

/// Reads orders as they come. An end of them ends the process: whoever started it is gone.
fn listen(cancel: Cancel) -> io::Result<Receiver<Order>> {
    let (to, orders) = mpsc::channel();
    thread::Builder::new().name("orders".to_owned()).spawn(move || {
        for line in io::stdin().lock().lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(Order::Cancel) => cancel.cancel(),
                Ok(order) => drop(to.send(order)),
                Err(e) => say(&Said::Error { error: format!("that is no order: {e}: {line}") }),
            }
        }
        std::process::exit(0);
    })?;
    Ok(orders)
}

fn say(what: &Said) {
    let mut out = io::stdout().lock();
    if let Ok(line) = serde_json::to_string(what) {
        // Nobody listening is no reason to stop; standard input tells of that.
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

struct Vmm {
    /// The VM that is at home here.
    home: Option<Home>,
    cancel: Cancel,
}

impl Vmm {
    fn obey(&mut self, order: Order) -> Result<Said, String> {
        match order {
            Order::Boot { config } => self.boot(&config),
            Order::Receive => self.receive(),
            Order::Send { to, how, trial } => self.send(&to, &how, trial),
            Order::Watch { ticks } => self.watch(ticks),
            Order::Check { anew } => self.check(anew),
            Order::Cancel => Err("that is not for here".to_owned()),
        }
    }

    fn home(&mut self) -> Result<&mut Home, String> {
        self.home.as_mut().ok_or_else(|| "there is no guest here".to_owned())
    }

    fn boot(&mut self, config: &Config) -> Result<Said, String> {
        let home = ferry::new_home(config).map_err(|e| e.to_string())?;
        home.vm.fill()?;
        home.vm.resume()?;
        self.home = Some(home);
        self.watch(config.vcpus)
    }

    fn watch(&mut self, ticks: u64) -> Result<Said, String> {
        let vm = &self.home()?.vm;
        if !vm.device().await_ticks(ticks, PATIENCE) {
            let why = vm.vcpus().broken();
            return Err(format!("the guest does not tick: {}", why.as_deref().unwrap_or("nobody knows why")));
        }
        Ok(Said::Running { ticks: vm.device().ticks() })
    }

    fn receive(&mut self) -> Result<Said, String> {
        if self.home.is_some() {
            return Err("there is a guest here already".to_owned());
        }
        let target = Target::builder().listen("127.0.0.1:0").map_err(|e| e.to_string())?;
        self.cancel.set(Some(target.cancel_handle()));
        let addr = target.address().map(|address| address.to_string()).unwrap_or_default();
        say(&Said::Listening { addr });
        let mut berth = Berth(None);
        let report = target.receive(&mut berth);
        self.cancel.set(None);
        if report.outcome == Outcome::Completed {
            self.home = berth.0;
        }
        Ok(Said::Received(Box::new(Arrival::new(report))))
    }

    fn send(&mut self, to: &str, how: &Shipping, trial: Trial) -> Result<Said, String> {
        let mut home = self.home.take().ok_or("there is no guest here")?;
        home.dirty = spoil(home.dirty, trial.mutant);
        home.vm.device().mark();
        let source = match ferry::source(&home, to, how) {
            Ok(source) => source,
            Err(e) => {
                self.home = Some(home);
                return Err(e.to_string());
            }
        };
        let cancel = source.cancel_handle();
        self.cancel.set(Some(cancel.clone()));
        if trial.cancel_while_paused {
            let cancel = cancel.clone();
            home.vm.once_paused(move || {
                cancel.cancel();
            });
        }
        let progress = source.progress();
        let report = thread::scope(|scope| {
            // Both threads end when these are dropped.
            let (_cancelled, uncancelled) = mpsc::channel::<()>();
            let (_over, not_over) = mpsc::channel::<()>();
            if let Some(us) = trial.cancel_after_us {
                scope.spawn(move || {
                    if uncancelled.recv_timeout(Duration::from_micros(us)) == Err(RecvTimeoutError::Timeout) {
                        cancel.cancel();
                    }
                });
            }
            scope.spawn(move || {
                while not_over.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    say(&Said::Progress(line(&progress)));
                }
            });
            source.migrate(&mut home.dirty, &mut home.vm)
        });
        self.cancel.set(None);
        let departure =
            Departure::new(report, home.vm.device().ticks(), home.vm.config().hot_bytes, &home.costs.read());
        // A guest that is gone leaves nothing behind. One that is in doubt stays, and stays paused.
        if departure.outcome != crate::report::End::Completed {
            self.home = Some(home);
        }
        Ok(Said::Sent(Box::new(departure)))
    }

    fn check(&mut self, anew: bool) -> Result<Said, String> {
        let vm = &self.home()?.vm;
        let begun = Instant::now();
        let checked = if anew { vm.check(PATIENCE) } else { vm.checked(PATIENCE) };
        let state = vm.device().state();
        let word = |found: Result<(), String>| found.err().unwrap_or_else(|| "ok".to_owned());
        Ok(Said::Checked(CheckedPart {
            guest_pages: checked.guest_pages,
            guest: word(checked.guest),
            device: word(checked.device),
            ticks_lost: state.ticks_lost,
            ticks_doubled: state.ticks_doubled,
            ms: ms(begun.elapsed()),
        }))
    }
}

fn line(progress: &Progress) -> Line {
    let now = progress.now();
    Line {
        stage: format!("{:?}", now.stage).to_lowercase(),
        rounds: now.rounds,
        ram_bytes: now.ram_bytes,
        untouched_bytes: now.untouched_bytes,
        pushed_bytes: now.pushed_bytes,
        payload_bytes: now.channels.payload_bytes,
        wire_bytes: now.channels.wire_bytes,
        rate_bytes_s: now.rate,
        dirty_rate_bytes_s: now.dirty_rate,
        bytes_left: now.bytes_left,
        throttle: now.throttle,
    }
}
