//! `pageferry qemu send`: gives a stored machine to a QEMU destination.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use pageferry::digest::Contents;
use pageferry::dirty::combined::Still;
use pageferry::net::Address;
use pageferry::qemu::Qemu;
use pageferry::qemu::wire::{Barrier, Compression, Dialect};
use pageferry::sys::thread::process_cpu_time;
use pageferry::{Guest, HookError, Ram, Source, StateWriter, Timeouts, Verify};

use super::{end, words};
use crate::image::cut_short;
use crate::interrupt::Interrupt;
use crate::output::{Output, on_bus_error_fail};
use crate::progress::{Side, Watch};
use crate::report::{End, Report};
use crate::store::{Manifest, Reader, Uuid, contents};

/// Give a machine that `pageferry qemu receive` has stored to a QEMU that waits for it.
///
/// The destination must have the same machine type, devices and RAM blocks as the QEMU that the machine came from, be
/// started with `-incoming defer`, and have its capability `multifd` and its parameters `multifd-channels` and
/// `multifd-compression` set to what is given here. The store stays as it is, and can be sent again.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry qemu send --to 10.0.0.2:4444 --in vm.store
  pageferry qemu send --to unix:/run/qemu.sock --in vm.store --channels 4 --compress zstd --json
  pageferry qemu send --to 10.0.0.2:4444 --in vm.store --channels 0       without multifd

At the destination, before that (QMP):
  migrate-set-capabilities multifd=on; migrate-set-parameters multifd-channels=2
  migrate-incoming tcp:0.0.0.0:4444

QEMU's stream is not encrypted, and anybody who reaches the port can break the migration: use a network that you trust.")]
pub struct Args {
    /// Where the destination waits: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    to: Address,
    /// The store
    #[arg(long = "in", value_name = "DIR")]
    store: PathBuf,
    /// Multifd channels, as the destination's parameter multifd-channels has it; 0 where its capability multifd is off
    #[arg(long, value_name = "N", default_value_t = 2)]
    channels: u8,
    /// How pages are compressed, as the destination's parameter multifd-compression has it
    #[arg(long, value_name = "HOW", default_value = "none")]
    compress: CompressArg,
    /// Whether the destination is asked whether it has taken the machine; if not, nobody knows whether it has
    #[arg(long, value_name = "HOW", default_value = "on")]
    return_path: Switch,
    /// Which QEMU the destination is
    #[arg(long, value_name = "VERSION", default_value = "auto")]
    dialect: DialectArg,
    /// The destination's -uuid, where it is not that of the source [default: the source's, which a store does not know if
    /// it came without channels and without the capability validate-uuid]
    #[arg(long, value_name = "UUID", value_parser = parse_uuid)]
    uuid: Option<[u8; 16]>,
    /// Print one JSON object a line on standard output: progress, then a report
    #[arg(long)]
    json: bool,
}

/// [`Compression`], as an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum CompressArg {
    /// Not at all
    None,
    /// By zlib
    Zlib,
    /// By zstd
    Zstd,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Switch {
    /// Yes
    On,
    /// No
    Off,
}

/// [`Dialect`], as an option.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum DialectArg {
    /// The same as the one that the machine came from
    Auto,
    /// 10.0, and later ones that speak as it does
    #[value(name = "10.0")]
    V10_0,
    /// 7.2, and later ones up to 9.1, which take its packets
    #[value(name = "7.2")]
    V7_2,
}

const COMMAND: &str = "qemu send";

/// How long the destination may take to load the devices, during which it says nothing. QEMU itself waits for ever.
const LOAD_TIME: Duration = Duration::from_secs(15 * 60);

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let (report, ram) =
        ship(args, out).unwrap_or_else(|error| (Report::early(COMMAND, End::Failed, Some(error)), None));
    end(out, &report, ram)
}

