//! One run from its first connection to its verdict, and the second attempt where the first one failed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use pageferry::precopy::{AtLimit, Overrun};
use pageferry::source::SourceBuilder;
use pageferry::{Outcome, Progress, Source, SourceReport, Target, TargetReport, Timeouts, Verify};

use crate::expect::{self, Must};
use crate::guest::{ChaosGuest, ChaosIncoming, Owner};
use crate::plan::{Class, Plan};
use crate::proxy::{Fired, Phase, Proxy, Shared};
use crate::vmm;

/// The longest that a run may take, its second attempt included, on a machine that is busy: whatever takes longer hangs.
const RUN_TIME: Duration = Duration::from_secs(120);

const HANGS: &str = "it HANGS";
/// A shorter time than this may pass without any fault, on a machine that is busy.
const SURE_MS: u64 = 2000;

fn timeouts(plan: &Plan) -> Timeouts {
    let stall = Duration::from_millis(plan.stall_ms);
    // In the time of a hook an unoptimised build hashes all of RAM.
    Timeouts { connect: stall, hello: stall, silence: stall, hook: stall * 8, stall }
}

/// What a run came to.
#[derive(Debug)]
pub struct Record {
    pub plan: Plan,
    pub sent: SourceReport,
    pub fired: Vec<Fired>,
    pub time: Duration,
}

impl Record {
    /// Faults that came when they still mattered.
    pub fn in_time(&self) -> impl Iterator<Item = &Fired> {
        self.fired.iter().filter(|fired| fired.phase != Phase::After)
    }
}

/// What whoever waits for a run can look at.
pub struct Views {
    source: Progress,
    target: Progress,
    proxy: Arc<Shared>,
}

pub type Window = Mutex<Option<Views>>;

fn source_of(guest: &ChaosGuest, plan: &Plan) -> SourceBuilder {
    Source::builder(guest.ram.clone())
        .channels(plan.channels)
        .verify(plan.verify)
        .timeouts(timeouts(plan))
        .resume_window(Duration::from_millis(plan.window_ms))
        .downtime_limit(Duration::from_millis(plan.downtime_ms_limit))
        .rounds_max(plan.rounds_max)
        .at_limit(AtLimit::SwitchOver)
        .overrun(match plan.retries {
            0 => Overrun::Accept,
            tries => Overrun::Retry { tries },
        })
}

struct Trip {
    sent: SourceReport,
    received: TargetReport,
    incoming: ChaosIncoming,
}

fn receive(target: Target, mut incoming: ChaosIncoming) -> thread::JoinHandle<(TargetReport, ChaosIncoming)> {
    thread::spawn(move || (target.receive(&mut incoming), incoming))
}

/// Carries out a plan. An error is what is wrong with what came of it.
pub fn run(plan: &Plan, view: &Window) -> Result<Record, String> {
    let begun = Instant::now();
    let mut guest = ChaosGuest::new(plan.guest, plan.seed);
    let window = Duration::from_millis(plan.window_ms);
    let target = Target::builder().timeouts(timeouts(plan)).resume_window(window);
    let target = target.listen("127.0.0.1:0").map_err(|e| e.to_string())?;
    let proxy = Proxy::before(&target.address().unwrap().to_string(), plan);
    let source = source_of(&guest, plan).connect(proxy.address()).map_err(|e| e.to_string())?;
    let views = Views { source: source.progress(), target: target.progress(), proxy: proxy.shared.clone() };
    *view.lock().unwrap() = Some(views);
    let cancel = target.cancel_handle();
    let mut incoming = ChaosIncoming::new(&guest.owner);
    (guest.watcher, incoming.watcher) = (Some(proxy.shared.clone()), Some(proxy.shared.clone()));
    let receiving = receive(target, incoming);
    let mut dirty = guest.dirty.clone();
    let sent = source.migrate(&mut dirty, &mut guest);
    let fired = proxy.shared.fired();
    proxy.end();
    // One that has seen no good Hello still waits for a source.
    cancel.cancel();
    let (received, incoming) = receiving.join().map_err(|_| "the target panicked")?;
    guest.watcher = None;
    let trip = Trip { sent, received, incoming };
    judge(plan, &guest, &trip, &fired)?;
    if matches!(trip.sent.outcome, Outcome::Failed(_)) {
        second_attempt(plan, &mut guest).map_err(|why| format!("{why}; before that {}", trip.sent.outcome))?;
    }
    Ok(Record { plan: plan.clone(), sent: trip.sent, fired, time: begun.elapsed() })
}

