//! `pageferry send`: ships a RAM image that lies still.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::dirty::combined::Still;
use pageferry::net::Address;
use pageferry::sys::thread::process_cpu_time;
use pageferry::{Guest, HookError, Ram, Source, StateWriter, Timeouts, Verify};

use crate::image::{Stamp, block, check_kind, cut_short, encode_length, sentence};
use crate::interrupt::Interrupt;
use crate::output::{Output, on_bus_error_fail};
use crate::progress::{Side, Watch};
use crate::report::{End, Report};
use crate::sizes::{Cpus, parse_seconds, parse_size};
use crate::tls::{TlsToArgs, warn_if_open};
use crate::zero_copy::ZeroCopyArg;

/// Send a RAM image that lies still to `pageferry receive`.
///
/// Pages that were never written (holes of the file) are not read and not sent; they are holes at the other side, too.
/// Nobody may write the file meanwhile.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry send --to 10.0.0.2:4444 --ram vm.img
  pageferry send --to target.example:4444 --ram vm.img --tls-dir /etc/pageferry
  pageferry send --to unix:/run/ferry --ram vm.img --channels 4 --verify full --json
  pageferry send --to 10.0.0.2:4444 --to 10.1.0.2:4444 --ram vm.img --channels 4 --resume-window 60

Across machines, use --tls-dir, or a network that you trust.")]
pub struct Args {
    /// Where `pageferry receive` listens: HOST:PORT or unix:PATH. Several times for a receiver with several networks: the
    /// channels are spread over them, and one that fails costs only its own
    #[arg(long, value_name = "ADDR", required = true)]
    to: Vec<Address>,
    /// The image, a regular file; a length that is no multiple of the page is kept to the byte
    #[arg(long, value_name = "FILE")]
    ram: PathBuf,
    /// Data channels, 1 to 255: each is a connection, and a thread on both sides
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..))]
    channels: u8,
    /// CPUs for the sending threads, such as 0,2 or 0-3; as far as they can be had [default: the scheduler chooses,
    /// but where both sides share a host with few CPUs, both ends of a channel share one]
    #[arg(long, value_name = "LIST")]
    cpus: Option<Cpus>,
    /// Keep the session for so long when all connections are lost, and go on when the receiver is reached again; it needs
    /// the option, too
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "0")]
    resume_window: Duration,
    /// Bytes a second, such as 500M, that are sent at the most [default: no limit]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    bandwidth_max: Option<u64>,
    /// Let the kernel send pages from where they lie (MSG_ZEROCOPY) rather than copy them first: it saves CPU time on
    /// links of 25 Gbit/s and more to another host, whose pages count against the limit on locked memory (ulimit -l)
    #[arg(long, value_name = "HOW", default_value = "auto")]
    zero_copy: ZeroCopyArg,
    #[command(flatten)]
    tls: TlsToArgs,
    /// What proves that everything arrived
    #[arg(long, value_name = "HOW", default_value = "wire")]
    verify: VerifyArg,
    /// Print one JSON object a line on standard output: progress, then a report
    #[arg(long)]
    json: bool,
}

/// [`Verify`], as an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum VerifyArg {
    /// Nothing but checksums of headers
    Off,
    /// Digests of every page, as sent and as landed
    Wire,
    /// And digests of all of RAM on both sides, holes included, while nothing moves
    Full,
}

impl From<VerifyArg> for Verify {
    fn from(arg: VerifyArg) -> Verify {
        match arg {
            VerifyArg::Off => Verify::Off,
            VerifyArg::Wire => Verify::Wire,
            VerifyArg::Full => Verify::Full,
        }
    }
}

const COMMAND: &str = "send";

/// How long the receiver may take to get the file to its disk, during which it says nothing.
const SYNC_TIME: Duration = Duration::from_secs(15 * 60);

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let report = ship(args, out).unwrap_or_else(|error| Report::early(COMMAND, End::Failed, Some(error)));
    out.end(&report)
}