/// Gives the store's RAM, too, once it is mapped.
fn ship(args: &Args, out: Output) -> Result<(Report, Option<Ram>), String> {
    let interrupt = Interrupt::listen();
    if args.channels == 0 && args.compress != CompressArg::None {
        return Err("only channels are compressed: --compress needs --channels 1 or more".to_owned());
    }
    let store = Reader::open(&args.store)?;
    let (dialect, barrier) = spoken(args.dialect, store.manifest())?;
    let tail = store.tail()?;
    let ram = store.ram()?;
    on_bus_error_fail(out, COMMAND, cut_short(&args.store), Vec::new());
    let mut qemu = Qemu::new(args.channels)
        .dialect(dialect, barrier)
        .section(store.manifest().section)
        .return_path(args.return_path == Switch::On)
        .compression(match args.compress {
            CompressArg::None => Compression::None,
            CompressArg::Zlib => Compression::Zlib,
            CompressArg::Zstd => Compression::Zstd,
        });
    if let Some(uuid) = args.uuid.or(store.manifest().uuid.map(Uuid::bytes)) {
        qemu = qemu.uuid(uuid);
    }
    let seen = qemu.seen();
    let contents = Arc::new(contents(&ram)?);
    let source = Source::builder(ram.clone())
        .verify(Verify::Off)
        .contents(contents.clone())
        .timeouts(Timeouts { hook: LOAD_TIME, ..Timeouts::default() })
        .framing(qemu)
        .connect(&args.to.to_string())
        .map_err(|e| e.to_string())?;
    interrupt.attach(source.cancel_handle());
    let watch = Watch::start(source.progress(), Side::Source, out);
    let mut machine = Stored { store: &store, ram: &ram, tail: &tail, contents: &contents, damage: None };
    let report = source.migrate(&mut Still::new(), &mut machine);
    drop(watch);
    let why = report.outcome.failure().map(words::of_destination);
    let still = machine.damage.map_or_else(|| store.check_still(), Err);
    let mut report = Report::of_source(COMMAND, report, process_cpu_time().unwrap_or_default());
    if report.outcome == End::Failed {
        report.error = why.or(report.error);
    }
    report.checked = Some(match args.return_path {
        Switch::On => "; RAM is what was stored, by its digests, and the destination has taken the machine",
        Switch::Off => {
            "; RAM is what was stored, by its digests; the destination was not asked whether it took the machine"
        }
    });
    match (report.outcome, still) {
        // In its own words, without the hook's.
        (End::Failed, Err(error)) => report.error = Some(error),
        // What was queued when the destination could still do without was read after that.
        (End::Completed, Err(error)) => {
            report.outcome = End::Failed;
            report.error = Some(format!("{error}: the destination runs the machine, with some of what was written"));
        }
        _ => {}
    }
    report.explain_missing_page("sending pages", &cut_short(&args.store));
    let sent = seen.counts();
    report.counters = Some(sent.into());
    // As QEMU counts: what was sent, with the first bytes of each connection, and without the answers.
    report.wire_bytes = sent.main_bytes + sent.channel_bytes;
    Ok((report, Some(ram)))
}

/// What the destination's program speaks, and where its machine has the barrier.
fn spoken(asked: DialectArg, manifest: &Manifest) -> Result<(Dialect, Barrier), String> {
    let stored = match manifest.dialect.as_str() {
        "10.0" => Dialect::V10_0,
        "7.2" => Dialect::V7_2,
        other => return Err(format!("{other:?} is no dialect that is spoken here")),
    };
    let dialect = match asked {
        DialectArg::Auto => stored,
        DialectArg::V10_0 => Dialect::V10_0,
        DialectArg::V7_2 => Dialect::V7_2,
    };
    // A source without channels has shown no barrier, and that of another program may be elsewhere. Then the machine type
    // says where it is. A distribution's own type, such as pc-q35-rhel9.2.0, keeps it where it was; one without any
    // version, such as microvm, has it where its program has it.
    let has_shown = manifest.channels > 0 && dialect == stored;
    let is_per_round = match version(&manifest.machine) {
        _ if has_shown => manifest.barrier == "per-round",
        Some(version) => version > (8, 0),
        None if manifest.channels > 0 && manifest.machine.contains('-') => manifest.barrier == "per-round",
        None => dialect == Dialect::V10_0,
    };
    Ok((dialect, if is_per_round { Barrier::PerRound } else { Barrier::PerSection }))
}

/// The version of a machine type: `pc-q35-8.0` has 8.0.
fn version(machine: &str) -> Option<(u32, u32)> {
    let (major, minor) = machine.rsplit('-').next()?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Zeros are a destination's that has none.
fn parse_uuid(text: &str) -> Result<[u8; 16], String> {
    let is_none = text.bytes().all(|b| matches!(b, b'0' | b'-')) && text.bytes().filter(|b| *b == b'0').count() == 32;
    if is_none { Ok([0; 16]) } else { text.parse().map(Uuid::bytes) }
}

/// The stored machine, in the place of a guest: it never runs here.
struct Stored<'s> {
    store: &'s Reader,
    ram: &'s Ram,
    tail: &'s [u8],
    contents: &'s Contents,
    /// What is wrong with the store, if something is.
    damage: Option<String>,
}

