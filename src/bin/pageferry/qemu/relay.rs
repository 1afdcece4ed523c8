//! `pageferry qemu relay`: passes a migration on from one QEMU to another while it goes on.

use std::process::ExitCode;

use pageferry::Outcome;
use pageferry::net::Address;
use pageferry::qemu::relay::{Relay, RelayReport};
use serde::Serialize;

use super::words::TRUSTED;
use crate::interrupt::Interrupt;
use crate::output::{Output, complain};
use crate::receive::{Listening, listen_advice};
use crate::report::End;
use crate::sizes::{human, ms};
use crate::tls::warn_if_far;

/// Pass a migration on from one QEMU to another, live: nothing is stored.
///
/// Every packet is looked at, and what is wrong never reaches the destination. The destination's answer goes back to the
/// source; without QEMU's capability return-path there is none, and QEMU takes what it has sent for received.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry qemu relay --listen 0.0.0.0:4444 --to 10.0.1.2:4444
  pageferry qemu relay --listen unix:/run/ferry --to 10.0.1.2:4444 --channels 8 --json

Start the destination with -incoming first; multifd and multifd-channels are the same at both ends.
Give --channels where strangers reach the address: QEMU 10.0 dies of one channel too many.")]
pub struct Args {
    /// Where to listen: HOST:PORT (port 0: any that is free) or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    /// Where the destination listens: HOST:PORT or unix:PATH
    #[arg(long, value_name = "ADDR")]
    to: Address,
    /// Multifd channels, as QEMU's parameter multifd-channels has it; 0 where its capability multifd is off [default: any]
    #[arg(long, value_name = "N")]
    channels: Option<u8>,
    /// Print one JSON object a line on standard output: where it listens, then a report
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Counters {
    main_bytes: u64,
    channel_bytes: u64,
    normal_pages: u64,
    zero_pages: u64,
    sync_packets: u64,
}

/// The last line of JSON.
#[derive(Serialize)]
struct Line {
    event: &'static str,
    command: &'static str,
    outcome: End,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    counters: Counters,
    channels: usize,
    turned_away: u64,
    total_ms: f64,
    remarks: Vec<String>,
}

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    match pass_on(args, out) {
        Ok(report) => end(report, out),
        Err(error) => out.end(&crate::report::Report::early("qemu relay", End::Failed, Some(error))),
    }
}

fn pass_on(args: &Args, out: Output) -> Result<RelayReport, String> {
    let interrupt = Interrupt::listen();
    warn_if_far(&args.listen, TRUSTED);
    let builder = args.channels.map_or_else(Relay::builder, |channels| Relay::builder().channels(channels));
    let listening = builder.listen(&args.listen.to_string()).map_err(|e| listen_advice(&e))?;
    let relay = listening.to(&args.to.to_string()).map_err(|e| e.to_string())?;
    interrupt.attach(relay.cancel_handle());
    let at = relay.address().ok_or("the address that is listened on is not known")?;
    out.event(&Listening::at(&at));
    out.say(format_args!("listening at {at}, for {}", args.to));
    Ok(relay.run())
}

fn end(report: RelayReport, out: Output) -> ExitCode {
    let outcome = match &report.outcome {
        Outcome::Completed => End::Completed,
        Outcome::Cancelled => End::Cancelled,
        Outcome::Failed(_) => End::Failed,
        Outcome::Uncertain(_) => End::Uncertain,
    };
    let error = (outcome != End::Completed).then(|| report.outcome.to_string());
    if let Some(error) = &error {
        complain(error);
    }
    let c = report.counters;
    if outcome == End::Completed {
        out.say(format_args!(
            "completed: {} on the main connection, {} on {} channels; {} pages with data, {} of zeros; {:.0} ms",
            human(c.main_bytes),
            human(c.channel_bytes),
            report.channels,
            c.normal_pages,
            c.zero_pages,
            ms(report.total)
        ));
    }
    out.event(&Line {
        event: "report",
        command: "qemu relay",
        outcome,
        error,
        counters: Counters {
            main_bytes: c.main_bytes,
            channel_bytes: c.channel_bytes,
            normal_pages: c.normal_pages,
            zero_pages: c.zero_pages,
            sync_packets: c.sync_packets,
        },
        channels: report.channels,
        turned_away: report.turned_away,
        total_ms: ms(report.total),
        remarks: report.remarks,
    });
    outcome.exit_code()
}