fn second_attempt(plan: &Plan, guest: &mut ChaosGuest) -> Result<(), String> {
    (guest.paused, guest.resumed) = (0, 0);
    // Nothing is in its way, and a machine that is busy is not to be: no short time limit.
    let target = Target::builder().listen("127.0.0.1:0").map_err(|e| e.to_string())?;
    let to = target.address().unwrap().to_string();
    let source = source_of(guest, plan).timeouts(Timeouts::default());
    let source = source.connect(&to).map_err(|e| e.to_string())?;
    let receiving = receive(target, ChaosIncoming::new(&guest.owner));
    let mut dirty = guest.dirty.clone();
    let sent = source.migrate(&mut dirty, guest);
    let (received, incoming) = receiving.join().map_err(|_| "the target of the second attempt panicked")?;
    let trip = Trip { sent, received, incoming };
    check(trip.sent.outcome == Outcome::Completed, || {
        format!("the second attempt, over a clean path: {} and {}", trip.sent.outcome, trip.received.outcome)
    })?;
    arrived(plan, guest, &trip).map_err(|why| format!("the second attempt: {why}"))
}

fn check(holds: bool, else_say: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(else_say()) }
}

/// Whether what both sides say is true, and all that had to come of it.
fn judge(plan: &Plan, guest: &ChaosGuest, trip: &Trip, fired: &[Fired]) -> Result<(), String> {
    let Trip { sent, received, incoming } = trip;
    let both = || format!("source: {}; target: {}", sent.outcome, received.outcome);
    let complaints = guest.owner.complaints();
    check(complaints.is_empty(), || format!("{complaints:?}; {}", both()))?;
    let owner: &Owner = &guest.owner;
    match &sent.outcome {
        Outcome::Completed => arrived(plan, guest, trip)?,
        Outcome::Failed(_) => {
            check(expect::must(plan) == Must::EndTruthfully, || {
                format!("it had to complete: {}; {:?}", both(), sent.remarks)
            })?;
            let reason = !fired.is_empty() || plan.class == Class::DropAtAccept || plan.stall_ms < SURE_MS;
            check(reason, || format!("for nothing: {}", both()))?;
            check(guest.resumed == guest.paused, || format!("paused {}, resumed {}", guest.paused, guest.resumed))?;
            check(owner.is_at_source(), || format!("nobody runs the guest: {}", both()))?;
            check(received.outcome != Outcome::Completed && incoming.runs == 0, both)?;
            let prepared = u32::from(incoming.ram.is_some());
            check(incoming.discards == prepared, || format!("discarded {} times: {}", incoming.discards, both()))?;
        }
        Outcome::Uncertain(_) => {
            check(expect::may_be_uncertain(plan), || format!("uncertain for no reason: {}", both()))?;
            check(guest.paused == guest.resumed + 1, || format!("paused {}, resumed {}", guest.paused, guest.resumed))?;
            if received.outcome == Outcome::Completed {
                check(owner.is_at_target(), both)?;
                same_bytes(guest, incoming)?;
            } else {
                check(incoming.runs == 0, both)?;
            }
        }
        Outcome::Cancelled => return Err(format!("nobody cancelled it: {}", both())),
    }
    Ok(())
}

/// Whether the guest runs at the target, with every byte that it had, and only there.
fn arrived(plan: &Plan, guest: &ChaosGuest, trip: &Trip) -> Result<(), String> {
    let Trip { sent, received, incoming } = trip;
    check(received.outcome == Outcome::Completed, || format!("completed, and the target: {}", received.outcome))?;
    check(guest.owner.is_at_target(), || "completed, and the guest is not at the target".to_owned())?;
    check((incoming.runs, incoming.discards) == (1, 0), || {
        format!("it ran {} times and was discarded {} times", incoming.runs, incoming.discards)
    })?;
    // Whoever loses all connections while paused lets the guest run on until they are back.
    let resumed = sent.overruns..=sent.overruns + sent.resumes;
    check(guest.paused == 1 + guest.resumed && resumed.contains(&guest.resumed), || {
        format!(
            "paused {}, resumed {}; {} overruns, {} resumes",
            guest.paused, guest.resumed, sent.overruns, sent.resumes
        )
    })?;
    check(sent.verified == (plan.verify != Verify::Off), || "it is not verified".to_owned())?;
    same_bytes(guest, incoming)
}