impl Guest for Stored<'_> {
    fn setup_bytes(&mut self) -> Result<Vec<u8>, HookError> {
        Ok(self.store.manifest().configuration.clone())
    }

    fn pause(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), HookError> {
        Ok(())
    }

    fn save_state(&mut self, out: &mut StateWriter) -> Result<(), HookError> {
        Ok(out.write_all(self.tail)?)
    }

    /// Nobody compares anything on the way or at the destination: what is damaged would run there.
    fn sent(&mut self) -> Result<(), HookError> {
        self.store.check(self.ram, self.contents).map_err(|damage| {
            self.damage = Some(damage.clone());
            damage.into()
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::store::Counters;

    #[test]
    fn a_machine_type_ends_with_its_version() {
        assert_eq!(version("pc-q35-8.0"), Some((8, 0)));
        assert_eq!(version("pc-i440fx-10.0"), Some((10, 0)));
        assert_eq!(version("microvm"), None);
    }

    #[test]
    fn the_barrier_is_where_the_stream_has_shown_it_and_else_where_the_machine_type_has_it() {
        let manifest = |machine: &str, channels: u8, dialect: &str, barrier: &str| -> Manifest {
            let file = json!({"file": "f", "bytes": 4096, "digest": "0123456789abcdef"});
            serde_json::from_value(json!({
                "format": "", "version": 1, "pageferry": "", "written_unix_s": 0, "machine": machine, "configuration": "",
                "dialect": dialect, "barrier": barrier, "section": 1, "channels": channels, "compression": "none",
                "digests": "", "blocks": [], "tail": file, "counters": Counters::default(),
            }))
            .unwrap()
        };
        let (auto, old, new) = (DialectArg::Auto, DialectArg::V7_2, DialectArg::V10_0);
        for (asked, machine, channels, dialect, barrier, expected) in [
            (auto, "pc-q35-10.0", 2, "10.0", "per-round", (Dialect::V10_0, Barrier::PerRound)),
            (auto, "pc-q35-8.0", 2, "10.0", "per-section", (Dialect::V10_0, Barrier::PerSection)),
            (auto, "pc-q35-7.2", 2, "7.2", "per-section", (Dialect::V7_2, Barrier::PerSection)),
            // QEMU 8.1 to 9.1.
            (auto, "pc-q35-8.2", 2, "7.2", "per-round", (Dialect::V7_2, Barrier::PerRound)),
            (auto, "pc-q35-8.2", 0, "7.2", "per-section", (Dialect::V7_2, Barrier::PerRound)),
            (old, "pc-q35-8.2", 2, "10.0", "per-round", (Dialect::V7_2, Barrier::PerRound)),
            // What has no version has the barrier where its program has it.
            (auto, "microvm", 0, "10.0", "per-section", (Dialect::V10_0, Barrier::PerRound)),
            (auto, "microvm", 0, "7.2", "per-section", (Dialect::V7_2, Barrier::PerSection)),
            (new, "microvm", 2, "7.2", "per-section", (Dialect::V10_0, Barrier::PerRound)),
            (old, "microvm", 2, "10.0", "per-round", (Dialect::V7_2, Barrier::PerSection)),
            (new, "pc-q35-rhel9.2.0", 2, "7.2", "per-section", (Dialect::V10_0, Barrier::PerSection)),
            (old, "pc-q35-rhel9.6.0", 2, "10.0", "per-round", (Dialect::V7_2, Barrier::PerRound)),
            // Moved between programs, a machine keeps its type.
            (new, "pc-q35-7.2", 2, "7.2", "per-section", (Dialect::V10_0, Barrier::PerSection)),
            (new, "pc-q35-8.1", 0, "7.2", "per-section", (Dialect::V10_0, Barrier::PerRound)),
            // As somebody has set it there.
            (auto, "pc-q35-10.0", 2, "10.0", "per-section", (Dialect::V10_0, Barrier::PerSection)),
        ] {
            let store = manifest(machine, channels, dialect, barrier);
            assert_eq!(
                spoken(asked, &store),
                Ok(expected),
                "{asked:?}, {machine}, {channels} channels, {dialect}, {barrier}"
            );
        }
    }

    #[test]
    fn a_uuid_has_32_digits() {
        assert_eq!(
            parse_uuid("00112233-4455-6677-8899-aabbccddeeff").map(|uuid| uuid[..3].to_vec()),
            Ok(vec![0, 0x11, 0x22])
        );
        assert_eq!(parse_uuid("00000000-0000-0000-0000-000000000000"), Ok([0; 16]), "none");
        assert!(parse_uuid("0011").is_err() && parse_uuid("+0112233-4455-6677-8899-aabbccddeeff").is_err());
    }
}
