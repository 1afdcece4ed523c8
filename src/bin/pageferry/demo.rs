//! `pageferry demo`: migrates a made-up guest to another process on this machine, and proves that it arrived.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::ValueEnum;
use pageferry::memory::{Backing, MemoryError};
use pageferry::sys::thread::process_cpu_time;
use pageferry::units::PageSize;
use pageferry::{DirtyBitmap, DirtySource, Ram, RamBlock, Source, WriteProtect};
use serde::Serialize;

use crate::child::Child;
use crate::fill::{Kind, Plan, fill};
use crate::guest::DemoGuest;
use crate::interrupt::Interrupt;
use crate::limits::Limits;
use crate::output::Output;
use crate::progress::{Side, Watch};
use crate::report::{DemoPart, End, Report, TargetPart};
use crate::send::VerifyArg;
use crate::sizes::{Cpus, human, ms, parse_ram_size};
use crate::tls::TlsToArgs;
use crate::writers::{Work, Writers};
use crate::zero_copy::ZeroCopyArg;

/// Migrate a made-up guest, which keeps writing, to a process started for it; prove that every byte arrived.
///
/// Half of the guest's RAM is filled with random bytes, 20 % with text, 15 % was written and is zero again, 15 % was
/// never touched. Threads in the place of vCPUs dirty all but the last while RAM is shipped.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry demo
  pageferry demo --ram 4G --channels 4 --writers 2 --dirty-rate 400 --verify wire
  pageferry demo --ram 512M --transport unix --json | tail -n 1")]
pub struct Args {
    /// RAM of the guest, such as 512M or 2G (powers of 1024), in multiples of 64K
    #[arg(long, value_name = "SIZE", default_value = "2G", value_parser = parse_ram_size)]
    ram: u64,
    /// Data channels, 1 to 255: each is a connection, and a thread on both sides
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    channels: u8,
    /// CPUs for the shipping threads, such as 0,1 or 0-3; as far as they can be had [default: the scheduler chooses,
    /// but where both sides share a host with few CPUs, both ends of a channel share one]
    #[arg(long, value_name = "LIST")]
    cpus: Option<Cpus>,
    /// Threads that dirty RAM, 0 to 64
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(..=64))]
    writers: u8,
    /// MiB that they dirty a second, all together; 0 for none. Every write is to a page chosen anew
    #[arg(long, value_name = "MIB_S", default_value_t = 100, value_parser = clap::value_parser!(u32).range(..=1_048_576))]
    dirty_rate: u32,
    #[command(flatten)]
    limits: Limits,
    /// How the guest travels
    #[arg(long, value_name = "HOW", default_value = "tcp")]
    transport: Transport,
    /// Let the kernel send pages from where they lie (MSG_ZEROCOPY) rather than copy them first: it saves CPU time on
    /// links of 25 Gbit/s and more to another host, whose pages count against the limit on locked memory (ulimit -l)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    zero_copy: ZeroCopyArg,
    #[command(flatten)]
    tls: TlsToArgs,
    /// What proves that everything arrived
    #[arg(long, value_name = "HOW", default_value = "full")]
    verify: VerifyArg,
    /// How writes are noticed
    #[arg(long, value_name = "HOW", default_value = "auto")]
    tracking: Tracking,
    /// Number from which the contents of RAM, and where writes go, are derived
    #[arg(long, value_name = "NUMBER", default_value_t = 1)]
    seed: u64,
    /// Print one JSON object a line on standard output: progress, then a report
    #[arg(long)]
    json: bool,
}

/// How the guest travels.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum Transport {
    /// TCP over the loopback device
    Tcp,
    /// A Unix socket in a private folder
    Unix,
}

impl Transport {
    fn word(self) -> &'static str {
        match self {
            Transport::Tcp => "tcp",
            Transport::Unix => "unix",
        }
    }
}

/// How writes are noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Tracking {
    /// By write protection where the kernel has it, else by a bitmap
    Auto,
    /// By the kernel: userfaultfd and PAGEMAP_SCAN, Linux 6.7 or later
    WriteProtect,
    /// The writers mark a bitmap themselves, as a VMM's devices do
    Bitmap,
}

