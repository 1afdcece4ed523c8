//! `pageferry qemu receive`: takes one migration from QEMU, and stores it.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use pageferry::digest::Contents;
use pageferry::net::Address;
use pageferry::qemu::wire::{Barrier, Compression, Dialect};
use pageferry::qemu::{Qemu, Seen};
use pageferry::sys::thread::process_cpu_time;
use pageferry::wire::control::Setup;
use pageferry::{HookError, Incoming, Ram, Target};

use super::end;
use super::words::{self, TRUSTED};
use crate::image::no_room;
use crate::interrupt::Interrupt;
use crate::output::{Output, on_bus_error_fail};
use crate::progress::{Side, Watch};
use crate::receive::{Listening, listen_advice};
use crate::report::{End, Report};
use crate::sizes::{Cpus, human, ms};
use crate::store::{Counters, Facts, Stored, Uuid, Writer, contents};
use crate::tls::warn_if_far;

/// Take one migration from QEMU, and store it: its RAM, and the state of its devices.
///
/// The source is told that all is well when everything is checked and on the disk, not before. Ask for an answer with
/// QEMU's capability return-path: without it QEMU takes what it has sent for received. Compressed pages are taken without
/// being told.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry qemu receive --listen 0.0.0.0:4444 --out vm.store
  pageferry qemu receive --listen unix:/run/ferry --channels 8 --out vm.store --json

In QEMU's monitor, at the source:
  migrate_set_capability multifd on
  migrate_set_capability return-path on
  migrate tcp:10.0.0.2:4444

Anybody who reaches the address can send: listen where only friends are. Exit code 3: the store is whole, but the
source left before it was told so, and its guest may run on.")]
pub struct Args {
    /// Where to listen: HOST:PORT (port 0: any that is free) or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    /// The folder to write; it appears when it is whole and on the disk, not before
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace a store that is there
    #[arg(long)]
    force: bool,
    /// Multifd channels, as QEMU's parameter multifd-channels has it; 0 where its capability multifd is off
    #[arg(long, value_name = "N", default_value_t = 2)]
    channels: u8,
    /// Take pages that the source never spoke of for zeros, as after free page hinting by a balloon
    #[arg(long)]
    accept_missing: bool,
    /// CPUs for the receiving threads, such as 0,2 or 0-3; as far as they can be had [default: the scheduler chooses]
    #[arg(long, value_name = "LIST")]
    cpus: Option<Cpus>,
    /// Print one JSON object a line on standard output: where it listens, progress, then a report
    #[arg(long)]
    json: bool,
}

const COMMAND: &str = "qemu receive";

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let (report, ram) =
        take_in(args, out).unwrap_or_else(|error| (Report::early(COMMAND, End::Failed, Some(error)), None));
    end(out, &report, ram)
}

/// Gives the RAM, too, if any has come.
fn take_in(args: &Args, out: Output) -> Result<(Report, Option<Ram>), String> {
    let interrupt = Interrupt::listen();
    let writer = Writer::create(&args.out, args.force)?;
    warn_if_far(&args.listen, TRUSTED);
    let qemu = Qemu::new(args.channels).accept_missing(args.accept_missing);
    let mut machine = Machine {
        writer: Some(writer),
        ram: None,
        contents: None,
        seen: qemu.seen(),
        channels: args.channels,
        tail: Vec::new(),
        stored: None,
        out,
        full: no_room(&args.out),
    };
    let cpus = args.cpus.clone().unwrap_or_default().0;
    let target = Target::builder().framing(qemu).cpus(cpus);
    let target = target.listen(&args.listen.to_string()).map_err(|e| listen_advice(&e))?;
    interrupt.attach(target.cancel_handle());
    let at = target.address().ok_or("the address that is listened on is not known")?;
    out.event(&Listening::at(&at));
    out.say(format_args!("listening at {at}"));
    let watch = Watch::start(target.progress(), Side::Target, out);
    let report = target.receive(&mut machine);
    drop(watch);
    let source_told = report.source_told;
    let why = report.outcome.failure().map(|why| words::of_source(why, &machine.seen.facts(), args.channels));
    let mut report = Report::of_target(COMMAND, report, process_cpu_time().unwrap_or_default());
    report.note_cpus(args.cpus.as_ref());
    let counters = Counters::from(machine.seen.counts());
    // As QEMU counts: what came, with the first bytes of each connection, which say whose it is, and without the answers.
    report.wire_bytes = counters.main_bytes + counters.channel_bytes;
    report.counters = Some(counters);
    report.checked = Some(match args.accept_missing {
        false => "; every page has come, each round was whole, and digests of RAM are stored",
        true => "; each round was whole, and digests of RAM are stored; pages that never came are zeros",
    });
    if report.outcome == End::Failed {
        report.error = why.or(report.error);
    }
    let full = format!("the disk of {} may be full, make room", args.out.display());
    report.explain_missing_page("receiving pages", &full);
    if let Some(stored) = machine.stored {
        report.digest_ms = Some(ms(stored.digest));
        report.fsync_ms = Some(ms(stored.fsync));
        report.take_fsync_out();
        report.file = Some(format!("{}, {}", args.out.display(), human(stored.bytes)));
    }
    match (report.outcome, machine.seen.facts().return_path) {
        (End::Completed, true) => {
            report.source_told = Some(source_told);
            if !source_told {
                // It was cancelled there, or has died. If both ran, they would share their disks.
                report.outcome = End::Uncertain;
                report.error = Some(format!(
                    "the source left before it was told that all is stored: its guest may run on there; {} is whole, and \
                     holds the guest as it stood still",
                    args.out.display()
                ));
            }
        }
        (End::Completed, false) => {
            let what = "the source had no return path: it did not wait to be told that all is stored";
            report.remarks.push(what.to_owned());
        }
        _ => {}
    }
    Ok((report, machine.ram))
}

