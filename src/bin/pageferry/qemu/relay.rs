//! `pageferry qemu relay`: passes a migration from one QEMU on to another while it goes on.

use std::process::ExitCode;

use pageferry::net::Address;
use pageferry::qemu::{Relay, RelayReport};
use pageferry::sys::thread::process_cpu_time;

use super::receive::counters_of;
use crate::interrupt::Interrupt;
use crate::output::Output;
use crate::receive::{Listening, listen_advice};
use crate::report::{End, Report, error_of};
use crate::sizes::ms;
use crate::tls::warn_if_open;

/// Pass a migration from one QEMU on to another, while the guest still runs at the source.
///
/// Each packet is checked before it goes on, and nothing is kept: rounds flow through as they come. The destination's
/// answer goes back to the source, where that has a return path.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry qemu relay --listen 192.168.1.1:4444 --to 10.0.0.2:4444
  pageferry qemu relay --listen 0.0.0.0:4444 --to unix:/run/vm.incoming --channels 4

The destination is a QEMU that was started with -incoming, and has as many multifd channels as the source.
Anybody who reaches the address can send: listen where only friends are.")]
pub struct Args {
    /// Where to listen: HOST:PORT (port 0: any that is free) or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    /// The QEMU to pass it on to: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    to: Address,
    /// Multifd channels that the destination has: others are turned away [default: as many as the source has]
    #[arg(long, value_name = "N")]
    channels: Option<u8>,
    /// Print one JSON object a line on standard output: where it listens, then a report
    #[arg(long)]
    json: bool,
}

const COMMAND: &str = "qemu relay";

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let report = pass_on(args, out).unwrap_or_else(|error| Report::early(COMMAND, End::Failed, Some(error)));
    out.end(&report)
}

fn pass_on(args: &Args, out: Output) -> Result<Report, String> {
    let interrupt = Interrupt::listen();
    warn_if_open(&args.listen, None);
    let relay = Relay::new(&args.listen.to_string(), &args.to.to_string(), args.channels);
    let relay = relay.map_err(|e| listen_advice(&e))?;
    interrupt.attach(relay.cancel_handle());
    let at = relay.address().ok_or("the address that is listened on is not known")?;
    out.event(&Listening::at(&at));
    out.say(format_args!("listening at {at}"));
    let RelayReport { outcome, counts, channels, total, turned_away, mut remarks } = relay.run();
    let mut report = Report::early(COMMAND, End::of(&outcome), error_of(&outcome));
    report.channels = channels;
    report.total_ms = ms(total);
    report.cpu_s = process_cpu_time().unwrap_or_default().as_secs_f64();
    report.wire_bytes = counts.main_bytes + counts.channel_bytes;
    report.payload_bytes = counts.normal_pages * pageferry::qemu::wire::PAGE_BYTES;
    report.zero_bytes = counts.zero_pages * pageferry::qemu::wire::PAGE_BYTES;
    report.counters = Some(counters_of(&counts));
    if turned_away > 0 {
        remarks.push(format!("{turned_away} connections were turned away"));
    }
    report.remarks = remarks;
    Ok(report)
}
