//! `pageferry settle`: asks the other side how an uncertain migration ended.

use std::process::ExitCode;
use std::time::Duration;

use pageferry::net::{Address, Endpoint};
use pageferry::settle::{Settled, settle, settle_over_tls};
use pageferry::units::SessionId;
use pageferry::{Failure, Timeouts};
use serde::Serialize;

use crate::output::{Output, complain};
use crate::tls::TlsToArgs;

/// Ask the receiving side how an uncertain migration ended.
///
/// It is a fence: a receiver that has not taken over by then never will, even if the sender's last word still reaches it.
/// Ask as often as you like, but not about a migration that is still going on.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pageferry settle --to 10.0.0.2:4444 --session 5e1c0b7d94f24a6683d0c1b2a3948576

Exit codes: 0 the guest runs there (destroy the copy at the sender); 4 it does not, and never will
(the sender may resume it); 2 wrong usage; 3 no answer, as uncertain as before: ask again, or make
sure by other means that it does not run there, before the sender resumes it.")]
pub struct Args {
    /// Where the receiving side listened: HOST:PORT or unix:PATH; if given several times, the first that can be reached
    #[arg(long, value_name = "ADDR", required = true)]
    to: Vec<Address>,
    /// The session, from the sender's report
    #[arg(long, value_name = "HEX", value_parser = parse_session)]
    session: SessionId,
    /// Seconds to wait for the answer, once connected: a receiver that is busy taking over answers after it
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    timeout: u32,
    #[command(flatten)]
    tls: TlsToArgs,
    /// Print one JSON object on standard output
    #[arg(long)]
    json: bool,
}

fn parse_session(text: &str) -> Result<SessionId, String> {
    SessionId::from_hex(text).ok_or_else(|| "a session is 32 hexadecimal digits".to_owned())
}

/// The answer, as JSON.
#[derive(Serialize)]
struct Answer {
    event: &'static str,
    session: String,
    to: Vec<String>,
    /// `runs-there`, `never-will-run-there` or `unknown`.
    settled: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

pub fn run(args: &Args) -> ExitCode {
    let out = Output::new(args.json);
    let timeouts = Timeouts { hook: Duration::from_secs(args.timeout.into()), ..Timeouts::default() };
    let target = Endpoint::Addresses(args.to.clone());
    let settled = match args.tls.load().map_err(Failure::Config) {
        Ok(Some(tls)) => settle_over_tls(target, args.session, &timeouts, &tls),
        Ok(None) => settle(target, args.session, &timeouts),
        Err(why) => Err(why),
    };
    let word = match settled {
        Ok(Settled::RunsThere) => "runs-there",
        Ok(Settled::NeverWillRunThere) => "never-will-run-there",
        Err(_) => "unknown",
    };
    out.event(&Answer {
        event: "settled",
        session: args.session.to_string(),
        to: args.to.iter().map(Address::to_string).collect(),
        settled: word,
        error: settled.as_ref().err().map(Failure::to_string),
    });
    ExitCode::from(match settled {
        Ok(Settled::RunsThere) => {
            out.say("the guest runs there: destroy the copy at the sender, which must never run again");
            0
        }
        Ok(Settled::NeverWillRunThere) => {
            out.say("the guest does not run there, and never will: the sender may resume it");
            4
        }
        Err(why) => {
            complain(format_args!("as uncertain as before: {why}"));
            3
        }
    })
}