fn same_bytes(guest: &ChaosGuest, incoming: &ChaosIncoming) -> Result<(), String> {
    let arrived = incoming.ram.as_ref().ok_or("it was never prepared for")?;
    let wrong = vmm::first_difference(&guest.frozen, arrived);
    check(wrong.is_none(), || format!("WRONG BYTES: {wrong:?} is not what it was at the hand-over"))?;
    let moved = vmm::first_difference(&guest.frozen, &guest.ram);
    check(moved.is_none(), || format!("{moved:?} of the source changed after the hand-over"))?;
    check(incoming.state == guest.state, || "the device state differs".to_owned())
}

/// Carries out a plan under a watch: a run that does not end in time is a failure, and where it stands is printed.
pub fn watched(plan: &Plan) -> Result<Record, String> {
    let window = Arc::new(Window::default());
    // Nothing is said through it: its end is that of the run.
    let (alive, ended) = channel::<()>();
    let (job, view) = (plan.clone(), window.clone());
    let runner = thread::Builder::new().name(format!("run-{}", plan.seed));
    let runner = runner.spawn(move || {
        let _alive = alive;
        run(&job, &view)
    });
    // One that hangs keeps its thread: the process ends with the failure.
    if ended.recv_timeout(RUN_TIME) == Err(RecvTimeoutError::Timeout) {
        crate::watch::print_where_all_stand();
        if let Some(Views { source, target, proxy }) = &*window.lock().unwrap() {
            eprintln!("source: {:?}\ntarget: {:?}", source.now(), target.now());
            proxy.seen().iter().for_each(|line| eprintln!("{line}"));
        }
        return Err(format!("{HANGS}: not over after {} s", RUN_TIME.as_secs()));
    }
    runner.unwrap().join().unwrap_or_else(|panic| Err(format!("it panicked: {}", words(panic))))
}

fn words(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
}

/// Carries out plans, several at a time; gives what came of them, and a line for each that failed.
pub fn all(plans: Vec<Plan>, at_once: usize, replay: impl Fn(u64) -> String + Sync) -> (Vec<Record>, Vec<String>) {
    let queue = Mutex::new(plans.into_iter());
    let (records, failures) = (Mutex::new(Vec::new()), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..at_once {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap().next();
                    let Some(plan) = next else { return };
                    match watched(&plan) {
                        Ok(record) => {
                            println!("seed {}, {plan}: {} in {:?}", plan.seed, record.sent.outcome, record.time);
                            records.lock().unwrap().push(record);
                        }
                        Err(why) => {
                            let line =
                                format!("seed {} FAILED, {plan}: {why}; again: {}", plan.seed, replay(plan.seed));
                            eprintln!("{line}");
                            failures.lock().unwrap().push(line);
                            if why.contains(HANGS) {
                                // No more are begun beside one that hangs, and that a debugger has stopped with all others.
                                queue.lock().unwrap().by_ref().for_each(drop);
                            }
                        }
                    }
                }
            });
        }
    });
    (records.into_inner().unwrap(), failures.into_inner().unwrap())
}

/// What came of a class.
#[derive(Clone, Copy, Default)]
struct Row {
    runs: u32,
    faults: usize,
    late: usize,
    paused: usize,
    outcomes: [u32; 3],
}

/// Runs and outcomes of each class.
pub struct Counts(BTreeMap<Class, Row>);

impl Counts {
    pub fn of(records: &[Record]) -> Counts {
        let mut rows = BTreeMap::<_, Row>::new();
        for record in records {
            let row = rows.entry(record.plan.class).or_default();
            row.runs += 1;
            let in_time = record.in_time().count();
            row.faults += in_time;
            row.paused += record.in_time().filter(|fired| fired.phase == Phase::Paused).count();
            row.late += record.plan.faults.len().saturating_sub(in_time);
            row.outcomes[match record.sent.outcome {
                Outcome::Completed => 0,
                Outcome::Failed(_) | Outcome::Cancelled => 1,
                Outcome::Uncertain(_) => 2,
            }] += 1;
        }
        Counts(rows)
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "class            runs  faults  paused  late  completed  failed  uncertain")?;
        for (class, Row { runs, faults, paused, late, outcomes: [completed, failed, uncertain] }) in &self.0 {
            let class = format!("{class:?}");
            writeln!(f, "{class:15} {runs:5} {faults:7} {paused:7} {late:5} {completed:10} {failed:7} {uncertain:10}")?;
        }
        Ok(())
    }
}
