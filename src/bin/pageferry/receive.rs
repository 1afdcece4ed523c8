//! `pageferry receive`: waits for one RAM image and writes it to a file.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use pageferry::memory::Initial;
use pageferry::net::Address;
use pageferry::sys::thread::process_cpu_time;
use pageferry::target::Witness;
use pageferry::wire::control::Setup;
use pageferry::{Failure, HookError, Incoming, Ram, Target};
use serde::Serialize;

use crate::image::{Arriving, decode_length, no_room};
use crate::interrupt::Interrupt;
use crate::output::{Output, on_bus_error_fail};
use crate::progress::{Side, Watch};
use crate::report::{End, Report};
use crate::sizes::{Cpus, human, parse_seconds};
use crate::tls::{TlsArgs, warn_if_open};

/// Wait for one RAM image from `pageferry send`, and write it to a file.
///
/// The file appears under its name when it is whole and on the disk, not before. The sender chooses channels and
/// verification. Holes stay holes, except under --verify full on tmpfs, where reading a hole fills it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry receive --listen 0.0.0.0:4444 --ram vm.img
  pageferry receive --listen 127.0.0.1:0 --ram vm.img --json    # the first line tells the port
  pageferry receive --listen 0.0.0.0:4444 --ram vm.img --tls-dir /etc/pageferry

Without --tls-dir, anybody who reaches the address can send: listen where only friends are.")]
pub struct Args {
    /// Where to listen: HOST:PORT (port 0: any that is free) or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    /// The file to write; one of the image's length is replaced
    #[arg(long, value_name = "FILE")]
    ram: PathBuf,
    /// Replace a file of another length, too
    #[arg(long)]
    force: bool,
    /// Keep what has come for so long when all connections are lost, for a sender with this option to go on
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "0")]
    resume_window: Duration,
    /// CPUs for the receiving threads, such as 0,2 or 0-3; as far as they can be had [default: the scheduler chooses,
    /// but where both sides share a host with few CPUs, both ends of a channel share one]
    #[arg(long, value_name = "LIST")]
    cpus: Option<Cpus>,
    /// Seconds to stay after the report where the sender may not know how it ended, and to answer `pageferry settle`;
    /// 0 for not at all
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    answer_queries: u32,
    #[command(flatten)]
    tls: TlsArgs,
    /// Print one JSON object a line on standard output: where it listens, progress, then a report
    #[arg(long)]
    json: bool,
}

const COMMAND: &str = "receive";

/// The first line of JSON.
#[derive(Serialize)]
pub struct Listening {
    event: &'static str,
    addr: String,
}

impl Listening {
    pub fn at(address: &Address) -> Listening {
        Listening { event: "listening", addr: address.to_string() }
    }
}

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let interrupt = Interrupt::listen();
    match take_in(args, out, &interrupt) {
        Ok((report, mut witness)) => {
            // The report first: nobody who waits for it waits for what may still be asked.
            let code = out.end(&report);
            interrupt.attach(witness.cancel_handle());
            witness.answer(Duration::from_secs(args.answer_queries.into()));
            code
        }
        Err(error) => out.end(&Report::early(COMMAND, End::Failed, Some(error))),
    }
}

fn take_in(args: &Args, out: Output, interrupt: &Interrupt) -> Result<(Report, Witness), String> {
    let arriving = Arriving::new(&args.ram, args.force)?;
    let cpus = args.cpus.clone().unwrap_or_default().0;
    let tls = args.tls.load()?;
    warn_if_open(&args.listen, tls.as_ref());
    let builder = match tls {
        Some(tls) => Target::builder().tls(tls),
        None => Target::builder(),
    };
    let target = builder.cpus(cpus).resume_window(args.resume_window);
    let target = target.listen(&args.listen.to_string()).map_err(|e| listen_advice(&e))?;
    interrupt.attach(target.cancel_handle());
    // Full verification reads holes, which on tmpfs need memory.
    on_bus_error_fail(out, COMMAND, no_room(&args.ram), arriving.partial_path().into_iter().collect());
    let at = target.address().ok_or("the address that is listened on is not known")?;
    out.event(&Listening::at(&at));
    out.say(format_args!("listening; send with: pageferry send --to {at} --ram FILE"));
    let watch = Watch::start(target.progress(), Side::Target, out);
    let mut image = Image { arriving, bytes: 0 };
    let (report, witness) = target.receive_and_witness(&mut image);
    drop(watch);
    let mut report = Report::of_target(COMMAND, report, process_cpu_time().unwrap_or_default());
    report.session = witness.session().map(|session| session.to_string());
    if witness.is_needed() && args.answer_queries > 0 {
        let seconds = args.answer_queries;
        report.remarks.push(format!("the sender may not know how it ended: it may ask for {seconds} s"));
    }
    report.note_cpus(args.cpus.as_ref());
    let full = format!("the disk of {} may be full, make room", args.ram.display());
    report.explain_missing_page("receiving pages", &full);
    if report.outcome == End::Completed {
        report.file = Some(format!("{}, {}", args.ram.display(), human(image.bytes)));
    }
    Ok((report, witness))
}

/// What to do about an address that cannot be had.
pub fn listen_advice(failure: &Failure) -> String {
    let advice = match failure {
        Failure::Listen { reason, address } => match reason.errno {
            Some(libc::EADDRINUSE) if address.starts_with("unix:") => {
                "; if nobody listens there any more, remove the socket's file"
            }
            Some(libc::EADDRINUSE) => "; choose another port, or 0 for one that is free",
            Some(libc::EACCES) => "; choose a port above 1023, or a path that may be written",
            Some(libc::EADDRNOTAVAIL) => "; it is not an address of this machine",
            Some(libc::ENOENT) => "; the directory has to be there",
            _ => "",
        },
        _ => "",
    };
    format!("{failure}{advice}")
}

/// The file, in the place of a VMM.
struct Image {
    arriving: Arriving,
    bytes: u64,
}

impl Image {
    fn path(&self) -> &Path {
        self.arriving.destination()
    }
}

impl Incoming for Image {
    fn prepare(&mut self, setup: &Setup) -> Result<Ram, HookError> {
        self.bytes = decode_length(&setup.opaque)?;
        let [info] = &setup.blocks[..] else {
            return Err(format!("an image is one RAM block, {} came", setup.blocks.len()).into());
        };
        if self.bytes.checked_next_multiple_of(info.page_size.bytes()) != Some(info.bytes) {
            return Err(format!("{} bytes of RAM do not make an image of {}", info.bytes, self.bytes).into());
        }
        // Fresh, all of it a hole: nothing has to be made zero.
        let block = self.arriving.map(self.bytes, info.page_size)?.with_initial(Initial::Zeroed);
        Ok(Ram::new([block])?)
    }

    /// An image has no device state. What is here is as good as said to be, once it is on the disk: the source can
    /// still be told if it is not.
    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        if state.read(&mut [0])? != 0 {
            return Err(format!("device state came with the image for {}", self.path().display()).into());
        }
        Ok(self.arriving.sync()?)
    }

    fn run(&mut self) -> Result<(), HookError> {
        Ok(self.arriving.land()?)
    }
}