/// A line of JSON: the target's process is there.
#[derive(Serialize)]
struct Started {
    event: &'static str,
    pid: u32,
    addr: String,
}

const COMMAND: &str = "demo";
/// How long writers are waited for, to see that they run on.
const PATIENCE: Duration = Duration::from_secs(1);

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let report = migrate(args, out).unwrap_or_else(|error| Report::early(COMMAND, End::Failed, Some(error)));
    out.end(&report)
}

fn migrate(args: &Args, out: Output) -> Result<Report, String> {
    let interrupt = Interrupt::listen();
    let tls = args.tls.load()?;
    let (ram, page_bytes) = ram(args.ram)?;
    let plan = Plan::new(ram.pages(), args.seed);
    let Some((digest, fill_time)) = fill_ram(&ram, &plan, &interrupt) else {
        return Ok(Report::early(COMMAND, End::Cancelled, Some("cancelled".to_owned())));
    };
    let of_kind = |kind| plan.pages_of(kind) * page_bytes;
    let [random, text, zeroed, untouched] = [Kind::Random, Kind::Text, Kind::Zeroed, Kind::Untouched].map(of_kind);
    out.say(format_args!(
        "guest: {} of RAM, filled in {:.1} s: {} random, {} text, {} zeroed, {} never touched",
        human(args.ram),
        fill_time.as_secs_f64(),
        human(random),
        human(text),
        human(zeroed),
        human(untouched)
    ));

    let tracker = Tracker::new(args.tracking, &ram)?;
    let writers = Writers::new(Work {
        ram: ram.clone(),
        seed: args.seed,
        writers: args.writers.into(),
        pages_per_second: (u64::from(args.dirty_rate) << 20) / page_bytes,
        touched: plan.touched(),
        marks: tracker.marks,
    });
    let child = Child::start(&child_arguments(args))?;
    out.event(&Started { event: "target", pid: child.pid(), addr: child.address.to_string() });
    out.say(format_args!("target: process {} at {}", child.pid(), child.address));
    let source = Source::builder(ram)
        .channels(args.channels)
        .cpus(args.cpus.clone().unwrap_or_default().0)
        .verify(args.verify.into())
        .zero_copy(args.zero_copy.into());
    let source = match tls {
        Some(tls) => source.tls(tls),
        None => source,
    };
    let source = args.limits.set(source)?.connect(&child.address.to_string()).map_err(|e| e.to_string())?;
    interrupt.attach(source.cancel_handle());

    let mut guest = DemoGuest { writers };
    guest.writers.start().map_err(|e| format!("cannot start the writers: {e}"))?;
    let watch = Watch::start(source.progress(), Side::Source, out);
    let cpu_before = process_cpu_time().unwrap_or_default();
    let mut dirty = tracker.source;
    let report = source.migrate(&mut dirty, &mut guest);
    let cpu = process_cpu_time().unwrap_or_default().saturating_sub(cpu_before);
    drop(watch);
    let mut report = Report::of_source(COMMAND, report, cpu);
    report.note_cpus(args.cpus.as_ref());
    // Where the source owns the guest, it runs: that is what "cancelled" and "failed" promise.
    let owned_here = matches!(report.outcome, End::Failed | End::Cancelled);
    let guest_runs_on = owned_here && guest.writers.go_on(PATIENCE);
    if owned_here && !guest_runs_on && guest.writers.len() > 0 {
        report.remarks.push("the guest should run on here, and its writers write nothing".to_owned());
    }
    let (target, complaints) = child.finish();
    if !complaints.is_empty() {
        report.remarks.push(format!("the target's process: {complaints}"));
    }
    guest.writers.stop();
    report.remarks.extend(tracker.remark);
    add_target(&mut report, target.as_ref());
    let (pages_written, ran) = (guest.writers.pages_written(), guest.writers.ran().as_secs_f64());
    report.demo = Some(DemoPart {
        seed: args.seed,
        transport: args.transport.word(),
        tracking: tracker.word,
        random_bytes: random,
        text_bytes: text,
        zeroed_bytes: zeroed,
        never_touched_bytes: untouched,
        ram_digest: format!("{digest:016x}"),
        fill_ms: ms(fill_time),
        writers: guest.writers.len(),
        dirty_rate_asked_mib_s: f64::from(args.dirty_rate),
        dirty_rate_mib_s: (pages_written * page_bytes) as f64 / (1 << 20) as f64 / ran.max(1e-6),
        pages_written,
        guest_runs_on,
        target,
    });
    Ok(report)
}

