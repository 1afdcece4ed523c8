//! `pageferry qemu relay`: passes a migration on from one QEMU to another while it goes on.

use std::fmt;
use std::process::ExitCode;

use pageferry::net::Address;
use pageferry::qemu::relay::{Relay, RelayReport};
use pageferry::{CancelAnswer, Outcome};
use serde::Serialize;

use super::words::TRUSTED;
use crate::interrupt::Interrupt;
use crate::output::{Output, complain};
use crate::progress::{Side, Watch};
use crate::receive::{Listening, listen_advice};
use crate::report::End;
use crate::sizes::{human, human_rate, ms};
use crate::store::Counters;
use crate::tls::warn_if_far;

/// Pass a migration on from one QEMU to another, live: nothing is stored.
///
/// Every packet is looked at, and what is wrong never reaches the destination. The destination's answer goes back to the
/// source; without QEMU's capability return-path there is none, and QEMU takes what it has sent for received.
///
/// Ctrl-C cancels, and the source keeps its guest, until the state of the devices is on its way. From then on the
/// destination may have the guest: Ctrl-C gives it 10 s more to say so, and a second one none. Without an answer the exit
/// code is 3, for uncertain: the source takes its guest back, so make sure that the destination does not run it. The code is
/// the same where the source has left before it took the answer in: the destination has the guest then, so make sure that
/// the source does not run it.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry qemu relay --listen 0.0.0.0:4444 --to 10.0.1.2:4444
  pageferry qemu relay --listen unix:/run/ferry --to 10.0.1.2:4444 --channels 8 --json

Start the destination with -incoming first; multifd and multifd-channels are the same at both ends.
Without --channels it takes the channels that there are half a second after the source has begun. Nothing reaches the
destination before the source is all there, and whoever comes later is turned away.")]
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
    /// Print one JSON object a line on standard output: where it listens, progress, then a report
    #[arg(long)]
    json: bool,
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
    let handle = relay.stop_handle();
    interrupt.attach_to(move || {
        if handle.stop() == CancelAnswer::TooLate {
            complain("too late to cancel: the destination may have the guest, and has a little time to say so");
        }
    });
    let at = relay.address().ok_or("the address that is listened on is not known")?;
    out.event(&Listening::at(&at));
    out.say(format_args!("listening at {at}, for {}", args.to));
    let watch = Watch::start(relay.progress(), Side::Relay, out);
    let report = relay.run();
    drop(watch);
    Ok(report)
}

fn end(report: RelayReport, out: Output) -> ExitCode {
    let (outcome, error) = match &report.outcome {
        Outcome::Completed => (End::Completed, None),
        Outcome::Cancelled => (End::Cancelled, Some("cancelled".to_owned())),
        Outcome::Failed(why) => (End::Failed, Some(why.to_string())),
        Outcome::Uncertain(why) => (
            End::Uncertain,
            Some(format!(
                "uncertain: the destination may have the guest, and the source may run it on: {why}; look there before you \
                 let either run"
            )),
        ),
    };
    if let Some(error) = &error {
        complain(error);
    }
    let c = report.counters;
    let words = Words { report: &report, completed: outcome == End::Completed };
    if report.channels > 0 || c.main_bytes > 0 {
        out.say(words.to_string().trim_end());
    } else {
        // Who was turned away may be who was waited for.
        report.remarks.iter().for_each(complain);
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
            rounds: c.barriers,
        },
        channels: report.channels,
        turned_away: report.turned_away,
        total_ms: ms(report.total),
        remarks: report.remarks,
    });
    outcome.exit_code()
}

/// The report for people.
struct Words<'a> {
    report: &'a RelayReport,
    completed: bool,
}

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RelayReport { counters: c, channels, turned_away, total, remarks, .. } = self.report;
        if self.completed {
            writeln!(f, "completed: the destination has taken everything")?;
        }
        let bytes = c.main_bytes + c.channel_bytes;
        let (main, rest, time) = (human(c.main_bytes), human(c.channel_bytes), total.as_secs_f64());
        write!(f, "  passed on   {}", human(bytes))?;
        if time > 0.0 {
            write!(f, " in {:.0} ms, {}", ms(*total), human_rate((bytes as f64 / time) as u64))?;
        }
        writeln!(f, ": {main} on the main connection, {rest} on {channels} {}", plural("channel", *channels as u64))?;
        writeln!(f, "  pages       {} with data, {} of zeros", c.normal_pages, c.zero_pages)?;
        writeln!(f, "  barriers    {}, with {} {}", c.barriers, c.sync_packets, plural("SYNC", c.sync_packets))?;
        if *turned_away > 0 {
            writeln!(f, "  turned away {turned_away} {}", plural("connection", *turned_away))?;
        }
        remarks.iter().try_for_each(|remark| writeln!(f, "  remark      {remark}"))
    }
}

fn plural(word: &str, count: u64) -> String {
    format!("{word}{}", if count == 1 { "" } else { "s" })
}