fn ship(args: &Args, out: Output) -> Result<Report, String> {
    let interrupt = Interrupt::listen();
    let mut image = Image::open(&args.ram)?;
    let block = block(&image.file, image.bytes, None, false).map_err(|e| e.to_string())?;
    let ram = Ram::new([block]).map_err(|e| e.to_string())?;
    let tls = args.tls.load()?;
    args.to.iter().for_each(|to| warn_if_open(to, tls.as_ref()));
    let to: Vec<_> = args.to.iter().map(Address::to_string).collect();
    on_bus_error_fail(out, COMMAND, cut_short(&args.ram), Vec::new());
    let builder = Source::builder(ram)
        .channels(args.channels)
        .cpus(args.cpus.clone().unwrap_or_default().0)
        .verify(args.verify.into())
        .zero_copy(args.zero_copy.into())
        .bandwidth_max(args.bandwidth_max.unwrap_or(0))
        .timeouts(Timeouts { hook: SYNC_TIME, ..Timeouts::default() })
        .resume_window(args.resume_window);
    let builder = match tls {
        Some(tls) => builder.tls(tls),
        None => builder,
    };
    let source = builder.connect_any(to.iter().map(String::as_str)).map_err(|e| e.to_string())?;
    interrupt.attach(source.cancel_handle());
    let watch = Watch::start(source.progress(), Side::Source, out);
    let report = source.migrate(&mut Still::new(), &mut image);
    drop(watch);
    let to = args.to.iter().map(Address::to_string).collect::<Vec<_>>().join(" --to ");
    let settle = format!("pageferry settle --to {to} --session {}", report.session);
    let mut report = Report::of_source(COMMAND, report, process_cpu_time().unwrap_or_default());
    report.settle = (report.outcome == End::Uncertain).then_some(settle);
    report.note_cpus(args.cpus.as_ref());
    // What was queued when the receiver could still throw the copy away was read after that.
    if let (End::Completed, Err(error)) = (report.outcome, image.check_still()) {
        report.outcome = End::Failed;
        report.error =
            Some(format!("{error}: the copy at the receiver may hold some of what was written, and some not"));
    }
    report.explain_missing_page("receiving pages", "the receiver's disk may be full");
    report.explain_missing_page("sending pages", &cut_short(&args.ram));
    Ok(report)
}

/// The image, in the place of a guest: it never runs.
struct Image {
    path: PathBuf,
    file: File,
    bytes: u64,
    stamp: Stamp,
}

impl Image {
    fn open(path: &Path) -> Result<Image, String> {
        // Looked at before it is opened: opening a pipe would wait for its other end.
        let metadata = std::fs::metadata(path).map_err(|e| sentence("open", path, &e))?;
        check_kind(path, &metadata)?;
        let file = File::open(path).map_err(|e| sentence("open", path, &e))?;
        let stamp = Stamp::of(&file).map_err(|e| sentence("look at", path, &e))?;
        let bytes = file.metadata().map_err(|e| sentence("look at", path, &e))?.len();
        if bytes == 0 {
            return Err(format!("{} is empty: there is nothing to send; name a RAM image", path.display()));
        }
        Ok(Image { path: path.to_owned(), file, bytes, stamp })
    }

    fn check_still(&self) -> Result<(), String> {
        let now = Stamp::of(&self.file).map_err(|e| sentence("look at", &self.path, &e))?;
        if now == self.stamp {
            return Ok(());
        }
        Err(format!("{} was written while it was sent; let it lie still", self.path.display()))
    }
}

impl Guest for Image {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(encode_length(self.bytes))
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    /// An image has no device state. By now most of it has been read: time to see whether it lay still, while the
    /// receiver can still throw it away.
    fn save_state(&mut self, _out: &mut StateWriter) -> Result<(), HookError> {
        Ok(self.check_still()?)
    }
}