/// One block of anonymous memory in the smallest pages of this host, and how large they are.
fn ram(bytes: u64) -> Result<(Ram, u64), String> {
    let make = |page_size| RamBlock::anonymous("ram", 0, bytes, page_size, Backing::Base);
    let made = match make(PageSize::SIZE_4K) {
        Err(MemoryError::PageTooSmall { host_page_bytes, .. }) => {
            make(u32::try_from(host_page_bytes).ok().and_then(PageSize::new).unwrap_or(PageSize::SIZE_64K))
        }
        result => result,
    };
    let block = made.map_err(|e| format!("cannot have {} of RAM: {e}; try a smaller --ram", human(bytes)))?;
    let page_bytes = block.page_size().bytes();
    Ok((Ram::new([block]).map_err(|e| e.to_string())?, page_bytes))
}

/// Fills RAM; `None` if that was interrupted.
fn fill_ram(ram: &Ram, plan: &Plan, interrupt: &Interrupt) -> Option<(u64, Duration)> {
    let begun = Instant::now();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    fill(ram, plan, threads, &|| interrupt.asked()).map(|digest| (digest, begun.elapsed()))
}

/// What notices writes.
struct Tracker {
    word: &'static str,
    source: Box<dyn DirtySource>,
    /// Where writers mark, if they have to.
    marks: Option<DirtyBitmap>,
    remark: Option<String>,
}

impl Tracker {
    fn new(how: Tracking, ram: &Ram) -> Result<Tracker, String> {
        let mut remark = None;
        if how != Tracking::Bitmap {
            match WriteProtect::new() {
                Ok(source) => {
                    return Ok(Tracker { word: "write-protect", source: Box::new(source), marks: None, remark });
                }
                Err(e) if how == Tracking::WriteProtect => return Err(format!("no write protection: {e}")),
                Err(e) => remark = Some(format!("writers mark a bitmap, as there is no write protection here: {e}")),
            }
        }
        let bitmap = DirtyBitmap::for_ram(ram);
        Ok(Tracker { word: "bitmap", source: Box::new(bitmap.clone()), marks: Some(bitmap), remark })
    }
}

fn child_arguments(args: &Args) -> Vec<OsString> {
    let mut arguments = vec![OsString::from("--transport"), args.transport.word().into()];
    if let Some(cpus) = &args.cpus {
        // The receiving threads begin where the sending ones end, so that they share no CPU that they need not share.
        let mut list = cpus.0.clone();
        let taken = usize::from(args.channels) % list.len().max(1);
        list.rotate_left(taken);
        let list: Vec<_> = list.iter().map(usize::to_string).collect();
        arguments.extend(["--cpus".into(), list.join(",").into()]);
    }
    if let Some(dir) = &args.tls.own.tls_dir {
        arguments.extend(["--tls-dir".into(), dir.into()]);
    }
    arguments
}

/// What both sides cost; and whether both say the same.
fn add_target(report: &mut Report, target: Option<&TargetPart>) {
    let Some(target) = target else {
        if report.outcome == End::Completed {
            report.outcome = End::Failed;
            report.error =
                Some("the target's process ended without a report, although it said that the guest runs".into());
        }
        return;
    };
    report.cpu_s += target.cpu_s;
    report.recv_syscalls = Some(target.recv_syscalls);
    report.remarks.extend(target.remarks.iter().map(|remark| format!("at the target: {remark}")));
    if report.outcome == End::Completed && (target.outcome != End::Completed || target.verified != report.verified) {
        report.outcome = End::Failed;
        report.error = Some("the target's process contradicts: for it the migration did not complete like that".into());
    }
}
