//! `pageferry qemu receive`: takes one migration from QEMU, and stores it.

use std::path::PathBuf;
use std::process::ExitCode;

use pageferry::net::Address;

use crate::output::Output;
use crate::report::{End, Report};

/// Take one migration from QEMU and store it: its RAM, and the state of its devices.
#[derive(clap::Args)]
pub struct Args {
    /// Where to listen: HOST:PORT (port 0: any that is free) or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: Address,
    /// The folder to write; it appears when it is whole and on the disk, not before
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Multifd channels, as QEMU's parameter multifd-channels has it; 0 where its capability multifd is off
    #[arg(long, value_name = "N", default_value_t = 2)]
    channels: u8,
    /// Print one JSON object a line on standard output: where it listens, progress, then a report
    #[arg(long)]
    json: bool,
}

const COMMAND: &str = "qemu receive";

pub fn run(args: &Args) -> ExitCode {
    let what = format!("{} over {} channels to {}", args.listen, args.channels, args.out.display());
    Output::new(args.json).end(&Report::early(COMMAND, End::Failed, Some(what)))
}