/// The store, in the place of a VMM.
struct Machine {
    /// Until it is finished, or given up.
    writer: Option<Writer>,
    ram: Option<Ram>,
    contents: Option<Arc<Contents>>,
    seen: Seen,
    channels: u8,
    tail: Vec<u8>,
    stored: Option<Stored>,
    out: Output,
    /// What is said if the disk has no room for a page.
    full: String,
}

impl Incoming for Machine {
    fn prepare(&mut self, _setup: &Setup) -> Result<Ram, HookError> {
        let writer = self.writer.as_mut().ok_or("there is no store")?;
        let blocks = self.seen.facts().blocks;
        // Memory that both sides share does not travel, and there is no telling which does: a store would lack it.
        if blocks.iter().any(|block| block.guest_address.is_some()) {
            return Err("the source has x-ignore-shared on, and leaves shared memory out; turn it off".into());
        }
        let add = |block: &pageferry::qemu::wire::Block| {
            writer.add_block(block.name.as_str(), block.guest_address, block.bytes)
        };
        let blocks = blocks.iter().map(add).collect::<Result<Vec<_>, _>>()?;
        writer.write_out_early();
        on_bus_error_fail(self.out, COMMAND, std::mem::take(&mut self.full), writer.paths());
        let ram = Ram::new(blocks)?;
        self.ram = Some(ram.clone());
        self.contents = Some(Arc::new(contents(&ram)?));
        Ok(ram)
    }

    fn contents(&mut self) -> Option<Arc<Contents>> {
        self.contents.clone()
    }

    fn load_state(&mut self, state: &mut dyn Read) -> Result<(), HookError> {
        self.tail.clear();
        state.read_to_end(&mut self.tail)?;
        Ok(())
    }

    /// The source can still be told if it does not get to the disk.
    fn run(&mut self) -> Result<(), HookError> {
        let prepared = (self.writer.take(), &self.ram, self.contents.take());
        let (Some(writer), Some(ram), Some(contents)) = prepared else { return Err("there is no store".into()) };
        self.stored = Some(writer.finish(ram, &contents, &self.tail, &facts(&self.seen, self.channels))?);
        Ok(())
    }

    fn discard(&mut self) {
        (self.writer, self.ram, self.contents) = (None, None, None);
    }
}

fn facts(seen: &Seen, channels: u8) -> Facts {
    let facts = seen.facts();
    let uuid = facts.uuid.and_then(Uuid::new);
    Facts {
        machine: facts.machine.map_or_else(String::new, |name| name.as_str().to_owned()),
        configuration: facts.configuration,
        dialect: match facts.dialect {
            Some(Dialect::V7_2) => "7.2",
            Some(Dialect::V10_0) | None => "10.0",
        },
        barrier: match facts.barrier {
            Some(Barrier::PerSection) => "per-section",
            Some(Barrier::PerRound) | None => "per-round",
        },
        section: facts.section,
        channels,
        uuid,
        compression: match facts.compression {
            Some(Compression::Zlib) => "zlib",
            Some(Compression::Zstd) => "zstd",
            Some(Compression::None) | None => "none",
        },
        counters: seen.counts().into(),
    }
}
